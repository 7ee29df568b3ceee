//! The stores of jobs.

pub mod postgres;
pub mod redis;
mod schedules;
#[cfg(feature = "testing")]
mod shift;
pub mod sqlite;

#[cfg(feature = "testing")]
pub use shift::{shift, shift_redis, shift_scores};

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::Drain;
use perennial_store::pool::sql::{self, Engine, Tx};
use tracing::warn;
use uuid::Uuid;

use crate::cron::{Ending, Occurrence, Run, RunOutcome, Schedule, ScheduleClaim, ScheduleStates, TakeOver};
use crate::encoding::millis;
use crate::job_admin::{Cancelled, JobAdmin, JobFilter, JobView};
use crate::queue::{
    Claim, Claims, Depth, Held, Lapsed, NewJob, Probed, Queue, Renewal, Renewed, Result, Settlement,
};
use crate::schedules::{ABANDONED, Schedules};
use crate::state::{State, Transition};
use crate::wake::Wake;
use postgres::PostgresQueue;
use redis::RedisQueue;
use schedules::SqlSchedules;
use sqlite::SqliteQueue;

/// Tables of jobs that are kept beside the rows that they are about.
pub const TABLES: sql::Tables =
    sql::Tables { module: "jobs", sqlite: sqlite::MIGRATIONS.steps, postgres: postgres::MIGRATIONS.steps };

/// The job store that the settings select.
#[derive(Clone, Debug)]
pub enum JobStore {
    /// The embedded store: a file of this process.
    Sqlite(SqliteQueue),
    /// A Postgres server, shared with other processes.
    Postgres(PostgresQueue),
    /// A Redis server, shared with other processes.
    Redis(RedisQueue),
}

impl JobStore {
    /// Wakes these queues after the commit of a transaction that added jobs to them.
    pub(crate) fn committed(&self, queues: &BTreeSet<&str>) {
        match self {
            Self::Sqlite(store) => store.wake().queues(queues.iter().copied()),
            Self::Postgres(store) => store.woken(queues.iter().copied()),
            Self::Redis(store) => store.committed(),
        }
    }
}

/// Calls the same method of the store in `self`, whichever it is.
macro_rules! either {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Sqlite($store) => $call,
            Self::Postgres($store) => $call,
            Self::Redis($store) => $call,
        }
    };
}

