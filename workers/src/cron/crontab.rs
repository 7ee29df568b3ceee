//! The handle through which operators use the schedules of a process.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::sync::Notify;
use tracing::warn;
use uuid::Uuid;

use super::claim::by_hand;
use super::{Ending, Overlap, Run, RunCause, RunOutcome, Schedule, ScheduleState, ScheduleStates, TakeOver};
use crate::admission::Admission;
use crate::job_admin::JobAdmin;
use crate::metrics;
use crate::queue::Result;
use crate::schedules::{ABANDONED, Schedules};
use crate::state::State;
use crate::store::JobStore;

/// How often a run by hand is tried while other processes change the schedule at the same moment.
const ATTEMPTS: usize = 20;

/// Lists schedules, runs them and pauses them. A cheap handle.
#[derive(Clone, Debug)]
pub struct Crontab {
    store: JobStore,
    admission: Admission,
    schedules: Arc<[Arc<Schedule>]>,
    wake: Arc<Notify>,
    beat: Arc<Notify>,
}

/// A schedule as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct ScheduleView {
    /// Definition of the schedule; `paused` says whether it is paused now.
    #[serde(flatten)]
    pub schedule: Schedule,
    /// Says whether the schedule fires.
    pub state: ScheduleActivity,
    /// Next time at which the schedule is due.
    pub next: Option<Moment>,
    /// Time for which an occurrence has been due without being claimed, in milliseconds.
    pub overdue_ms: Option<i128>,
    /// Occurrence that waits for the job of an earlier one.
    pub queued: Option<Moment>,
    /// Newest run of the schedule.
    pub last: Option<RunView>,
}

/// Says whether a schedule fires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleActivity {
    /// The schedule is fired when it is due.
    Active,
    /// The schedule is fired again when it is resumed.
    Paused,
    /// The schedule is never due, or not any more.
    Never,
    /// No process has said within the last minute that it defines the schedule.
    Undefined,
}

/// A time, in UTC and in the zone of a schedule.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// Time in UTC.
    pub utc: Timestamp,
    /// Time on the wall clock of the schedule's zone.
    pub local: String,
}

/// Record of one occurrence, as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct RunView {
    /// Time at which the occurrence was due.
    pub occurrence: Moment,
    /// Cause of the run.
    pub cause: RunCause,
    /// Time from when the occurrence was due to its claim, in milliseconds.
    pub lag_ms: i128,
    /// Number of earlier occurrences that have no run of their own.
    pub passed: u32,
    /// Id of the job, if there is one.
    pub job: Option<Uuid>,
    /// How the run ended, or the state of its job; `unknown` if neither was recorded.
    pub outcome: String,
    /// Reason of the outcome.
    pub reason: Option<String>,
    /// Time from the start of the run to its end, in milliseconds. The run starts at its due time with the
    /// delay, or at its claim if that was later.
    pub took_ms: Option<i128>,
}

/// Result of asking for a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// The job with this id is enqueued.
    Enqueued(Uuid),
    /// These jobs of the schedule have not ended, and its policy lets no others run beside them.
    Unfinished(Vec<Uuid>),
    /// Other processes changed the schedule during every attempt.
    Busy,
    /// There is no such schedule.
    Unknown,
}

impl Crontab {
    /// Creates a handle to the schedules that this process defines, in a store of jobs.
    pub fn new(store: JobStore, admission: Admission, schedules: Vec<Schedule>) -> Self {
        let schedules = schedules.into_iter().map(Arc::new).collect();
        Self { store, admission, schedules, wake: Arc::default(), beat: Arc::default() }
    }

