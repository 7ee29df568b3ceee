//! Jobs in Postgres, for several replicas at once.
//!
//! Claims skip rows that other sessions have locked. Claiming and settling take arrays, so that a hundred jobs
//! cost as much as one. Each query is one statement, without a name and without state in a session, so it works
//! through a PgBouncer that pools transactions; jobs are found by polling then.
//!
//! Another program may enqueue with one statement:
//!
//! ```sql
//! INSERT INTO jobs (kind, queue, payload) VALUES ('mail.send', 'default', '{"to": "ada@example.org"}');
//! -- Optional: wakes workers at once, who would find it with their next poll.
//! SELECT pg_notify('perennial_jobs', 'default');
//! ```
//!
//! Such a job lacks what the program does for its own jobs: the payload is checked only when the job runs, there
//! is no unique key, and no bound on how much may wait. A kind with limits of its own waits in a queue of its
//! own, `queue/kind`.

mod claim;
mod job_admin;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::Drain;
use perennial_store::pool::postgres::{self, Parameter, Postgres, Session};
use perennial_store::pool::{Migrations, sql};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::encoding::{json, read_json};
use crate::queue::{
    Claim, Claimed, Claims, Depth, Due, Held, Lapsed, NewJob, Queue, Renewal, Renewed, Result, Settlement,
};
use crate::state::{Attempts, Transition};
use crate::wake::Wake;
use claim::Cursors;

/// The tables of the engine.
pub const MIGRATIONS: Migrations = Migrations {
    module: "jobs",
    steps: &[
    "CREATE TABLE jobs (
        id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        kind         text NOT NULL,
        queue        text NOT NULL DEFAULT 'default',
        priority     smallint NOT NULL DEFAULT 0,        -- lower goes first
        state        text NOT NULL DEFAULT 'ready' CHECK (state IN ('scheduled', 'ready', 'running')),
        payload      json NOT NULL CHECK (octet_length(payload::text) <= 262144),
        run_at       timestamptz NOT NULL DEFAULT now(), -- when it is due
        scheduled_at timestamptz,                        -- when it was said that it waits for a while
        epoch        bigint NOT NULL DEFAULT 0,
        worker       text,
        lease_until  timestamptz,
        failures     integer NOT NULL DEFAULT 0,
        recoveries   integer NOT NULL DEFAULT 0,
        recovered_at timestamptz,                        -- the first of them
        errors       text,                               -- JSON: the last five
        checkpoint   text,                               -- JSON
        progress     text,                               -- JSON
        trace        text,
        unique_key   text,
        cancelled    text,                               -- why it must not go on
        created_at   timestamptz NOT NULL DEFAULT now(),
        -- Other programs write here, too: what could not be read again is refused.
        CHECK (epoch BETWEEN 0 AND 1::bigint << 61 AND failures >= 0 AND recoveries >= 0),
        CHECK (state <> 'running' OR lease_until IS NOT NULL),
        CHECK (run_at BETWEEN '1970-01-01' AND '9999-01-01' AND created_at BETWEEN '1970-01-01' AND '9999-01-01'),
        CHECK (scheduled_at BETWEEN '1970-01-01' AND '9999-01-01'),
        CHECK (recovered_at BETWEEN '1970-01-01' AND '9999-01-01'),
        CHECK (lease_until BETWEEN '1970-01-01' AND '9999-01-01')
    ) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_cost_delay = 0);
    CREATE INDEX jobs_ready ON jobs (queue, priority, run_at, id) WHERE state = 'ready';
    CREATE INDEX jobs_scheduled ON jobs (queue, run_at) WHERE state = 'scheduled';
    CREATE INDEX jobs_waits ON jobs (scheduled_at) WHERE state = 'scheduled';
    -- Not on lease_until: renewing changes no index then.
    CREATE INDEX jobs_running ON jobs (id) WHERE state = 'running';

    CREATE TABLE job_keys (
        key     text PRIMARY KEY,
        job     uuid NOT NULL,
        scope   text NOT NULL,                           -- started, ended, window
        until   timestamptz,                             -- of a window
        made_at timestamptz NOT NULL DEFAULT now()
    );

    CREATE TABLE ended_jobs (
        id         uuid PRIMARY KEY,
        kind       text NOT NULL,
        queue      text NOT NULL,
        priority   smallint NOT NULL,
        state      text NOT NULL,                        -- dead, cancelled
        payload    json NOT NULL,
        epoch      bigint NOT NULL,
        failures   integer NOT NULL,
        recoveries integer NOT NULL,
        errors     text,
        checkpoint text,
        trace      text,
        reason     text NOT NULL,
        created_at timestamptz NOT NULL,
        ended_at   timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX ended_jobs_age ON ended_jobs (ended_at);

    CREATE TABLE paused_queues (queue text PRIMARY KEY);",
    "CREATE TABLE schedules (
        name       text PRIMARY KEY,
        definition text NOT NULL,                        -- JSON
        timing     text NOT NULL,                        -- the expression and the zone that last_fire is about
        -- milliseconds since 1970, here as below: the last time that was claimed, or when it was known first
        last_fire  bigint NOT NULL,
        queued     bigint,                               -- a time that waits for the job of an earlier one
        paused     boolean NOT NULL,                     -- as defined
        held       boolean,                              -- as an operator wants it
        version    bigint NOT NULL,                      -- what claims compare and swap
        seen_at    bigint NOT NULL                       -- when a process last said that it is defined so
    );

    CREATE TABLE schedule_runs (
        id         bytea PRIMARY KEY,                    -- that of its job, if it has one
        schedule   text NOT NULL,
        has_job    boolean NOT NULL,
        occurrence bigint NOT NULL,
        claimed_at bigint NOT NULL,
        cause      text NOT NULL,                        -- JSON, as ending
        passed     bigint NOT NULL,
        ending     text
    );
    CREATE INDEX schedule_runs_of ON schedule_runs (schedule, claimed_at);",
    ],
};

