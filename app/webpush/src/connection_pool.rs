//! The connections of one runtime to one push service.
//!
//! Connections are opened one after the other, and only under load: the next one when the open ones carry more than
//! a few requests each. A connection that was idle for a while is closed. A connection on which an answer did not
//! come in time is not used again: a device between us and the service may have forgotten it without notice.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Version};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::sleep_until;

use crate::concurrency_limit::ConcurrencyLimit;
use crate::connect::{ConnectError, HttpVersion};
use crate::http1::Http1;
use crate::http2::Http2;
use crate::service::Service;
use crate::wire::{ClientError, PoolContext, PoolLimits, PushResponse, SendError};

/// Pause after a failed dial, while there are other connections.
const DIAL_AGAIN: Duration = Duration::from_secs(1);
/// Another HTTP/2 connection is opened when each open one carries this many requests.
const BUSY: usize = 8;

/// The connections of one runtime to one push service.
#[derive(Debug)]
pub(crate) struct ConnectionPool {
    pub(crate) service: Arc<Service>,
    pub(crate) turns: ConcurrencyLimit,
    http: HttpVersion,
    shared: Arc<PoolContext>,
    state: Mutex<PoolState>,
    /// Notified when another connection can be used, or dialing has failed.
    changed: Notify,
    /// Number of requests under way that have given their permit back.
    pub(crate) overdue: AtomicUsize,
}

#[derive(Debug, Default)]
struct PoolState {
    http2: Vec<Arc<Http2>>,
    /// HTTP/1.1 connections between two requests.
    idle: Vec<Http1>,
    /// True when the last new connection spoke HTTP/1.1.
    is_http1: bool,
    /// HTTP/1.1 connections that carry a request.
    lent: usize,
    is_dialing: bool,
    dialed: Option<Instant>,
    /// Number of connections in a row that ended before they answered a request.
    fruitless: u32,
    failed: Option<(Instant, Arc<ConnectError>)>,
}

/// A connection for one request.
#[derive(Debug)]
pub(crate) enum Checkout {
    Http2(Arc<Http2>),
    Http1(Http1),
}

impl Checkout {
    pub(crate) fn version(&self) -> Version {
        match self {
            Self::Http2(_) => Version::HTTP_2,
            Self::Http1(_) => Version::HTTP_11,
        }
    }
}

impl ConnectionPool {
    pub(crate) fn new(service: Arc<Service>, http: HttpVersion, shared: Arc<PoolContext>) -> Arc<Self> {
        let turns = ConcurrencyLimit::new(most(&shared.limits, http == HttpVersion::One));
        let state = Mutex::new(PoolState { is_http1: http == HttpVersion::One, ..PoolState::default() });
        Arc::new(Self {
            service,
            turns,
            http,
            shared,
            state,
            changed: Notify::new(),
            overdue: AtomicUsize::new(0),
        })
    }

