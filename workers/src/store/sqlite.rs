//! Jobs in the embedded store.
//!
//! A job is a row from its enqueueing to its end. Every change of it goes through the store's single writer,
//! and so many of them share one commit.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_server::pool::sqlite::{Migrations, Sqlite};
use rusqlite::{Connection, OptionalExtension, Row, named_params};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::job::Registry;
use crate::lease::BootTime;
use crate::queue::{Claim, Claimed, Claims, Held, NewJob, Queue, Result};
use crate::state::{Event, Spent, State, Transition, next};

/// The tables of the engine.
pub const MIGRATIONS: Migrations = Migrations {
    module: "jobs",
    steps: &["CREATE TABLE jobs (
        id          BLOB PRIMARY KEY,       -- UUID version 7
        kind        TEXT NOT NULL,
        queue       TEXT NOT NULL,
        priority    INTEGER NOT NULL,       -- lower goes first
        state       TEXT NOT NULL,          -- scheduled, ready, running, dead
        payload     TEXT NOT NULL,          -- JSON
        run_at      INTEGER NOT NULL,       -- milliseconds since 1970: when it is due
        epoch       INTEGER NOT NULL DEFAULT 0,
        worker      TEXT,
        lease_until INTEGER,                -- milliseconds since the machine was started
        failures    INTEGER NOT NULL DEFAULT 0,
        recoveries  INTEGER NOT NULL DEFAULT 0,
        error       TEXT,
        created_at  INTEGER NOT NULL,
        ended_at    INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX jobs_ready ON jobs (queue, priority, run_at) WHERE state = 'ready';
    CREATE INDEX jobs_scheduled ON jobs (queue, run_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_leases ON jobs (lease_until) WHERE state = 'running';
    CREATE INDEX jobs_dead ON jobs (ended_at) WHERE state = 'dead';"],
};

/// How many lapsed leases are dealt with in one transaction.
const RESCUE_AT_ONCE: usize = 100;

/// The queue in an embedded store. A cheap handle.
#[derive(Clone, Debug)]
pub struct SqliteQueue {
    store: Sqlite,
    wake: Arc<Notify>,
}

impl SqliteQueue {
    /// The queue in `store`, whose [`MIGRATIONS`] have been applied.
    pub fn new(store: Sqlite) -> Self {
        Self { store, wake: Arc::new(Notify::new()) }
    }

    /// To be called after the commit of a transaction that used [`insert_jobs`].
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Takes every running job from its worker, at boot: the lock on the store says that no other process
    /// can hold one, so nobody has to wait for leases to lapse.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn rescue_all(&self, registry: &Arc<Registry>) -> Result<usize> {
        let mut rescued = 0;
        loop {
            let registry = Arc::clone(registry);
            let some = self.store.write(move |tx| rescue(tx, i64::MAX, &registry)).await?;
            rescued += some;
            if some < RESCUE_AT_ONCE {
                return Ok(rescued);
            }
        }
    }
}

/// Adds jobs within a transaction of the caller's, so that they exist if and only if the rows do that they
/// are about. Call [`SqliteQueue::wake`] after the commit.
///
/// # Errors
/// When SQLite refuses.
pub fn insert_jobs(tx: &Connection, jobs: &[NewJob]) -> rusqlite::Result<()> {
    let now = now_ms();
    let mut insert = tx.prepare_cached(
        "INSERT INTO jobs (id, kind, queue, priority, state, payload, run_at, created_at)
         VALUES (:id, :kind, :queue, :priority, :state, :payload, :run_at, :now)
         ON CONFLICT (id) DO NOTHING",
    )?;
    for job in jobs {
        let run_at = job.run_at.map_or(now, Timestamp::as_millisecond);
        let state = if run_at > now { State::Scheduled } else { State::Ready };
        insert.execute(named_params! {
            ":id": job.id.as_bytes(), ":kind": job.kind, ":queue": job.queue, ":priority": job.priority,
            ":state": state.as_str(), ":payload": job.payload, ":run_at": run_at, ":now": now,
        })?;
    }
    Ok(())
}

impl Queue for SqliteQueue {
    async fn enqueue(&self, jobs: Vec<NewJob>) -> Result<()> {
        self.store.write(move |tx| insert_jobs(tx, &jobs)).await?;
        self.wake();
        Ok(())
    }

    async fn claim(&self, claim: Claim) -> Result<Claims> {
        Ok(self.store.write(move |tx| take(tx, &claim, now_ms())).await?)
    }

    async fn renew(&self, held: Vec<Held>, lease: Duration) -> Result<Vec<Held>> {
        let renew = move |tx: &Connection| {
            let mut update = tx.prepare_cached(
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND epoch = ? AND state = 'running'",
            )?;
            let until = lease_end(lease);
            let mut kept = Vec::with_capacity(held.len());
            for held in held {
                if update.execute((until, held.id.as_bytes(), held.epoch))? == 1 {
                    kept.push(held);
                }
            }
            Ok(kept)
        };
        Ok(self.store.write(renew).await?)
    }

    async fn settle(&self, held: Held, transition: Transition) -> Result<bool> {
        let wakes = matches!(transition, Transition::Again { .. });
        let settled = self.store.write(move |tx| settle(tx, held, &transition, now_ms())).await?;
        if wakes && settled {
            self.wake();
        }
        Ok(settled)
    }

    async fn rescue(&self, registry: Arc<Registry>) -> Result<usize> {
        let now = BootTime::now().millis();
        let rescued = self.store.write(move |tx| rescue(tx, now, &registry)).await?;
        if rescued > 0 {
            self.wake();
        }
        Ok(rescued)
    }

    async fn woken(&self) {
        self.wake.notified().await;
    }
}

fn take(tx: &Connection, claim: &Claim, now: i64) -> rusqlite::Result<Claims> {
    // What has become due is made ready first, so that a crowd that is not due yet is never looked through.
    tx.prepare_cached(
        "UPDATE jobs SET state = 'ready' WHERE state = 'scheduled' AND queue = ? AND run_at <= ?",
    )?
    .execute((claim.queue, now))?;
    let mut update = tx.prepare_cached(
        "UPDATE jobs SET state = 'running', epoch = epoch + 1, worker = :worker, lease_until = :until
         WHERE id IN (SELECT id FROM jobs WHERE state = 'ready' AND queue = :queue
                      ORDER BY priority, run_at LIMIT :limit)
         RETURNING id, kind, payload, epoch, failures, recoveries, run_at",
    )?;
    let parameters = named_params! {
        ":worker": claim.worker, ":until": lease_end(claim.lease),
        ":queue": claim.queue, ":limit": claim.limit,
    };
    let jobs =
        update.query_map(parameters, |row| claimed(row, now))?.collect::<rusqlite::Result<Vec<_>>>()?;
    let next_at: Option<i64> = tx
        .prepare_cached("SELECT min(run_at) FROM jobs WHERE state = 'scheduled' AND queue = ?")?
        .query_row([claim.queue], |row| row.get(0))?;
    Ok(Claims { jobs, next_in: next_at.map(|at| since(now, at)) })
}

fn claimed(row: &Row<'_>, now: i64) -> rusqlite::Result<Claimed> {
    Ok(Claimed {
        id: Uuid::from_bytes(row.get("id")?),
        kind: row.get("kind")?,
        payload: row.get("payload")?,
        epoch: row.get("epoch")?,
        spent: Spent { failures: row.get("failures")?, recoveries: row.get("recoveries")? },
        waited: since(row.get("run_at")?, now),
    })
}

fn settle(tx: &Connection, held: Held, transition: &Transition, now: i64) -> rusqlite::Result<bool> {
    let (state, run_at, spent, error, ended_at) = match transition {
        Transition::Finished => {
            let mut delete =
                tx.prepare_cached("DELETE FROM jobs WHERE id = ? AND epoch = ? AND state = 'running'")?;
            return Ok(delete.execute((held.id.as_bytes(), held.epoch))? == 1);
        }
        Transition::Again { at, spent, error } => {
            let at = at.as_millisecond();
            let state = if at > now { State::Scheduled } else { State::Ready };
            (state, Some(at), spent, error.as_deref(), None)
        }
        Transition::Dead { reason, spent } => (State::Dead, None, spent, Some(reason.as_str()), Some(now)),
    };
    let mut update = tx.prepare_cached(
        "UPDATE jobs SET state = :state, run_at = coalesce(:run_at, run_at), failures = :failures,
                recoveries = :recoveries, error = coalesce(:error, error), ended_at = :ended_at,
                worker = NULL, lease_until = NULL
         WHERE id = :id AND epoch = :epoch AND state = 'running'",
    )?;
    let changed = update.execute(named_params! {
        ":state": state.as_str(), ":run_at": run_at, ":failures": spent.failures,
        ":recoveries": spent.recoveries, ":error": error, ":ended_at": ended_at,
        ":id": held.id.as_bytes(), ":epoch": held.epoch,
    })?;
    Ok(changed == 1)
}

fn rescue(tx: &Connection, lapsed_before: i64, registry: &Registry) -> rusqlite::Result<usize> {
    let lapsed: Vec<(Held, String, Spent)> = tx
        .prepare_cached(
            "SELECT id, epoch, kind, failures, recoveries FROM jobs
             WHERE state = 'running' AND lease_until < ? ORDER BY lease_until LIMIT ?",
        )?
        .query_map((lapsed_before, RESCUE_AT_ONCE), |row| {
            let held = Held { id: Uuid::from_bytes(row.get(0)?), epoch: row.get(1)? };
            Ok((held, row.get(2)?, Spent { failures: row.get(3)?, recoveries: row.get(4)? }))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let now = now_ms();
    for (held, kind, spent) in &lapsed {
        let time = Timestamp::from_millisecond(now).unwrap_or_default();
        let transition = next(&registry.budget(kind), *spent, Event::Lapsed, time, 0.0);
        settle(tx, *held, &transition, now)?;
    }
    Ok(lapsed.len())
}

/// The number of jobs of a queue in each state, for tests and status pages.
///
/// # Errors
/// When SQLite refuses.
pub fn count(tx: &Connection, queue: &str, state: State) -> rusqlite::Result<usize> {
    tx.prepare_cached("SELECT count(*) FROM jobs WHERE queue = ? AND state = ?")?
        .query_row((queue, state.as_str()), |row| row.get(0))
        .optional()
        .map(Option::unwrap_or_default)
}

/// When a lease that begins now ends. By the clock that leases are measured by everywhere: a step of the wall
/// clock takes no job from a worker. Boot takes them all ([`SqliteQueue::rescue_all`]), so that it does not
/// matter that this clock begins anew with the machine.
fn lease_end(lease: Duration) -> i64 {
    BootTime::now().after(lease).millis()
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// From `earlier` to `later`, both in milliseconds; nothing when they are the other way round.
fn since(earlier: i64, later: i64) -> Duration {
    Duration::from_millis(u64::try_from(later.saturating_sub(earlier)).unwrap_or_default())
}
