//! The metrics of pools, stores and caches, with one constant for each name.

use std::time::Duration;

use metrics::{
    Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::cache::status::CacheStatus;
use crate::pool::status::PoolStatus;

/// Counter: transactions that the SQLite writer committed.
pub const SQLITE_COMMITS: &str = "perennial_sqlite_commits_total";
/// Counter: writes in the transactions that the SQLite writer committed.
pub const SQLITE_WRITES: &str = "perennial_sqlite_writes_total";
/// Counter: transactions that were lost, with every write in them.
pub const SQLITE_LOST: &str = "perennial_sqlite_lost_total";
/// Histogram, seconds: time from the request for a write to its commit.
pub const SQLITE_WRITE_DURATION: &str = "perennial_sqlite_write_duration_seconds";
/// Gauge by `pool`, `state` (used, available, waiting): connections, and callers that wait for one.
pub const POOL: &str = "perennial_pool";
/// Histogram by `pool`, seconds: time that a caller waited for a connection.
pub const POOL_WAIT: &str = "perennial_pool_wait_seconds";
/// Counter by `pool`: connections requested by tasks that already held one. It should stay at 0.
pub const POOL_NESTED: &str = "perennial_pool_nested_total";
/// Counter by `cache`, `result` (hit, miss): lookups in a cache. A miss is a load.
pub const CACHE_REQUESTS: &str = "perennial_cache_requests_total";
/// Counter by `cache`: loads that failed.
pub const CACHE_FAILURES: &str = "perennial_cache_load_failures_total";
/// Counter by `cache`: expired answers that were returned because the load failed.
pub const CACHE_STALE: &str = "perennial_cache_stale_total";
/// Counter by `cache`, `cause` (size, expired, forgotten): entries that were removed.
pub const CACHE_REMOVALS: &str = "perennial_cache_removals_total";
/// Gauge by `cache`, bytes: size of its entries.
pub const CACHE_BYTES: &str = "perennial_cache_bytes";
/// Counter by `what`: rows of a store that could not be read. A row counts every time.
pub const UNREADABLE: &str = "perennial_unreadable_rows_total";

/// Describes the metrics to the recorder.
pub fn describe() {
    describe_counter!(UNREADABLE, Unit::Count, "rows of a store that could not be read");
    describe_counter!(SQLITE_COMMITS, Unit::Count, "transactions committed by the SQLite writer");
    describe_counter!(SQLITE_WRITES, Unit::Count, "writes inside those transactions");
    describe_counter!(SQLITE_LOST, Unit::Count, "transactions that were lost, with every write in them");
    describe_histogram!(SQLITE_WRITE_DURATION, Unit::Seconds, "time from a write's request to its commit");
    describe_gauge!(POOL, Unit::Count, "connections of a pool, and callers that wait for one");
    describe_histogram!(POOL_WAIT, Unit::Seconds, "time that a caller waited for a connection of a pool");
    describe_counter!(POOL_NESTED, Unit::Count, "connections requested by tasks that already held one");
    describe_counter!(CACHE_REQUESTS, Unit::Count, "lookups in a cache, by their result");
    describe_counter!(CACHE_FAILURES, Unit::Count, "loads of a cache that failed");
    describe_counter!(CACHE_STALE, Unit::Count, "expired answers returned because the load failed");
    describe_counter!(CACHE_REMOVALS, Unit::Count, "entries removed from a cache, by cause");
    describe_gauge!(CACHE_BYTES, Unit::Bytes, "size of the entries of a cache");
    for name in [SQLITE_COMMITS, SQLITE_WRITES, SQLITE_LOST] {
        counter!(name).increment(0);
    }
}

/// Registers the counter of unreadable rows for a table whose rows are read one by one.
pub fn may_be_unreadable(what: &'static str) {
    counter!(UNREADABLE, "what" => what).increment(0);
}

/// Counts one commit of the SQLite writer, and the writes in it.
pub(crate) fn sqlite_committed(writes: usize) {
    counter!(SQLITE_COMMITS).increment(1);
    counter!(SQLITE_WRITES).increment(writes as u64);
}

/// Counts one lost transaction.
pub(crate) fn sqlite_lost() {
    counter!(SQLITE_LOST).increment(1);
}

pub(crate) fn sqlite_write_took(took: Duration) {
    histogram!(SQLITE_WRITE_DURATION).record(took);
}

/// Counts one row that could not be read.
pub(crate) fn unreadable(what: &'static str) {
    counter!(UNREADABLE, "what" => what).increment(1);
}

/// The histogram of the waits for a connection of a pool.
pub(crate) fn pool_waits(pool: &'static str) -> Histogram {
    counter!(POOL_NESTED, "pool" => pool).increment(0);
    histogram!(POOL_WAIT, "pool" => pool)
}

/// Publishes the status of a pool.
pub(crate) fn pool(pool: &'static str, status: PoolStatus) {
    let used = status.size.saturating_sub(status.available);
    for (state, count) in [("used", used), ("available", status.available), ("waiting", status.waiting)] {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        gauge!(POOL, "pool" => pool, "state" => state).set(count);
    }
}

/// Counts one connection requested by a task that already holds one.
pub(crate) fn pool_nested(pool: &'static str) {
    counter!(POOL_NESTED, "pool" => pool).increment(1);
}

/// Publishes the status of a cache.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
pub(crate) fn cache(cache: &'static str, status: CacheStatus) {
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