    /// Returns a connection with room for one more request, and waits for it.
    pub(crate) async fn checkout(self: &Arc<Self>) -> Result<Checkout, ClientError> {
        let asked = Instant::now();
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let mut state = self.state();
                if let Some(found) = self.pick(&mut state) {
                    return Ok(found);
                }
                if self.shared.drivers.is_stopped() {
                    return Err(ClientError::Closed);
                }
                match &state.failed {
                    // The connections that carry requests now come back.
                    Some((when, _)) if state.lent > 0 && when.elapsed() < DIAL_AGAIN => {}
                    // A dial failed while this request waited for its connection.
                    Some((when, error)) if state.lent == 0 && *when >= asked => {
                        return Err(Arc::clone(error).into());
                    }
                    _ => self.dial(&mut state),
                }
            }
            changed.await;
        }
    }

    /// Sends a request on a connection, and keeps the connection for the next request.
    pub(crate) async fn send(
        &self,
        connection: Checkout,
        request: Request<()>,
        body: Bytes,
    ) -> Result<PushResponse, SendError> {
        let connection = match connection {
            Checkout::Http2(connection) => return connection.send(request, body).await,
            Checkout::Http1(connection) => connection,
        };
        let mut unanswered = Unanswered(Some(self));
        let sent = connection.send(request, body).await;
        unanswered.0 = None;
        let mut state = self.state();
        state.lent -= 1;
        if sent.answer.is_ok() {
            state.fruitless = 0;
        }
        if sent.closed {
            // A service that closes one connection without notice may have closed the others.
            state.idle.retain(|idle| !idle.used);
        }
        state.idle.extend(sent.connection);
        drop(state);
        self.changed.notify_one();
        sent.answer
    }

    /// Closes connections that were idle for long.
    pub(crate) fn sweep(&self) {
        let mut state = self.state();
        state.http2.retain(|connection| connection.is_usable());
        state.idle.retain(Http1::is_usable);
    }

    /// Maximum number of requests under way that have given their permit back: half of the requests that the
    /// connections can carry.
    pub(crate) fn most_overdue(&self) -> usize {
        most(&self.shared.limits, self.state().is_http1) / 2
    }

    /// Number of HTTP/2 connections and of idle HTTP/1.1 connections.
    pub(crate) fn connections(&self) -> usize {
        let state = self.state();
        state.http2.len() + state.idle.len()
    }

    /// Picks an open connection. Starts to open another one when the open ones are busy.
    fn pick(self: &Arc<Self>, state: &mut PoolState) -> Option<Checkout> {
        if state.is_http1 {
            while let Some(idle) = state.idle.pop() {
                if idle.is_usable() {
                    state.lent += 1;
                    return Some(Checkout::Http1(idle));
                }
                state.fruitless += u32::from(!idle.used);
            }
            return None;
        }
        let PoolState { http2, fruitless, .. } = state;
        http2.retain(|connection| {
            let keep = connection.is_usable();
            match (keep, connection.has_answered()) {
                (_, true) => *fruitless = 0,
                (false, false) => *fruitless += 1,
                (true, false) => {}
            }
            keep
        });
        let limits = &self.shared.limits;
        let least = state.http2.iter().min_by_key(|connection| connection.load())?;
        let least = Arc::clone(least);
        let may_dial = state.failed.as_ref().is_none_or(|(when, _)| when.elapsed() > DIAL_AGAIN);
        let is_busy = least.load() >= BUSY.min(least.room(limits.streams));
        if is_busy && may_dial && state.http2.len() < limits.connections {
            self.dial(state);
        }
        Some(Checkout::Http2(least))
    }

    /// Opens one more connection unless one is being opened. A pause separates it from the last one of any thread.
    fn dial(self: &Arc<Self>, state: &mut PoolState) {
        if std::mem::replace(&mut state.is_dialing, true) {
            return;
        }
        let own = state.dialed.map(|dialed| dialed + fruitless_pause(state.fruitless));
        let not_before =
            self.service.next_dial(self.shared.limits.connect_every).max(own.unwrap_or_else(Instant::now));
        state.dialed = Some(not_before);
        // Made before the task is spawned: the waiting requests are notified even when the task never runs.
        let dialing = Dialing(Arc::clone(self));
        self.shared.drivers.spawn(async move {
            let pool = &dialing.0;
            sleep_until(not_before.into()).await;
            if let Err(error) = pool.open().await {
                pool.state().failed = Some((Instant::now(), Arc::new(error)));
            }
        });
    }

    async fn open(&self) -> Result<(), ConnectError> {
        let origin = &self.service.origin;
        let room = self.shared.room(origin.is_listed())?;
        let connected = self.shared.connector.connect(origin, &self.service.addresses, self.http).await?;
        self.service.is_found();
        let failed = |why| ConnectError::Handshake(origin.to_string(), why);
        let is_http1 = !connected.http2;
        if is_http1 {
            let connection = Http1::open(connected, room, &self.shared.drivers).await.map_err(failed)?;
            self.state().idle.push(connection);
        } else {
            let connection = Http2::open(connected, room, &self.shared.drivers).await.map_err(failed)?;
            self.state().http2.push(connection);
        }
        let mut state = self.state();
        state.failed = None;
        if std::mem::replace(&mut state.is_http1, is_http1) != is_http1 {
            self.turns.bound(most(&self.shared.limits, is_http1));
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock()
    }
}

/// Number of requests at once that all connections together can carry.
fn most(limits: &PoolLimits, is_http1: bool) -> usize {
    if is_http1 { limits.http1_connections } else { limits.connections * limits.streams }
}

/// Pause before another connection to a service that ends connections at once: none after the first, up to a second.
fn fruitless_pause(fruitless: u32) -> Duration {
    match fruitless {
        0 | 1 => Duration::ZERO,
        more => Duration::from_millis(10).saturating_mul(2_u32.saturating_pow(more.min(16))).min(DIAL_AGAIN),
    }
}

/// A connection that is being opened. Its drop notifies the requests that wait for it.
struct Dialing(Arc<ConnectionPool>);

impl Drop for Dialing {
    fn drop(&mut self) {
        self.0.state().is_dialing = false;
        self.0.changed.notify_waiters();
    }
}

/// A request on an HTTP/1.1 connection that has no answer yet.
struct Unanswered<'a>(Option<&'a ConnectionPool>);

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.0 {
            // The cause that swallowed this request may swallow others.
            let mut state = pool.state();
            state.lent -= 1;
            state.idle.clear();
            drop(state);
            pool.changed.notify_one();
        }
    }
}
