//! The outbox: jobs of a transaction in one store are published to another store.
//!
//! ```text
//!  transaction: rows + outbox entry ──► commit
//!                                          │ relay: marks it, publishes by job id (which is idempotent)
//!                                          ▼
//!                                        Redis ──► worker ──► settled: the entry is deleted
//!                                          ▲
//!                  audit: published a while ago, and not there? again ──┘
//! ```
//!
//! Only the first step is atomic. An entry stays until its job has settled, so that a Redis that lost its last
//! writes gets the job a second time.

mod relay;

use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use perennial_store::pool::sql::{self, Store, Tables, Tx};
use perennial_store::values;
use tokio::sync::Notify;
use tracing::{info, warn};
use uuid::Uuid;

use crate::encoding::{later, millis, now_ms};
use crate::queue::{Due, NewJob, Result};

/// The table of the outbox.
pub const TABLES: Tables = Tables {
    module: "outbox",
    sqlite: &["CREATE TABLE outbox (
        id           BLOB PRIMARY KEY,
        kind         TEXT NOT NULL,
        queue        TEXT NOT NULL,
        priority     INTEGER NOT NULL,
        payload      TEXT NOT NULL,
        due_at       INTEGER,           -- milliseconds since 1970, as everywhere
        recoveries   INTEGER NOT NULL,
        trace        TEXT,
        unique_key   TEXT,
        unique_until TEXT,              -- started, ended, or the milliseconds of a window
        published_at INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX outbox_waiting ON outbox (id) WHERE published_at IS NULL;
    CREATE INDEX outbox_published ON outbox (published_at) WHERE published_at IS NOT NULL;"],
    postgres: &["CREATE TABLE outbox (
        id           bytea PRIMARY KEY,
        kind         text NOT NULL,
        queue        text NOT NULL,
        priority     bigint NOT NULL,
        payload      text NOT NULL,
        due_at       bigint,
        recoveries   bigint NOT NULL,
        trace        text,
        unique_key   text,
        unique_until text,
        published_at bigint
    );
    CREATE INDEX outbox_waiting ON outbox (id) WHERE published_at IS NULL;
    CREATE INDEX outbox_published ON outbox (published_at) WHERE published_at IS NOT NULL;"],
};

/// Wait between two attempts to delete entries whose jobs have settled.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
/// Number of these attempts.
const ATTEMPTS: u32 = 5;

/// The outbox in a store. A cheap handle.
#[derive(Clone, Debug)]
pub struct Outbox {
    store: Store,
    wake: Arc<Notify>,
}

/// Puts jobs into the outbox, in a transaction of the caller.
///
/// # Errors
/// When the store refuses.
pub async fn insert<T: Tx>(tx: &T, jobs: &[NewJob]) -> sql::Result<()> {
    let sql = "INSERT INTO outbox (id, kind, queue, priority, payload, due_at, recoveries, trace, unique_key,
                                   unique_until)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING";
    for job in jobs {
        let now = now_ms();
        let due_at = match job.due {
            Due::Now => None,
            Due::In(wait) => Some(later(now, wait)),
            Due::At(time) => Some(time.as_millisecond()),
        };
        let until = job.unique.as_ref().map(|unique| match unique.until.scope() {
            (_, Some(window)) => millis(window).to_string(),
            (scope, None) => scope.to_owned(),
        });
        let key = job.unique.as_ref().map(|unique| unique.key.clone());
        let priority = i64::from(job.priority);
        let parameters = values![
            job.id,
            &*job.kind,
            &*job.queue,
            priority,
            &job.payload,
            due_at,
            job.recoveries,
            &job.trace,
            key,
            until,
        ];
        tx.execute(sql, &parameters).await?;
    }
    Ok(())
}

impl Outbox {
    /// Creates the outbox in `store`, where [`TABLES`] have been created.
    pub fn new(store: Store) -> Self {
        Self { store, wake: Arc::default() }
    }

    /// Wakes the relay, because the outbox may have an entry.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Marks these entries as not published.
    async fn unmark(&self, ids: &[Uuid]) -> Result<()> {
        self.on("UPDATE outbox SET published_at = NULL", ids).await?;
        self.wake();
        Ok(())
    }

    /// Deletes the entries of jobs that have ended. An entry that cannot be deleted is published again some
    /// time, and its job runs again.
    pub(crate) async fn settled(&self, ids: Vec<Uuid>) {
        if ids.is_empty() {
            return;
        }
        for failures in 1..=ATTEMPTS {
            match self.on("DELETE FROM outbox", &ids).await {
                Ok(()) => return,
                Err(error) if failures == ATTEMPTS => {
                    warn!(jobs = ids.len(), error = %error, "entries stay in the outbox: their jobs may run again");
                }
                Err(error) => {
                    info!(error = %error, "entries cannot be deleted from the outbox yet");
                    tokio::time::sleep(AGAIN.jittered(failures)).await;
                }
            }
        }
    }

    /// Runs a statement on these entries.
    async fn on(&self, statement: &str, ids: &[Uuid]) -> sql::Result<()> {
        let these = self.store.dialect().is_among("id", "?");
        self.store.execute(format!("{statement} WHERE {these}"), values![sql::hex_list(ids)]).await.map(drop)
    }
}