impl Queue for JobStore {
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
        let scheduled: Vec<_> = settlements.iter().map(ending).collect();
        let kept = either!(self, store => store.settle(settlements).await)?;
        let ended = scheduled.into_iter().zip(&kept).filter_map(|(ending, kept)| ending.filter(|_| *kept));
        self.note(ended.collect()).await;
        Ok(kept)
    }

    async fn lapsed(&self, limit: usize, worker: String, lease: Duration) -> Result<Lapsed> {
        either!(self, store => store.lapsed(limit, worker, lease).await)
    }

    async fn probe(&self, queues: Vec<Arc<str>>) -> Result<Option<Probed>> {
        either!(self, store => store.probe(queues).await)
    }

    async fn measure_all(&self, queues: Vec<Arc<str>>) -> Vec<(Arc<str>, Result<Depth>)> {
        either!(self, store => store.measure_all(queues).await)
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

impl JobAdmin for JobStore {
    async fn list(&self, filter: JobFilter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        either!(self, store => store.list(filter, cursor, limit).await)
    }

    async fn show(&self, id: Uuid) -> Result<Option<JobView>> {
        either!(self, store => store.show(id).await)
    }

    async fn retry(&self, filter: JobFilter) -> Result<usize> {
        either!(self, store => store.retry(filter).await)
    }

    async fn discard(&self, filter: JobFilter) -> Result<usize> {
        either!(self, store => store.discard(filter).await)
    }

    async fn cancel(&self, id: Uuid, reason: String) -> Result<Cancelled> {
        let cancelled = either!(self, store => store.cancel(id, reason.clone()).await)?;
        if cancelled == Cancelled::Now
            && let Some(job) = self.show(id).await?
            && let Some(occurrence) = job.trace.as_deref().and_then(Occurrence::of_trace)
            && occurrence.has_job(id)
        {
            let ending =
                Ending { outcome: RunOutcome::Cancelled, reason: Some(reason), at: Timestamp::now() };
            self.note(vec![(occurrence.schedule, id, ending)]).await;
        }
        Ok(cancelled)
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

/// Calls the same method for schedules of the store in `self`, whichever it is.
macro_rules! schedules {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Sqlite(queue) => {
                let $store = SqlSchedules::new($self, queue.store());
                $call
            }
            Self::Postgres(queue) => {
                let $store = SqlSchedules::new($self, queue.store());
                $call
            }
            Self::Redis($store) => $call,
        }
    };
}

impl Schedules for JobStore {
    async fn sync(&self, schedules: Vec<Arc<Schedule>>, take_over: TakeOver) -> Result<()> {
        schedules!(self, store => store.sync(schedules, take_over).await)
    }

    async fn due(&self) -> Result<ScheduleStates> {
        if let Self::Sqlite(queue) = self {
            return queue.standings(SqlSchedules::new(self, queue.store()).due()).await;
        }
        schedules!(self, store => store.due().await)
    }

    async fn fire(&self, claim: ScheduleClaim) -> Result<bool> {
        schedules!(self, store => store.fire(claim).await)
    }

    async fn set(&self, schedule: String, paused: bool) -> Result<bool> {
        schedules!(self, store => store.set(schedule, paused).await)
    }

    async fn unfinished(&self, schedule: &str, queue: &str) -> Result<Vec<Uuid>> {
        schedules!(self, store => store.unfinished(schedule, queue).await)
    }

    async fn runs(&self, schedule: &str, limit: usize) -> Result<Vec<Run>> {
        schedules!(self, store => store.runs(schedule, limit).await)
    }

    async fn record_endings(&self, endings: Vec<(String, Uuid, Ending)>) -> Result<()> {
        schedules!(self, store => store.record_endings(endings).await)
    }
}

impl JobStore {
    /// Records how jobs of schedules ended. A failure is only logged, since the jobs have ended in any case.
    async fn note(&self, endings: Vec<(String, Uuid, Ending)>) {
        if endings.is_empty() {
            return;
        }
        if let Err(error) = self.record_endings(endings).await {
            warn!(error = error.in_one_line(), "the endings of scheduled jobs could not be recorded");
        }
    }
}

/// Adds jobs to the tables beside the rows of a transaction.
pub(crate) async fn insert_jobs<T: Tx>(tx: &T, jobs: &[NewJob]) -> sql::Result<()> {
    match tx.engine() {
        Engine::Sqlite(connection) => drop(sqlite::insert_jobs(connection, jobs)?),
        Engine::SqliteSession(session) => {
            let jobs = jobs.to_vec();
            session.run(move |connection| Ok(sqlite::insert_jobs(connection, &jobs).map(drop)?)).await?;
        }
        Engine::Postgres(transaction) => drop(postgres::insert_jobs(transaction, jobs).await?),
        Engine::PostgresSession(transaction) => drop(postgres::insert_jobs(transaction, jobs).await?),
    }
    Ok(())
}

/// Returns the ending of a scheduled job by this settlement; `None` if no schedule enqueued the job, or if it
/// does not end.
fn ending(settlement: &Settlement) -> Option<(String, Uuid, Ending)> {
    let (outcome, reason) = match &settlement.transition {
        Transition::Again { .. } => return None,
        Transition::Finished => (RunOutcome::Done, None),
        Transition::Ended { state: State::Cancelled, reason, .. } => {
            (RunOutcome::Cancelled, Some(reason.clone()))
        }
        Transition::Ended { reason, .. } => (RunOutcome::Dead, Some(reason.clone())),
    };
    let id = settlement.job.id;
    let occurrence = Occurrence::of_trace(settlement.job.trace.as_deref()?)?;
    let ending = Ending { outcome, reason, at: Timestamp::now() };
    occurrence.has_job(id).then_some((occurrence.schedule, id, ending))
}

/// Returns for how many milliseconds after it was last upheld another definition stays. A definition may have
/// been upheld in this very moment, so the value for `Always` is below zero.
fn stands_for(take_over: TakeOver) -> i64 {
    match take_over {
        TakeOver::Never => i64::MAX / 2,
        TakeOver::IfAbandoned => millis(ABANDONED),
        TakeOver::Always => i64::MIN / 2,
    }
}