/// Channel on which new jobs are announced. The payload of an announcement is the queue.
const CHANNEL: &str = "perennial_jobs";
/// Time for which announcements are gathered.
const DEBOUNCE: Duration = Duration::from_millis(4);

/// The queue in a Postgres server. A cheap handle.
#[derive(Clone, Debug)]
pub struct PostgresQueue {
    postgres: Postgres,
    wake: Wake,
    /// Queues that are to be announced to other processes.
    announce: Wake,
    cursors: Cursors,
}

impl PostgresQueue {
    /// Creates the queue in `postgres`, where [`MIGRATIONS`] have been applied.
    pub fn new(postgres: Postgres) -> Self {
        Self { postgres, wake: Wake::default(), announce: Wake::default(), cursors: Cursors::default() }
    }

    /// Returns the store that has the tables.
    pub(super) fn store(&self) -> sql::Store {
        sql::Store::Postgres(self.postgres.clone())
    }

    /// Wakes these queues, here and in other processes. Call it after the commit of a transaction that used
    /// [`insert_jobs`].
    pub fn woken<'a>(&self, queues: impl IntoIterator<Item = &'a str> + Clone) {
        self.wake.queues(queues.clone());
        if !self.postgres.is_behind_pgbouncer() {
            self.announce.queues(queues);
        }
    }
}

/// Adds jobs within a transaction of the caller, so that the jobs exist if and only if the rows of that
/// transaction do, and returns their ids as [`Queue::enqueue`] does. Wake their queues after the commit.
///
/// # Errors
/// When Postgres refuses, or cannot be reached.
pub async fn insert_jobs(session: &impl Session, jobs: &[NewJob]) -> postgres::Result<Vec<Uuid>> {
    // The keys are taken in their order, so that two transactions with the same keys never deadlock.
    let mut in_order: Vec<&NewJob> = jobs.iter().filter(|job| job.unique.is_some()).collect();
    in_order.sort_by_key(|job| job.unique_key());
    let mut taken = HashMap::new();
    for job in in_order {
        if let Some(other) = take_key(session, job).await? {
            taken.insert(job.id, other);
        }
    }
    let new: Vec<&NewJob> = jobs.iter().filter(|job| !taken.contains_key(&job.id)).collect();
    insert(session, &new).await?;
    Ok(jobs.iter().map(|job| taken.get(&job.id).copied().unwrap_or(job.id)).collect())
}

