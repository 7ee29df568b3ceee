//! Jobs in the embedded store.
//!
//! A job is a row from its enqueueing to its end. Every change of it goes through the store's single writer, so
//! that many changes share one commit. Jobs that were given up or cancelled move to a table of their own.
//!
//! Another program may enqueue with one statement, also while a server runs (it sees the job with its next
//! poll):
//!
//! ```sql
//! INSERT INTO jobs (kind, queue, payload) VALUES ('mail.send', 'default', '{"to": "ada@example.org"}');
//! ```
//!
//! Such a job lacks what the program does for its own jobs: the payload is checked only when the job runs, there
//! is no unique key, and no bound on how much may wait. A kind with limits of its own waits in a queue of its
//! own, `queue/kind`.

mod job_admin;
mod kept;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::Drain;
use perennial_store::pool::sqlite::Sqlite;
use perennial_store::pool::{Migrations, set_apart, sql};
use rusqlite::{Connection, OptionalExtension, Row, ToSql, named_params};
use uuid::Uuid;

use self::kept::KeptStatement;
use crate::cron::ScheduleStates;
use crate::encoding::{json, later, now_ms, read_json, timestamp};
use crate::lease::BootTime;
use crate::queue::{
    Claim, Claimed, Claims, Depth, Due, Held, Lapsed, NewJob, Probed, Queue, Renewal, Renewed, Result,
    Settlement,
};
use crate::state::{Attempts, State, Transition};
use crate::wake::Wake;

