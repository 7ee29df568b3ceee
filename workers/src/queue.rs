//! What a store of jobs can do, for those who enqueue and for those who work.

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
/// A payload that is longer than this, in bytes, is worth a warning.
const LONG_PAYLOAD: usize = 64 * 1024;
/// How many of its last errors a job keeps.
pub const KEPT_ERRORS: usize = 5;

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] sqlite::Error),
    /// Postgres.
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    /// Redis.
    #[error(transparent)]
    Redis(#[from] redis::Error),
    /// A payload that cannot be written as JSON, or is too long.
    #[error("the payload of a {kind} job is not usable: {reason}")]
    Payload {
        /// The kind of job.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A payload that is not what its kind wants.
    #[error("{field}: {reason}, in the payload of a {kind} job")]
    Misfit {
        /// The kind of job.
        kind: &'static str,
        /// The field, as a path; a dot for the whole.
        field: String,
        /// What was wanted there.
        reason: String,
    },
    /// So many jobs wait already that one more would never get its turn in time.
    #[error("the queue {queue} is full")]
    Full {
        /// The queue.
        queue: String,
    },
    /// What is stored cannot be read: somebody else wrote it, or it was damaged.
    #[error("what is stored cannot be read: {0}")]
    Unreadable(String),
}

impl From<sql::Error> for Error {
    fn from(error: sql::Error) -> Self {
        match error {
            sql::Error::Sqlite(error) => Self::Sqlite(error),
            sql::Error::Postgres(error) => Self::Postgres(error),
            error @ sql::Error::Unreadable { .. } => Self::Unreadable(error.to_string()),
        }
    }
}

impl Error {
    /// The error with its causes, in one line.
    pub fn in_one_line(self) -> String {
        with_causes(&self)
    }

    /// Whether the same request may well succeed in a moment: nothing is wrong with what was asked.
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

/// The result of asking a store.
pub type Result<T> = std::result::Result<T, Error>;

/// When a job is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Due {
    /// At once.
    #[default]
    Now,
    /// After this long, by the store's clock.
    In(Duration),
    /// At this time.
    At(Timestamp),
}

/// A job that is about to be enqueued.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id: UUID version 7, made here, so that a job can be enqueued again without becoming two.
    pub id: Uuid,
    /// Its kind.
    pub kind: Cow<'static, str>,
    /// The queue that it waits in.
    pub queue: Cow<'static, str>,
    /// Lower goes first within the queue.
    pub priority: i16,
    /// JSON.
    pub payload: String,
    /// When it is due.
    pub due: Due,
    /// Under which key there must be no other.
    pub unique: Option<Unique>,
    /// What joins it to whatever enqueued it: a W3C `traceparent`, or a request's id.
    pub trace: Option<String>,
    /// Crashes that are held against it from the start: it is what is left of a job that had them.
    pub recoveries: u32,
}

impl NewJob {
    /// A job to be run at once, as its options say.
    ///
    /// # Errors
    /// When the payload is no JSON or longer than [`MAX_PAYLOAD`].
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

    /// In another queue than its options say.
    #[must_use]
    pub fn queue(mut self, queue: &'static str) -> Self {
        self.queue = queue.into();
        self
    }

    /// With another priority than its options say.
    #[must_use]
    pub fn priority(mut self, priority: i16) -> Self {
        self.priority = priority;
        self
    }

    /// When it is due.
    #[must_use]
    pub fn due(mut self, due: Due) -> Self {
        self.due = due;
        self
    }

    /// Joined to whatever enqueued it.
    #[must_use]
    pub fn trace(mut self, trace: impl Into<String>) -> Self {
        self.trace = Some(trace.into());
        self
    }

    /// The key that it takes, as stores keep it: no two kinds share one.
    pub(crate) fn unique_key(&self) -> Option<String> {
        self.unique.as_ref().map(|unique| format!("{}:{}", self.kind, unique.key))
    }
}

/// What a worker asks for.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The queue.
    pub queue: Arc<str>,
    /// At most so many.
    pub limit: usize,
    /// Who claims, for those who look.
    pub worker: String,
    /// For how long.
    pub lease: Duration,
}

/// A job in a worker's hands.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Its id.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its queue.
    pub queue: Arc<str>,
    /// Its priority.
    pub priority: i16,
    /// JSON.
    pub payload: String,
    /// This claim's number.
    pub epoch: i64,
    /// Whether it was never claimed before.
    pub first: bool,
    /// What has gone wrong so far.
    pub spent: Attempts,
    /// The last errors, the newest last.
    pub errors: Vec<Failure>,
    /// What an earlier run wrote down.
    pub checkpoint: Option<String>,
    /// What joins it to whatever enqueued it.
    pub trace: Option<String>,
    /// The key that it takes, if nobody else may have it.
    pub unique: Option<String>,
    /// Why it must not be run any more, if somebody has cancelled it.
    pub cancelled: Option<String>,
    /// When it was enqueued.
    pub created_at: Timestamp,
    /// When it was due, as far as that is known.
    pub due_at: Timestamp,
    /// How long it waited since it was due.
    pub waited: Duration,
}

