//! Every metric of the host, each named once, and the recorder that Prometheus reads.
//!
//! Labels are bounded: a route is the pattern that matched (or `unmatched`), never a path.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::cache;
use crate::drain::Drain;
use crate::net::Refusal;
use crate::pool::Status;

/// Counter by `listener`, `route`, `method`, `status`: requests that were answered. Status 499 is a client that left.
pub const HTTP_REQUESTS: &str = "perennial_http_requests_total";
/// Histogram by `listener`, `route`, seconds: from the request head to the last byte of the response.
pub const HTTP_DURATION: &str = "perennial_http_request_duration_seconds";
/// Gauge by `listener`: requests between head and last byte, but for those that are shed.
pub const HTTP_IN_FLIGHT: &str = "perennial_http_requests_in_flight";
/// Gauge by `listener`: open connections.
pub const HTTP_CONNECTIONS: &str = "perennial_http_connections";
/// Gauge by `listener`: 1 while as many connections are open as may be, and idle ones make room for new ones.
pub const HTTP_AT_LIMIT: &str = "perennial_http_connections_at_limit";
/// Gauge: 1 while requests are sent away since memory is nearly used up.
pub const SHEDDING: &str = "perennial_memory_shedding";
/// Counter by `reason`: connections that the host ended, or refused.
pub const HTTP_CONNECTIONS_CUT: &str = "perennial_http_connections_cut_total";
/// Counter by `listener`: requests that were sent away because too many ran.
pub const HTTP_SHED: &str = "perennial_http_requests_shed_total";
/// Counter by `route`: polls of a handler that kept their thread for longer than `server.slow_poll`.
pub const HTTP_SLOW_POLLS: &str = "perennial_http_slow_polls_total";
/// Gauge: work that waits for one of the threads of `server.cpu`.
pub const CPU_WAITING: &str = "perennial_cpu_waiting";
/// Gauge: work that they do.
pub const CPU_RUNNING: &str = "perennial_cpu_running";
/// Counter: work that found the queue full.
pub const CPU_REFUSED: &str = "perennial_cpu_refused_total";
/// Counter: handlers that panicked.
pub const HTTP_PANICS: &str = "perennial_http_panics_total";
/// Counter by `task`: contained tasks that failed and were started again.
pub const TASK_FAILURES: &str = "perennial_task_failures_total";
/// Gauge by `dependency`: 1 while its circuit breaker is open.
pub const BREAKER_OPEN: &str = "perennial_breaker_open";
/// Counter: transactions that the SQLite writer committed.
pub const SQLITE_COMMITS: &str = "perennial_sqlite_commits_total";
/// Counter: writes inside them.
pub const SQLITE_WRITES: &str = "perennial_sqlite_writes_total";
/// Counter: transactions that were lost, with every write in them.
pub const SQLITE_LOST: &str = "perennial_sqlite_lost_total";
/// Histogram, seconds: from asking for a write to its commit.
pub const SQLITE_WRITE_DURATION: &str = "perennial_sqlite_write_duration_seconds";
/// Counter: log lines that were dropped because the log's reader was too slow.
pub const LOG_LINES_DROPPED: &str = "perennial_log_lines_dropped_total";
/// Gauge, bytes: memory of the cgroup without the page cache,
pub const MEMORY_USED: &str = "perennial_memory_used_bytes";
/// and its limit, if it has one.
pub const MEMORY_LIMIT: &str = "perennial_memory_limit_bytes";
/// Gauge by `pool`, `state` (used, available, waiting): connections, and those who wait for one.
pub const POOL: &str = "perennial_pool";
/// Histogram by `pool`, seconds: how long a connection was waited for.
pub const POOL_WAIT: &str = "perennial_pool_wait_seconds";
/// Counter by `pool`: connections that were asked for by what held one already. It is to be none.
pub const POOL_NESTED: &str = "perennial_pool_nested_total";
/// Counter by `cache`, `result` (hit, miss): what was asked of a cache. A miss is a load.
pub const CACHE_REQUESTS: &str = "perennial_cache_requests_total";
/// Counter by `cache`: loads that failed.
pub const CACHE_FAILURES: &str = "perennial_cache_load_failures_total";
/// Counter by `cache`: answers that had ended, and were given since the load failed.
pub const CACHE_STALE: &str = "perennial_cache_stale_total";
/// Counter by `cache`, `cause` (size, expired, forgotten): entries that were removed.
pub const CACHE_REMOVALS: &str = "perennial_cache_removals_total";
/// Gauge by `cache`, bytes: what its entries take.
pub const CACHE_BYTES: &str = "perennial_cache_bytes";

