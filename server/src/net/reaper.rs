//! All connections of a server: their number, and their deadlines.
//!
//! One task checks every connection several times a second. A check costs some nanoseconds; a timer for each
//! deadline of each request would cost more than the rest of the host together.

use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::connection::{Connection, ConnectionPhase, Peer, ShutdownMode, Spoken};
use super::{Config, Timeouts};
use crate::http::scope::{RequestScope, RequestView};
use crate::metrics;
use perennial_runtime::cgroup::Pressure;
use perennial_runtime::drain::{self, Drain};
use perennial_runtime::metrics::Counted;

/// Minimum time before the drain closes idle connections, however long they have been idle: a request that is on its
/// way is answered, with `Connection: close`. It is also the time limit for a connection that was asked to leave.
const LINGER: Duration = Duration::from_millis(500);

/// Time limits of a client after the sending side was shut down: how long it may be silent without closing, and how
/// long it may go on sending.
const CLOSING: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// Time limit of a client that has not identified itself, while memory is nearly used up: for a request head, and for
/// every other step before a request.
const HASTE: Duration = Duration::from_secs(1);

/// Maximum number of connections that are chosen at once to make room for others.
const VICTIMS: usize = 64;
/// Minimum idle time of a connection that is chosen to make room.
const IDLE: Duration = Duration::from_millis(100);

/// Maximum number of bytes that an HTTP/2 connection may send without a useful event: PING, SETTINGS, WINDOW_UPDATE.
const MAX_USELESS: u64 = 1 << 20;

/// Maximum excess of requests that a client left before an answer over requests that it waited for.
const MAX_LEFT: u32 = 200;

/// Idle time after which a connection is parked, without buffers for its next request.
const REST_AFTER: Duration = Duration::from_millis(500);

/// Number of parts of the table, so that connections that come and go do not wait for each other.
const SHARDS: usize = 16;

/// Bounds of the interval between two checks, which is an eighth of the shortest deadline.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Clock in milliseconds that each check sets: reading it costs nothing.
#[derive(Debug)]
pub(crate) struct ConnectionClock {
    began: Instant,
    now: AtomicU64,
}

impl ConnectionClock {
    fn new() -> Self {
        // The clock begins at 1, because a stored 0 means never.
        Self { began: Instant::now(), now: AtomicU64::new(1) }
    }

    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn tick(&self) -> u64 {
        let now = milliseconds(self.began.elapsed()) + 1;
        self.now.store(now, Ordering::Relaxed);
        now
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The connections of one server. A cheap handle.
#[derive(Clone, Debug)]
pub struct Connections(Arc<Table>);

#[derive(Debug)]
struct Table {
    name: &'static str,
    slots: Arc<Semaphore>,
    max_per_address: usize,
    timeouts: Timeouts,
    clock: Arc<ConnectionClock>,
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Connection>>>; SHARDS],
    addresses: Mutex<HashMap<IpAddr, usize>>,
    open: AtomicUsize,
    emptied: Notify,
    /// Notified when the empty table gets a connection.
    seated: Notify,
    /// Connections that make room next while the limit is reached, the next one last.
    victims: Mutex<Vec<Arc<Connection>>>,
}

/// The place of a connection in the table, and its counts. Both end when this drops.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    connection: Arc<Connection>,
    table: Arc<Table>,
    address: Option<IpAddr>,
    _counted: Counted,
}

impl ConnectionPermit {
    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Counts the connection for the client that a proxy has named.
    pub(super) fn limit(&mut self, client: Peer) -> Result<(), TooMany> {
        if let Some(address) = self.table.enter(client)?
            && let Some(before) = self.address.replace(address)
        {
            self.table.leave(before);
        }
        Ok(())
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.connection.enter(ConnectionPhase::Closed);
        self.table.shard(self.connection.id).remove(&self.connection.id);
        if let Some(address) = self.address {
            self.table.leave(address);
        }
        if self.table.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.table.emptied.notify_waiters();
        }
    }
}