async fn insert(session: &impl Session, jobs: &[&NewJob]) -> postgres::Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = jobs.iter().map(|job| job.id).collect();
    let kinds: Vec<&str> = jobs.iter().map(|job| &*job.kind).collect();
    let queues: Vec<&str> = jobs.iter().map(|job| &*job.queue).collect();
    let priorities: Vec<i16> = jobs.iter().map(|job| job.priority).collect();
    let payloads: Vec<&str> = jobs.iter().map(|job| job.payload.as_str()).collect();
    let waits: Vec<Option<f64>> = jobs.iter().map(|job| wait(job.due)).collect();
    let times: Vec<Option<Timestamp>> = jobs.iter().map(|job| time(job.due)).collect();
    let recoveries: Vec<i32> = jobs.iter().map(|job| count(job.recoveries)).collect();
    let traces: Vec<Option<&str>> = jobs.iter().map(|job| job.trace.as_deref()).collect();
    let keys: Vec<Option<String>> = jobs.iter().map(|job| job.unique_key()).collect();
    let sql = "
        INSERT INTO jobs (id, kind, queue, priority, state, payload, run_at, scheduled_at, recoveries, recovered_at,
                          trace, unique_key)
        SELECT id, kind, queue, priority, CASE WHEN due > now() THEN 'scheduled' ELSE 'ready' END, payload::json,
               due, CASE WHEN wait IS NOT NULL THEN now() END, recoveries, CASE WHEN recoveries > 0 THEN now() END,
               trace, key
        FROM (SELECT *, coalesce(at, now() + make_interval(secs => coalesce(wait, 0))) AS due
              FROM unnest($1::uuid[], $2::text[], $3::text[], $4::int2[], $5::text[], $6::float8[],
                          $7::timestamptz[], $8::int4[], $9::text[], $10::text[])
                   AS new (id, kind, queue, priority, payload, wait, at, recoveries, trace, key)) AS new
        ON CONFLICT (id) DO NOTHING";
    let parameters: [Parameter<'_>; 10] = [
        (&ids, Type::UUID_ARRAY),
        (&kinds, Type::TEXT_ARRAY),
        (&queues, Type::TEXT_ARRAY),
        (&priorities, Type::INT2_ARRAY),
        (&payloads, Type::TEXT_ARRAY),
        (&waits, Type::FLOAT8_ARRAY),
        (&times, Type::TIMESTAMPTZ_ARRAY),
        (&recoveries, Type::INT4_ARRAY),
        (&traces, Type::TEXT_ARRAY),
        (&keys, Type::TEXT_ARRAY),
    ];
    session.execute(sql, &parameters).await?;
    Ok(())
}

