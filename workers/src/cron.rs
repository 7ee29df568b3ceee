//! Schedules: jobs that are enqueued by the clock.
//!
//! ```text
//! tick (tokio-cron-scheduler) ─┐
//! a poll of our own ───────────┼─► timer ── what is due since the last claim? ──► fire
//! the next time that is due ───┘     ▲                                             │ one transaction: the new state,
//!                                    └── states of schedules ◄─────── store ◄──────┘ if unchanged, and the job
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`expression`] | when a schedule is due, also when clocks change |
//! | [`claim`] | the decision what to do now, as a pure function |
//! | [`timer`] | the task that reads states, decides and fires |
//! | [`tick`] | one steady beat that wakes the timer, and decides nothing |
//! | [`crontab`] | the handle of operators |
//!
//! Any replica may fire, and none leads. Each reads the state of a schedule, decides, and writes the new state with the
//! job if no other replica was faster: so every occurrence is claimed once, and a process that dies on the way has
//! claimed nothing. The clock is the store's.

pub mod claim;
pub mod crontab;
pub mod expression;
pub(crate) mod occurrence;
pub mod tick;
pub mod timer;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};
use uuid::Uuid;

use crate::job::Job;
use crate::queue::{self, Due, NewJob};
pub use crontab::Crontab;
pub use expression::{CronExpression, Unreadable};
use occurrence::NAMESPACE;
pub use occurrence::Occurrence;

/// The longest name of a schedule, in bytes.
pub const MAX_NAME: usize = 100;
/// The longest delay by which occurrences may be spread out.
pub const MAX_JITTER: Duration = Duration::from_secs(24 * 3600);
/// Highest number of missed occurrences that are caught up at once.
pub const MAX_CATCH_UP: u32 = 500;
/// How late an occurrence may be without counting as missed, unless a schedule says otherwise.
const GRACE: Duration = Duration::from_secs(60);

/// A job that is enqueued by the clock, from code or from settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Name, unique in a store: lower-case letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// When the schedule is due.
    #[serde(flatten)]
    pub expression: CronExpression,
    /// The job that is enqueued.
    pub job: JobTemplate,
    /// Policy for occurrences that were missed.
    pub misfire: Misfire,
    /// Policy for an occurrence at which the job of an earlier one has not ended.
    pub overlap: Overlap,
    /// Bound of the delay of an occurrence, in milliseconds. Each occurrence is delayed by less than this, by
    /// an amount of its own.
    pub jitter_ms: u64,
    /// The schedule is not due before this time.
    pub from: Option<Timestamp>,
    /// The schedule is not due after this time.
    pub until: Option<Timestamp>,
    /// True if the schedule is paused, unless an operator says otherwise.
    pub paused: bool,
}

/// The job that a schedule enqueues. A unique key of its kind is not used: the policies of the schedule say
/// what may run at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobTemplate {
    /// Name of the kind.
    pub kind: String,
    /// Queue that the job waits in.
    pub queue: String,
    /// Priority within the queue: a lower number goes first.
    pub priority: i16,
    /// Payload in JSON.
    #[serde(serialize_with = "write_payload", deserialize_with = "read_payload")]
    pub payload: String,
}

/// Writes the payload as JSON within JSON, and not as a string.
fn write_payload<S: Serializer>(payload: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let value: serde_json::Value = serde_json::from_str(payload).map_err(ser::Error::custom)?;
    value.serialize(serializer)
}

fn read_payload<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(serde_json::Value::deserialize(deserializer)?.to_string())
}

impl From<NewJob> for JobTemplate {
    fn from(job: NewJob) -> Self {
        let NewJob { kind, queue, priority, payload, .. } = job;
        Self { kind: kind.into_owned(), queue: queue.into_owned(), priority, payload }
    }
}

/// Policy for occurrences that were missed: the process was stopped, its store was away, or the clock was set
/// forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "policy")]
pub enum Misfire {
    /// Occurrences that are too late are skipped.
    Skip {
        /// How late an occurrence may be, in milliseconds.
        grace_ms: u64,
    },
    /// One job stands for all missed occurrences.
    Coalesce,
    /// Each of the newest missed occurrences gets a job.
    CatchUp {
        /// Highest number of jobs, never more than [`MAX_CATCH_UP`].
        most: u32,
        /// How old an occurrence may be, in milliseconds.
        within_ms: u64,
    },
}