/// The tables of the engine.
pub const MIGRATIONS: Migrations = Migrations {
    module: "jobs",
    steps: &[
        "CREATE TABLE jobs (
        id           BLOB PRIMARY KEY DEFAULT (randomblob(16)) CHECK (length(id) = 16),
        kind         TEXT NOT NULL,
        queue        TEXT NOT NULL DEFAULT 'default',
        priority     INTEGER NOT NULL DEFAULT 0 CHECK (priority BETWEEN -32768 AND 32767), -- lower goes first
        state        TEXT NOT NULL DEFAULT 'ready' CHECK (state IN ('scheduled', 'ready', 'running')),
        payload      TEXT NOT NULL CHECK (json_valid(payload) AND length(payload) <= 262144),
        -- milliseconds since 1970, here as everywhere: when it is due
        run_at       INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
        scheduled_at INTEGER,                -- when it was said that it waits for a while
        epoch        INTEGER NOT NULL DEFAULT 0,
        worker       TEXT,
        lease_until  INTEGER,                -- milliseconds since the machine was started
        failures     INTEGER NOT NULL DEFAULT 0,
        recoveries   INTEGER NOT NULL DEFAULT 0,
        recovered_at INTEGER,                -- the first of them
        errors       TEXT,                   -- JSON: the last five
        checkpoint   TEXT,                   -- JSON
        progress     TEXT,                   -- JSON
        trace        TEXT,
        unique_key   TEXT,
        cancelled    TEXT,                   -- why it must not go on
        created_at   INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000 AS INTEGER)),
        -- Other programs write here, too: what could not be read again is refused.
        CHECK (epoch >= 0 AND failures BETWEEN 0 AND 1000000 AND recoveries BETWEEN 0 AND 1000000),
        CHECK (state <> 'running' OR lease_until IS NOT NULL),
        CHECK (run_at BETWEEN 0 AND 253402300799000 AND created_at BETWEEN 0 AND 253402300799000)
    ) WITHOUT ROWID, STRICT;
    CREATE INDEX jobs_ready ON jobs (queue, priority, run_at) WHERE state = 'ready';
    CREATE INDEX jobs_scheduled ON jobs (queue, run_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_waits ON jobs (scheduled_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_leases ON jobs (lease_until) WHERE state = 'running';

    CREATE TABLE job_keys (
        key   TEXT PRIMARY KEY,
        job   BLOB NOT NULL,
        scope TEXT NOT NULL,                 -- started, ended, window
        until INTEGER                        -- of a window
    ) WITHOUT ROWID;

    CREATE TABLE ended_jobs (
        id         BLOB PRIMARY KEY,
        kind       TEXT NOT NULL,
        queue      TEXT NOT NULL,
        priority   INTEGER NOT NULL,
        state      TEXT NOT NULL,            -- dead, cancelled
        payload    TEXT NOT NULL,
        epoch      INTEGER NOT NULL,
        failures   INTEGER NOT NULL,
        recoveries INTEGER NOT NULL,
        errors     TEXT,
        checkpoint TEXT,
        trace      TEXT,
        reason     TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        ended_at   INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX ended_jobs_age ON ended_jobs (ended_at);

    CREATE TABLE paused_queues (queue TEXT PRIMARY KEY) WITHOUT ROWID;",
        "CREATE TABLE schedules (
        name       TEXT PRIMARY KEY,
        definition TEXT NOT NULL,            -- JSON
        timing     TEXT NOT NULL,            -- the expression and the zone that last_fire is about
        last_fire  INTEGER NOT NULL,         -- the last time that was claimed, or when it was known first
        queued     INTEGER,                  -- a time that waits for the job of an earlier one
        paused     INTEGER NOT NULL,         -- as defined
        held       INTEGER,                  -- as an operator wants it
        version    INTEGER NOT NULL,         -- what claims compare and swap
        seen_at    INTEGER NOT NULL          -- when a process last said that it is defined so
    ) WITHOUT ROWID;

    CREATE TABLE schedule_runs (
        id         BLOB PRIMARY KEY,         -- that of its job, if it has one
        schedule   TEXT NOT NULL,
        has_job    INTEGER NOT NULL,
        occurrence INTEGER NOT NULL,
        claimed_at INTEGER NOT NULL,
        cause      TEXT NOT NULL,            -- JSON, as ending
        passed     INTEGER NOT NULL,
        ending     TEXT
    ) WITHOUT ROWID;
    CREATE INDEX schedule_runs_of ON schedule_runs (schedule, claimed_at);",
        // Defaults run in the SQLite library of the program that inserts. This step needs only SQLite 3.31, which has
        // no STRICT tables and no fractions of seconds in unixepoch.
        "ALTER TABLE jobs RENAME TO old_jobs;
    CREATE TABLE jobs (
        id           BLOB PRIMARY KEY DEFAULT (randomblob(16)) CHECK (typeof(id) = 'blob' AND length(id) = 16),
        kind         TEXT NOT NULL,
        queue        TEXT NOT NULL DEFAULT 'default',
        priority     INTEGER NOT NULL DEFAULT 0 CHECK (typeof(priority) = 'integer' AND priority BETWEEN -32768 AND 32767),
        state        TEXT NOT NULL DEFAULT 'ready' CHECK (state IN ('scheduled', 'ready', 'running')),
        payload      TEXT NOT NULL CHECK (typeof(payload) = 'text' AND json_valid(payload) AND length(payload) <= 262144),
        run_at       INTEGER NOT NULL DEFAULT (CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)),
        scheduled_at INTEGER,
        epoch        INTEGER NOT NULL DEFAULT 0,
        worker       TEXT,
        lease_until  INTEGER,
        failures     INTEGER NOT NULL DEFAULT 0,
        recoveries   INTEGER NOT NULL DEFAULT 0,
        recovered_at INTEGER,
        errors       TEXT,
        checkpoint   TEXT,
        progress     TEXT,
        trace        TEXT,
        unique_key   TEXT,
        cancelled    TEXT,
        created_at   INTEGER NOT NULL DEFAULT (CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)),
        CHECK (typeof(kind) = 'text' AND typeof(queue) = 'text'),
        CHECK (typeof(epoch) = 'integer' AND typeof(failures) = 'integer' AND typeof(recoveries) = 'integer'),
        CHECK (epoch >= 0 AND failures BETWEEN 0 AND 1000000 AND recoveries BETWEEN 0 AND 1000000),
        CHECK (state <> 'running' OR lease_until IS NOT NULL),
        CHECK (typeof(run_at) = 'integer' AND typeof(created_at) = 'integer'),
        CHECK (run_at BETWEEN 0 AND 253402300799000 AND created_at BETWEEN 0 AND 253402300799000),
        CHECK (typeof(coalesce(scheduled_at, 0)) = 'integer' AND typeof(coalesce(lease_until, 0)) = 'integer'),
        CHECK (typeof(coalesce(recovered_at, 0)) = 'integer')
    ) WITHOUT ROWID;
    INSERT INTO jobs (id, kind, queue, priority, state, payload, run_at, scheduled_at, epoch, worker, lease_until, failures,
        recoveries, recovered_at, errors, checkpoint, progress, trace, unique_key, cancelled, created_at)
    SELECT id, kind, queue, priority, state, payload, run_at, scheduled_at, epoch, worker, lease_until, failures,
        recoveries, recovered_at, errors, checkpoint, progress, trace, unique_key, cancelled, created_at FROM old_jobs;
    DROP TABLE old_jobs;
    CREATE INDEX jobs_ready ON jobs (queue, priority, run_at) WHERE state = 'ready';
    CREATE INDEX jobs_scheduled ON jobs (queue, run_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_waits ON jobs (scheduled_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_leases ON jobs (lease_until) WHERE state = 'running';",
    ],
};