/// Takes the unique key for the job, or returns the job that has the key.
async fn take_key(session: &impl Session, job: &NewJob) -> postgres::Result<Option<Uuid>> {
    let (Some(unique), Some(key)) = (&job.unique, job.unique_key()) else { return Ok(None) };
    let (scope, window) = unique.until.scope();
    let window = window.map(seconds);
    // A key that was not given back, since its job was deleted by hand or its process died first, is free. A
    // key that is younger than a minute is not free: its job may be in a transaction that has not committed
    // yet.
    let sql = "
        INSERT INTO job_keys AS held (key, job, scope, until)
        VALUES ($1, $2, $3, now() + make_interval(secs => $4))
        ON CONFLICT (key) DO UPDATE SET job = excluded.job, scope = excluded.scope, until = excluded.until,
                                        made_at = now()
            WHERE held.job = excluded.job OR held.until <= now()
               OR (held.until IS NULL AND held.made_at < now() - interval '1 minute'
                   AND NOT EXISTS (SELECT FROM jobs WHERE id = held.job))
        RETURNING job";
    let parameters: [Parameter<'_>; 4] =
        [(&key, Type::TEXT), (&job.id, Type::UUID), (&scope, Type::TEXT), (&window, Type::FLOAT8)];
    if !session.query(sql, &parameters).await?.is_empty() {
        return Ok(None);
    }
    // ON CONFLICT has locked the row although it did not update it (INSERT, PostgreSQL's documentation): the key is not
    // given back before this transaction ends.
    let holder = "SELECT job FROM job_keys WHERE key = $1";
    if let Some(held) = session.query(holder, &[(&key, Type::TEXT)]).await?.first() {
        return Ok(Some(held.get(0)));
    }
    Err(postgres::Error::Busy)
}

impl Queue for PostgresQueue {
    async fn enqueue(&self, jobs: Vec<NewJob>) -> Result<Vec<Uuid>> {
        let mut connection = self.postgres.get().await?;
        let ids = if jobs.iter().all(|job| job.unique.is_none()) {
            insert(&connection, &jobs.iter().collect::<Vec<_>>()).await?;
            jobs.iter().map(|job| job.id).collect()
        } else {
            let transaction = connection.begin().await?;
            let ids = insert_jobs(&transaction, &jobs).await?;
            transaction.commit().await?;
            ids
        };
        drop(connection);
        for job in &jobs {
            if let Due::In(wait) = job.due {
                self.cursors.due_in(&job.queue, wait);
            }
        }
        let queues: BTreeSet<&str> = jobs.iter().map(|job| &*job.queue).collect();
        self.woken(queues);
        Ok(ids)
    }

    async fn claim(&self, claim: Claim) -> Result<Claims> {
        claim::claim(&self.postgres, &self.cursors, claim).await
    }

    async fn renew(&self, renewals: Vec<Renewal>, lease: Duration) -> Result<Vec<Renewed>> {
        let (ids, epochs) = split(renewals.iter().map(|renewal| renewal.held));
        let progress: Vec<Option<String>> =
            renewals.iter().map(|renewal| renewal.progress.as_ref().map(json)).collect();
        let sql = "
            UPDATE jobs SET lease_until = now() + make_interval(secs => $4),
                            progress = coalesce(held.progress, jobs.progress)
            FROM unnest($1::uuid[], $2::int8[], $3::text[]) AS held (id, epoch, progress)
            WHERE jobs.id = ANY ($1) AND jobs.id = held.id AND jobs.epoch = held.epoch AND state = 'running'
            RETURNING jobs.id, jobs.epoch, cancelled";
        let lease = seconds(lease);
        let parameters: [Parameter<'_>; 4] = [
            (&ids, Type::UUID_ARRAY),
            (&epochs, Type::INT8_ARRAY),
            (&progress, Type::TEXT_ARRAY),
            (&lease, Type::FLOAT8),
        ];
        let rows = self.postgres.query(sql, &parameters).await?;
        Ok(rows.iter().map(|row| Renewed { held: held(row), cancelled: row.get(2) }).collect())
    }

    async fn record(&self, held: Held, _queue: Arc<str>, checkpoint: String) -> Result<bool> {
        let sql = "UPDATE jobs SET checkpoint = $3, recoveries = 0, recovered_at = NULL
                   WHERE id = $1 AND epoch = $2 AND state = 'running'";
        let parameters: [Parameter<'_>; 3] =
            [(&held.id, Type::UUID), (&held.epoch, Type::INT8), (&checkpoint, Type::TEXT)];
        Ok(self.postgres.execute(sql, &parameters).await? == 1)
    }

    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<bool>> {
        let connection = self.postgres.get().await?;
        let of = |wanted: fn(&Transition) -> bool| -> Vec<&Settlement> {
            settlements.iter().filter(|settlement| wanted(&settlement.transition)).collect()
        };
        let finished = of(|transition| matches!(transition, Transition::Finished));
        let again = of(|transition| matches!(transition, Transition::Again { .. }));
        let ended = of(|transition| matches!(transition, Transition::Ended { .. }));
        let (finished, continued, ended) = tokio::try_join!(
            finish(&connection, &finished),
            run_again(&connection, &again),
            end(&connection, &ended)
        )?;
        let gone: HashSet<Held> = finished.into_iter().chain(ended).collect();
        let keys = settlements.iter().filter(|settlement| gone.contains(&settlement.job.held()));
        give_back(&connection, keys.filter_map(|settlement| key_of(&settlement.job)), WHEN_ENDED).await?;
        drop(connection);
        for settlement in &again {
            if let Transition::Again { wait, .. } = settlement.transition {
                self.cursors.due_in(&settlement.job.queue, wait);
            }
        }
        if !again.is_empty() {
            let queues: BTreeSet<&str> = again.iter().map(|settlement| &*settlement.job.queue).collect();
            self.woken(queues);
        }
        let kept: HashSet<Held> = gone.into_iter().chain(continued).collect();
        Ok(settlements.iter().map(|settlement| kept.contains(&settlement.job.held())).collect())
    }

    async fn lapsed(&self, limit: usize, worker: String, lease: Duration) -> Result<Lapsed> {
        claim::lapsed(&self.postgres, limit, worker, lease).await
    }

    async fn measure(&self, queue: Arc<str>) -> Result<Depth> {
        // A scheduled job that is due is ready, also before a claim has found it.
        let sql = "
            SELECT count(*) FILTER (WHERE is_ready), count(*) FILTER (WHERE state = 'scheduled' AND NOT is_ready),
                   count(*) FILTER (WHERE state = 'running'), coalesce(sum(octet_length(payload::text)), 0)::int8,
                   (extract(epoch FROM now() - min(run_at) FILTER (WHERE is_ready)) * 1000)::int8
            FROM (SELECT *, state = 'ready' OR (state = 'scheduled' AND run_at <= now()) AS is_ready
                  FROM jobs WHERE queue = $1) AS jobs";
        let rows = self.postgres.query(sql, &[(&&*queue, Type::TEXT)]).await?;
        let Some(row) = rows.first() else { return Ok(Depth::default()) };
        let number = |column| row.get::<_, Option<i64>>(column).unwrap_or_default().max(0).unsigned_abs();
        Ok(Depth {
            ready: number(0),
            scheduled: number(1),
            running: number(2),
            bytes: number(3),
            oldest_ms: number(4),
        })
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    async fn listen(&self, drain: Drain) -> anyhow::Result<()> {
        if self.postgres.is_behind_pgbouncer() {
            drain.notice().await;
            return Ok(());
        }
        let mut listener = self.postgres.listen(CHANNEL).await?;
        loop {
            tokio::select! {
                queue = listener.next() => {
                    let queue = queue.ok_or_else(|| anyhow::anyhow!("the connection that listens has ended"))?;
                    self.wake.queues([queue.as_str()]);
                }
                queues = self.announce.woken() => {
                    let queues: Vec<String> = queues.iter().map(ToString::to_string).collect();
                    listener.notify(&queues).await?;
                    tokio::time::sleep(DEBOUNCE).await;
                }
                () = drain.soft() => return Ok(()),
            }
        }
    }
}

/// Deletes jobs that have finished, and returns the claims that were held.
async fn finish(session: &impl Session, settlements: &[&Settlement]) -> Result<Vec<Held>> {
    if settlements.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, epochs) = split(settlements.iter().map(|settlement| settlement.job.held()));
    // `ANY` makes the planner use the primary key, whatever it estimates for the length of the arrays.
    let sql = "
        DELETE FROM jobs USING unnest($1::uuid[], $2::int8[]) AS held (id, epoch)
        WHERE jobs.id = ANY ($1) AND jobs.id = held.id AND jobs.epoch = held.epoch AND state = 'running'
        RETURNING jobs.id, jobs.epoch";
    let parameters: [Parameter<'_>; 2] = [(&ids, Type::UUID_ARRAY), (&epochs, Type::INT8_ARRAY)];
    Ok(session.query(sql, &parameters).await?.iter().map(held).collect())
}

/// Lets jobs run again, and returns the claims that were held.
async fn run_again(session: &impl Session, settlements: &[&Settlement]) -> Result<Vec<Held>> {
    if settlements.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, epochs) = split(settlements.iter().map(|settlement| settlement.job.held()));
    let again = settlements.iter().map(|settlement| match &settlement.transition {
        Transition::Again { wait, spent } => (seconds(*wait), *spent),
        _ => (0.0, settlement.job.spent),
    });
    let (waits, spent): (Vec<f64>, Vec<Attempts>) = again.unzip();
    let failures: Vec<i32> = spent.iter().map(|spent| count(spent.failures)).collect();
    let recoveries: Vec<i32> = spent.iter().map(|spent| count(spent.recoveries)).collect();
    let since: Vec<Option<Timestamp>> = spent.iter().map(|spent| spent.since).collect();
    let errors = errors(settlements);
    let sql = "
        UPDATE jobs SET state = CASE WHEN new.wait > 0 THEN 'scheduled' ELSE 'ready' END,
               run_at = CASE WHEN new.wait > 0 THEN now() + make_interval(secs => new.wait)
                             ELSE least(run_at, now()) END,
               scheduled_at = now(), failures = new.failures,
               recoveries = new.recoveries, recovered_at = new.since, errors = new.errors, worker = NULL,
               lease_until = NULL
        FROM unnest($1, $2::int8[], $3::float8[], $4::int4[], $5::int4[], $6::timestamptz[], $7::text[])
             AS new (id, epoch, wait, failures, recoveries, since, errors)
        WHERE jobs.id = ANY ($1) AND jobs.id = new.id AND jobs.epoch = new.epoch AND jobs.state = 'running'
        RETURNING jobs.id, jobs.epoch";
    let parameters: [Parameter<'_>; 7] = [
        (&ids, Type::UUID_ARRAY),
        (&epochs, Type::INT8_ARRAY),
        (&waits, Type::FLOAT8_ARRAY),
        (&failures, Type::INT4_ARRAY),
        (&recoveries, Type::INT4_ARRAY),
        (&since, Type::TIMESTAMPTZ_ARRAY),
        (&errors, Type::TEXT_ARRAY),
    ];
    Ok(session.query(sql, &parameters).await?.iter().map(held).collect())
}

/// Moves jobs to the table of ended jobs, and returns the claims that were held.
async fn end(session: &impl Session, settlements: &[&Settlement]) -> Result<Vec<Held>> {
    if settlements.is_empty() {
        return Ok(Vec::new());
    }
    let (ids, epochs) = split(settlements.iter().map(|settlement| settlement.job.held()));
    let mut states = Vec::with_capacity(ids.len());
    let mut reasons = Vec::with_capacity(ids.len());
    let (mut failures, mut recoveries) = (Vec::with_capacity(ids.len()), Vec::with_capacity(ids.len()));
    for settlement in settlements {
        if let Transition::Ended { state, reason, spent } = &settlement.transition {
            states.push(state.as_str());
            // A text in Postgres cannot have a zero byte.
            reasons.push(reason.replace('\0', " "));
            failures.push(count(spent.failures));
            recoveries.push(count(spent.recoveries));
        }
    }
    let errors = errors(settlements);
    let sql = "
        WITH gone AS (
            DELETE FROM jobs USING unnest($1::uuid[], $2::int8[]) AS held (id, epoch)
            WHERE jobs.id = ANY ($1) AND jobs.id = held.id AND jobs.epoch = held.epoch AND state = 'running'
            RETURNING jobs.*
        )
        INSERT INTO ended_jobs (id, kind, queue, priority, state, payload, epoch, failures, recoveries, errors,
                                checkpoint, trace, reason, created_at)
        SELECT gone.id, kind, queue, priority, new.state, payload, gone.epoch, new.failures, new.recoveries,
               new.errors, checkpoint, trace, new.reason, created_at
        FROM gone JOIN unnest($1, $2, $3::text[], $4::text[], $5::int4[], $6::int4[], $7::text[])
             AS new (id, epoch, state, reason, failures, recoveries, errors)
             ON new.id = gone.id AND new.epoch = gone.epoch
        -- One that was enqueued a second time, after it had ended once.
        ON CONFLICT (id) DO UPDATE SET state = excluded.state, epoch = excluded.epoch, failures = excluded.failures,
            recoveries = excluded.recoveries, errors = excluded.errors, checkpoint = excluded.checkpoint,
            reason = excluded.reason, ended_at = now()
        RETURNING id, epoch";
    let parameters: [Parameter<'_>; 7] = [
        (&ids, Type::UUID_ARRAY),
        (&epochs, Type::INT8_ARRAY),
        (&states, Type::TEXT_ARRAY),
        (&reasons, Type::TEXT_ARRAY),
        (&failures, Type::INT4_ARRAY),
        (&recoveries, Type::INT4_ARRAY),
        (&errors, Type::TEXT_ARRAY),
    ];
    Ok(session.query(sql, &parameters).await?.iter().map(held).collect())
}

/// Condition for the keys that are given back when their jobs begin.
const WHEN_STARTED: &str = "scope = 'started'";
/// Condition for the keys that are given back when their jobs have ended.
const WHEN_ENDED: &str = "scope <> 'window'";

/// Returns the unique key of a job, with the id of the job.
fn key_of(job: &Claimed) -> Option<(&str, Uuid)> {
    Some((job.unique.as_deref()?, job.id))
}

/// Gives back the unique keys of jobs for which the condition `which` holds.
async fn give_back<'a>(
    session: &impl Session,
    keys: impl Iterator<Item = (&'a str, Uuid)>,
    which: &str,
) -> Result<()> {
    let (keys, jobs): (Vec<&str>, Vec<Uuid>) = keys.unzip();
    if keys.is_empty() {
        return Ok(());
    }
    let sql = format!(
        "DELETE FROM job_keys USING unnest($1::text[], $2::uuid[]) AS gone (key, job)
         WHERE job_keys.key = gone.key AND job_keys.job = gone.job AND {which}"
    );
    session.execute(&sql, &[(&keys, Type::TEXT_ARRAY), (&jobs, Type::UUID_ARRAY)]).await?;
    Ok(())
}

fn held(row: &Row) -> Held {
    Held { id: row.get(0), epoch: row.get(1) }
}

fn split(held: impl Iterator<Item = Held>) -> (Vec<Uuid>, Vec<i64>) {
    held.map(|held| (held.id, held.epoch)).unzip()
}

fn errors(settlements: &[&Settlement]) -> Vec<Option<String>> {
    let errors = settlements.iter().map(|settlement| &settlement.errors);
    errors.map(|errors| (!errors.is_empty()).then(|| json(errors))).collect()
}

fn count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Returns a wait in seconds, but no longer than a timestamp can bear.
fn seconds(wait: Duration) -> f64 {
    const MILLENNIUM: f64 = 1000.0 * 365.25 * 24.0 * 3600.0;
    wait.as_secs_f64().min(MILLENNIUM)
}

fn wait(due: Due) -> Option<f64> {
    match due {
        Due::In(wait) => Some(seconds(wait)),
        Due::Now | Due::At(_) => None,
    }
}

fn time(due: Due) -> Option<Timestamp> {
    match due {
        Due::At(time) => Some(time),
        Due::Now | Due::In(_) => None,
    }
}

/// The columns of [`Claimed`].
const CLAIMED: &str =
    "id, kind, queue, priority, payload::text AS payload, epoch, failures, recoveries, recovered_at,
    errors, checkpoint, trace, unique_key, cancelled, created_at, run_at,
    (extract(epoch FROM clock_timestamp() - run_at) * 1000000)::int8 AS waited";

fn claimed(row: &Row, queue: Option<&Arc<str>>) -> Claimed {
    let unsigned = |column: &str| row.get::<_, i32>(column).unsigned_abs();
    let epoch: i64 = row.get("epoch");
    let waited: i64 = row.get("waited");
    let name = || Arc::from(row.get::<_, &str>("queue"));
    Claimed {
        id: row.get("id"),
        kind: row.get("kind"),
        queue: queue.map_or_else(name, Arc::clone),
        priority: row.get("priority"),
        payload: row.get("payload"),
        epoch,
        first: epoch == 1,
        spent: Attempts {
            failures: unsigned("failures"),
            recoveries: unsigned("recoveries"),
            since: row.get("recovered_at"),
        },
        errors: read_json(row.get("errors")),
        checkpoint: row.get("checkpoint"),
        trace: row.get("trace"),
        unique: row.get("unique_key"),
        cancelled: row.get("cancelled"),
        created_at: row.get("created_at"),
        due_at: row.get("run_at"),
        waited: Duration::from_micros(waited.max(0).unsigned_abs()),
    }
}
