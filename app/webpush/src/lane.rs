//! The connections to one origin.
//!
//! They are opened when the ones there are have no room, one at a time, up to a limit. A connection that was
//! idle for a while is not used again, and one on which an answer did not come in time is suspect: what
//! stands between us and the service may have forgotten it without a word.

use std::error::Error as StdError;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, Version, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Mutex as AsyncMutex, Notify, OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use crate::client::{Answer, Body, ClientError, Drivers, Limits, lock};
use crate::connect::{ConnectError, Connected, Connector};
use crate::target::Origin;

/// How much of an answer's body is read, and for how long: error texts are shorter, and nothing else is of
/// interest.
const MAX_ANSWER: usize = 4096;
const BODY: Duration = Duration::from_secs(1);
/// A connection that carries requests and is silent for this long is asked whether it lives.
const PING: Duration = Duration::from_secs(20);
/// A connection that was idle for this long is closed instead of used: NATs and load balancers forget.
const IDLE: Duration = Duration::from_secs(60);
/// After a dial that failed, while there are other connections.
const DIAL_AGAIN: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct Lane {
    origin: Origin,
    limits: Limits,
    /// As many requests at once as all connections together can carry.
    turns: Turns,
    /// An HTTP/1.1 connection carries one request at a time: a turn is the right to one of them.
    http1_turns: Turns,
    state: Mutex<State>,
    /// Somebody has finished with a connection.
    room: Notify,
    /// Held while dialing; holds when that failed last, and why.
    dialing: AsyncMutex<Option<(Instant, Arc<ConnectError>)>>,
}

#[derive(Debug, Default)]
struct State {
    http2: Vec<Arc<Http2>>,
    /// Whether the last new connection spoke HTTP/1.1.
    http1: bool,
    idle: Vec<Idle>,
    /// Not before then, as long as there are connections.
    dial_again: Option<Instant>,
}

/// An HTTP/1.1 connection between two requests.
#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Body>,
    used: bool,
    since: Instant,
}

#[derive(Debug)]
struct Http2 {
    sender: http2::SendRequest<Body>,
    in_flight: AtomicUsize,
    /// How many requests at once the service allows.
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    suspect: AtomicBool,
}

impl Http2 {
    fn load(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    fn is_usable(&self) -> bool {
        let forgotten = self.load() == 0 && lock(&self.last_used).elapsed() > IDLE;
        !self.sender.is_closed() && !self.suspect.load(Ordering::Relaxed) && !forgotten
    }
}

/// Rights that bulk requests may have three quarters of, so that others never wait for all of them.
#[derive(Debug)]
struct Turns {
    all: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
}

/// One of them; for a bulk request, in both respects.
#[derive(Debug)]
pub(crate) struct Turn {
    _all: Option<OwnedSemaphorePermit>,
    _bulk: Option<OwnedSemaphorePermit>,
}

impl Turns {
    fn new(count: usize) -> Self {
        let bulk = (count * 3 / 4).max(1);
        Self { all: Arc::new(Semaphore::new(count)), bulk: Arc::new(Semaphore::new(bulk)) }
    }

    async fn take(&self, bulk: bool) -> Turn {
        // A semaphore that is never closed always has another turn.
        let bulk = if bulk { Arc::clone(&self.bulk).acquire_owned().await.ok() } else { None };
        Turn { _bulk: bulk, _all: Arc::clone(&self.all).acquire_owned().await.ok() }
    }
}

impl Lane {
    pub(crate) fn new(origin: Origin, limits: Limits) -> Self {
        Self {
            origin,
            limits,
            turns: Turns::new((limits.connections * limits.streams).max(limits.http1_connections)),
            http1_turns: Turns::new(limits.http1_connections),
            state: Mutex::default(),
            room: Notify::new(),
            dialing: AsyncMutex::default(),
        }
    }

    /// Waits for the right to one more request.
    pub(crate) async fn turn(&self, bulk: bool) -> Turn {
        self.turns.take(bulk).await
    }

