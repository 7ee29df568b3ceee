//! One connection: its phase, since when, and how it is asked to end.
//!
//! The connection stores its phase in a few atomic words. [`super::reaper`] checks several times a second whether a
//! phase takes too long. So no connection and no request arms a timer of its own, and a deadline costs one store.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::task::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use super::reaper::ConnectionClock;
use crate::http::scope::RequestScope;

/// Number of bytes of an HTTP/2 preface and the empty SETTINGS frame after it (RFC 9113, section 3.4).
const PREFACE: u64 = 24 + 9;

/// Maximum size of an HTTP/2 frame that answers no request, with its TLS overhead, in bytes.
const OWN_FRAMES: usize = 64;

/// The remote end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client.
    Tcp(SocketAddr),
    /// A client on the same machine, through a Unix socket.
    Unix,
}

impl Peer {
    /// The client's address, if it has one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip().to_canonical()),
            Self::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Spoken {
    /// Not known yet.
    Unknown,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// A protocol other than HTTP.
    Tcp,
}

impl Spoken {
    fn of(word: u8) -> Self {
        [Self::Unknown, Self::Http1, Self::Http2, Self::Tcp][usize::from(word)]
    }
}

/// The phase of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ConnectionPhase {
    /// The first request cannot have arrived yet.
    Opening,
    /// Between two requests.
    Idle,
    /// Part of a request head has arrived.
    Head,
    /// At least one request is running.
    Busy,
    /// The bytes belong to another owner: a WebSocket, for example, or a protocol other than HTTP.
    Upgraded,
    /// The sending side is shut down, and the client may still be sending.
    Closing,
    /// The connection has ended.
    Closed,
}

impl ConnectionPhase {
    fn of(word: u8) -> Self {
        [Self::Opening, Self::Idle, Self::Head, Self::Busy, Self::Upgraded, Self::Closing, Self::Closed]
            [usize::from(word)]
    }
}

/// How a connection is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum ShutdownMode {
    /// The connection is not asked to end.
    Stay,
    /// It ends with the next answer.
    Last,
    /// It ends when the running requests have been answered: `Connection: close`, or GOAWAY.
    Leave,
    /// It ends now.
    Cut,
}

impl ShutdownMode {
    fn of(word: u8) -> Self {
        [Self::Stay, Self::Last, Self::Leave, Self::Cut][usize::from(word)]
    }
}

