//! Types that the connections of both HTTP versions share: limits, tasks, answers and errors.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{ConnectError, Connector};

/// Limit on the bytes that are read of an answer's body, and on the time: error texts are shorter, and nothing else
/// is of interest.
pub(crate) const MAX_ANSWER: usize = 4096;
pub(crate) const BODY: Duration = Duration::from_secs(1);
/// A connection that was idle for this long is closed: NATs and load balancers forget idle connections.
pub(crate) const IDLE: Duration = Duration::from_secs(60);

/// Limits of a connection pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PoolLimits {
    /// HTTP/2 connections to one service.
    pub(crate) connections: usize,
    /// Requests at once on one HTTP/2 connection; the service may allow fewer.
    pub(crate) streams: usize,
    /// HTTP/1.1 connections to one service.
    pub(crate) http1_connections: usize,
    /// Shortest time between two new connections to one service.
    pub(crate) connect_every: Duration,
    /// Longest time from the permit to the end of the answer. The wait for the permit may take as long again.
    pub(crate) timeout: Duration,
}

/// Reason why there is no answer.
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
    #[error("the sender is closed")]
    Closed,
}

/// Reason why a connection has no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// The service has certainly not processed the request.
    NotLookedAt,
    /// The service may have processed the request.
    Unknown(String),
}

/// An answer and the part of its body that was read.
#[derive(Debug)]
pub(crate) struct PushResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// State that all pools of a runtime share.
#[derive(Debug)]
pub(crate) struct PoolContext {
    pub(crate) connector: Arc<Connector>,
    pub(crate) limits: PoolLimits,
    pub(crate) drivers: Drivers,
    pub(crate) rooms: Rooms,
}

impl PoolContext {
    /// Takes the right to open one more connection.
    pub(crate) fn room(&self, is_listed: bool) -> Result<Room, ConnectError> {
        let take =
            |from: &Arc<Semaphore>| Arc::clone(from).try_acquire_owned().map_err(|_| ConnectError::TooMany);
        let unlisted = if is_listed { None } else { Some(take(&self.rooms.unlisted)?) };
        Ok(Room { _all: take(&self.rooms.all)?, _unlisted: unlisted })
    }
}

/// Maximum number of connections in the process. Services that the settings do not list may have half of them.
#[derive(Clone, Debug)]
pub(crate) struct Rooms {
    all: Arc<Semaphore>,
    unlisted: Arc<Semaphore>,
}

impl Rooms {
    pub(crate) fn new(count: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(count)), unlisted: Arc::new(Semaphore::new(count.div_ceil(2))) }
    }
}

/// The right to one open connection, in the whole process.
#[derive(Debug)]
pub(crate) struct Room {
    _all: OwnedSemaphorePermit,
    _unlisted: Option<OwnedSemaphorePermit>,
}

/// The tasks that move the bytes of connections. They end with the client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drivers {
    running: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl Drivers {
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.running.spawn(self.stop.clone().run_until_cancelled_owned(task));
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    pub(crate) async fn end(&self) {
        self.running.close();
        self.running.wait().await;
    }
}