/// The queue in an embedded store. A cheap handle.
#[derive(Clone, Debug)]
pub struct SqliteQueue {
    store: Sqlite,
    wake: Wake,
    /// Cache of when each queue has a job to claim.
    next: Arc<KeptStatement<BTreeMap<Arc<str>, Option<i64>>>>,
    /// Cache of how many jobs there are in each queue.
    depths: Arc<KeptStatement<BTreeMap<Arc<str>, Depth>>>,
    /// Cache of how many ended jobs each queue keeps.
    ended: Arc<KeptStatement<Vec<(String, u64)>>>,
    /// Cache of the states of schedules.
    standings: Arc<KeptStatement<ScheduleStates>>,
}

impl SqliteQueue {
    /// Creates the queue in `store`, whose [`MIGRATIONS`] have been applied.
    pub fn new(store: Sqlite) -> Self {
        Self {
            store,
            wake: Wake::default(),
            next: Arc::default(),
            depths: Arc::default(),
            ended: Arc::default(),
            standings: Arc::default(),
        }
    }

    /// Returns the states of schedules, from the cache or from `read`.
    pub(super) async fn standings(
        &self,
        read: impl Future<Output = Result<ScheduleStates>>,
    ) -> Result<ScheduleStates> {
        let stamp = self.store.stamp();
        match self.standings.get(stamp) {
            Some(standings) => Ok(ScheduleStates { now: timestamp(now_ms()), ..standings }),
            None => Ok(self.standings.set(stamp, read.await?)),
        }
    }

    /// Returns the store that has the tables.
    pub(super) fn store(&self) -> sql::Store {
        sql::Store::Sqlite(self.store.clone())
    }

    /// Ends every lease, at boot: the lock on the store says that no other process can hold one, so no worker
    /// has to wait until they expire. It does not matter then that the clock of leases begins anew with the
    /// machine.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn end_leases(&self) -> Result<usize> {
        let sql = "UPDATE jobs SET lease_until = -1 WHERE state = 'running'";
        Ok(self.store.write(move |tx| tx.execute(sql, [])).await?)
    }
}

/// Adds jobs within a transaction of the caller, so that the jobs exist if and only if the rows of that
/// transaction do, and returns their ids as [`Queue::enqueue`] does. Wake their queues after the commit.
///
/// # Errors
/// When SQLite refuses.
pub fn insert_jobs(tx: &Connection, jobs: &[NewJob]) -> rusqlite::Result<Vec<Uuid>> {
    let now = now_ms();
    jobs.iter().map(|job| insert(tx, job, now)).collect()
}

