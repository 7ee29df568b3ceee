//! Schedules: jobs that are enqueued by the clock.
//!
//! ```text
//! tick (tokio-cron-scheduler) ─┐
//! a poll of our own ───────────┼─► timer ── what is due since the last claim? ──► fire
//! the next time that is due ───┘     ▲                                             │ one transaction: the schedule's row
//!                                    └── where schedules stand ◄───── store ◄──────┘ from what was read, and the job
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`expression`] | when something is due, and what that means when clocks change |
//! | [`claim`] | what is to be done now, as a pure function |
//! | [`timer`] | the task that asks and does |
//! | [`tick`] | one steady beat that wakes it, and decides nothing |
//! | [`crontab`] | the handle of operators |
//!
//! Any replica may fire, and none leads. Each reads where a schedule stands, decides, and writes down the new standing
//! with the job if nobody was faster: so every occurrence is claimed once, and a process that dies on the way has
//! claimed nothing. The clock is the store's.

pub mod claim;
pub mod crontab;
pub mod expression;
pub mod tick;
pub mod timer;

use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};
use uuid::Uuid;

use crate::job::Job;
use crate::queue::{self, Due, NewJob};
pub use crontab::Crontab;
pub use expression::{CronExpression, Unreadable};

/// The longest name of a schedule, in bytes.
pub const MAX_NAME: usize = 100;
/// The longest delay by which occurrences may be spread out.
pub const MAX_JITTER: Duration = Duration::from_secs(24 * 3600);
/// The most that is caught up at once.
pub const MAX_CATCH_UP: u32 = 500;
/// How late an occurrence may be without counting as missed, unless a schedule says otherwise.
const GRACE: Duration = Duration::from_secs(60);
/// What the ids of jobs are derived in, from the names of their schedules.
const NAMESPACE: Uuid = Uuid::from_u128(0x5f2c_68f9_5d0c_4b6e_9a57_1d4f_0c3b_8e21);

/// A job that is enqueued by the clock: a value, from code or from settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Its name, once in a store: lower-case letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// When it is due.
    #[serde(flatten)]
    pub expression: CronExpression,
    /// What is enqueued.
    pub job: JobTemplate,
    /// What becomes of times at which nobody could enqueue it.
    pub misfire: Misfire,
    /// What becomes of a time at which the job of an earlier one has not ended.
    pub overlap: Overlap,
    /// Each occurrence is delayed by less than this, by an amount of its own, in milliseconds.
    pub jitter_ms: u64,
    /// Not due before then.
    pub from: Option<Timestamp>,
    /// Not due after then.
    pub until: Option<Timestamp>,
    /// Whether it is paused, unless an operator says otherwise.
    pub paused: bool,
}

/// The job that a schedule enqueues. A unique key that its kind may have is not asked for: what may run at once is for
/// the schedule's policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobTemplate {
    /// Its kind.
    pub kind: String,
    /// The queue that it waits in.
    pub queue: String,
    /// Lower goes first.
    pub priority: i16,
    /// JSON.
    #[serde(serialize_with = "write_payload", deserialize_with = "read_payload")]
    pub payload: String,
}

/// As JSON within JSON, and not as a text.
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

/// What becomes of times that were missed: the process was stopped, its store was away, or the clock was set forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "policy")]
pub enum Misfire {
    /// Nothing: what is later than this many milliseconds is skipped.
    Skip {
        /// How late it may be.
        grace_ms: u64,
    },
    /// One job stands for all of them.
    Coalesce,
    /// A job for each of the newest.
    CatchUp {
        /// At most so many, and never more than [`MAX_CATCH_UP`],
        most: u32,
        /// and none that is older than this many milliseconds.
        within_ms: u64,
    },
}

impl Misfire {
    /// Skips what is more than a minute late.
    pub const SKIP: Self = Self::Skip { grace_ms: GRACE.as_secs() * 1000 };
}

/// What becomes of a time at which the job of an earlier one has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// They run side by side.
    Allow,
    /// It is skipped.
    Skip,
    /// It waits for the end of the other; while one waits, others are skipped.
    QueueOne,
    /// The other is cancelled, and it begins when that has ended.
    CancelOther,
}