    /// A connection with room for one more request.
    pub(crate) async fn checkout(
        &self,
        bulk: bool,
        connector: &Connector,
        drivers: &Drivers,
    ) -> Result<Checkout<'_>, ClientError> {
        let asked = Instant::now();
        let mut turn = None;
        loop {
            if turn.is_none() && self.state().http1 {
                turn = Some(self.http1_turns.take(bulk).await);
            }
            if let Some(found) = self.free(&mut turn) {
                return Ok(found);
            }
            // One at a time dials: the first answer tells the protocol, and so how many are needed.
            let mut last_failure = tokio::select! {
                dialing = self.dialing.lock() => dialing,
                () = self.room.notified() => continue,
            };
            if let Some(found) = self.free(&mut turn) {
                return Ok(found);
            }
            if self.state().http1 && turn.is_none() {
                continue;
            }
            let failed = match &*last_failure {
                // It failed while we waited for our turn to try the same.
                Some((when, error)) if *when > asked => Some(Arc::clone(error)),
                _ => self.open(connector, drivers).await.err().map(Arc::new),
            };
            if let Some(error) = failed {
                *last_failure = Some((Instant::now(), Arc::clone(&error)));
                // The loop then takes the least busy of those that are open, if there are any.
                if !self.make_do() {
                    return Err(error.into());
                }
            }
        }
    }

    /// Dials, and adds the connection.
    async fn open(&self, connector: &Connector, drivers: &Drivers) -> Result<(), ConnectError> {
        let Connected { stream, http2 } = connector.connect(&self.origin).await?;
        let io = TokioIo::new(stream);
        let broken = |error: hyper::Error| ConnectError::Handshake(self.origin.to_string(), chain(&error));
        if http2 {
            let (sender, mut connection) = http2::Builder::new(drivers.clone())
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
                last_used: Mutex::new(Instant::now()),
                suspect: AtomicBool::new(false),
            });
            let told = Arc::downgrade(&connected);
            drive(drivers, async move {
                poll_fn(|context| {
                    let end = Pin::new(&mut connection).poll(context);
                    if let Some(told) = told.upgrade() {
                        told.streams.store(connection.current_max_send_streams(), Ordering::Relaxed);
                    }
                    end
                })
                .await
            });
            let mut state = self.state();
            state.http1 = false;
            state.http2.push(connected);
            return Ok(());
        }
        let (sender, connection) = http1::handshake(io).await.map_err(broken)?;
        drive(drivers, connection);
        let mut state = self.state();
        state.http1 = true;
        state.idle.push(Idle { sender, used: false, since: Instant::now() });
        Ok(())
    }

    /// A connection that is open and has room, or the least busy one when no more may be opened.
    fn free(&self, turn: &mut Option<Turn>) -> Option<Checkout<'_>> {
        let mut state = self.state();
        if state.http1 {
            turn.as_ref()?;
            state.idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE);
            let idle = state.idle.pop()?;
            return Some(Checkout::Http1(Http1 { lane: self, idle: Some(idle), _turn: turn.take() }));
        }
        state.http2.retain(|connection| connection.is_usable());
        let least = state.http2.iter().min_by_key(|connection| connection.load())?;
        let full = least.load() >= self.limits.streams.min(least.streams.load(Ordering::Relaxed)).max(1);
        let may_dial = state.dial_again.is_none_or(|when| when <= Instant::now());
        if full && may_dial && state.http2.len() < self.limits.connections {
            return None;
        }
        Some(Checkout::Http2(InFlight::on(self, least)))
    }

    /// After a dial that failed: whether there are connections to go on with for a while.
    fn make_do(&self) -> bool {
        let mut state = self.state();
        state.dial_again = Some(Instant::now() + DIAL_AGAIN);
        state.http2.iter().any(|connection| connection.is_usable())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn drive(drivers: &Drivers, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
    drivers.execute(async move {
        if let Err(error) = connection.await {
            debug!(error = chain(&error), "a connection to a push service ended with an error");
        }
    });
}

/// A connection, for one request.
pub(crate) enum Checkout<'a> {
    Http2(InFlight<'a>),
    Http1(Http1<'a>),
}

/// Why there is no answer.
pub(crate) enum SendError {
    /// The service has certainly not processed it.
    NotLookedAt,
    /// It may have.
    Unknown(String),
}

impl Checkout<'_> {
    pub(crate) fn version(&self) -> Version {
        match self {
            Self::Http2(_) => Version::HTTP_2,
            Self::Http1(_) => Version::HTTP_11,
        }
    }

    pub(crate) async fn send(self, request: Request<Body>) -> Result<Answer, SendError> {
        match self {
            Self::Http2(connection) => connection.send(request).await,
            Self::Http1(connection) => connection.send(request).await,
        }
    }
}

/// A request on an HTTP/2 connection, counted while it lasts.
pub(crate) struct InFlight<'a> {
    lane: &'a Lane,
    connection: Arc<Http2>,
    answered: bool,
}