fn insert(tx: &Connection, job: &NewJob, now: i64) -> rusqlite::Result<Uuid> {
    if let Some(taken) = take_key(tx, job, now)? {
        return Ok(taken);
    }
    let run_at = match job.due {
        Due::Now => now,
        Due::In(wait) => later(now, wait),
        Due::At(time) => time.as_millisecond(),
    };
    let state = if run_at > now { State::Scheduled } else { State::Ready };
    tx.prepare_cached(
        "INSERT INTO jobs (id, kind, queue, priority, state, payload, run_at, scheduled_at, recoveries,
                           recovered_at, trace, unique_key, created_at)
         VALUES (:id, :kind, :queue, :priority, :state, :payload, :run_at, :scheduled_at, :recoveries,
                 :recovered_at, :trace, :unique_key, :now)
         ON CONFLICT (id) DO NOTHING",
    )?
    .execute(named_params! {
        ":id": job.id.as_bytes(), ":kind": job.kind, ":queue": job.queue, ":priority": job.priority,
        ":state": state.as_str(), ":payload": job.payload, ":run_at": run_at,
        ":scheduled_at": matches!(job.due, Due::In(_)).then_some(now), ":recoveries": job.recoveries,
        ":recovered_at": (job.recoveries > 0).then_some(now), ":trace": job.trace,
        ":unique_key": job.unique_key(), ":now": now,
    })?;
    Ok(job.id)
}

/// Takes the unique key for the job, or returns the job that has the key.
fn take_key(tx: &Connection, job: &NewJob, now: i64) -> rusqlite::Result<Option<Uuid>> {
    let (Some(unique), Some(key)) = (&job.unique, job.unique_key()) else { return Ok(None) };
    let (scope, window) = unique.until.scope();
    let until = window.map(|window| later(now, window));
    // A key that was not given back, since its job was deleted by hand, is free.
    let taken = tx
        .prepare_cached(
            "INSERT INTO job_keys (key, job, scope, until) VALUES (:key, :job, :scope, :until)
             ON CONFLICT (key) DO UPDATE SET job = excluded.job, scope = excluded.scope, until = excluded.until
                 WHERE job = excluded.job OR until <= :now
                    OR (until IS NULL AND NOT EXISTS (SELECT 1 FROM jobs WHERE id = job_keys.job))",
        )?
        .execute(named_params! {
            ":key": key, ":job": job.id.as_bytes(), ":scope": scope, ":until": until, ":now": now,
        })?;
    if taken == 1 {
        return Ok(None);
    }
    let sql = "SELECT job FROM job_keys WHERE key = ?";
    tx.prepare_cached(sql)?.query_row([key], |row| Ok(Some(Uuid::from_bytes(row.get(0)?))))
}

impl Queue for SqliteQueue {
    async fn enqueue(&self, jobs: Vec<NewJob>) -> Result<Vec<Uuid>> {
        let jobs = Arc::new(jobs);
        let enqueued = Arc::clone(&jobs);
        let ids = self.store.write(move |tx| insert_jobs(tx, &jobs)).await?;
        self.wake.queues(enqueued.iter().map(|job| &*job.queue));
        Ok(ids)
    }

    async fn claim(&self, claim: Claim) -> Result<Claims> {
        Ok(self.store.write(move |tx| take(tx, &claim, now_ms())).await?)
    }

    async fn renew(&self, renewals: Vec<Renewal>, lease: Duration) -> Result<Vec<Renewed>> {
        let renew = move |tx: &Connection| {
            let mut update = tx.prepare_cached(
                "UPDATE jobs SET lease_until = ?, progress = coalesce(?, progress)
                 WHERE id = ? AND epoch = ? AND state = 'running' RETURNING cancelled",
            )?;
            let until = lease_end(lease);
            let mut renewed = Vec::with_capacity(renewals.len());
            for Renewal { held, progress, .. } in renewals {
                let parameters = (until, progress.as_ref().map(json), held.id.as_bytes(), held.epoch);
                let cancelled = update.query_row(parameters, |row| lossy(row, "cancelled")).optional()?;
                renewed.extend(cancelled.map(|cancelled| Renewed { held, cancelled }));
            }
            Ok(renewed)
        };
        Ok(self.store.write(renew).await?)
    }