impl Misfire {
    /// Skips occurrences that are more than a minute late.
    pub const SKIP: Self = Self::Skip { grace_ms: GRACE.as_secs() * 1000 };
}

/// Policy for an occurrence at which the job of an earlier one has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Both jobs run side by side.
    Allow,
    /// The occurrence is skipped.
    Skip,
    /// The occurrence waits for the end of the earlier job. While one waits, others are skipped.
    QueueOne,
    /// The earlier job is cancelled, and the occurrence begins when that job has ended.
    CancelOther,
}

/// A name that a schedule cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to {MAX_NAME} lower-case letters, digits, dots, dashes and underscores")]
pub struct BadName;

/// Checks whether a schedule can have this name.
///
/// # Errors
/// When it cannot.
pub fn check_name(name: &str) -> Result<(), BadName> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let is_name = !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(fits);
    if is_name { Ok(()) } else { Err(BadName) }
}

impl Schedule {
    /// Creates a schedule that enqueues `job` when `expression` says, in UTC. Missed occurrences are
    /// coalesced, and overlapping jobs run side by side.
    ///
    /// # Errors
    /// When the name, the expression or the payload is not usable.
    pub fn new<J: Job>(name: &str, expression: &str, job: &J) -> anyhow::Result<Self> {
        Ok(Self::of(name, expression.parse()?, NewJob::new(job)?.into())?)
    }

    /// Creates the same schedule for a job without its type.
    ///
    /// # Errors
    /// When the name is not usable.
    pub fn of(name: &str, expression: CronExpression, job: JobTemplate) -> Result<Self, BadName> {
        check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            expression,
            job,
            misfire: Misfire::Coalesce,
            overlap: Overlap::Allow,
            jitter_ms: 0,
            from: None,
            until: None,
            paused: false,
        })
    }

    /// Goes by the wall clock of another zone, an IANA name.
    ///
    /// # Errors
    /// When there is no such zone.
    pub fn zone(self, zone: &str) -> Result<Self, Unreadable> {
        let expression = CronExpression::parse(self.expression.as_str(), zone)?;
        Ok(Self { expression, ..self })
    }

    /// Sets the policy for missed occurrences.
    #[must_use]
    pub fn misfire(self, misfire: Misfire) -> Self {
        Self { misfire, ..self }
    }

    /// Sets the policy for overlaps.
    #[must_use]
    pub fn overlap(self, overlap: Overlap) -> Self {
        Self { overlap, ..self }
    }

    /// Delays each occurrence by less than `jitter`, which is cut to [`MAX_JITTER`].
    #[must_use]
    pub fn jitter(self, jitter: Duration) -> Self {
        let jitter_ms = u64::try_from(jitter.min(MAX_JITTER).as_millis()).unwrap_or_default();
        Self { jitter_ms, ..self }
    }

    /// Returns the next time after `last` that is within the window of the schedule.
    pub fn next_after(&self, last: Timestamp) -> Option<Timestamp> {
        let next = self.expression.next_after(self.begin(last))?;
        self.until.is_none_or(|until| next <= until).then_some(next)
    }

    /// Returns the delay of an occurrence, which is the same in every process.
    pub fn delay(&self, occurrence: Timestamp) -> SignedDuration {
        if self.jitter_ms == 0 {
            return SignedDuration::ZERO;
        }
        let seed = format!("{}@{occurrence}", self.name);
        let (random, _) = Uuid::new_v5(&NAMESPACE, seed.as_bytes()).as_u64_pair();
        SignedDuration::from_millis(i64::try_from(random % self.jitter_ms).unwrap_or_default())
    }

    /// Returns the schedule in JSON.
    pub(crate) fn definition(&self) -> String {
        crate::encoding::json(self)
    }

    /// Creates the job for an occurrence; `is_manual` says that an operator asked for it.
    fn job(&self, occurrence: Timestamp, is_manual: bool) -> NewJob {
        let JobTemplate { kind, queue, priority, payload } = self.job.clone();
        let of = Occurrence { schedule: self.name.clone(), time: occurrence };
        // Missed occurrences keep their order.
        let due = if is_manual { Due::Now } else { Due::At(occurrence + self.delay(occurrence)) };
        NewJob {
            id: of.job(is_manual),
            kind: kind.into(),
            queue: queue.into(),
            priority,
            payload,
            due,
            unique: None,
            trace: Some(of.to_string()),
            recoveries: 0,
        }
    }

    /// Returns the time after which the schedule may be due, if `last` was its last time.
    fn begin(&self, last: Timestamp) -> Timestamp {
        // A time on the wall clock that is the first moment of the window is within it.
        let before = SignedDuration::from_nanos(i64::from(!self.expression.is_elapsed()));
        let from = self.from.and_then(|from| from.checked_sub(before).ok());
        from.map_or(last, |from| last.max(from))
    }
}

