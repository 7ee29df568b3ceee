//! The connections to one origin, and how a request gets through on them.
//!
//! Connections are opened when the ones there are have no room, one at a time, up to a limit. A request that
//! a connection gave back unsent, or that the service says it has not looked at (GOAWAY, REFUSED_STREAM), is
//! sent again on another connection: that loses nothing and doubles nothing. Any other failure may have come
//! after the service took the message; it is reported, and the caller decides.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Mutex as AsyncMutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::connect::{ConnectError, Connected, Connector};
use crate::target::Origin;

type Body = Full<Bytes>;

/// How often a request that was certainly not looked at is sent again.
const RESENDS: usize = 5;
/// How much of an answer's body is read: error texts are shorter, and nothing else is of interest.
const MAX_ANSWER: usize = 4096;
/// A connection that carries requests and is silent for this long is asked whether it lives.
const PING: Duration = Duration::from_secs(20);
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
    #[error("the service refused the request {RESENDS} times")]
    Refused,
    #[error("too many different push services at once")]
    TooManyOrigins,
}

/// An answer, read to its end or to [`MAX_ANSWER`].
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// The connections to all origins.
#[derive(Debug)]
pub(crate) struct Client {
    connector: Connector,
    limits: Limits,
    origins: Mutex<HashMap<Origin, Arc<Lane>>>,
    drivers: Drivers,
}

