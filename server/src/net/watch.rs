//! All connections of a server: how many there are, and whether any of them takes too long.
//!
//! One task looks at every connection several times a second. A look costs some nanoseconds; a timer for each
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

/// How long the drain waits at least before idle connections are closed, however long they have been idle: a request that
/// is on its way is answered, with `Connection: close`. Then, how long one that was told to leave may take.
const LINGER: Duration = Duration::from_millis(500);

/// How long a client that was told that nothing more will come may be silent without closing, and how long it may go on
/// sending.
const CLOSING: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// The time for a request head, and for anything else that comes before a request, while memory is nearly used up.
const HASTE: Duration = Duration::from_secs(1);

/// How many connections are chosen at once to make room for others, and how long each was idle at least.
const VICTIMS: usize = 64;
const IDLE: Duration = Duration::from_millis(100);

/// How many bytes an HTTP/2 connection may send of which nothing comes: pings, settings, window updates.
const MAX_USELESS: u64 = 1 << 20;

/// How many requests a client may leave before they are answered, beyond those that it waited for.
const MAX_LEFT: u32 = 200;

/// After how long an idle connection keeps nothing for its next request.
const REST_AFTER: Duration = Duration::from_millis(500);

/// Parts of the table, so that connections that come and go do not wait for each other.
const SHARDS: usize = 16;

/// Between two looks: an eighth of the shortest deadline, within these.
const LOOK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Milliseconds, as of the last look: reading it costs nothing.
#[derive(Debug)]
pub(crate) struct ConnectionClock {
    began: Instant,
    now: AtomicU64,
}

impl ConnectionClock {
    fn new() -> Self {
        // Zero means never.
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
    /// There is a connection again.
    seated: Notify,
    /// Those that make room next while there are as many as may be.
    victims: Mutex<Vec<Arc<Connection>>>,
}

/// A connection's place in the table, and what is counted for it.
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

    /// Counts it for the client that a proxy speaks for.
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

    /// Counts a connection from this client, if there is a limit.
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

/// One connection from an address that has too many of them.
#[derive(Debug)]
pub(crate) struct TooMany;

/// What a limit for one address is for: whoever has one IPv6 address has its whole /64.
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

    /// A seat for a new connection; `limited` if its address has a limit.
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
            // Nobody has looked at the clock meanwhile.
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

    /// Has the connection that was idle for longest end, of the address that has most of them. False when none is idle.
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

    /// How many there are whose clients were not told yet that nothing more will come.
    pub fn count(&self) -> usize {
        self.all().iter().filter(|connection| connection.phase() != ConnectionPhase::Closing).count()
    }

    fn is_empty(&self) -> bool {
        self.0.open.load(Ordering::Acquire) == 0
    }

    /// Returns when there is none.
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

    /// What the connections do, the oldest first.
    pub fn view(&self) -> Vec<ConnectionView> {
        let now = self.0.clock.now();
        let mut views: Vec<_> = self.all().iter().map(|open| ConnectionView::of(open, now)).collect();
        views.sort_by_key(|view| view.id);
        views
    }

    /// The requests that run, the oldest first.
    pub fn requests(&self) -> Vec<RequestView> {
        let mut views = Vec::new();
        for connection in self.all() {
            views.extend(connection.requests().iter().map(RequestScope::view));
        }
        views.sort_by(|a, b| b.age_ms.total_cmp(&a.age_ms));
        views
    }

    /// Looks around until `over`: cuts what takes too long, and tells all to leave when the drain begins.
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
                    // Nothing can be too late.
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
            // A store is as old as the last look when it is written.
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

/// Those that make room, the last of them first: from the address that has most connections the one that was idle for
/// longest, and so on.
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

/// The connections of one address: how many, how long the one is idle that was so for longest, and those that are idle.
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

/// How far the drain has come, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Drained {
    /// How long ago it began.
    since: u64,
    /// How long a connection is idle before it is closed.
    linger: u64,
    /// Whether nothing is waited for.
    hard: bool,
}

/// One look at one connection. In a `hurry`, what is before a request has no time.
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
    // What is blocked has a deadline of its own.
    let blocked = connection.blocked_for(now) > 0;
    let http2 = connection.spoken() == Spoken::Http2;
    let linger = milliseconds(LINGER);
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
        // GOAWAY first: a request that is on its way is told to go elsewhere, and not lost.
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
        // Somebody else's bytes are silent for too long only where somebody said what that is.
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
    if http2 {
        let (answered, left) = connection.answered_and_left();
        if connection.useless() > MAX_USELESS {
            return connection.cut("flood");
        }
        if u64::from(left) > u64::from(MAX_LEFT) + answered {
            return connection.cut("resets");
        }
    }
    if !timeouts.age.is_zero() && connection.opened.elapsed() > aged(timeouts.age, connection.id) {
        // HTTP/1.1 ends with its next answer; an idle one has the idle timeout.
        connection.tell(if http2 { ShutdownMode::Leave } else { ShutdownMode::Last });
    }
    let Some(Drained { since, linger: patience, hard }) = drained else { return };
    if hard {
        return connection.cut("drain");
    }
    match phase {
        // A request may have been sent that has not arrived.
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

/// The age of this connection's end: within a tenth of `age`, so that not all of them end at once.
fn aged(age: Duration, id: u64) -> Duration {
    // Fibonacci hashing spreads consecutive numbers.
    let spread = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    age.mul_f64(0.9 + f64::from(u8::try_from(spread).unwrap_or_default()) / 1280.0)
}

/// What an operator sees of a connection.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionView {
    /// Its number in this process.
    pub id: u64,
    /// The listener that it came to.
    pub listener: &'static str,
    /// Who is at the other end.
    pub peer: String,
    /// What is spoken.
    pub protocol: Spoken,
    /// Whether it is encrypted.
    pub tls: bool,
    /// What it does.
    pub phase: ConnectionPhase,
    /// For how long, in milliseconds.
    pub phase_ms: u64,
    /// How long ago it was accepted, in milliseconds.
    pub age_ms: u64,
    /// How many requests it has been answered.
    pub answered: u64,
    /// How many run.
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