impl Table {
    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        let shard = usize::try_from(id % SHARDS as u64).unwrap_or_default();
        self.shards[shard].lock()
    }

    fn addresses(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.addresses.lock()
    }

    /// Counts a connection from this client, if the number per address is limited.
    fn enter(&self, peer: Peer) -> Result<Option<IpAddr>, TooMany> {
        let Some(address) = peer.ip().filter(|_| self.max_per_address > 0).map(network) else {
            return Ok(None);
        };
        let mut addresses = self.addresses();
        let count = addresses.entry(address).or_default();
        if *count >= self.max_per_address {
            return Err(TooMany);
        }
        *count += 1;
        Ok(Some(address))
    }

    fn leave(&self, address: IpAddr) {
        let mut addresses = self.addresses();
        if let Some(count) = addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&address);
            }
        }
    }
}

/// The error for a connection from an address that has too many of them.
#[derive(Debug)]
pub(crate) struct TooMany;

/// Returns the address that a limit per address counts: a client with one IPv6 address has its whole /64 network, so
/// the last 64 bits are zero.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Connections {
    pub(crate) fn new(config: &Config) -> Self {
        Self(Arc::new(Table {
            name: config.name,
            slots: Arc::new(Semaphore::new(config.max_connections)),
            max_per_address: config.max_per_address,
            timeouts: config.timeouts,
            clock: Arc::new(ConnectionClock::new()),
            next: AtomicU64::new(1),
            shards: std::array::from_fn(|_| Mutex::default()),
            addresses: Mutex::default(),
            open: AtomicUsize::new(0),
            emptied: Notify::new(),
            seated: Notify::new(),
            victims: Mutex::default(),
        }))
    }

    pub(crate) fn slots(&self) -> &Arc<Semaphore> {
        &self.0.slots
    }

    /// Returns a permit for a new connection. The limit per address applies if `limited`.
    pub(crate) fn seat(
        &self,
        peer: Peer,
        tls: bool,
        limited: bool,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Result<ConnectionPermit, TooMany> {
        let table = &self.0;
        let address = if limited { table.enter(peer)? } else { None };
        let id = table.next.fetch_add(1, Ordering::Relaxed);
        if table.open.fetch_add(1, Ordering::AcqRel) == 0 {
            // The clock stands still while the table is empty.
            table.clock.tick();
            table.seated.notify_one();
        }
        let connection = Arc::new(Connection::new(id, table.name, peer, tls, Arc::clone(&table.clock)));
        connection.hold_slot(slot);
        table.shard(id).insert(id, Arc::clone(&connection));
        Ok(ConnectionPermit {
            connection,
            table: Arc::clone(table),
            address,
            _counted: Counted::new(metrics::connections(table.name)),
        })
    }

    /// Cuts the longest idle connection of the address that has the most connections. Returns false when none is idle.
    pub(crate) fn make_room(&self) -> bool {
        let now = self.0.clock.tick();
        let mut victims = self.0.victims.lock();
        let is_idle = |connection: &Connection| {
            let is_between = matches!(
                connection.phase(),
                ConnectionPhase::Opening | ConnectionPhase::Idle | ConnectionPhase::Head
            );
            is_between
                && connection.told() < ShutdownMode::Cut
                && connection.phase_lasts(now) >= milliseconds(IDLE)
        };
        for again in [true, false] {
            while let Some(victim) = victims.pop() {
                if is_idle(&victim) {
                    victim.cut("made room");
                    return true;
                }
            }
            if again {
                *victims = choose(self.all(), is_idle, now);
            }
        }
        false
    }

    /// Returns the number of connections, without the closing ones.
    pub fn count(&self) -> usize {
        self.all().iter().filter(|connection| connection.phase() != ConnectionPhase::Closing).count()
    }

    fn is_empty(&self) -> bool {
        self.0.open.load(Ordering::Acquire) == 0
    }

    /// Returns when no connection is open.
    pub(crate) async fn emptied(&self) {
        loop {
            let emptied = self.0.emptied.notified();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    fn all(&self) -> Vec<Arc<Connection>> {
        let shards = self.0.shards.iter();
        shards
            .flat_map(|shard| {
                let shard = shard.lock();
                shard.values().cloned().collect::<Vec<_>>()
            })
            .collect()
    }

    /// Returns views of the connections, the oldest first.
    pub fn view(&self) -> Vec<ConnectionView> {
        let now = self.0.clock.now();
        let mut views: Vec<_> = self.all().iter().map(|open| ConnectionView::of(open, now)).collect();
        views.sort_by_key(|view| view.id);
        views
    }

    /// Returns views of the running requests, the oldest first.
    pub fn requests(&self) -> Vec<RequestView> {
        let mut views = Vec::new();
        for connection in self.all() {
            views.extend(connection.requests().iter().map(RequestScope::view));
        }
        views.sort_by(|a, b| b.age_ms.total_cmp(&a.age_ms));
        views
    }

    /// Checks all connections until `over` completes: cuts a connection that takes too long, and asks all to leave when
    /// the drain begins.
    pub(crate) async fn watch(&self, drain: &Drain, pressure: &Pressure, over: impl Future<Output = ()>) {
        let timeouts = &self.0.timeouts;
        let shortest = timeouts.handshake.min(timeouts.head).min(timeouts.idle).min(timeouts.write);
        let look = (shortest / 8).clamp(LOOK.0, LOOK.1);
        let mut over = std::pin::pin!(over);
        let mut softened = None;
        loop {
            let phase = drain.phase();
            let pause = if phase >= drain::Phase::Soft { LOOK.0 } else { look };
            let changed = async {
                match phase {
                    drain::Phase::Running | drain::Phase::Notice => drain.soft().await,
                    drain::Phase::Soft => drain.hard().await,
                    drain::Phase::Hard => std::future::pending().await,
                }
            };
            let due = async {
                if self.is_empty() {
                    // An empty table has no deadlines.
                    self.0.seated.notified().await;
                }
                tokio::time::sleep(pause).await;
            };
            tokio::select! {
                () = over.as_mut() => return,
                () = due => {}
                () = changed => {}
            }
            let now = self.0.clock.tick();
            let hurry = pressure.is_high();
            let phase = drain.phase();
            if phase >= drain::Phase::Soft && softened.is_none() {
                softened = Some(now);
            }
            let drained = softened.map(|began| Drained {
                since: now - began,
                linger: milliseconds(drain.linger()),
                hard: phase == drain::Phase::Hard,
            });
            // A stored time comes from the last check, so it may be too early by one pause.
            let slack = milliseconds(pause);
            for shard in &self.0.shards {
                let shard = shard.lock();
                for connection in shard.values() {
                    look_at(connection, timeouts, now, slack, hurry, drained);
                }
            }
        }
    }
}

/// Chooses the connections that make room, the next one last. Each is the longest idle connection of the address that
/// has the most connections left.
fn choose(
    all: Vec<Arc<Connection>>,
    is_idle: impl Fn(&Connection) -> bool,
    now: u64,
) -> Vec<Arc<Connection>> {
    let mut by_address = HashMap::<Option<IpAddr>, (usize, Vec<Arc<Connection>>)>::new();
    for connection in all {
        let (count, idle) = by_address.entry(connection.peer().ip().map(network)).or_default();
        *count += 1;
        if is_idle(&connection) {
            idle.push(connection);
        }
    }
    for (_, idle) in by_address.values_mut() {
        idle.sort_by_key(|connection| connection.phase_lasts(now));
    }
    let lasts = |idle: &[Arc<Connection>]| idle.last().map_or(0, |connection| connection.phase_lasts(now));
    let ranked = by_address.into_values().map(|(count, idle)| (count, lasts(&idle), idle));
    let mut ranked: BinaryHeap<Ranked> = ranked.map(Ranked).collect();
    let mut chosen = Vec::with_capacity(VICTIMS);
    while chosen.len() < VICTIMS
        && let Some(Ranked((count, _, mut idle))) = ranked.pop()
    {
        let Some(victim) = idle.pop() else { continue };
        chosen.push(victim);
        ranked.push(Ranked((count - 1, lasts(&idle), idle)));
    }
    chosen.reverse();
    chosen
}

/// The connections of one address: their number, the longest idle time, and the idle connections.
struct Ranked((usize, u64, Vec<Arc<Connection>>));

impl Ranked {
    fn rank(&self) -> (bool, usize, u64) {
        (!self.0.2.is_empty(), self.0.0, self.0.1)
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

/// Progress of the drain; times are in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Drained {
    /// Time since the soft phase began.
    since: u64,
    /// Idle time after which a connection is closed.
    linger: u64,
    /// Whether the hard phase has begun: nothing is waited for.
    hard: bool,
}

/// Checks one connection. In a `hurry`, a client that has not identified itself gets only [`HASTE`].
fn look_at(
    connection: &Connection,
    timeouts: &Timeouts,
    now: u64,
    slack: u64,
    hurry: bool,
    drained: Option<Drained>,
) {
    let over = |lasts: u64, limit: Duration| lasts > milliseconds(limit) + slack;
    let phase = connection.phase();
    let lasts = connection.phase_lasts(now);
    let quiet = connection.quiet_for(now);
    // A blocked write has a deadline of its own.
    let blocked = connection.blocked_for(now) > 0;
    let http2 = connection.spoken() == Spoken::Http2;
    let told = connection.told();
    if told == ShutdownMode::Cut || phase == ConnectionPhase::Closed {
        return;
    }
    if over(connection.blocked_for(now), timeouts.write) {
        return connection.cut("write timeout");
    }
    if hurry && over(lasts, HASTE) && connection.is_unknown() {
        return connection.cut("memory");
    }
    match phase {
        ConnectionPhase::Closing => {
            if over(lasts, CLOSING.0) || over(now.saturating_sub(connection.wrote()), CLOSING.1) {
                connection.tell(ShutdownMode::Cut);
            }
            return;
        }
        ConnectionPhase::Opening if over(lasts, timeouts.handshake) => {
            return connection.cut("handshake timeout");
        }
        ConnectionPhase::Head if over(lasts, timeouts.head) => return connection.cut("head timeout"),
        // GOAWAY first: a request that is on its way is sent to another connection, and not lost.
        ConnectionPhase::Idle if blocked => {}
        ConnectionPhase::Idle if http2 && told < ShutdownMode::Leave && over(quiet, timeouts.idle) => {
            connection.tell(ShutdownMode::Leave);
        }
        ConnectionPhase::Idle if !http2 && told < ShutdownMode::Leave && over(quiet, timeouts.idle) => {
            return connection.end("idle timeout");
        }
        ConnectionPhase::Idle if over(quiet, timeouts.idle + LINGER) => {
            return connection.cut("idle timeout");
        }
        // Of the upgraded connections only raw TCP has an idle timeout, which its listener sets.
        ConnectionPhase::Upgraded if connection.spoken() == Spoken::Tcp && over(lasts, timeouts.idle) => {
            return connection.cut("idle timeout");
        }
        ConnectionPhase::Idle if lasts > milliseconds(REST_AFTER) => connection.rest(),
        ConnectionPhase::Busy => {
            let stalled =
                connection.requests().iter().any(|scope| over(scope.stalled_for(now), timeouts.write));
            if stalled {
                return connection.cut("write timeout");
            }
        }
        _ => {}
    }
    if http2 && let Some(reason) = misconduct(connection) {
        return connection.cut(reason);
    }
    if !timeouts.age.is_zero() && connection.opened.elapsed() > aged(timeouts.age, connection.id) {
        // An HTTP/1.1 connection ends with its next answer, or by the idle timeout.
        connection.tell(if http2 { ShutdownMode::Leave } else { ShutdownMode::Last });
    }
    if let Some(drained) = drained {
        leave(connection, drained, Seen { phase, lasts, quiet, blocked, http2 });
    }
}

/// What one look at a connection has seen. Times are in milliseconds.
#[derive(Clone, Copy)]
struct Seen {
    phase: ConnectionPhase,
    lasts: u64,
    quiet: u64,
    blocked: bool,
    http2: bool,
}

/// Returns why an HTTP/2 connection is cut that costs more than it asks for.
fn misconduct(connection: &Connection) -> Option<&'static str> {
    let (answered, left) = connection.answered_and_left();
    if connection.useless() > MAX_USELESS {
        return Some("flood");
    }
    (u64::from(left) > u64::from(MAX_LEFT) + answered).then_some("resets")
}

/// Has a connection end in a drain: as soon as no request of it can be lost.
fn leave(connection: &Connection, drained: Drained, seen: Seen) {
    let Seen { phase, lasts, quiet, blocked, http2 } = seen;
    let Drained { since, linger: patience, hard } = drained;
    let linger = milliseconds(LINGER);
    if hard {
        return connection.cut("drain");
    }
    match phase {
        // A request may be on its way.
        ConnectionPhase::Opening if lasts > patience && since > linger => connection.end("drain"),
        ConnectionPhase::Upgraded
            if connection.spoken() == Spoken::Tcp && lasts > linger && since > linger =>
        {
            connection.cut("drain");
        }
        ConnectionPhase::Opening
        | ConnectionPhase::Upgraded
        | ConnectionPhase::Closing
        | ConnectionPhase::Closed => {}
        _ if http2 => connection.tell(ShutdownMode::Leave),
        ConnectionPhase::Idle if quiet > patience && since > linger => connection.tell(ShutdownMode::Leave),
        _ => connection.tell(ShutdownMode::Last),
    }
    // Half a request head is not a request: hyper would wait for the other half.
    let resting =
        matches!(phase, ConnectionPhase::Opening | ConnectionPhase::Idle | ConnectionPhase::Head) && !blocked;
    if resting && quiet > patience + linger && since > 2 * linger {
        connection.cut("drain");
    }
}

/// Returns the age at which connection `id` ends: `age` plus or minus a tenth, so that not all connections end at once.
fn aged(age: Duration, id: u64) -> Duration {
    // Fibonacci hashing spreads consecutive numbers.
    let spread = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    age.mul_f64(0.9 + f64::from(u8::try_from(spread).unwrap_or_default()) / 1280.0)
}

/// A connection as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionView {
    /// Number of the connection in this process.
    pub id: u64,
    /// Name of the listener that accepted the connection.
    pub listener: &'static str,
    /// The client: its address and port, or `unix`.
    pub peer: String,
    /// Protocol of the connection.
    pub protocol: Spoken,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Phase of the connection.
    pub phase: ConnectionPhase,
    /// Duration of the phase so far, in milliseconds.
    pub phase_ms: u64,
    /// Time since the connection was accepted, in milliseconds.
    pub age_ms: u64,
    /// Number of answered requests.
    pub answered: u64,
    /// Number of running requests.
    pub requests: usize,
}

impl ConnectionView {
    fn of(connection: &Connection, now: u64) -> Self {
        Self {
            id: connection.id,
            listener: connection.listener,
            peer: connection.peer().to_string(),
            protocol: connection.spoken(),
            tls: connection.tls,
            phase: connection.phase(),
            phase_ms: connection.phase_lasts(now),
            age_ms: milliseconds(connection.opened.elapsed()),
            answered: connection.answered_and_left().0,
            requests: connection.requests().len(),
        }
    }
}