    async fn record(&self, held: Held, _queue: Arc<str>, checkpoint: String) -> Result<bool> {
        let sql = "UPDATE jobs SET checkpoint = ?, recoveries = 0, recovered_at = NULL
                   WHERE id = ? AND epoch = ? AND state = 'running'";
        let record = move |tx: &Connection| {
            Ok(tx.prepare_cached(sql)?.execute((checkpoint, held.id.as_bytes(), held.epoch))? == 1)
        };
        Ok(self.store.write(record).await?)
    }

    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<bool>> {
        let again = settlements.iter().filter(|s| matches!(s.transition, Transition::Again { .. }));
        let again: Vec<Arc<str>> = again.map(|settlement| Arc::clone(&settlement.job.queue)).collect();
        let settled = self
            .store
            .write(move |tx| {
                let now = now_ms();
                settlements.iter().map(|settlement| settle(tx, settlement, now)).collect()
            })
            .await?;
        if !again.is_empty() {
            self.wake.queues(again.iter().map(|queue| &**queue));
        }
        Ok(settled)
    }

    async fn lapsed(&self, limit: usize, worker: String, lease: Duration) -> Result<Lapsed> {
        let lapsed = move |tx: &Connection| {
            let now = now_ms();
            mend_waits(tx, now)?;
            let sql = format!(
                "UPDATE jobs SET epoch = epoch + 1, worker = :worker, lease_until = :until
                 WHERE id IN (SELECT id FROM jobs WHERE state = 'running' AND lease_until < :before
                              ORDER BY lease_until LIMIT :limit)
                 RETURNING {CLAIMED}"
            );
            let mut jobs = Vec::new();
            loop {
                let parameters = named_params! {
                    ":worker": worker, ":until": lease_end(lease), ":before": BootTime::now().millis(),
                    ":limit": limit - jobs.len(),
                };
                let taken = readable(tx, &sql, parameters, now)?;
                jobs.extend(taken.jobs);
                if taken.buried == 0 || jobs.len() >= limit {
                    return Ok(Lapsed { jobs, now: timestamp(now) });
                }
            }
        };
        Ok(self.store.write(lapsed).await?)
    }

    async fn probe(&self, queues: Vec<Arc<str>>) -> Result<Option<Probed>> {
        let stamp = self.store.stamp();
        let known = self.next.get(stamp).filter(|known| queues.iter().all(|queue| known.contains_key(queue)));
        let known = match known {
            Some(known) => known,
            None => {
                let asked = queues.clone();
                self.next.set(stamp, self.store.read(move |tx| next_of(tx, asked)).await?)
            }
        };
        let now = now_ms();
        let next = |queue: Arc<str>| Some((Arc::clone(&queue), since(now, (*known.get(&queue)?)?)));
        Ok(Some(queues.into_iter().filter_map(next).collect()))
    }

    async fn measure_all(&self, queues: Vec<Arc<str>>) -> Vec<(Arc<str>, Result<Depth>)> {
        let stamp = self.store.stamp();
        if let Some(depths) = self.depths.get(stamp)
            && let Some(depths) = queues.iter().map(|queue| depths.get(queue).copied()).collect::<Option<Vec<_>>>()
            // The time for which ready jobs wait grows without a write.
            && depths.iter().all(|depth| depth.ready == 0)
        {
            return queues.into_iter().zip(depths.into_iter().map(Ok)).collect();
        }
        let asked = queues.clone();
        let measure = move |tx: &Connection| {
            let of = |queue: &Arc<str>| Ok((Arc::clone(queue), depth(tx, queue)?));
            asked.iter().map(of).collect::<rusqlite::Result<BTreeMap<_, _>>>()
        };
        match self.store.read(measure).await {
            Ok(depths) => {
                let depths = self.depths.set(stamp, depths);
                let of = |queue: Arc<str>| {
                    let depth = depths.get(&queue).copied().unwrap_or_default();
                    (queue, Ok(depth))
                };
                queues.into_iter().map(of).collect()
            }
            Err(error) => {
                queues.into_iter().next().map(|queue| (queue, Err(error.into()))).into_iter().collect()
            }
        }
    }