impl Claimed {
    /// The claim.
    pub fn held(&self) -> Held {
        Held { id: self.id, epoch: self.epoch }
    }
}

/// One error of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// In which attempt.
    pub attempt: u32,
    /// What was wrong.
    pub error: String,
}

/// What a claim brought.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// The jobs, those first that should begin first.
    pub jobs: Vec<Claimed>,
    /// How long until the next job of the queue is due, if one is scheduled.
    pub next_in: Option<Duration>,
}

/// One claim of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// The job.
    pub id: Uuid,
    /// The claim's number.
    pub epoch: i64,
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// So much,
    pub done: u64,
    /// of so much.
    pub total: u64,
}

/// A lease to be lengthened.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// The claim.
    pub held: Held,
    /// The job's queue.
    pub queue: Arc<str>,
    /// How far it has come, if it says so.
    pub progress: Option<Progress>,
}

/// A lease that was lengthened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// The claim.
    pub held: Held,
    /// Why the job should stop, if somebody has cancelled it.
    pub cancelled: Option<String>,
}

/// What becomes of a job that was claimed.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The job as it was claimed, and its errors as they are now.
    pub job: Arc<Claimed>,
    /// What becomes of it.
    pub transition: Transition,
    /// Its last errors, the newest last.
    pub errors: Vec<Failure>,
}

impl Settlement {
    /// Of a job whose errors are what they were.
    pub fn of(job: Arc<Claimed>, transition: Transition) -> Self {
        Self { errors: job.errors.clone(), job, transition }
    }
}

/// Jobs of workers that have not renewed their leases.
#[derive(Clone, Debug)]
pub struct Lapsed {
    /// The jobs, claimed anew.
    pub jobs: Vec<Claimed>,
    /// The time by the store's clock.
    pub now: Timestamp,
}

/// How many jobs there are in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Depth {
    /// Waiting for a worker.
    pub ready: u64,
    /// Not due yet.
    pub scheduled: u64,
    /// In workers' hands.
    pub running: u64,
    /// The length of all their payloads, in bytes.
    pub bytes: u64,
    /// For how long the oldest one has been due, in milliseconds.
    pub oldest_ms: u64,
}

impl Depth {
    /// All that are not in anybody's hands.
    pub fn waiting(&self) -> u64 {
        self.ready + self.scheduled
    }
}

/// Queues that have a job to claim, and how soon: zero is now.
pub type Probed = Vec<(Arc<str>, Duration)>;

/// A store of jobs. A cheap handle.
pub trait Queue: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// Adds jobs, all or none, and returns their ids. One whose id is there already is not added again, nor is
    /// one whose unique key is taken: its place is taken by the id of the job that has the key.
    fn enqueue(&self, jobs: Vec<NewJob>) -> impl Future<Output = Result<Vec<Uuid>>> + Send;

    /// Takes due jobs, raising their epochs.
    fn claim(&self, claim: Claim) -> impl Future<Output = Result<Claims>> + Send;

    /// Lengthens leases by `lease` from now, and returns those that are still held.
    fn renew(
        &self,
        renewals: Vec<Renewal>,
        lease: Duration,
    ) -> impl Future<Output = Result<Vec<Renewed>>> + Send;

    /// Writes down how far a run has come; its crashes are forgiven. False when the claim is not held any more.
    fn record(
        &self,
        held: Held,
        queue: Arc<str>,
        checkpoint: String,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Writes down what becomes of jobs. False for each claim that is not held any more: nothing has changed.
    fn settle(&self, settlements: Vec<Settlement>) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Claims up to `limit` jobs whose leases have lapsed, or last for longer than any lease can: the store's
    /// clock was set back then, and what waits for a while is made to wait for no longer than that. `lease` is
    /// that of workers.
    fn lapsed(
        &self,
        limit: usize,
        worker: String,
        lease: Duration,
    ) -> impl Future<Output = Result<Lapsed>> + Send;

    /// Which of these queues have a job to claim now or later, and how soon. None when that takes a claim to find out.
    fn probe(&self, _queues: Vec<Arc<str>>) -> impl Future<Output = Result<Option<Probed>>> + Send {
        async { Ok(None) }
    }

    /// How many jobs there are in each of these queues.
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

    /// How many jobs there are in a queue.
    fn measure(&self, queue: Arc<str>) -> impl Future<Output = Result<Depth>> + Send;

    /// What tells workers that there may be something to claim.
    fn wake(&self) -> &Wake;

    /// Passes on what other processes say of new jobs, until the drain. Workers also poll, so that nothing
    /// depends on it.
    fn listen(&self, drain: Drain) -> impl Future<Output = anyhow::Result<()>> + Send;
}