/// Counter by `what`: rows of a store that could not be read, each time they were.
pub const UNREADABLE: &str = "perennial_unreadable_rows_total";

/// Counter by `listener`, `reason`: connections whose first bytes, or requests whose head could not be served, by
/// [`Refusal`].
pub const HTTP_REFUSED: &str = "perennial_http_refused_total";
/// Gauge by `version`, `commit`: 1.
pub const BUILD_INFO: &str = "perennial_build_info";

/// Upper bounds, in seconds, of the buckets of every histogram of durations.
const SECONDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0];

/// Why the host ends connections.
const CUTS: [&str; 13] = [
    "address limit",
    "body idle",
    "body timeout",
    "drain",
    "flood",
    "handshake timeout",
    "head timeout",
    "idle timeout",
    "limit",
    "made room",
    "memory",
    "resets",
    "write timeout",
];

/// How often the recorder tidies up, so that histograms do not grow while nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// The process's metrics, as Prometheus text. A cheap handle.
#[derive(Clone)]
pub struct Metrics {
    recorder: PrometheusHandle,
    /// What every exporter says of its process: processor time, memory, descriptors, threads, its start.
    process: metrics_process::Collector,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Installs the recorder, once per process.
    ///
    /// # Errors
    /// When another recorder is already installed.
    pub fn install() -> Result<Self, BuildError> {
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
            .install_recorder()?;
        describe();
        let process = metrics_process::Collector::default();
        process.describe();
        Ok(Self { recorder: handle, process })
    }

    /// Says what was built. `commit` is empty when nobody knows.
    pub fn built(&self, version: &'static str, commit: &'static str) {
        gauge!(BUILD_INFO, "version" => version, "commit" => commit).set(1.0);
    }

    /// The text exposition format.
    pub fn render(&self) -> String {
        self.process.collect();
        self.recorder.render()
    }

    /// Tidies up until the end.
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn upkeep(self, drain: Drain) -> Result<(), Infallible> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(UPKEEP) => self.recorder.run_upkeep(),
                () = drain.hard() => return Ok(()),
            }
        }
    }
}

fn describe() {
    describe_gauge!(BREAKER_OPEN, Unit::Count, "1 while the circuit breaker of a dependency is open");
    describe_counter!(HTTP_REQUESTS, Unit::Count, "requests answered, by route, method and status");
    describe_histogram!(HTTP_DURATION, Unit::Seconds, "request head to last byte of the response, by route");
    describe_gauge!(HTTP_IN_FLIGHT, Unit::Count, "requests between head and last byte");
    describe_counter!(UNREADABLE, Unit::Count, "rows of a store that could not be read");
    describe_gauge!(HTTP_AT_LIMIT, Unit::Count, "1 while as many connections are open as may be");
    describe_gauge!(SHEDDING, Unit::Count, "1 while requests are sent away for want of memory");
    gauge!(SHEDDING).set(0.0);
    describe_gauge!(HTTP_CONNECTIONS, Unit::Count, "open connections");
    describe_counter!(
        HTTP_CONNECTIONS_CUT,
        Unit::Count,
        "connections ended or refused by the host, by reason"
    );
    describe_counter!(HTTP_SHED, Unit::Count, "requests sent away because too many ran");
    describe_counter!(HTTP_SLOW_POLLS, Unit::Count, "polls of a handler that kept their thread for too long");
    describe_gauge!(CPU_WAITING, Unit::Count, "work that waits for a processor thread");
    describe_gauge!(CPU_RUNNING, Unit::Count, "work that processor threads do");
    describe_counter!(CPU_REFUSED, Unit::Count, "work that found the queue of the processor threads full");
    describe_counter!(HTTP_PANICS, Unit::Count, "handlers that panicked");
    describe_counter!(TASK_FAILURES, Unit::Count, "contained tasks that failed and were started again");
    describe_counter!(SQLITE_COMMITS, Unit::Count, "transactions committed by the SQLite writer");
    describe_counter!(SQLITE_WRITES, Unit::Count, "writes inside those transactions");
    describe_counter!(SQLITE_LOST, Unit::Count, "transactions that were lost, with every write in them");
    describe_histogram!(SQLITE_WRITE_DURATION, Unit::Seconds, "from asking for a write to its commit");
    describe_counter!(LOG_LINES_DROPPED, Unit::Count, "log lines dropped because their reader was too slow");
    describe_gauge!(MEMORY_USED, Unit::Bytes, "memory of the cgroup without the page cache");
    describe_gauge!(MEMORY_LIMIT, Unit::Bytes, "the limit of the cgroup's memory");
    describe_gauge!(POOL, Unit::Count, "connections of a pool, and those who wait for one");
    describe_histogram!(POOL_WAIT, Unit::Seconds, "how long a connection of a pool was waited for");
    describe_counter!(POOL_NESTED, Unit::Count, "connections asked for by what held one already");
    describe_counter!(CACHE_REQUESTS, Unit::Count, "what was asked of a cache, and whether it was there");
    describe_counter!(CACHE_FAILURES, Unit::Count, "loads of a cache that failed");
    describe_counter!(
        CACHE_STALE,
        Unit::Count,
        "answers that had ended, and were given since the load failed"
    );
    describe_counter!(CACHE_REMOVALS, Unit::Count, "entries removed from a cache, by cause");
    describe_gauge!(CACHE_BYTES, Unit::Bytes, "what the entries of a cache take");
    describe_counter!(
        HTTP_REFUSED,
        Unit::Count,
        "connections that could not be served, by listener and reason"
    );
    describe_gauge!(BUILD_INFO, Unit::Count, "1, by the version and the commit that was built");
    begin_at_zero();
}

