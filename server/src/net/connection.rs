//! One connection: what it does, since when, and how it is told to end.
//!
//! The connection writes down what it does in a few atomic words; whether that takes too long is found out by
//! [`super::watch`], which looks around several times a second. So no connection and no request arms a timer
//! of its own, and a deadline costs a store.

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

use super::watch::ConnectionClock;
use crate::http::scope::RequestScope;

/// The bytes of an HTTP/2 preface and the empty SETTINGS behind it (RFC 9113, section 3.4).
const PREFACE: u64 = 24 + 9;

/// The most bytes of a frame of HTTP/2 that answers no request, with those of TLS around it.
const OWN_FRAMES: usize = 64;

/// Who is at the other end.
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

/// What is spoken on a connection.
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
    /// Something else.
    Tcp,
}

impl Spoken {
    fn of(word: u8) -> Self {
        [Self::Unknown, Self::Http1, Self::Http2, Self::Tcp][usize::from(word)]
    }
}

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ConnectionPhase {
    /// Before the first request could have come.
    Opening,
    /// Between two requests.
    Idle,
    /// Part of a request head has come.
    Head,
    /// At least one request is running.
    Busy,
    /// It is somebody else's now: a WebSocket, say, or a protocol beside HTTP.
    Upgraded,
    /// Its client was told that nothing more will come, and may still be sending.
    Closing,
    /// It has ended.
    Closed,
}

impl ConnectionPhase {
    fn of(word: u8) -> Self {
        [Self::Opening, Self::Idle, Self::Head, Self::Busy, Self::Upgraded, Self::Closing, Self::Closed]
            [usize::from(word)]
    }
}

