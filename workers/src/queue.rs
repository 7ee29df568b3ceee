//! The operations of a job store for enqueueing and for workers.

use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::Drain;
use perennial_store::pool::{postgres, redis, sql, sqlite, with_causes};
use serde::{Deserialize, Serialize};
use tracing::warn;
use uuid::Uuid;

use crate::job::{Job, Unique};
use crate::state::{Attempts, Transition};
use crate::wake::Wake;

/// The largest payload of a job, in bytes. Jobs name rows; they do not carry them.
pub const MAX_PAYLOAD: usize = 256 * 1024;
/// Length from which on a payload causes a warning, in bytes.
const LONG_PAYLOAD: usize = 64 * 1024;
/// Number of its last errors that a job keeps.
pub const KEPT_ERRORS: usize = 5;

/// Errors of a job store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite failed.
    #[error(transparent)]
    Sqlite(#[from] sqlite::Error),
    /// Postgres failed.
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    /// Redis failed.
    #[error(transparent)]
    Redis(#[from] redis::Error),
    /// The payload cannot be written as JSON, or is too long.
    #[error("the payload of a {kind} job is not usable: {reason}")]
    Payload {
        /// Name of the kind.
        kind: &'static str,
        /// Reason why the payload is not usable.
        reason: String,
    },
    /// The payload does not fit its kind.
    #[error("{field}: {reason}, in the payload of a {kind} job")]
    Misfit {
        /// Name of the kind.
        kind: &'static str,
        /// Path of the field; a dot stands for the whole payload.
        field: String,
        /// Reason why the field does not fit.
        reason: String,
    },
    /// The queue has reached its bounds: one more job would not run in time.
    #[error("the queue {queue} is full")]
    Full {
        /// Name of the queue.
        queue: String,
    },
    /// Stored data cannot be read: another program wrote it, or it was damaged.
    #[error("what is stored cannot be read: {0}")]
    Unreadable(String),
}

impl From<sql::Error> for Error {
    fn from(error: sql::Error) -> Self {
        match error {
            sql::Error::Sqlite(error) => Self::Sqlite(error),
            sql::Error::Postgres(error) => Self::Postgres(error),
            sql::Error::Refused { source, .. } => Self::from(*source),
            error @ (sql::Error::Unreadable { .. } | sql::Error::Unwritable(_) | sql::Error::Awaited) => {
                Self::Unreadable(error.to_string())
            }
        }
    }
}

impl Error {
    /// Returns the error with its causes, in one line.
    pub fn in_one_line(self) -> String {
        with_causes(&self)
    }

    /// Returns true if the error is transient: the same request may succeed a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Sqlite(error) => error.is_passing(),
            Self::Postgres(error) => error.is_passing(),
            Self::Redis(error) => error.is_passing(),
            Self::Full { .. } => true,
            Self::Payload { .. } | Self::Misfit { .. } | Self::Unreadable(_) => false,
        }
    }
}

/// Result of an operation of a job store.
pub type Result<T> = std::result::Result<T, Error>;

/// When a job is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Due {
    /// The job is due at once.
    #[default]
    Now,
    /// The job is due after this wait, by the store's clock.
    In(Duration),
    /// The job is due at this time.
    At(Timestamp),
}

/// A job that is about to be enqueued.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Id of the job: a UUID of version 7. It is made before the job is enqueued, so that a job can be
    /// enqueued again without becoming two.
    pub id: Uuid,
    /// Name of the kind.
    pub kind: Cow<'static, str>,
    /// Queue that the job waits in.
    pub queue: Cow<'static, str>,
    /// Priority within the queue: a lower number goes first.
    pub priority: i16,
    /// Payload in JSON.
    pub payload: String,
    /// When the job is due.
    pub due: Due,
    /// Unique key of the job, if it has one.
    pub unique: Option<Unique>,
    /// Trace that joins the job to its origin: a W3C `traceparent`, the id of a request, or an occurrence of
    /// a schedule.
    pub trace: Option<String>,
    /// Number of crashes that count against the job from the start, because it is the rest of a job that had
    /// them.
    pub recoveries: u32,
}

impl NewJob {
    /// Creates a job that is due at once, with the options of its kind.
    ///
    /// # Errors
    /// When the payload cannot be written as JSON, or is longer than [`MAX_PAYLOAD`].
    pub fn new<J: Job>(job: &J) -> Result<Self> {
        let unusable = |reason| Error::Payload { kind: J::KIND, reason };
        let payload = serde_json::to_string(job).map_err(|error| unusable(error.to_string()))?;
        if payload.len() > MAX_PAYLOAD {
            return Err(unusable(format!("{} bytes, at most {MAX_PAYLOAD} are possible", payload.len())));
        }
        if payload.len() > LONG_PAYLOAD {
            warn!(
                kind = J::KIND,
                bytes = payload.len(),
                "a long payload: jobs should name rows, not carry them"
            );
        }
        let options = J::options();
        Ok(Self {
            id: Uuid::now_v7(),
            kind: J::KIND.into(),
            queue: options.lane(J::KIND),
            priority: options.priority,
            payload,
            due: Due::Now,
            unique: job.unique(),
            trace: None,
            recoveries: 0,
        })
    }