impl<'a> InFlight<'a> {
    fn on(lane: &'a Lane, connection: &Arc<Http2>) -> Self {
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { lane, connection: Arc::clone(connection), answered: false }
    }

    async fn send(mut self, request: Request<Body>) -> Result<Answer, SendError> {
        let mut sender = self.connection.sender.clone();
        let sent = sender.try_send_request(request).await;
        // Also an error is an answer: the connection itself knows how it is.
        self.answered = true;
        match sent {
            Ok(response) => Ok(read(response).await),
            Err(error) if error.message().is_some() => Err(SendError::NotLookedAt),
            Err(error) => Err(classify(error.error())),
        }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.connection.suspect.store(true, Ordering::Relaxed);
        }
        *lock(&self.connection.last_used) = Instant::now();
        self.connection.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.lane.room.notify_one();
    }
}

/// A request on an HTTP/1.1 connection.
pub(crate) struct Http1<'a> {
    lane: &'a Lane,
    idle: Option<Idle>,
    _turn: Option<Turn>,
}

impl Http1<'_> {
    async fn send(mut self, request: Request<Body>) -> Result<Answer, SendError> {
        let Some(Idle { sender, used, .. }) = &mut self.idle else { return Err(SendError::NotLookedAt) };
        // A new connection is ready once its driver has run; one that was closed meanwhile never is.
        let sent = match sender.ready().await {
            Ok(()) => sender.try_send_request(request).await,
            Err(_closed) => {
                self.idle = None;
                return Err(SendError::NotLookedAt);
            }
        };
        let used = *used;
        let idle = self.idle.take();
        let response = match sent {
            Ok(response) => response,
            Err(error) if error.message().is_some() => return Err(SendError::NotLookedAt),
            // It was closed while idle, and what we sent crossed that on the way.
            Err(error) if used && error.error().is_incomplete_message() => {
                // Whoever closes one without a word may have closed the others.
                self.lane.state().idle.retain(|idle| !idle.used);
                return Err(SendError::NotLookedAt);
            }
            Err(error) => return Err(classify(error.error())),
        };
        let closing = is_closing(&response);
        let answer = read(response).await;
        if let Some(Idle { mut sender, .. }) = idle
            && !closing
            && sender.ready().await.is_ok()
        {
            self.lane.state().idle.push(Idle { sender, used: true, since: Instant::now() });
        }
        Ok(answer)
    }
}

impl Drop for Http1<'_> {
    fn drop(&mut self) {
        if self.idle.is_some() {
            // No answer came in time. Whatever swallowed this request may swallow others.
            self.lane.state().idle.clear();
        }
        self.lane.room.notify_one();
    }
}

/// Whether this is the last answer on an HTTP/1.1 connection. It may look usable until the end arrives.
fn is_closing(response: &Response<Incoming>) -> bool {
    let options = response.headers().get_all(header::CONNECTION).iter();
    options
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("close"))
}

/// Reads an answer, and as much of its body as comes at once.
async fn read(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    // The status decides; a body that breaks off or never ends takes nothing away from it.
    let body = match tokio::time::timeout(BODY, Limited::new(body, MAX_ANSWER).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => {
            debug!(%error, status = parts.status.as_u16(), "the answer's body was not read to its end");
            Bytes::new()
        }
        Err(_elapsed) => Bytes::new(),
    };
    Answer { status: parts.status, headers: parts.headers, body }
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