/// A counter that is absent until something happens hides its first increment from every alert.
fn begin_at_zero() {
    let plain = [CPU_REFUSED, HTTP_PANICS, SQLITE_COMMITS, SQLITE_WRITES, SQLITE_LOST, LOG_LINES_DROPPED];
    for name in plain {
        counter!(name).increment(0);
    }
    for reason in CUTS {
        counter!(HTTP_CONNECTIONS_CUT, "reason" => reason).increment(0);
    }
}

/// A table whose rows are read one by one.
pub fn may_be_unreadable(what: &'static str) {
    counter!(UNREADABLE, "what" => what).increment(0);
}

/// A contained task that may fail.
pub(crate) fn task_may_fail(task: &'static str) {
    counter!(TASK_FAILURES, "task" => task).increment(0);
}

/// One connection, or one request head, that could not be served.
pub(crate) fn refused(listener: &'static str, refusal: Refusal) {
    counter!(HTTP_REFUSED, "listener" => listener, "reason" => refusal.as_str()).increment(1);
}

/// The metrics of a listener's requests. What the recorder finds by labels is looked up once.
pub(crate) struct Requests {
    listener: &'static str,
    in_flight: Gauge,
    routes: RwLock<HashMap<Box<str>, Route>>,
}

#[derive(Default)]
struct Route(HashMap<(&'static str, u16), (Counter, Histogram)>);

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requests").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Requests {
    pub(crate) fn new(listener: &'static str) -> Self {
        let in_flight = gauge!(HTTP_IN_FLIGHT, "listener" => listener);
        counter!(HTTP_SHED, "listener" => listener).increment(0);
        for refusal in Refusal::ALL {
            counter!(HTTP_REFUSED, "listener" => listener, "reason" => refusal.as_str()).increment(0);
        }
        Self { listener, in_flight, routes: RwLock::default() }
    }

    /// One more that runs.
    pub(crate) fn count(&self) -> Counted {
        Counted::new(self.in_flight.clone())
    }

    /// One that was answered.
    pub(crate) fn ended(&self, route: &str, method: &'static str, status: u16, took: Duration) {
        let record = |(requests, duration): &(Counter, Histogram)| {
            requests.increment(1);
            duration.record(took);
        };
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = routes.get(route).and_then(|route| route.0.get(&(method, status))) {
            return record(known);
        }
        drop(routes);
        let labels = [
            ("listener", self.listener.to_owned()),
            ("route", route.to_owned()),
            ("method", method.to_owned()),
            ("status", status.to_string()),
        ];
        let duration = histogram!(HTTP_DURATION, "listener" => self.listener, "route" => route.to_owned());
        counter!(HTTP_SLOW_POLLS, "route" => route.to_owned()).increment(0);
        let new = (counter!(HTTP_REQUESTS, &labels), duration);
        record(&new);
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.entry(route.into()).or_default().0.insert((method, status), new);
    }

    /// One that was sent away at once.
    pub(crate) fn shed(&self, method: &'static str) {
        self.ended("shed", method, 503, Duration::ZERO);
        counter!(HTTP_SHED, "listener" => self.listener).increment(1);
    }
}

/// One poll of a handler that took too long.
pub(crate) fn slow_poll(route: &str) {
    counter!(HTTP_SLOW_POLLS, "route" => route.to_owned()).increment(1);
}

/// The gauge of work that waits for a processor thread.
pub(crate) fn cpu_waiting() -> Gauge {
    gauge!(CPU_WAITING)
}

/// The gauge of work that a processor thread does.
pub(crate) fn cpu_running() -> Gauge {
    gauge!(CPU_RUNNING)
}

/// Work that found the queue full.
pub(crate) fn cpu_refused() {
    counter!(CPU_REFUSED).increment(1);
}

/// The gauge of connections of a listener.
pub(crate) fn connections(listener: &'static str) -> Gauge {
    gauge!(HTTP_CONNECTIONS, "listener" => listener)
}

/// One handler that panicked.
pub(crate) fn handler_panicked() {
    counter!(HTTP_PANICS).increment(1);
}

/// One connection that the host ended or refused.
pub(crate) fn connection_cut(reason: &'static str) {
    counter!(HTTP_CONNECTIONS_CUT, "reason" => reason).increment(1);
}

/// One failure of a contained task.
pub(crate) fn task_failed(task: &'static str) {
    counter!(TASK_FAILURES, "task" => task).increment(1);
}

/// One commit of the SQLite writer, with the number of writes in it.
pub(crate) fn sqlite_committed(writes: usize) {
    counter!(SQLITE_COMMITS).increment(1);
    counter!(SQLITE_WRITES).increment(writes as u64);
}

/// One transaction that was lost.
pub(crate) fn sqlite_lost() {
    counter!(SQLITE_LOST).increment(1);
}

/// How long a write waited for its commit.
pub(crate) fn breaker_open(dependency: &'static str, open: bool) {
    gauge!(BREAKER_OPEN, "dependency" => dependency).set(f64::from(u8::from(open)));
}

pub(crate) fn sqlite_write_took(took: Duration) {
    histogram!(SQLITE_WRITE_DURATION).record(took);
}

/// The number of log lines dropped so far.
pub(crate) fn log_lines_dropped(total: u64) {
    counter!(LOG_LINES_DROPPED).absolute(total);
}

/// A row could not be read.
pub(crate) fn unreadable(what: &'static str) {
    counter!(UNREADABLE, "what" => what).increment(1);
}

/// Whether as many connections are open as may be.
pub(crate) fn at_limit(listener: &'static str, reached: bool) {
    gauge!(HTTP_AT_LIMIT, "listener" => listener).set(f64::from(u8::from(reached)));
}

/// Whether requests are sent away since memory is nearly used up.
pub(crate) fn shedding(shedding: bool) {
    gauge!(SHEDDING).set(f64::from(u8::from(shedding)));
}

/// How much memory is used, of how much.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
pub(crate) fn memory(used: u64, limit: u64) {
    gauge!(MEMORY_USED).set(used as f64);
    gauge!(MEMORY_LIMIT).set(limit as f64);
}

/// How long connections of a pool are waited for.
pub(crate) fn pool_waits(pool: &'static str) -> Histogram {
    counter!(POOL_NESTED, "pool" => pool).increment(0);
    histogram!(POOL_WAIT, "pool" => pool)
}

/// How a pool stands.
pub(crate) fn pool(pool: &'static str, status: Status) {
    let used = status.size.saturating_sub(status.available);
    for (state, count) in [("used", used), ("available", status.available), ("waiting", status.waiting)] {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        gauge!(POOL, "pool" => pool, "state" => state).set(count);
    }
}

/// A connection that is asked for by what holds one already.
pub(crate) fn pool_nested(pool: &'static str) {
    counter!(POOL_NESTED, "pool" => pool).increment(1);
}

/// How a cache stands.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
pub(crate) fn cache(cache: &'static str, status: cache::Status) {
    counter!(CACHE_REQUESTS, "cache" => cache, "result" => "hit").absolute(status.hits);
    counter!(CACHE_REQUESTS, "cache" => cache, "result" => "miss").absolute(status.misses);
    counter!(CACHE_FAILURES, "cache" => cache).absolute(status.failed);
    counter!(CACHE_STALE, "cache" => cache).absolute(status.stale);
    let removals = [("size", status.evicted), ("expired", status.expired), ("forgotten", status.forgotten)];
    for (cause, count) in removals {
        counter!(CACHE_REMOVALS, "cache" => cache, "cause" => cause).absolute(count);
    }
    gauge!(CACHE_BYTES, "cache" => cache).set(status.bytes as f64);
}

/// Something that is counted while it exists: the gauge falls when the value drops, by any path.
pub struct Counted(Gauge);

impl Counted {
    /// One more.
    pub fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counted")
    }
}