    /// Puts the job into another queue than its options say.
    #[must_use]
    pub fn queue(mut self, queue: &'static str) -> Self {
        self.queue = queue.into();
        self
    }

    /// Gives the job another priority than its options say.
    #[must_use]
    pub fn priority(mut self, priority: i16) -> Self {
        self.priority = priority;
        self
    }

    /// Sets when the job is due.
    #[must_use]
    pub fn due(mut self, due: Due) -> Self {
        self.due = due;
        self
    }

    /// Sets the trace that joins the job to its origin.
    #[must_use]
    pub fn trace(mut self, trace: impl Into<String>) -> Self {
        self.trace = Some(trace.into());
        self
    }

    /// Returns the unique key as stores keep it: with the kind, so that two kinds never share a key.
    pub(crate) fn unique_key(&self) -> Option<String> {
        self.unique.as_ref().map(|unique| format!("{}:{}", self.kind, unique.key))
    }
}

/// Request of a worker for due jobs.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Name of the queue.
    pub queue: Arc<str>,
    /// Highest number of jobs.
    pub limit: usize,
    /// Name of the worker, for operators.
    pub worker: String,
    /// Length of the leases.
    pub lease: Duration,
}

/// A job that a worker has claimed.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Id of the job.
    pub id: Uuid,
    /// Name of the kind.
    pub kind: String,
    /// Queue of the job.
    pub queue: Arc<str>,
    /// Priority within the queue.
    pub priority: i16,
    /// Payload in JSON.
    pub payload: String,
    /// Epoch of this claim.
    pub epoch: i64,
    /// True if the job was never claimed before.
    pub first: bool,
    /// Failures and crashes so far.
    pub spent: Attempts,
    /// Last errors of the job, the newest last.
    pub errors: Vec<Failure>,
    /// Checkpoint of an earlier run.
    pub checkpoint: Option<String>,
    /// Trace that joins the job to its origin.
    pub trace: Option<String>,
    /// Unique key of the job, if it has one.
    pub unique: Option<String>,
    /// Reason why the job must not be run any more, if it was cancelled.
    pub cancelled: Option<String>,
    /// Time at which the job was enqueued.
    pub created_at: Timestamp,
    /// Time at which the job was due, as far as that is known.
    pub due_at: Timestamp,
    /// Time from when the job was due to its claim.
    pub waited: Duration,
}

impl Claimed {
    /// Returns the claim of the job.
    pub fn held(&self) -> Held {
        Held { id: self.id, epoch: self.epoch }
    }
}

/// One error of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Time of the error.
    pub at: Timestamp,
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Text of the error.
    pub error: String,
}

/// Answer to a [`Claim`].
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// Claimed jobs, in the order in which they should begin.
    pub jobs: Vec<Claimed>,
    /// Time until the next job of the queue is due, if one is scheduled.
    pub next_in: Option<Duration>,
}

/// One claim of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// Id of the job.
    pub id: Uuid,
    /// Epoch of the claim.
    pub epoch: i64,
}

/// Progress of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in total.
    pub total: u64,
}

/// Request to extend a lease.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// Claim that holds the lease.
    pub held: Held,
    /// Queue of the job.
    pub queue: Arc<str>,
    /// Progress of the run, if it reports one.
    pub progress: Option<Progress>,
}

/// A lease that was extended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// Claim that holds the lease.
    pub held: Held,
    /// Reason why the job should stop, if it was cancelled.
    pub cancelled: Option<String>,
}

/// Settlement of a claimed job.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The job as it was claimed.
    pub job: Arc<Claimed>,
    /// Transition of the job.
    pub transition: Transition,
    /// Last errors of the job, the newest last.
    pub errors: Vec<Failure>,
}

impl Settlement {
    /// Creates the settlement of a job that has no new error.
    pub fn of(job: Arc<Claimed>, transition: Transition) -> Self {
        Self { errors: job.errors.clone(), job, transition }
    }
}

/// Jobs whose lease has expired.
#[derive(Clone, Debug)]
pub struct Lapsed {
    /// The jobs, claimed anew.
    pub jobs: Vec<Claimed>,
    /// Time of the store's clock.
    pub now: Timestamp,
}

