//! The relay publishes entries of the outbox, and compares published entries with the jobs in Redis.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::Drain;
use perennial_store::pool::sql::{self, Dialect, Row, Tx};
use perennial_store::{transact, values};
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

use super::Outbox;
use crate::encoding::{millis, now_ms};
use crate::job::{Unique, UniqueUntil};
use crate::metrics;
use crate::queue::{Due, NewJob, Queue, Result};
use crate::store::redis::{FoundJob, RedisQueue};

/// Highest number of entries that are published at once.
const BATCH: usize = 500;
/// How often published entries are compared with the jobs in Redis.
const AUDIT: Duration = Duration::from_secs(5);
/// Time since its publication after which an entry is compared.
const AUDIT_AFTER: Duration = Duration::from_secs(15);
/// How often the relay looks for entries that it was not woken for.
const POLL: Duration = Duration::from_millis(500);

impl Outbox {
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