/// A name that a schedule cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to {MAX_NAME} lower-case letters, digits, dots, dashes and underscores")]
pub struct BadName;

/// Whether a schedule can have this name.
///
/// # Errors
/// When it cannot.
pub fn check_name(name: &str) -> Result<(), BadName> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let is_name = !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(fits);
    if is_name { Ok(()) } else { Err(BadName) }
}

impl Schedule {
    /// Enqueues `job` when `expression` says, by UTC; what was missed once, and side by side.
    ///
    /// # Errors
    /// When the name, the expression or the payload is not usable.
    pub fn new<J: Job>(name: &str, expression: &str, job: &J) -> anyhow::Result<Self> {
        Ok(Self::of(name, expression.parse()?, NewJob::new(job)?.into())?)
    }

    /// The same for a job without its type.
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

    /// By the wall clock of another zone, an IANA name.
    ///
    /// # Errors
    /// When there is no such zone.
    pub fn zone(self, zone: &str) -> Result<Self, Unreadable> {
        let expression = CronExpression::parse(self.expression.as_str(), zone)?;
        Ok(Self { expression, ..self })
    }

    /// With another policy for what was missed.
    #[must_use]
    pub fn misfire(self, misfire: Misfire) -> Self {
        Self { misfire, ..self }
    }

    /// With another policy for what has not ended.
    #[must_use]
    pub fn overlap(self, overlap: Overlap) -> Self {
        Self { overlap, ..self }
    }

    /// Spread out by less than `jitter`: never more than [`MAX_JITTER`].
    #[must_use]
    pub fn jitter(self, jitter: Duration) -> Self {
        let jitter_ms = u64::try_from(jitter.min(MAX_JITTER).as_millis()).unwrap_or_default();
        Self { jitter_ms, ..self }
    }

    /// The next time after `last` that is within its window.
    pub fn next_after(&self, last: Timestamp) -> Option<Timestamp> {
        let next = self.expression.next_after(self.begin(last))?;
        self.until.is_none_or(|until| next <= until).then_some(next)
    }

    /// By how much an occurrence is delayed: the same in every process.
    pub fn delay(&self, occurrence: Timestamp) -> SignedDuration {
        if self.jitter_ms == 0 {
            return SignedDuration::ZERO;
        }
        let seed = format!("{}@{occurrence}", self.name);
        let (random, _) = Uuid::new_v5(&NAMESPACE, seed.as_bytes()).as_u64_pair();
        SignedDuration::from_millis(i64::try_from(random % self.jitter_ms).unwrap_or_default())
    }

    /// The schedule in JSON.
    pub(crate) fn definition(&self) -> String {
        crate::store::json(self)
    }

    /// The job for an occurrence, which may be one that somebody asked for.
    fn job(&self, occurrence: Timestamp, is_manual: bool) -> NewJob {
        let JobTemplate { kind, queue, priority, payload } = self.job.clone();
        let of = Occurrence { schedule: self.name.clone(), time: occurrence };
        // What was missed keeps its order.
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

    /// From where on it may be due, if `last` was its last time.
    fn begin(&self, last: Timestamp) -> Timestamp {
        // A time on the wall clock that is the first moment of the window is within it.
        let before = SignedDuration::from_nanos(i64::from(!self.expression.is_elapsed()));
        let from = self.from.and_then(|from| from.checked_sub(before).ok());
        from.map_or(last, |from| last.max(from))
    }
}

/// One time of one schedule: what joins a job to what enqueued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occurrence {
    /// The name of the schedule.
    pub schedule: String,
    /// When it was due, without its delay.
    pub time: Timestamp,
}

impl Occurrence {
    /// What the trace of such jobs begins with.
    const TRACE: &str = "cron:";

    /// Read from the trace of a job; none if something else enqueued it.
    pub fn of_trace(trace: &str) -> Option<Self> {
        let (schedule, time) = trace.strip_prefix(Self::TRACE)?.split_once('@')?;
        Some(Self { schedule: schedule.to_owned(), time: time.parse().ok()? })
    }

    /// Whether this is its job, and not one that follows from it and has the same trace.
    pub(crate) fn has_job(&self, id: Uuid) -> bool {
        id == self.job(false) || id == self.job(true)
    }