impl Client {
    pub(crate) fn new(connector: Connector, limits: Limits) -> Self {
        Self { connector, limits, origins: Mutex::default(), drivers: Drivers::default() }
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    /// Sends what `make` makes, as often as it takes to have it looked at once.
    pub(crate) async fn send(
        &self,
        origin: &Origin,
        make: impl Fn(Version) -> Request<Body> + Send + Sync,
    ) -> Result<Answer, ClientError> {
        let lane = self.lane(origin)?;
        let limit = self.limits.timeout;
        tokio::time::timeout(limit, self.send_on(&lane, make))
            .await
            .map_err(|_| ClientError::Timeout(limit))?
    }

    /// Ends every connection.
    pub(crate) async fn close(&self) {
        lock(&self.origins).clear();
        self.drivers.end().await;
    }

    fn lane(&self, origin: &Origin) -> Result<Arc<Lane>, ClientError> {
        let mut origins = lock(&self.origins);
        if let Some(lane) = origins.get(origin) {
            return Ok(Arc::clone(lane));
        }
        if origins.len() >= MAX_ORIGINS {
            // One that nobody is using now can be made again.
            origins.retain(|_, lane| Arc::strong_count(lane) > 1);
            if origins.len() >= MAX_ORIGINS {
                return Err(ClientError::TooManyOrigins);
            }
        }
        let lane = Arc::new(Lane::new(origin.clone(), self.limits));
        origins.insert(origin.clone(), Arc::clone(&lane));
        Ok(lane)
    }

    async fn send_on(
        &self,
        lane: &Arc<Lane>,
        make: impl Fn(Version) -> Request<Body> + Send + Sync,
    ) -> Result<Answer, ClientError> {
        let _turn = take(&lane.turns).await;
        for _ in 0..=RESENDS {
            let sent = match self.checkout(lane).await? {
                Checkout::Http2(connection) => connection.send(make(Version::HTTP_2)).await,
                Checkout::Http1(connection) => connection.send(make(Version::HTTP_11), lane).await,
            };
            match sent {
                Ok(answer) => return Ok(answer),
                Err(SendError::NotLookedAt) => {}
                Err(SendError::Unknown(why)) => return Err(ClientError::Broken(why)),
            }
        }
        Err(ClientError::Refused)
    }

    /// A connection with room for one more request.
    async fn checkout(&self, lane: &Lane) -> Result<Checkout, ClientError> {
        let asked = Instant::now();
        let mut turn = None;
        loop {
            // An HTTP/1.1 connection carries one request at a time: a turn is the right to one of them.
            if turn.is_none() && lane.state().http1 {
                turn = take(&lane.http1_turns).await;
            }
            if let Some(found) = lane.free(&self.limits, &mut turn) {
                return Ok(found);
            }
            // One at a time dials: the first answer tells the protocol, and so how many are needed.
            let mut last_failure = lane.dialing.lock().await;
            if let Some(found) = lane.free(&self.limits, &mut turn) {
                return Ok(found);
            }
            if let Some((when, error)) = &*last_failure
                && *when > asked
            {
                // It failed while we waited for our turn to try the same.
                return Err(Arc::clone(error).into());
            }
            match self.open(lane).await {
                // The loop finds the new connection, as everybody else does.
                Ok(()) => {}
                Err(error) => {
                    let error = Arc::new(error);
                    *last_failure = Some((Instant::now(), Arc::clone(&error)));
                    return Err(error.into());
                }
            }
        }
    }

    /// Dials, and adds the connection to the lane.
    async fn open(&self, lane: &Lane) -> Result<(), ConnectError> {
        let Connected { stream, http2 } = self.connector.connect(&lane.origin).await?;
        let io = TokioIo::new(stream);
        let broken = |error: hyper::Error| ConnectError::Handshake(lane.origin.to_string(), chain(&error));
        if http2 {
            let (sender, mut connection) = http2::Builder::new(self.drivers.clone())
                .timer(TokioTimer::new())
                .keep_alive_interval(PING)
                .keep_alive_timeout(PING)
                // Pings on idle connections are answered with GOAWAY ENHANCE_YOUR_CALM.
                .keep_alive_while_idle(false)
                .handshake(io)
                .await
                .map_err(broken)?;
            let connected = Arc::new(Http2 {
                sender,
                in_flight: AtomicUsize::new(0),
                streams: AtomicUsize::new(connection.current_max_send_streams()),
            });
            let told = Arc::downgrade(&connected);
            self.drivers.drive(poll_fn(move |context| {
                let end = Pin::new(&mut connection).poll(context);
                if let Some(told) = told.upgrade() {
                    told.streams.store(connection.current_max_send_streams(), Ordering::Relaxed);
                }
                end
            }));
            let mut state = lane.state();
            state.http1 = false;
            state.http2.push(connected);
            return Ok(());
        }
        let (sender, connection) = http1::handshake(io).await.map_err(broken)?;
        self.drivers.drive(connection);
        let mut state = lane.state();
        state.http1 = true;
        state.idle_http1.push(Idle { sender, used: false });
        Ok(())
    }
}

/// What is known of one origin.
#[derive(Debug)]
struct Lane {
    origin: Origin,
    /// As many requests at once as all connections together can carry.
    turns: Arc<Semaphore>,
    http1_turns: Arc<Semaphore>,
    state: Mutex<LaneState>,
    /// Held while dialing; holds when that failed last, and why.
    dialing: AsyncMutex<Option<(Instant, Arc<ConnectError>)>>,
}

#[derive(Debug, Default)]
struct LaneState {
    http2: Vec<Arc<Http2>>,
    /// Whether the last new connection spoke HTTP/1.1.
    http1: bool,
    idle_http1: Vec<Idle>,
}

/// An HTTP/1.1 connection between two requests.
#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Body>,
    used: bool,
}