/// A connection, as requests and operators see it.
#[derive(Debug)]
pub struct Connection {
    /// Number of the connection in this process.
    pub id: u64,
    /// Name of the listener that accepted the connection.
    pub listener: &'static str,
    /// Time at which the connection was accepted.
    pub opened: Instant,
    /// Remote end of the socket: the client, or a proxy.
    pub socket_peer: Peer,
    /// Whether the connection is encrypted.
    pub tls: bool,
    proxied: OnceLock<Peer>,
    clock: Arc<ConnectionClock>,
    spoken: AtomicU8,
    phase: AtomicU8,
    /// Start of the phase, by the clock.
    since: AtomicU64,
    /// Time since which bytes wait for the client to take them, by the clock; 0 if none wait.
    blocked: AtomicU64,
    /// Number of bytes read since the last useful event.
    useless: AtomicU64,
    told: AtomicU8,
    /// Whether the connection has been idle long enough to be parked.
    resting: AtomicBool,
    reason: OnceLock<&'static str>,
    /// Waker of the task that drives the connection.
    driver: AtomicWaker,
    /// Waker of the owner that reads from an upgraded connection.
    reader: AtomicWaker,
    /// Waker of a write that waits for the client.
    writer: AtomicWaker,
    /// Time of the last write, by the clock.
    wrote: AtomicU64,
    /// Number of request bodies that have not ended.
    bodies: AtomicU32,
    answered: AtomicU64,
    /// Number of requests that the client left before they were answered.
    left: AtomicU32,
    requests: Mutex<Vec<RequestScope>>,
    slot: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Connection {
    pub(super) fn new(
        id: u64,
        listener: &'static str,
        socket_peer: Peer,
        tls: bool,
        clock: Arc<ConnectionClock>,
    ) -> Self {
        Self {
            id,
            listener,
            opened: Instant::now(),
            socket_peer,
            tls,
            proxied: OnceLock::new(),
            spoken: AtomicU8::new(Spoken::Unknown as u8),
            phase: AtomicU8::new(ConnectionPhase::Opening as u8),
            since: AtomicU64::new(clock.now()),
            blocked: AtomicU64::new(0),
            useless: AtomicU64::new(0),
            told: AtomicU8::new(ShutdownMode::Stay as u8),
            resting: AtomicBool::new(false),
            reason: OnceLock::new(),
            driver: AtomicWaker::new(),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
            wrote: AtomicU64::new(0),
            bodies: AtomicU32::new(0),
            answered: AtomicU64::new(0),
            left: AtomicU32::new(0),
            requests: Mutex::default(),
            slot: Mutex::default(),
            clock,
        }
    }

    /// Returns the client: the one that a trusted proxy has named, or the remote end of the socket.
    pub fn peer(&self) -> Peer {
        self.proxied.get().copied().unwrap_or(self.socket_peer)
    }

    pub(super) fn set_proxied(&self, peer: Peer) {
        let _ = self.proxied.set(peer);
    }

    /// Ends the connection once its running requests are answered: `Connection: close`, or GOAWAY.
    pub fn close(&self) {
        self.tell(ShutdownMode::Leave);
    }

    /// Ends the connection now, without answers to its running requests.
    pub fn abort(&self) {
        self.tell(ShutdownMode::Cut);
    }

    /// Ends the connection now and counts the reason.
    pub(crate) fn cut(&self, reason: &'static str) {
        self.count_end(reason);
        self.tell(ShutdownMode::Cut);
    }

    /// Ends the connection in order and counts the reason.
    pub(super) fn end(&self, reason: &'static str) {
        self.count_end(reason);
        self.tell(ShutdownMode::Leave);
    }

    fn count_end(&self, reason: &'static str) {
        if self.reason.set(reason).is_ok() {
            crate::metrics::connection_cut(reason);
        }
    }

    /// Keeps the connection's permit of the connection limit, or releases it.
    pub(super) fn hold_slot(&self, slot: Option<OwnedSemaphorePermit>) {
        *self.slot.lock() = slot;
    }

    /// Begins the closing phase, after the sending side was shut down: another connection may have the permit.
    pub(crate) fn close_begins(&self) {
        self.enter(ConnectionPhase::Closing);
        self.hold_slot(None);
    }

    pub(crate) fn tell(&self, told: ShutdownMode) {
        if self.told.fetch_max(told as u8, Ordering::AcqRel) < told as u8 {
            self.driver.wake();
            self.reader.wake();
            self.writer.wake();
        }
    }

    pub(crate) fn told(&self) -> ShutdownMode {
        ShutdownMode::of(self.told.load(Ordering::Acquire))
    }

    /// Returns the shutdown mode; the task in `context` is woken when it changes.
    pub(crate) fn poll_told(&self, context: &Context<'_>) -> ShutdownMode {
        self.driver.register(context.waker());
        self.told()
    }

    /// Returns the value of `future`, or `None` if the connection is cut before.
    pub(crate) async fn unless_cut<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let cut = poll_fn(|context| match self.poll_told(context) {
            ShutdownMode::Cut => Poll::Ready(()),
            _ => Poll::Pending,
        });
        tokio::select! {
            biased;
            value = future => Some(value),
            () = cut => None,
        }
    }

    /// Returns the protocol of the connection.
    pub fn spoken(&self) -> Spoken {
        Spoken::of(self.spoken.load(Ordering::Relaxed))
    }

