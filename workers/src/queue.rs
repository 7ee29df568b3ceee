//! What a store of jobs can do, for those who enqueue and for those who work.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_server::pool::sqlite;
use uuid::Uuid;

use crate::job::{Job, Registry};
use crate::state::{Spent, Transition};

/// The largest payload of a job, in bytes. Jobs name rows; they do not carry them.
pub const MAX_PAYLOAD: usize = 256 * 1024;

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite.
    #[error(transparent)]
    Sqlite(#[from] sqlite::Error),
    /// A payload that cannot be written as JSON, or is too long.
    #[error("the payload of a {kind} job is not usable: {reason}")]
    Payload {
        /// The kind of job.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// The error with its causes, in one line.
    pub(crate) fn in_one_line(self) -> String {
        format!("{:#}", anyhow::Error::from(self))
    }
}

/// The result of asking a store.
pub type Result<T> = std::result::Result<T, Error>;

/// A job that is about to be enqueued.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Its id: UUID version 7, made here, so that a job can be enqueued again without becoming two.
    pub id: Uuid,
    /// Its kind.
    pub kind: &'static str,
    /// The queue that it waits in.
    pub queue: &'static str,
    /// Lower goes first within the queue.
    pub priority: i16,
    /// JSON.
    pub payload: String,
    /// Not before this time; at once if there is none.
    pub run_at: Option<Timestamp>,
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
        let options = J::options();
        let (queue, priority) = (options.queue, options.priority);
        Ok(Self { id: Uuid::now_v7(), kind: J::KIND, queue, priority, payload, run_at: None })
    }

    /// In another queue than its options say.
    #[must_use]
    pub fn queue(mut self, queue: &'static str) -> Self {
        self.queue = queue;
        self
    }

    /// With another priority than its options say.
    #[must_use]
    pub fn priority(mut self, priority: i16) -> Self {
        self.priority = priority;
        self
    }

    /// Not before `time`.
    #[must_use]
    pub fn at(mut self, time: Timestamp) -> Self {
        self.run_at = Some(time);
        self
    }
}

/// What a worker asks for.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The queue.
    pub queue: &'static str,
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
    /// JSON.
    pub payload: String,
    /// This claim's number.
    pub epoch: i64,
    /// What has gone wrong so far.
    pub spent: Spent,
    /// How long it waited since it was due.
    pub waited: Duration,
}

/// What a claim brought.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// The jobs.
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

/// A store of jobs. A cheap handle.
pub trait Queue: Clone + Send + Sync + 'static {
    /// Adds jobs. One whose id is there already is not added again.
    fn enqueue(&self, jobs: Vec<NewJob>) -> impl Future<Output = Result<()>> + Send;

    /// Takes due jobs, raising their epochs.
    fn claim(&self, claim: Claim) -> impl Future<Output = Result<Claims>> + Send;

    /// Lengthens leases by `lease` from now, and returns those that are still held.
    fn renew(&self, held: Vec<Held>, lease: Duration) -> impl Future<Output = Result<Vec<Held>>> + Send;

    /// Writes down what becomes of a job. False when the claim is not held any more: nothing has changed.
    fn settle(&self, held: Held, transition: Transition) -> impl Future<Output = Result<bool>> + Send;

    /// Takes jobs from workers that have not renewed their leases, and returns how many.
    fn rescue(&self, registry: Arc<Registry>) -> impl Future<Output = Result<usize>> + Send;

    /// Returns when there may be something to claim. It may be wrong either way: workers also poll.
    fn woken(&self) -> impl Future<Output = ()> + Send;
}
