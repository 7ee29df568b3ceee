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

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::backoff::Backoff;
use perennial_runtime::drain::Drain;
use perennial_store::pool::sql::{self, Dialect, Row, Store, Tables, Tx};
use perennial_store::{transact, values};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};
use uuid::Uuid;

use crate::job::{Unique, UniqueUntil};
use crate::metrics;
use crate::queue::{Due, NewJob, Queue, Result};
use crate::store::redis::{FoundJob, RedisQueue};
use crate::store::{json, millis, now_ms};

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

/// Highest number of entries that are published at once.
const BATCH: usize = 500;
/// How often the relay looks for entries that it was not woken for.
const POLL: Duration = Duration::from_millis(500);
/// How often published entries are compared with the jobs in Redis.
const AUDIT: Duration = Duration::from_secs(5);
/// Time since its publication after which an entry is compared.
const AUDIT_AFTER: Duration = Duration::from_secs(15);
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
            Due::In(wait) => Some(now.saturating_add(millis(wait))),
            Due::At(time) => Some(time.as_millisecond()),
        };
        let until = job.unique.as_ref().map(|unique| match unique.until {
            UniqueUntil::Started => "started".to_owned(),
            UniqueUntil::Ended => "ended".to_owned(),
            UniqueUntil::Window(window) => millis(window).to_string(),
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

    /// Publishes the entries of the outbox, until the soft phase of the drain.
    ///
    /// # Errors
    /// When the store or Redis fails. The relay is to be run again then.
    pub async fn relay(self, queue: RedisQueue, drain: Drain) -> anyhow::Result<()> {
        let mut audit_at = Instant::now();
        let mut audited_to = 0;
        loop {
            while self.publish(&queue).await? == BATCH {}
            if Instant::now() >= audit_at {
                audit_at = Instant::now() + AUDIT;
                audited_to = self.audit(&queue, audited_to).await?;
            }
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(POLL) => {}
                // Entries of jobs that still run are left to another process, or to the next one.
                () = drain.soft() => return Ok(()),
            }
        }
    }

    /// Takes some entries and publishes them, and returns how many.
    async fn publish(&self, queue: &RedisQueue) -> Result<usize> {
        // Entries are marked first: two relays never publish the same entry, so no job comes again that has
        // settled meanwhile. A relay that dies in between leaves its entries to the audit.
        let skip = if self.store.dialect() == Dialect::Postgres { "FOR UPDATE SKIP LOCKED" } else { "" };
        let sql = format!(
            "UPDATE outbox SET published_at = ?1
             WHERE id IN (SELECT id FROM outbox WHERE published_at IS NULL ORDER BY id LIMIT ?2 {skip})
             RETURNING *"
        );
        let rows = self.change(sql, values![now_ms(), BATCH].to_vec()).await?;
        let jobs: Vec<NewJob> = sql::each(&rows, "outbox", "id", read);
        if jobs.len() < rows.len() {
            self.bury(&rows).await?;
        }
        let ids: Vec<Uuid> = jobs.iter().map(|job| job.id).collect();
        let taken = match queue.enqueue(jobs).await {
            Ok(taken) => taken,
            Err(error) => {
                self.unmark(&ids).await?;
                return Err(error);
            }
        };
        // Another job has the unique key: that one will settle.
        let others = ids.iter().zip(taken).filter(|(id, taken)| *id != taken).map(|(id, _)| *id);
        self.settled(others.collect()).await;
        metrics::relayed(ids.len());
        Ok(rows.len())
    }

    /// Marks the entries that cannot be read as published at the end of time: they stay as they are, and no
    /// query finds them again.
    async fn bury(&self, rows: &[Row]) -> sql::Result<()> {
        for row in rows.iter().filter(|row| read(row).is_err()) {
            let Some(id) = row.value("id") else { continue };
            let sql = "UPDATE outbox SET published_at = ? WHERE id = ?";
            self.store.execute(sql, values![i64::MAX, id.clone()]).await?;
        }
        Ok(())
    }

    /// Compares entries that were published a while ago, after `from`, with the jobs in Redis. Returns where
    /// to go on.
    async fn audit(&self, queue: &RedisQueue, from: i64) -> Result<i64> {
        let before = now_ms().saturating_sub(millis(AUDIT_AFTER));
        let sql = "SELECT id, queue, published_at FROM outbox WHERE published_at > ?1 AND published_at <= ?2
                   ORDER BY published_at LIMIT ?3";
        let rows = self.store.query(sql, values![from, before, 20 * BATCH]).await?;
        let mut by_queue = BTreeMap::<String, Vec<Uuid>>::new();
        let entry = |row: &Row| Ok((row.get::<String>("queue")?, row.get::<Uuid>("id")?));
        for (queue, id) in sql::each(&rows, "outbox", "id", entry) {
            by_queue.entry(queue).or_default().push(id);
        }
        let (mut missing, mut ended) = (Vec::new(), Vec::new());
        for (name, ids) in by_queue {
            for some in ids.chunks(BATCH) {
                for (id, found) in some.iter().zip(queue.find(&name, some).await?) {
                    match found {
                        FoundJob::Nowhere => missing.push(*id),
                        FoundJob::Ended => ended.push(*id),
                        FoundJob::Waiting => {}
                    }
                }
            }
        }
        // The process that settled these jobs died before it deleted their entries.
        self.settled(ended).await;
        if !missing.is_empty() {
            warn!(jobs = missing.len(), "published, and not in Redis: publishing again");
            self.unmark(&missing).await?;
        }
        // Entries after the last row may have the same time.
        Ok(if rows.len() < 20 * BATCH {
            0
        } else {
            rows.last().map_or(Ok(1), |row| row.get::<i64>("published_at"))? - 1
        })
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
        let list = json(&ids.iter().map(|id| id.simple().to_string()).collect::<Vec<_>>());
        let these = self.store.dialect().is_among("id", "?");
        self.store.execute(format!("{statement} WHERE {these}"), values![list]).await.map(drop)
    }

    /// Runs a statement that changes rows, and returns them.
    async fn change(&self, sql: String, parameters: Vec<sql::Value>) -> sql::Result<Vec<Row>> {
        transact!(&self.store, tx => tx.query(&sql, &parameters))
    }
}

fn read(row: &Row) -> sql::Result<NewJob> {
    let unique = match (row.get::<Option<String>>("unique_key")?, row.get::<Option<String>>("unique_until")?)
    {
        (Some(key), Some(until)) => Some(Unique {
            key,
            until: match until.as_str() {
                "started" => UniqueUntil::Started,
                "ended" => UniqueUntil::Ended,
                window => UniqueUntil::Window(Duration::from_millis(window.parse().unwrap_or_default())),
            },
        }),
        _ => None,
    };
    let due_at: Option<i64> = row.get("due_at")?;
    Ok(NewJob {
        id: row.get("id")?,
        kind: row.get::<String>("kind")?.into(),
        queue: row.get::<String>("queue")?.into(),
        priority: i16::try_from(row.get::<i64>("priority")?).unwrap_or_default(),
        payload: row.get("payload")?,
        due: due_at.and_then(|at| Timestamp::from_millisecond(at).ok()).map_or(Due::Now, Due::At),
        unique,
        trace: row.get("trace")?,
        recoveries: row.get("recoveries")?,
    })
}