    async fn measure(&self, queue: Arc<str>) -> Result<Depth> {
        Ok(self.store.read(move |tx| depth(tx, &queue)).await?)
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    /// Waits for the drain: the poll finds the jobs that other processes add.
    async fn listen(&self, drain: Drain) -> anyhow::Result<()> {
        drain.notice().await;
        Ok(())
    }
}

/// The columns of [`Claimed`].
const CLAIMED: &str = "id, kind, queue, priority, payload, epoch, failures, recoveries, recovered_at, errors,
    checkpoint, trace, unique_key, cancelled, created_at, run_at";

/// Returns when each of these queues has a job to claim, in milliseconds since 1970.
fn next_of(tx: &Connection, queues: Vec<Arc<str>>) -> rusqlite::Result<BTreeMap<Arc<str>, Option<i64>>> {
    let mut next = tx.prepare_cached(
        "SELECT coalesce((SELECT 0 FROM jobs WHERE state = 'ready' AND queue = ?1 LIMIT 1),
                         (SELECT min(run_at) FROM jobs WHERE state = 'scheduled' AND queue = ?1))
         WHERE NOT EXISTS (SELECT 1 FROM paused_queues WHERE queue = ?1)",
    )?;
    let of = |queue: Arc<str>| {
        let at: Option<Option<i64>> = next.query_row([&queue], |row| row.get(0)).optional()?;
        Ok((queue, at.flatten()))
    };
    queues.into_iter().map(of).collect()
}

fn depth(tx: &Connection, queue: &str) -> rusqlite::Result<Depth> {
    let now = now_ms();
    let sql = "SELECT count(*) FILTER (WHERE state = 'ready'), count(*) FILTER (WHERE state = 'scheduled'),
                      count(*) FILTER (WHERE state = 'running'), coalesce(sum(length(payload)), 0),
                      min(run_at) FILTER (WHERE state = 'ready')
               FROM jobs WHERE queue = ?";
    tx.prepare_cached(sql)?.query_row([queue], |row| {
        let oldest: Option<i64> = row.get(4)?;
        Ok(Depth {
            ready: row.get(0)?,
            scheduled: row.get(1)?,
            running: row.get(2)?,
            bytes: row.get(3)?,
            oldest_ms: oldest.map_or(0, |oldest| now.saturating_sub(oldest).max(0).unsigned_abs()),
        })
    })
}

fn take(tx: &Connection, claim: &Claim, now: i64) -> rusqlite::Result<Claims> {
    let paused = "SELECT EXISTS (SELECT 1 FROM paused_queues WHERE queue = ?)";
    if tx.prepare_cached(paused)?.query_row([&claim.queue], |row| row.get(0))? {
        return Ok(Claims::default());
    }
    // Jobs that have become due are made ready first, so that a crowd of jobs that are not due yet is never
    // searched.
    tx.prepare_cached(
        "UPDATE jobs SET state = 'ready' WHERE id IN
             (SELECT id FROM jobs WHERE state = 'scheduled' AND queue = ? AND run_at <= ?
              ORDER BY run_at LIMIT 1000)",
    )?
    .execute((&claim.queue, now))?;
    let sql = format!(
        "UPDATE jobs SET state = 'running', epoch = epoch + 1, worker = :worker, lease_until = :until
         WHERE id IN (SELECT id FROM jobs WHERE state = 'ready' AND queue = :queue
                      ORDER BY priority, run_at LIMIT :limit)
         RETURNING {CLAIMED}"
    );
    let mut jobs = Vec::new();
    loop {
        let parameters = named_params! {
            ":worker": claim.worker, ":until": lease_end(claim.lease),
            ":queue": claim.queue, ":limit": claim.limit - jobs.len(),
        };
        let taken = readable(tx, &sql, parameters, now)?;
        jobs.extend(taken.jobs);
        // Jobs that were set apart took the places of others.
        if taken.buried == 0 || jobs.len() >= claim.limit {
            break;
        }
    }
    jobs.sort_by_key(|job| (job.priority, std::cmp::Reverse(job.waited)));
    if jobs.iter().any(|job| job.unique.is_some()) {
        let mut release =
            tx.prepare_cached("DELETE FROM job_keys WHERE key = ? AND job = ? AND scope = 'started'")?;
        for job in jobs.iter().filter(|job| job.unique.is_some()) {
            release.execute((&job.unique, job.id.as_bytes()))?;
        }
    }
    let next_at: Option<i64> = tx
        .prepare_cached("SELECT min(run_at) FROM jobs WHERE state = 'scheduled' AND queue = ?")?
        .query_row([&claim.queue], |row| row.get(0))?;
    Ok(Claims { jobs, next_in: next_at.map(|at| since(now, at)) })
}