    pub(crate) fn speak(&self, spoken: Spoken) {
        self.spoken.store(spoken as u8, Ordering::Relaxed);
    }

    pub(crate) fn enter(&self, phase: ConnectionPhase) {
        self.since.store(self.clock.now(), Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// Returns the phase of the connection.
    pub fn phase(&self) -> ConnectionPhase {
        ConnectionPhase::of(self.phase.load(Ordering::Acquire))
    }

    /// Returns the duration of the phase so far, in milliseconds.
    pub(super) fn phase_lasts(&self, now: u64) -> u64 {
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// Returns the time since the phase began or bytes were written, whichever was later, in milliseconds: an answer
    /// may still be on its way after its request has ended.
    pub(super) fn quiet_for(&self, now: u64) -> u64 {
        self.phase_lasts(now).min(now.saturating_sub(self.wrote.load(Ordering::Relaxed)))
    }

    /// Returns the time of the last write, by the clock.
    pub(super) fn wrote(&self) -> u64 {
        self.wrote.load(Ordering::Relaxed)
    }

    /// Returns true when the client has not identified itself: the connection is opening or waits for the rest of a
    /// request head, or all running requests wait for their bodies and have shown no key.
    pub(super) fn is_unknown(&self) -> bool {
        match self.phase() {
            ConnectionPhase::Opening | ConnectionPhase::Head => true,
            ConnectionPhase::Busy => self.requests().iter().all(RequestScope::is_unknown),
            ConnectionPhase::Idle
            | ConnectionPhase::Upgraded
            | ConnectionPhase::Closing
            | ConnectionPhase::Closed => false,
        }
    }

    /// Returns how long bytes have waited for the client to take them, in milliseconds.
    pub(super) fn blocked_for(&self, now: u64) -> u64 {
        match self.blocked.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        }
    }

    /// Returns the number of bytes read since the last useful event.
    pub(super) fn useless(&self) -> u64 {
        self.useless.load(Ordering::Relaxed)
    }

    /// Records a useful event: a request or a part of a body has arrived.
    pub(crate) fn useful(&self) {
        self.useless.store(0, Ordering::Relaxed);
    }

    /// Returns the number of answered requests, and the number of requests that the client left before an answer.
    pub(super) fn answered_and_left(&self) -> (u64, u32) {
        (self.answered.load(Ordering::Relaxed), self.left.load(Ordering::Relaxed))
    }

    /// Lets the connection be parked, because it has been idle for a while.
    pub(super) fn rest(&self) {
        if !self.resting.swap(true, Ordering::AcqRel) {
            self.driver.wake();
        }
    }

    /// Ends the parking, because bytes have arrived.
    pub(crate) fn has_rested(&self) {
        self.resting.store(false, Ordering::Release);
    }

    /// Returns true when the connection may be parked: it is idle, and has been for a while.
    pub(crate) fn is_resting(&self) -> bool {
        self.resting.load(Ordering::Acquire) && self.is_between_requests()
    }

    /// Returns true when the connection is idle: no body is open, and no written bytes wait for the client.
    pub(crate) fn is_between_requests(&self) -> bool {
        self.phase() == ConnectionPhase::Idle
            && self.bodies.load(Ordering::Acquire) == 0
            && self.blocked.load(Ordering::Relaxed) == 0
    }

    /// Records a request that was answered without having run.
    pub(crate) fn turned_away(&self) {
        let requests = self.requests();
        self.useful();
        if requests.is_empty() {
            self.enter(ConnectionPhase::Idle);
        }
    }

    /// Returns the requests that run on the connection.
    pub(crate) fn requests(&self) -> MutexGuard<'_, Vec<RequestScope>> {
        self.requests.lock()
    }

    pub(crate) fn clock(&self) -> &ConnectionClock {
        &self.clock
    }

    pub(super) fn has_read(&self, bytes: usize) {
        let useless = self.useless.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        match self.spoken() {
            Spoken::Http2 if useless >= PREFACE && self.phase() == ConnectionPhase::Opening => {
                self.enter(ConnectionPhase::Idle);
            }
            // Bytes that arrive while a body is open belong to the body.
            Spoken::Http1
                if self.phase() == ConnectionPhase::Idle && self.bodies.load(Ordering::Relaxed) == 0 =>
            {
                self.enter(ConnectionPhase::Head);
            }
            Spoken::Tcp => self.since.store(self.clock.now(), Ordering::Relaxed),
            _ if self.phase() == ConnectionPhase::Closing => {
                self.since.store(self.clock.now(), Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Returns an error to the owner that reads from an upgraded connection after it was cut.
    pub(super) fn unless_cut_for_its_owner(&self, context: &Context<'_>) -> io::Result<()> {
        if self.phase() == ConnectionPhase::Upgraded {
            self.reader.register(context.waker());
            if self.told() == ShutdownMode::Cut {
                return Err(was_cut());
            }
        }
        Ok(())
    }

    /// Records the result of a write and returns it; a waiting write fails if the connection was cut.
    pub(super) fn unless_stuck(
        &self,
        written: Poll<io::Result<usize>>,
        context: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.has_written(match &written {
            Poll::Ready(written) => Poll::Ready(written.as_ref().map_or(0, |bytes| *bytes)),
            Poll::Pending => Poll::Pending,
        });
        if written.is_pending() {
            self.writer.register(context.waker());
            if self.told() == ShutdownMode::Cut {
                return Poll::Ready(Err(was_cut()));
            }
        }
        written
    }

    fn has_written(&self, written: Poll<usize>) {
        if let Poll::Ready(bytes) = written {
            // The PINGs and acknowledgements that hyper writes by itself are not activity of the client.
            if bytes > OWN_FRAMES || self.phase() != ConnectionPhase::Idle {
                self.wrote.store(self.clock.now(), Ordering::Relaxed);
            }
            if self.spoken() == Spoken::Tcp {
                self.since.store(self.clock.now(), Ordering::Relaxed);
            }
            if self.blocked.load(Ordering::Relaxed) != 0 {
                self.blocked.store(0, Ordering::Relaxed);
            }
        } else if self.blocked.load(Ordering::Relaxed) == 0 {
            self.blocked.store(self.clock.now(), Ordering::Relaxed);
        }
    }
}

fn was_cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "cut by the host")
}

/// A request body that has not ended. It is counted until it ends, or is no longer waited for.
#[derive(Debug)]
pub(crate) struct OpenBody(Arc<Connection>);

impl OpenBody {
    pub(crate) fn on(connection: &Arc<Connection>) -> Self {
        connection.bodies.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(connection))
    }
}

impl Drop for OpenBody {
    fn drop(&mut self) {
        self.0.bodies.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One request on a connection; it is listed there until this drops.
#[derive(Debug)]
pub(crate) struct RunningRequest {
    scope: RequestScope,
    answered: bool,
}

impl RunningRequest {
    pub(crate) fn on(connection: &Connection, scope: &RequestScope) -> Self {
        let mut requests = connection.requests();
        requests.push(scope.clone());
        connection.useful();
        connection.resting.store(false, Ordering::Relaxed);
        connection.enter(ConnectionPhase::Busy);
        Self { scope: scope.clone(), answered: false }
    }

    pub(crate) fn answered(&mut self) {
        self.answered = true;
    }
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        let connection = self.scope.connection();
        let mut requests = connection.requests();
        requests.retain(|other| !other.is(&self.scope));
        if self.answered {
            connection.answered.fetch_add(1, Ordering::Relaxed);
        } else {
            connection.left.fetch_add(1, Ordering::Relaxed);
        }
        if requests.is_empty() && connection.phase() == ConnectionPhase::Busy {
            connection.enter(ConnectionPhase::Idle);
        }
    }
}