/// State of a schedule in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleState {
    /// Name of the schedule.
    pub name: String,
    /// The schedule in JSON, as it was defined last.
    pub definition: String,
    /// The expression and the zone that [`ScheduleState::last_fire`] is about.
    pub timing: String,
    /// Last time that was claimed, or the time at which the schedule was first known.
    pub last_fire: Timestamp,
    /// Occurrence that waits for the job of an earlier one.
    pub queued: Option<Timestamp>,
    /// True if the definition pauses the schedule.
    pub paused: bool,
    /// True if an operator pauses the schedule, and false if an operator lets it run; `None` leaves it to the
    /// definition.
    pub held: Option<bool>,
    /// Version of the state, which every change raises.
    pub version: i64,
    /// Time at which a process last upheld the definition.
    pub seen_at: Timestamp,
}

/// Policy for the definitions of other processes, when a process says what it defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeOver {
    /// Other definitions stay.
    Never,
    /// Another definition stays as long as a process upholds it: see
    /// [`ABANDONED`](crate::schedules::ABANDONED).
    IfAbandoned,
    /// Other definitions are replaced: of two versions of a program, the one that booted last counts.
    Always,
}

impl ScheduleState {
    /// Returns true if the schedule is paused.
    pub fn is_paused(&self) -> bool {
        self.held.unwrap_or(self.paused)
    }

    /// Returns the schedule as it was defined last.
    ///
    /// # Errors
    /// When this program cannot read the definition.
    pub fn schedule(&self) -> queue::Result<Schedule> {
        let unreadable = |error: serde_json::Error| {
            queue::Error::Unreadable(format!("the schedule {}: {error}", self.name))
        };
        serde_json::from_str(&self.definition).map_err(unreadable)
    }
}

/// States of all schedules, and the time.
#[derive(Clone, Debug)]
pub struct ScheduleStates {
    /// Time of the store's clock.
    pub now: Timestamp,
    /// States of all schedules that can be read.
    pub all: Vec<ScheduleState>,
    /// Names of the schedules that cannot be read, since another program wrote them.
    pub unreadable: Vec<String>,
}

/// The new state of a schedule with its jobs, which are written all or not at all.
#[derive(Clone, Debug)]
pub struct ScheduleClaim {
    /// Name of the schedule.
    pub schedule: String,
    /// Version that the state must still have: otherwise another process was faster.
    pub version: i64,
    /// New value of [`ScheduleState::last_fire`].
    pub last_fire: Timestamp,
    /// New value of [`ScheduleState::queued`].
    pub queued: Option<Timestamp>,
    /// Jobs to enqueue.
    pub jobs: Vec<NewJob>,
    /// Runs to record.
    pub runs: Vec<Run>,
}

/// Cause of a run, or of the record that there was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunCause {
    /// The occurrence was due.
    Due,
    /// The occurrence had waited for the job of an earlier one.
    Queued,
    /// An operator asked for the run.
    Manual,
}

/// Record of one occurrence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Id of the job, if there is one; otherwise of the record alone.
    pub id: Uuid,
    /// True if a job was enqueued.
    pub has_job: bool,
    /// Time at which the occurrence was due, without its delay.
    pub occurrence: Timestamp,
    /// Time of the claim, by the store's clock.
    pub claimed_at: Timestamp,
    /// Cause of the run.
    pub cause: RunCause,
    /// Number of earlier occurrences, since the last run, that have no run of their own, counted up to a
    /// thousand.
    pub passed: u32,
    /// How the run ended, if it has.
    pub ending: Option<Ending>,
}

/// Ending of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// Outcome of the run.
    pub outcome: RunOutcome,
    /// Reason of the outcome, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Time of the end.
    pub at: Timestamp,
}

/// Outcome of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// The job is done.
    Done,
    /// The job was given up.
    Dead,
    /// The job was cancelled.
    Cancelled,
    /// The job of an earlier occurrence had not ended.
    Overlapped,
    /// The occurrence was too late.
    Missed,
}