impl Lane {
    fn new(origin: Origin, limits: Limits) -> Self {
        let turns = (limits.connections * limits.streams).max(limits.http1_connections);
        Self {
            origin,
            turns: Arc::new(Semaphore::new(turns)),
            http1_turns: Arc::new(Semaphore::new(limits.http1_connections)),
            state: Mutex::default(),
            dialing: AsyncMutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, LaneState> {
        lock(&self.state)
    }

    /// A connection that is open and has room, or the least busy one when no more may be opened.
    fn free(&self, limits: &Limits, turn: &mut Option<OwnedSemaphorePermit>) -> Option<Checkout> {
        let mut state = self.state();
        if state.http1 {
            turn.as_ref()?;
            state.idle_http1.retain(|idle| !idle.sender.is_closed());
            let idle = state.idle_http1.pop()?;
            return Some(Checkout::Http1(Http1 { idle, turn: turn.take() }));
        }
        state.http2.retain(|connection| !connection.sender.is_closed());
        let least = state.http2.iter().min_by_key(|connection| connection.load())?;
        let full = least.load() >= limits.streams.min(least.streams.load(Ordering::Relaxed)).max(1);
        if full && state.http2.len() < limits.connections {
            return None;
        }
        Some(Checkout::Http2(InFlight::on(least)))
    }
}

async fn take(turns: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    // A semaphore that is never closed always has another turn.
    Arc::clone(turns).acquire_owned().await.ok()
}

enum Checkout {
    Http2(InFlight),
    Http1(Http1),
}

enum SendError {
    /// The service has certainly not processed it.
    NotLookedAt,
    /// It may have.
    Unknown(String),
}

#[derive(Debug)]
struct Http2 {
    sender: http2::SendRequest<Body>,
    in_flight: AtomicUsize,
    /// How many requests at once the service allows.
    streams: AtomicUsize,
}

impl Http2 {
    fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }
}

/// A request on an HTTP/2 connection, counted while it lasts.
struct InFlight(Arc<Http2>);

impl InFlight {
    fn on(connection: &Arc<Http2>) -> Self {
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }

    async fn send(&self, request: Request<Body>) -> Result<Answer, SendError> {
        let mut sender = self.0.sender.clone();
        let response = match sender.try_send_request(request).await {
            Ok(response) => response,
            Err(error) if error.message().is_some() => return Err(SendError::NotLookedAt),
            Err(error) => return Err(classify(error.error())),
        };
        read(response).await
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Http1 {
    idle: Idle,
    turn: Option<OwnedSemaphorePermit>,
}

impl Http1 {
    async fn send(self, request: Request<Body>, lane: &Lane) -> Result<Answer, SendError> {
        let Self { idle: Idle { mut sender, used }, turn } = self;
        // A new connection is ready once its driver has run; one that was closed meanwhile never is.
        if sender.ready().await.is_err() {
            return Err(SendError::NotLookedAt);
        }
        let response = match sender.try_send_request(request).await {
            Ok(response) => response,
            Err(error) if error.message().is_some() => return Err(SendError::NotLookedAt),
            // It was closed while idle: what we sent crossed that on the way.
            Err(error) if used && error.error().is_incomplete_message() => {
                return Err(SendError::NotLookedAt);
            }
            Err(error) => return Err(classify(error.error())),
        };
        let answer = read(response).await?;
        if sender.ready().await.is_ok() {
            lane.state().idle_http1.push(Idle { sender, used: true });
        }
        drop(turn);
        Ok(answer)
    }
}

/// Reads an answer, at most [`MAX_ANSWER`] bytes of it.
async fn read(response: Response<Incoming>) -> Result<Answer, SendError> {
    let (parts, body) = response.into_parts();
    // The status decides; a body that breaks off or never ends takes nothing away from it.
    let body = match Limited::new(body, MAX_ANSWER).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            debug!(%error, status = parts.status.as_u16(), "the answer's body was not read to its end");
            Bytes::new()
        }
    };
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}

/// Tells what was certainly not processed (RFC 9113, sections 6.8 and 8.7) from what may have been.
fn classify(error: &hyper::Error) -> SendError {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(h2) = error.downcast_ref::<h2::Error>() {
            // h2 fails a stream with GOAWAY only when its id is above the last one that was processed.
            let unprocessed =
                h2.is_remote() && h2.is_go_away() || h2.reason() == Some(h2::Reason::REFUSED_STREAM);
            return if unprocessed { SendError::NotLookedAt } else { SendError::Unknown(h2.to_string()) };
        }
        cause = error.source();
    }
    SendError::Unknown(chain(error))
}

/// An error with its causes, in one line.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The tasks that move the bytes of connections. They end with the client.
#[derive(Clone, Debug, Default)]
struct Drivers {
    running: TaskTracker,
    stop: CancellationToken,
}

impl Drivers {
    fn drive(&self, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        hyper::rt::Executor::execute(self, async move {
            if let Err(error) = connection.await {
                debug!(error = chain(&error), "a connection to a push service ended with an error");
            }
        });
    }

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