    /// The id of its job: made of the schedule and the time, so that it can be enqueued again without becoming two.
    fn job(&self, is_manual: bool) -> Uuid {
        let seed = if is_manual { format!("{} by hand", self.schedule) } else { self.schedule.clone() };
        let name = Uuid::new_v5(&NAMESPACE, seed.as_bytes());
        let mut random = [0; 10];
        random.copy_from_slice(&name.as_bytes()[..10]);
        let ms = u64::try_from(self.time.as_millisecond()).unwrap_or_default();
        uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid()
    }
}

/// As a trace.
impl fmt::Display for Occurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}@{}", Self::TRACE, self.schedule, self.time)
    }
}

/// Where a schedule stands in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScheduleState {
    /// Its name.
    pub name: String,
    /// The schedule in JSON, as it was defined last.
    pub definition: String,
    /// The expression and the zone that [`ScheduleState::last_fire`] is about.
    pub timing: String,
    /// The last time that was claimed, or when it was known first.
    pub last_fire: Timestamp,
    /// A time that waits for the job of an earlier one.
    pub queued: Option<Timestamp>,
    /// Whether it is paused as defined.
    pub paused: bool,
    /// Whether an operator wants it paused, if that is not as defined.
    pub held: Option<bool>,
    /// Raised by every change.
    pub version: i64,
    /// When a process last said that it is defined so.
    pub seen_at: Timestamp,
}

/// What becomes of the definitions of other processes when a process says what it defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeOver {
    /// They stand.
    Never,
    /// They stand as long as another process upholds them: see [`ABANDONED`](crate::schedules::ABANDONED).
    IfAbandoned,
    /// They are replaced: of two versions of a program, the one that booted last counts.
    Always,
}

impl ScheduleState {
    /// Whether nothing is claimed.
    pub fn is_paused(&self) -> bool {
        self.held.unwrap_or(self.paused)
    }

    /// The schedule as it was defined last.
    ///
    /// # Errors
    /// When this program cannot read it.
    pub fn schedule(&self) -> queue::Result<Schedule> {
        let unreadable = |error: serde_json::Error| {
            queue::Error::Unreadable(format!("the schedule {}: {error}", self.name))
        };
        serde_json::from_str(&self.definition).map_err(unreadable)
    }
}

/// Where schedules stand, and what time it is.
#[derive(Clone, Debug)]
pub struct ScheduleStates {
    /// By the store's clock.
    pub now: Timestamp,
    /// All that were ever defined,
    pub all: Vec<ScheduleState>,
    /// but for those that cannot be read, since another program wrote them: their names.
    pub unreadable: Vec<String>,
}

/// How a schedule goes on from where it stood, all or nothing.
#[derive(Clone, Debug)]
pub struct ScheduleClaim {
    /// The schedule.
    pub schedule: String,
    /// Where it stood: somebody who has changed it meanwhile was faster.
    pub version: i64,
    /// Where it stands from now on.
    pub last_fire: Timestamp,
    /// What waits from now on.
    pub queued: Option<Timestamp>,
    /// The jobs to be enqueued.
    pub jobs: Vec<NewJob>,
    /// What is written down about it.
    pub runs: Vec<Run>,
}

/// Why there was a run, or was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunCause {
    /// It was due.
    Due,
    /// It had waited for another.
    Queued,
    /// Somebody asked for it.
    Manual,
}

/// What became of one occurrence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// That of its job, if there is one.
    pub id: Uuid,
    /// Whether a job was enqueued.
    pub has_job: bool,
    /// When it was due, without its delay.
    pub occurrence: Timestamp,
    /// When it was claimed, by the store's clock.
    pub claimed_at: Timestamp,
    /// Why.
    pub cause: RunCause,
    /// How many times before it, since the last one, have no run of their own: counted up to a thousand.
    pub passed: u32,
    /// How it ended, if it has.
    pub ending: Option<Ending>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// How.
    pub outcome: RunOutcome,
    /// Why, if there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When.
    pub at: Timestamp,
}

/// How a run can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// Its job did what it had to.
    Done,
    /// Its job was given up.
    Dead,
    /// Its job was cancelled.
    Cancelled,
    /// The job of an earlier one had not ended.
    Overlapped,
    /// It was too late for it.
    Missed,
}