    /// Makes the schedules known to the store, in place of the definitions of other processes, and warns of
    /// schedules that are never due.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn define(&self) -> Result<()> {
        for schedule in self.schedules.iter() {
            metrics::may_be_due(&schedule.name);
            if schedule.next_after(Timestamp::now()).is_none() {
                warn!(
                    schedule = schedule.name,
                    expression = schedule.expression.as_str(),
                    "this schedule is never due"
                );
            }
        }
        self.store.sync(self.schedules.to_vec(), TakeOver::Always).await
    }

    /// Returns the schedules that this process defines.
    pub(super) fn schedules(&self) -> &[Arc<Schedule>] {
        &self.schedules
    }

    pub(super) fn store(&self) -> &JobStore {
        &self.store
    }

    pub(super) fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Wakes the timer, because a schedule may be due.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Passes on a beat of the tick, on which a timer that is late looks at once.
    pub(super) fn beat(&self) {
        self.beat.notify_one();
    }

    pub(super) async fn beats(&self) {
        self.beat.notified().await;
    }

    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Returns every schedule that the store knows. A schedule that cannot be read, since another version
    /// defined it, is left out.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self) -> Result<Vec<ScheduleView>> {
        let standings = self.store.due().await?;
        let mut views = Vec::with_capacity(standings.all.len());
        for standing in &standings.all {
            let Ok(schedule) = standing.schedule() else { continue };
            let last = match self.store.runs(&standing.name, 1).await?.pop() {
                Some(run) => Some(self.view(&schedule, run).await?),
                None => None,
            };
            let moment = |time| Moment::of(time, &schedule);
            let (now, paused) = (standings.now, standing.is_paused());
            let due = schedule.next_after(standing.last_fire);
            let overdue =
                due.filter(|due| *due < now && !paused).map(|due| now.duration_since(due).as_millis());
            let next = if due.is_some_and(|due| due > now) { due } else { schedule.next_after(now) };
            let state = match next {
                _ if now.duration_since(standing.seen_at).unsigned_abs() > ABANDONED => {
                    ScheduleActivity::Undefined
                }
                _ if paused => ScheduleActivity::Paused,
                None => ScheduleActivity::Never,
                Some(_) => ScheduleActivity::Active,
            };
            views.push(ScheduleView {
                state,
                next: next.filter(|_| state == ScheduleActivity::Active).map(moment),
                overdue_ms: overdue,
                queued: standing.queued.map(moment),
                last,
                schedule: Schedule { paused, ..schedule },
            });
        }
        Ok(views)
    }

    /// Returns the newest runs of a schedule, the newest first; `None` if there is no such schedule.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn runs(&self, name: &str, limit: usize) -> Result<Option<Vec<RunView>>> {
        let Some((_, _, schedule)) = self.find(name).await? else { return Ok(None) };
        let mut views = Vec::new();
        for run in self.store.runs(name, limit).await? {
            views.push(self.view(&schedule, run).await?);
        }
        Ok(Some(views))
    }

    /// Runs the job of a schedule now, also while the schedule is paused.
    ///
    /// # Errors
    /// When its queue is full, or the store fails.
    pub async fn run(&self, name: &str) -> Result<Asked> {
        for _ in 0..ATTEMPTS {
            let Some((now, standing, schedule)) = self.find(name).await? else { return Ok(Asked::Unknown) };
            let unfinished = match schedule.overlap {
                Overlap::Allow => Vec::new(),
                _ => self.store.unfinished(name, &schedule.job.queue).await?,
            };
            let Some((job, claim)) = by_hand(&schedule, &standing, &unfinished, now) else {
                return Ok(Asked::Unfinished(unfinished));
            };
            self.admission.admit(&claim.jobs)?;
            if self.store.fire(claim).await? {
                return Ok(Asked::Enqueued(job));
            }
        }
        Ok(Asked::Busy)
    }

    /// Pauses a schedule in every process, or resumes it from now on. Returns false when there is no such
    /// schedule.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn pause(&self, name: &str, paused: bool) -> Result<bool> {
        let is_there = self.store.set(name.to_owned(), paused).await?;
        self.wake();
        Ok(is_there)
    }

    /// Returns a schedule and its state, with the time of the store's clock.
    async fn find(&self, name: &str) -> Result<Option<(Timestamp, ScheduleState, Schedule)>> {
        let ScheduleStates { now, all, .. } = self.store.due().await?;
        let found = all.into_iter().find(|standing| standing.name == name);
        found.map(|standing| standing.schedule().map(|schedule| (now, standing, schedule))).transpose()
    }

    async fn view(&self, schedule: &Schedule, run: Run) -> Result<RunView> {
        let job = match &run.ending {
            // A job that was given up may have been revived.
            None | Some(Ending { outcome: RunOutcome::Dead | RunOutcome::Cancelled, .. }) => {
                self.store.show(run.id).await?
            }
            Some(_) => None,
        };
        let (outcome, reason) = match (&run.ending, job) {
            (Some(Ending { outcome, reason, .. }), None) => (outcome.as_str().to_owned(), reason.clone()),
            (_, Some(job)) => (job.state.as_str().to_owned(), job.reason),
            (None, None) => ("unknown".to_owned(), None),
        };
        let begin = run.claimed_at.max(run.occurrence + schedule.delay(run.occurrence));
        let took = run.ending.filter(|_| run.has_job);
        Ok(RunView {
            occurrence: Moment::of(run.occurrence, schedule),
            cause: run.cause,
            lag_ms: run.claimed_at.duration_since(run.occurrence).max(SignedDuration::ZERO).as_millis(),
            passed: run.passed,
            job: run.has_job.then_some(run.id),
            outcome,
            reason,
            took_ms: took.map(|ending| ending.at.duration_since(begin).as_millis().max(0)),
        })
    }
}

impl Moment {
    fn of(time: Timestamp, schedule: &Schedule) -> Self {
        let local = time.to_zoned(schedule.expression.zone().clone());
        Self { utc: time, local: local.strftime("%F %T %:z").to_string() }
    }
}

impl RunOutcome {
    /// Returns the word for the outcome; for ends of jobs, the word of [`State`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Dead => State::Dead.as_str(),
            Self::Cancelled => State::Cancelled.as_str(),
            Self::Overlapped => "overlapped",
            Self::Missed => "missed",
        }
    }
}