/// Jobs that were claimed, and how many could not be read.
struct Taken {
    jobs: Vec<Claimed>,
    buried: usize,
}

/// Runs a statement that claims jobs. A job that cannot be read, since another program wrote it, must not
/// block the others: it becomes dead, with its bytes as they are.
fn readable(
    tx: &Connection,
    sql: &str,
    parameters: &[(&str, &dyn ToSql)],
    now: i64,
) -> rusqlite::Result<Taken> {
    let mut taken = Taken { jobs: Vec::new(), buried: 0 };
    let mut unreadable = Vec::new();
    let mut statement = tx.prepare_cached(sql)?;
    let mut rows = statement.query(parameters)?;
    while let Some(row) = rows.next()? {
        match claimed(row, now) {
            Ok(job) => taken.jobs.push(job),
            Err(error) => {
                unreadable.push((row.get::<_, [u8; 16]>("id")?, row.get("epoch")?, error.to_string()));
            }
        }
    }
    for (id, epoch, why) in unreadable {
        set_apart("jobs", &Uuid::from_bytes(id).to_string(), &why);
        bury(tx, id, epoch, &format!("it cannot be read: {why}"), now)?;
        taken.buried += 1;
    }
    Ok(taken)
}

/// Makes a job dead without reading it: SQLite copies the row.
fn bury(tx: &Connection, id: [u8; 16], epoch: i64, reason: &str, now: i64) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "DELETE FROM job_keys WHERE job = :id AND scope <> 'window'
             AND key = (SELECT unique_key FROM jobs WHERE id = :id AND epoch = :epoch)",
    )?
    .execute(named_params! { ":id": id, ":epoch": epoch })?;
    tx.prepare_cached(
        "INSERT OR REPLACE INTO ended_jobs (id, kind, queue, priority, state, payload, epoch, failures, recoveries,
                                 errors, checkpoint, trace, reason, created_at, ended_at)
         SELECT id, kind, queue, priority, 'dead', payload, epoch, failures, recoveries, errors, checkpoint, trace,
                :reason, created_at, :now
         FROM jobs WHERE id = :id AND epoch = :epoch AND state = 'running'",
    )?
    .execute(named_params! { ":id": id, ":epoch": epoch, ":reason": reason, ":now": now })?;
    tx.prepare_cached("DELETE FROM jobs WHERE id = :id AND epoch = :epoch AND state = 'running'")?
        .execute(named_params! { ":id": id, ":epoch": epoch })
        .map(drop)
}

/// Reads a text that is only shown, or compared with others of its kind. Bytes that are no UTF-8 are
/// replaced.
fn lossy(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<String>> {
    let bytes = row.get_ref(column)?.as_bytes_or_null()?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()))
}

fn claimed(row: &Row<'_>, now: i64) -> rusqlite::Result<Claimed> {
    let recovered_at: Option<i64> = row.get("recovered_at")?;
    let epoch: i64 = row.get("epoch")?;
    let queue: String = row.get("queue")?;
    Ok(Claimed {
        id: Uuid::from_bytes(row.get("id")?),
        kind: row.get("kind")?,
        queue: queue.into(),
        priority: row.get("priority")?,
        payload: row.get("payload")?,
        epoch,
        first: epoch == 1,
        spent: Attempts {
            failures: row.get("failures")?,
            recoveries: row.get("recoveries")?,
            since: recovered_at.map(timestamp),
        },
        errors: read_json(lossy(row, "errors")?),
        checkpoint: row.get("checkpoint")?,
        trace: lossy(row, "trace")?,
        unique: lossy(row, "unique_key")?,
        cancelled: lossy(row, "cancelled")?,
        created_at: timestamp(row.get("created_at")?),
        due_at: timestamp(row.get("run_at")?),
        waited: since(row.get("run_at")?, now),
    })
}

