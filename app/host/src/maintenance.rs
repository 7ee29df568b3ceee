//! Periodic maintenance of the host, as jobs and schedules that operators can see and change.

use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use perennial_store::pool::sql;
use perennial_store::pool::sqlite::Sqlite;
use perennial_workers::cron::Overlap;
use perennial_workers::state::Budget;
use perennial_workers::{Context, Job, JobAdmin, JobOutcome, Jobs, Options, Schedule};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::module::Host;
use crate::sessions::Sessions;

/// Queue of maintenance jobs, so that they never wait behind jobs of an application.
const QUEUE: &str = "maintenance";
/// Number of maintenance jobs that run at once.
const SLOTS: usize = 2;

/// Options of maintenance jobs. A job that fails is tried again for a while; then the next time of its schedule comes.
pub fn options() -> Options {
    Options {
        queue: QUEUE,
        timeout: Duration::from_secs(3600),
        budget: Budget {
            failures: 5,
            backoff: Backoff::new(Duration::from_secs(5), Duration::from_secs(300)),
            ..Options::default().budget
        },
        ..Options::default()
    }
}

/// Deletes in steps: calls `some`, which returns how many entries it has deleted, until it returns 0. Returns the sum.
pub async fn until_none<F>(context: &Context, mut some: impl FnMut() -> F) -> anyhow::Result<u64>
where
    F: Future<Output = anyhow::Result<u64>>,
{
    let mut all = 0;
    loop {
        context.check()?;
        match some().await? {
            0 => return Ok(all),
            forgotten => all += forgotten,
        }
    }
}

/// Hands in the jobs and schedules of the host. Jobs that have ended are kept for `retention`.
pub(crate) fn mount(host: &mut Host, retention: Duration) -> anyhow::Result<()> {
    host.serve_queue(QUEUE, SLOTS);
    host.job::<ForgetJobs>((host.jobs.clone(), retention));
    host.schedule(Schedule::new("jobs.retention", "*/10 * * * *", &ForgetJobs {})?.overlap(Overlap::Skip));
    // Postgres does this by itself.
    if let sql::Store::Sqlite(sqlite) = &host.store {
        let sqlite = sqlite.clone();
        host.job::<Optimize>(sqlite);
        host.schedule(Schedule::new("store.optimize", "30 3 * * *", &Optimize {})?.overlap(Overlap::Skip));
    }
    Ok(())
}

/// Hands in the job and the schedule that delete sessions which have ended, for programs that have sessions.
pub(crate) fn mount_sessions(host: &mut Host) -> anyhow::Result<()> {
    host.job::<ForgetSessions>(host.store.clone());
    let schedule = Schedule::new("sessions.retention", "20 * * * *", &ForgetSessions {})?;
    host.schedule(schedule.overlap(Overlap::Skip));
    Ok(())
}

/// Deletes sessions that have ended.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForgetSessions {}

impl Job for ForgetSessions {
    const KIND: &'static str = "sessions.retention";
    type Tools = sql::Store;

    fn options() -> Options {
        options()
    }

    async fn run(&self, context: Context, store: sql::Store) -> anyhow::Result<JobOutcome> {
        until_none(&context, || Sessions::forget(&store)).await?;
        Ok(JobOutcome::Done)
    }
}

/// Deletes jobs that ended long ago.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForgetJobs {}

impl Job for ForgetJobs {
    const KIND: &'static str = "jobs.retention";
    type Tools = (Jobs, Duration);

    fn options() -> Options {
        options()
    }

    async fn run(&self, context: Context, (jobs, retention): Self::Tools) -> anyhow::Result<JobOutcome> {
        let forget = || async { Ok(jobs.store().prune(retention).await? as u64) };
        let forgotten = until_none(&context, forget).await?;
        if forgotten > 0 {
            info!(jobs = forgotten, "deleted jobs that ended long ago");
        }
        Ok(JobOutcome::Done)
    }
}

/// Updates the statistics of the tables for the query planner of SQLite.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Optimize {}

impl Job for Optimize {
    const KIND: &'static str = "store.optimize";
    type Tools = Sqlite;

    fn options() -> Options {
        options()
    }

    async fn run(&self, _context: Context, sqlite: Sqlite) -> anyhow::Result<JobOutcome> {
        // The manual of SQLite advises this: `optimize` analyzes only tables that have changed, and `analysis_limit`
        // bounds the number of rows of each index.
        sqlite.write(|tx| tx.execute_batch("PRAGMA analysis_limit = 400; PRAGMA optimize;")).await?;
        Ok(JobOutcome::Done)
    }
}
