//! How a request gets through to an origin, over the connections of its lane.
//!
//! A request that a connection gave back unsent, or that the service says it has not looked at (GOAWAY,
//! REFUSED_STREAM), is sent again on another connection: over HTTP/2 that loses nothing and doubles nothing.
//! Over HTTP/1.1 there is one case that nobody can tell apart, a connection that ends just as a request is
//! written to it; it is sent again too. Any other failure may have come after the service took the message;
//! it is reported, and the caller decides.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, Version};
use http_body_util::Full;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{ConnectError, Connector};
use crate::lane::{Lane, SendError};
use crate::target::Origin;

pub(crate) type Body = Full<Bytes>;

/// How often a request that was certainly not looked at is sent again, within its time.
const RESENDS: u32 = 20;
/// So many of these at once; then there are pauses, which double from the first to the last.
const AT_ONCE: u32 = 3;
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// How many origins are known at once.
const MAX_ORIGINS: usize = 1024;

/// How many connections, and how much on each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// HTTP/2 connections to one origin.
    pub(crate) connections: usize,
    /// Requests at once on one HTTP/2 connection; the service may allow fewer.
    pub(crate) streams: usize,
    /// HTTP/1.1 connections to one origin.
    pub(crate) http1_connections: usize,
    /// From asking for a turn to the end of the answer.
    pub(crate) timeout: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(transparent)]
    Connect(#[from] Arc<ConnectError>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the connection failed: {0}")]
    Broken(String),
    #[error("the service gave the request back {0} times")]
    Refused(u32),
    #[error("too many different push services at once")]
    TooManyOrigins,
}

/// An answer, and as much of its body as was read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// The lanes to all origins.
#[derive(Debug)]
pub(crate) struct Client {
    connector: Connector,
    limits: Limits,
    lanes: Mutex<HashMap<Origin, Arc<Lane>>>,
    drivers: Drivers,
}

impl Client {
    pub(crate) fn new(connector: Connector, limits: Limits) -> Self {
        Self { connector, limits, lanes: Mutex::default(), drivers: Drivers::default() }
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Sends what `make` makes, as often as it takes to have it looked at once. A `bulk` request leaves some
    /// of the lane to others.
    pub(crate) async fn send(
        &self,
        origin: &Origin,
        bulk: bool,
        make: impl Fn(Version) -> Request<Body> + Send + Sync,
    ) -> Result<Answer, ClientError> {
        let lane = self.lane(origin)?;
        let limit = self.limits.timeout;
        let answer = tokio::time::timeout(limit, self.send_on(&lane, bulk, make)).await;
        answer.map_err(|_| ClientError::Timeout(limit))?
    }

    /// Ends every connection.
    pub(crate) async fn close(&self) {
        lock(&self.lanes).clear();
        self.drivers.end().await;
    }

    fn lane(&self, origin: &Origin) -> Result<Arc<Lane>, ClientError> {
        let mut lanes = lock(&self.lanes);
        if let Some(lane) = lanes.get(origin) {
            return Ok(Arc::clone(lane));
        }
        if lanes.len() >= MAX_ORIGINS {
            // One that nobody is using now can be made again.
            lanes.retain(|_, lane| Arc::strong_count(lane) > 1);
            if lanes.len() >= MAX_ORIGINS {
                return Err(ClientError::TooManyOrigins);
            }
        }
        let lane = Arc::new(Lane::new(origin.clone(), self.limits));
        lanes.insert(origin.clone(), Arc::clone(&lane));
        Ok(lane)
    }

    async fn send_on(
        &self,
        lane: &Lane,
        bulk: bool,
        make: impl Fn(Version) -> Request<Body> + Send + Sync,
    ) -> Result<Answer, ClientError> {
        let _turn = lane.turn(bulk).await;
        for resends in 0..=RESENDS {
            if resends > AT_ONCE {
                let (first, last) = PAUSES;
                tokio::time::sleep((first * 2_u32.pow(resends - AT_ONCE - 1)).min(last)).await;
            }
            let checkout = lane.checkout(bulk, &self.connector, &self.drivers).await?;
            let request = make(checkout.version());
            match checkout.send(request).await {
                Ok(answer) => return Ok(answer),
                Err(SendError::NotLookedAt) => {}
                Err(SendError::Unknown(why)) => return Err(ClientError::Broken(why)),
            }
        }
        Err(ClientError::Refused(RESENDS + 1))
    }
}

/// The tasks that move the bytes of connections. They end with the client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drivers {
    running: TaskTracker,
    stop: CancellationToken,
}

impl Drivers {
    async fn end(&self) {
        self.stop.cancel();
        self.running.close();
        self.running.wait().await;
    }
}

impl<F> hyper::rt::Executor<F> for Drivers
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.running.spawn(self.stop.clone().run_until_cancelled_owned(future));
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
