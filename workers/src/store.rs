//! The stores of jobs.

pub mod postgres;
pub mod redis;
pub mod sqlite;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_server::drain::Drain;
use perennial_server::pool::sql;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::ledger::{Cancelled, Filter, JobView, Ledger};
use crate::queue::{Claim, Claims, Depth, Held, Lapsed, NewJob, Queue, Renewal, Renewed, Result, Settlement};
use crate::wake::Wake;
use postgres::PostgresQueue;
use redis::RedisQueue;
use sqlite::SqliteQueue;

/// The tables of jobs that are kept beside what they are about.
pub const TABLES: sql::Tables =
    sql::Tables { module: "jobs", sqlite: sqlite::MIGRATIONS.steps, postgres: postgres::MIGRATIONS.steps };

/// The store that the settings name.
#[derive(Clone, Debug)]
pub enum Store {
    /// A file of our own.
    Sqlite(SqliteQueue),
    /// A Postgres server, shared with other processes.
    Postgres(PostgresQueue),
    /// A Redis server, shared with other processes.
    Redis(RedisQueue),
}

impl Store {
    /// To be called after the commit of a transaction that added jobs to these queues.
    pub(crate) fn committed(&self, queues: &BTreeSet<&str>) {
        match self {
            Self::Sqlite(store) => store.wake().queues(queues.iter().copied()),
            Self::Postgres(store) => store.woken(queues.iter().copied()),
            Self::Redis(store) => store.committed(),
        }
    }
}

/// The same method of whichever store it is.
macro_rules! either {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Sqlite($store) => $call,
            Self::Postgres($store) => $call,
            Self::Redis($store) => $call,
        }
    };
}

impl Queue for Store {
    async fn enqueue(&self, jobs: Vec<NewJob>) -> Result<Vec<Uuid>> {
        either!(self, store => store.enqueue(jobs).await)
    }

    async fn claim(&self, claim: Claim) -> Result<Claims> {
        either!(self, store => store.claim(claim).await)
    }

    async fn renew(&self, renewals: Vec<Renewal>, lease: Duration) -> Result<Vec<Renewed>> {
        either!(self, store => store.renew(renewals, lease).await)
    }

    async fn record(&self, held: Held, queue: Arc<str>, checkpoint: String) -> Result<bool> {
        either!(self, store => store.record(held, queue, checkpoint).await)
    }

    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<bool>> {
        either!(self, store => store.settle(settlements).await)
    }

    async fn lapsed(&self, limit: usize, worker: String, lease: Duration) -> Result<Lapsed> {
        either!(self, store => store.lapsed(limit, worker, lease).await)
    }

    async fn measure(&self, queue: Arc<str>) -> Result<Depth> {
        either!(self, store => store.measure(queue).await)
    }

    fn wake(&self) -> &Wake {
        either!(self, store => store.wake())
    }

    async fn listen(&self, drain: Drain) -> anyhow::Result<()> {
        either!(self, store => store.listen(drain).await)
    }
}

impl Ledger for Store {
    async fn list(&self, filter: Filter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        either!(self, store => store.list(filter, cursor, limit).await)
    }

    async fn show(&self, id: Uuid) -> Result<Option<JobView>> {
        either!(self, store => store.show(id).await)
    }

    async fn retry(&self, filter: Filter) -> Result<usize> {
        either!(self, store => store.retry(filter).await)
    }

    async fn discard(&self, filter: Filter) -> Result<usize> {
        either!(self, store => store.discard(filter).await)
    }

    async fn cancel(&self, id: Uuid, reason: String) -> Result<Cancelled> {
        either!(self, store => store.cancel(id, reason).await)
    }

    async fn pause(&self, queue: String, paused: bool) -> Result<()> {
        either!(self, store => store.pause(queue, paused).await)
    }

    async fn paused(&self) -> Result<Vec<String>> {
        either!(self, store => store.paused().await)
    }

    async fn ended(&self) -> Result<Vec<(String, u64)>> {
        either!(self, store => store.ended().await)
    }

    async fn prune(&self, older: Duration) -> Result<usize> {
        either!(self, store => store.prune(older).await)
    }
}

/// JSON for a column. What is written here cannot fail to be JSON.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// What [`json`] wrote; the default for nothing, and for what others wrote.
fn read_json<T: DeserializeOwned + Default>(text: Option<String>) -> T {
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// A payload as it is stored, to be shown.
fn from_json(payload: String) -> Option<Box<RawValue>> {
    RawValue::from_string(payload).ok()
}

/// The time now by this machine's clock, in milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// A time in milliseconds since 1970.
fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or_default()
}

/// A wait in milliseconds.
pub(crate) fn millis(wait: Duration) -> i64 {
    later(0, wait)
}

/// In milliseconds, and never beyond what a timestamp can be.
fn later(now: i64, wait: Duration) -> i64 {
    const END: i64 = 253_402_300_799_000;
    now.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)).min(END)
}