/// Number of jobs in a queue, by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// Number of jobs that wait for a worker.
    pub ready: u64,
    /// Number of jobs that are not due yet.
    pub scheduled: u64,
    /// Number of jobs that workers have claimed.
    pub running: u64,
    /// Length of all their payloads, in bytes.
    pub bytes: u64,
    /// Time for which the oldest ready job has been due, in milliseconds.
    pub oldest_ms: u64,
}

impl Depth {
    /// Returns the number of jobs that no worker has claimed.
    pub fn waiting(&self) -> u64 {
        self.ready + self.scheduled
    }
}

/// Queues that have a job to claim, with the wait until then; zero means now.
pub type Probed = Vec<(Arc<str>, Duration)>;

/// A store of jobs. A cheap handle.
pub trait Queue: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// Adds jobs, all or none, and returns their ids. A job whose id is known is not added again. A job whose
    /// unique key is taken is not added either: the id of the job that has the key is returned in its place.
    fn enqueue(&self, jobs: Vec<NewJob>) -> impl Future<Output = Result<Vec<Uuid>>> + Send;

    /// Claims due jobs, and raises their epochs.
    fn claim(&self, claim: Claim) -> impl Future<Output = Result<Claims>> + Send;

    /// Extends leases to `lease` from now, and returns the ones that are still held.
    fn renew(
        &self,
        renewals: Vec<Renewal>,
        lease: Duration,
    ) -> impl Future<Output = Result<Vec<Renewed>>> + Send;

    /// Writes the checkpoint of a run, and resets the crashes of its job. Returns false when the claim is not
    /// held any more.
    fn record(
        &self,
        held: Held,
        queue: Arc<str>,
        checkpoint: String,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Writes the transitions of jobs. Returns false for each claim that is not held any more: nothing has
    /// changed for it.
    fn settle(&self, settlements: Vec<Settlement>) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Claims up to `limit` jobs whose leases have expired, or last for longer than any lease can because the
    /// store's clock was set back. In the latter case jobs that wait for a duration are made to wait for no
    /// longer than that. `lease` is the lease of workers.
    fn lapsed(
        &self,
        limit: usize,
        worker: String,
        lease: Duration,
    ) -> impl Future<Output = Result<Lapsed>> + Send;

    /// Returns which of these queues have a job to claim now or later, and how soon; `None` when only a claim
    /// can find out.
    fn probe(&self, _queues: Vec<Arc<str>>) -> impl Future<Output = Result<Option<Probed>>> + Send {
        async { Ok(None) }
    }

    /// Returns the number of jobs in each of these queues.
    fn measure_all(
        &self,
        queues: Vec<Arc<str>>,
    ) -> impl Future<Output = Vec<(Arc<str>, Result<Depth>)>> + Send {
        async move {
            let mut all = Vec::with_capacity(queues.len());
            for queue in queues {
                let depth = self.measure(Arc::clone(&queue)).await;
                all.push((queue, depth));
            }
            all
        }
    }

    /// Returns the number of jobs in a queue.
    fn measure(&self, queue: Arc<str>) -> impl Future<Output = Result<Depth>> + Send;

    /// Returns the handle that wakes workers when there may be a job to claim.
    fn wake(&self) -> &Wake;

    /// Passes on announcements of new jobs by other processes, until the drain. Workers also poll, so that
    /// nothing depends on it.
    fn listen(&self, drain: Drain) -> impl Future<Output = anyhow::Result<()>> + Send;
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::job::{Context, Job, JobOutcome, UniqueUntil};

    #[derive(Debug, Serialize, Deserialize)]
    struct Report {
        day: Option<u8>,
    }

    impl Job for Report {
        const KIND: &'static str = "report";
        type Tools = ();

        fn unique(&self) -> Option<Unique> {
            let key = format!("day {}", self.day?);
            Some(Unique { key, until: UniqueUntil::Ended })
        }

        async fn run(&self, _context: Context, (): ()) -> anyhow::Result<JobOutcome> {
            Ok(JobOutcome::Done)
        }
    }

    #[test]
    fn a_unique_key_is_of_its_kind_and_a_job_may_have_none() {
        let key = |day| NewJob::new(&Report { day }).unwrap().unique_key();
        assert_eq!(key(Some(1)).as_deref(), Some("report:day 1"));
        assert_eq!(key(Some(1)), key(Some(1)));
        assert_ne!(key(Some(1)), key(Some(2)));
        assert_eq!(key(None), None);
    }

    #[test]
    fn what_went_wrong_in_a_transaction_keeps_its_name() {
        let unreadable = sql::Error::Unreadable {
            column: "x".into(),
            wanted: "a text",
            found: "a blob".into(),
            statement: None,
        };
        assert!(matches!(Error::from(unreadable), Error::Unreadable(reason) if reason.contains("column x")));
        assert!(matches!(
            Error::from(sql::Error::Sqlite(sqlite::Error::Slow)),
            Error::Sqlite(sqlite::Error::Slow)
        ));
    }
}