/// What a connection was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum ShutdownMode {
    /// Nothing.
    Stay,
    /// To end with the next answer.
    Last,
    /// To end when what runs has been answered: `Connection: close`, or GOAWAY.
    Leave,
    /// To end now.
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
    /// Its number in this process.
    pub id: u64,
    /// The listener that it came to.
    pub listener: &'static str,
    /// When it was accepted.
    pub opened: Instant,
    /// Who connected: the client, or a proxy.
    pub socket_peer: Peer,
    /// Whether it is encrypted.
    pub tls: bool,
    proxied: OnceLock<Peer>,
    clock: Arc<ConnectionClock>,
    spoken: AtomicU8,
    phase: AtomicU8,
    /// When the phase began, by the clock.
    since: AtomicU64,
    /// Since when bytes wait that the client does not take; 0 if there are none.
    blocked: AtomicU64,
    /// Bytes read since something useful came of any.
    useless: AtomicU64,
    told: AtomicU8,
    /// Whether it has been idle for so long that nothing should be kept for its next request.
    resting: AtomicBool,
    reason: OnceLock<&'static str>,
    /// Of the task that drives it, and of whoever has its bytes once they are somebody else's.
    driver: AtomicWaker,
    reader: AtomicWaker,
    writer: AtomicWaker,
    /// When bytes were written last, by the clock.
    wrote: AtomicU64,
    /// Request bodies that have not come to their ends.
    bodies: AtomicU32,
    answered: AtomicU64,
    /// Requests that the client left before they were answered.
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

    /// Who is at the other end: the client that a trusted proxy speaks for, or whoever connected.
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

    /// Ends the connection now, with no answer to anything.
    pub fn abort(&self) {
        self.tell(ShutdownMode::Cut);
    }

    /// Ends it now, for a reason that is counted.
    pub(crate) fn cut(&self, reason: &'static str) {
        self.count_end(reason);
        self.tell(ShutdownMode::Cut);
    }

    /// Ends it in order, for a reason that is counted.
    pub(super) fn end(&self, reason: &'static str) {
        self.count_end(reason);
        self.tell(ShutdownMode::Leave);
    }

    fn count_end(&self, reason: &'static str) {
        if self.reason.set(reason).is_ok() {
            crate::metrics::connection_cut(reason);
        }
    }

    /// Keeps the right to be open, until its client is told that nothing more will come.
    pub(super) fn hold_slot(&self, slot: Option<OwnedSemaphorePermit>) {
        *self.slot.lock() = slot;
    }

    /// Its client was told that nothing more will come: another one may have its place.
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

    /// What it was told; the task in `context` is woken when that changes.
    pub(crate) fn poll_told(&self, context: &Context<'_>) -> ShutdownMode {
        self.driver.register(context.waker());
        self.told()
    }

    /// The value of `future`, unless the connection is cut before.
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

    /// What is spoken.
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

    /// What it does.
    pub fn phase(&self) -> ConnectionPhase {
        ConnectionPhase::of(self.phase.load(Ordering::Acquire))
    }

    /// For how long it has done so, in milliseconds.
    pub(super) fn phase_lasts(&self, now: u64) -> u64 {
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// How long ago it was busy, or bytes were written, in milliseconds: what was answered may still be on its way.
    pub(super) fn quiet_for(&self, now: u64) -> u64 {
        self.phase_lasts(now).min(now.saturating_sub(self.wrote.load(Ordering::Relaxed)))
    }

    /// When bytes were written last, by the clock.
    pub(super) fn wrote(&self) -> u64 {
        self.wrote.load(Ordering::Relaxed)
    }

    /// Whether its client has not shown who it is: no request runs, or none but such as wait for their bodies and were shown
    /// no key.
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

    /// For how long bytes have waited that the client does not take, in milliseconds.
    pub(super) fn blocked_for(&self, now: u64) -> u64 {
        match self.blocked.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        }
    }

    /// How many bytes have come since one was useful.
    pub(super) fn useless(&self) -> u64 {
        self.useless.load(Ordering::Relaxed)
    }

    /// Something useful has come: a request, a part of a body.
    pub(crate) fn useful(&self) {
        self.useless.store(0, Ordering::Relaxed);
    }

    /// How many requests were answered, and how many their client left before.
    pub(super) fn answered_and_left(&self) -> (u64, u32) {
        (self.answered.load(Ordering::Relaxed), self.left.load(Ordering::Relaxed))
    }

    /// It has been idle for a while.
    pub(super) fn rest(&self) {
        if !self.resting.swap(true, Ordering::AcqRel) {
            self.driver.wake();
        }
    }

    /// Something has arrived after a rest.
    pub(crate) fn has_rested(&self) {
        self.resting.store(false, Ordering::Release);
    }

    /// Whether nothing happens on it, and nothing has for a while.
    pub(crate) fn is_resting(&self) -> bool {
        self.resting.load(Ordering::Acquire) && self.is_between_requests()
    }

    /// Whether nothing happens on it, and everything that was answered is on its way.
    pub(crate) fn is_between_requests(&self) -> bool {
        self.phase() == ConnectionPhase::Idle
            && self.bodies.load(Ordering::Acquire) == 0
            && self.blocked.load(Ordering::Relaxed) == 0
    }

    /// A request was answered without having run.
    pub(crate) fn turned_away(&self) {
        let requests = self.requests();
        self.useful();
        if requests.is_empty() {
            self.enter(ConnectionPhase::Idle);
        }
    }

    /// The requests that run on it.
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
            // What comes while a body is open is of the body.
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

    /// An error for somebody else who reads from a connection that was cut.
    pub(super) fn unless_cut_for_its_owner(&self, context: &Context<'_>) -> io::Result<()> {
        if self.phase() == ConnectionPhase::Upgraded {
            self.reader.register(context.waker());
            if self.told() == ShutdownMode::Cut {
                return Err(was_cut());
            }
        }
        Ok(())
    }

    /// What became of a write; an error if it waits and the connection was cut.
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
            // What the library writes by itself, as pings and acknowledgements, is nothing that the client has asked for.
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

/// A request body that has not come to its end, counted until it has, or nobody waits for it any more.
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

/// One request on a connection, listed while it lasts.
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