fn settle(tx: &Connection, settlement: &Settlement, now: i64) -> rusqlite::Result<bool> {
    let job = &settlement.job;
    let held = job.held();
    let errors = (!settlement.errors.is_empty()).then(|| json(&settlement.errors));
    let (wait, spent) = match &settlement.transition {
        Transition::Again { wait, spent } => (wait, spent),
        Transition::Finished => return remove(tx, job),
        Transition::Ended { state, reason, spent } => {
            let moved = tx
                .prepare_cached(
                    "INSERT OR REPLACE INTO ended_jobs (id, kind, queue, priority, state, payload, epoch, failures, recoveries,
                                             errors, checkpoint, trace, reason, created_at, ended_at)
                     SELECT id, kind, queue, priority, :state, payload, epoch, :failures, :recoveries, :errors,
                            checkpoint, trace, :reason, created_at, :now
                     FROM jobs WHERE id = :id AND epoch = :epoch AND state = 'running'",
                )?
                .execute(named_params! {
                    ":state": state.as_str(), ":failures": spent.failures, ":recoveries": spent.recoveries,
                    ":errors": errors, ":reason": reason, ":now": now,
                    ":id": held.id.as_bytes(), ":epoch": held.epoch,
                })?;
            return if moved == 1 { remove(tx, job) } else { Ok(false) };
        }
    };
    let run_at = later(now, *wait);
    let state = if run_at > now { State::Scheduled } else { State::Ready };
    let changed = tx
        .prepare_cached(
            "UPDATE jobs SET state = :state, scheduled_at = :now,
                    run_at = CASE WHEN :run_at > :now THEN :run_at ELSE min(run_at, :now) END, failures = :failures, recoveries = :recoveries,
                    recovered_at = :recovered_at, errors = :errors, worker = NULL, lease_until = NULL
             WHERE id = :id AND epoch = :epoch AND state = 'running'",
        )?
        .execute(named_params! {
            ":state": state.as_str(), ":run_at": run_at, ":now": now, ":failures": spent.failures,
            ":recoveries": spent.recoveries,
            ":recovered_at": spent.since.map(Timestamp::as_millisecond), ":errors": errors,
            ":id": held.id.as_bytes(), ":epoch": held.epoch,
        })?;
    Ok(changed == 1)
}

/// Lets jobs that wait for a duration, and not until a time, wait anew when the clock has been set back.
fn mend_waits(tx: &Connection, now: i64) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE jobs SET run_at = run_at - (scheduled_at - :now), scheduled_at = :now
         WHERE state = 'scheduled' AND scheduled_at > :now + 1000",
    )?
    .execute(named_params! { ":now": now })
    .map(drop)
}

/// Deletes a job that has ended, and gives back its unique key.
fn remove(tx: &Connection, job: &Claimed) -> rusqlite::Result<bool> {
    let mut delete =
        tx.prepare_cached("DELETE FROM jobs WHERE id = ? AND epoch = ? AND state = 'running'")?;
    let removed = delete.execute((job.id.as_bytes(), job.epoch))? == 1;
    if let (true, Some(key)) = (removed, &job.unique) {
        give_back(tx, key, job.id)?;
    }
    Ok(removed)
}

/// Gives back the unique key of a job that has ended, unless it is for a window.
fn give_back(tx: &Connection, key: &str, job: Uuid) -> rusqlite::Result<()> {
    let sql = "DELETE FROM job_keys WHERE key = ? AND job = ? AND scope <> 'window'";
    tx.prepare_cached(sql)?.execute((key, job.as_bytes())).map(drop)
}

/// Returns when a lease that begins now ends, by the clock that measures leases everywhere: a step of the
/// wall clock takes no job from a worker.
fn lease_end(lease: Duration) -> i64 {
    BootTime::now().after(lease).millis()
}

/// Returns the time from `earlier` to `later`, both in milliseconds; zero when `later` comes first.
fn since(earlier: i64, later: i64) -> Duration {
    Duration::from_millis(u64::try_from(later.saturating_sub(earlier)).unwrap_or_default())
}
