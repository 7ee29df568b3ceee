//! Jobs as types: a kind, options, a payload, and a `run` with its outcomes.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use perennial_runtime::backoff::Backoff;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cron::occurrence::Occurrence;
use crate::lease::Lease;
use crate::queue::{self, Held, NewJob, Progress};
use crate::state::{Attempts, Budget};

/// Work that is stored as its payload, and run later by any worker.
///
/// A job runs at least once: its effects must tolerate a second run, or be fenced by [`Context::epoch`].
pub trait Job: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Name of the kind in the store, such as `push.deliver`. It must not change once jobs of the kind may
    /// exist.
    const KIND: &'static str;

    /// Handles that a run needs. They are made once, at boot.
    type Tools: Clone + Send + Sync + 'static;

    /// Returns the subject of the job for the log, such as the id of a notification.
    fn subject(&self) -> Option<String> {
        None
    }

    /// Returns the queue, the priority, the limits and the budget of this kind.
    fn options() -> Options {
        Options::default()
    }

    /// Returns the unique key of the job, if it has one, and how long the key is taken.
    fn unique(&self) -> Option<Unique> {
        None
    }

    /// Runs the job. An error is a failure, after which the job is tried again as its options say.
    fn run(
        &self,
        context: Context,
        tools: Self::Tools,
    ) -> impl Future<Output = anyhow::Result<JobOutcome>> + Send;

    /// Called before the job becomes dead, so that the job can report its end within five seconds. After an
    /// error the job stays as it is, and is given up again later.
    fn give_up(
        &self,
        _context: Context,
        _tools: Self::Tools,
        _reason: String,
    ) -> impl Future<Output = anyhow::Result<()>> + Send {
        async { Ok(()) }
    }
}

/// Outcome of a run that returned no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// The job is done.
    Done,
    /// There was nothing to do, for this reason. Skipped runs are counted apart from done ones.
    Skipped(String),
    /// The job runs again after this wait. This is no failure.
    Snooze(Duration),
    /// The run failed, and the job knows when to try again, for example from `Retry-After`.
    Retry {
        /// Wait before the next run, instead of the backoff.
        after: Duration,
        /// Reason of the failure.
        reason: String,
    },
    /// The job must not go on, for this reason. It ends as cancelled and not as dead.
    Cancel(String),
    /// The job can never succeed, for this reason. It ends at once, however many attempts are left.
    Dead(String),
    /// The run was told to stop, and another worker should do the rest.
    HandBack,
}

/// Queue, priority, limits and budget of a kind of job.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Queue that jobs of the kind wait in.
    pub queue: &'static str,
    /// Priority within the queue: a lower number goes first.
    pub priority: i16,
    /// Longest time that one run may take.
    pub timeout: Duration,
    /// Budget for failures and crashes, with the backoff after a failure.
    pub budget: Budget,
    /// Highest number of jobs of the kind that run at once in a process; `None` leaves it to the slots of the
    /// queue. A kind with this limit waits in a queue of its own, so that it never blocks other kinds.
    pub concurrency: Option<usize>,
    /// Highest rate at which jobs of the kind start in a process. A kind with this limit has a queue of its
    /// own, too.
    pub rate: Option<Rate>,
    /// True if clients with a key may enqueue the kind by `POST /jobs/{kind}`.
    pub public: bool,
}

/// A number of starts in a period, evenly spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Number of jobs that may start in one period.
    pub jobs: u32,
    /// Length of the period.
    pub per: Duration,
}

/// Queue of jobs whose options name none.
pub const DEFAULT_QUEUE: &str = "default";

impl Default for Options {
    fn default() -> Self {
        Self {
            queue: DEFAULT_QUEUE,
            priority: 0,
            timeout: Duration::from_secs(300),
            budget: Budget {
                failures: 20,
                recoveries: 3,
                window: Duration::from_secs(72 * 3600),
                backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(600)),
            },
            concurrency: None,
            rate: None,
            public: false,
        }
    }
}

impl Options {
    /// Returns the queue that jobs of this kind wait in: `queue/kind` for a kind with limits of its own.
    pub fn lane(&self, kind: &str) -> Cow<'static, str> {
        if self.concurrency.is_some() || self.rate.is_some() {
            format!("{}/{kind}", self.queue).into()
        } else {
            self.queue.into()
        }
    }
}

/// A key that no two jobs of a kind have at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unique {
    /// The key, within the kind.
    pub key: String,
    /// How long the key is taken.
    pub until: UniqueUntil,
}

/// How long a unique key is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UniqueUntil {
    /// The key is taken until the job is claimed for the first time: a change during the run is worth another
    /// job.
    Started,
    /// The key is taken until the job has ended.
    Ended,
    /// The key is taken for this long, whatever becomes of the job.
    Window(Duration),
}

impl UniqueUntil {
    /// Returns the word for it in stores, and the length of a window.
    pub(crate) fn scope(self) -> (&'static str, Option<Duration>) {
        match self {
            Self::Started => ("started", None),
            Self::Ended => ("ended", None),
            Self::Window(window) => ("window", Some(window)),
        }
    }
}

/// Context of one run: its claim, its lease and its deadline. A cheap handle.
#[derive(Clone, Debug)]
pub struct Context {
    /// Id of the job.
    pub id: Uuid,
    /// Epoch of the claim. Rows that the job writes carry it, so that an earlier run that wakes up late
    /// changes nothing.
    pub epoch: i64,
    /// Failures and crashes of earlier runs.
    pub spent: Attempts,
    /// Instant after which the run counts as failed.
    pub deadline: Instant,
    /// Cancelled when the run should stop soon and hand back, when the job was cancelled, or when the run has
    /// lost its lease.
    pub cancel: CancellationToken,
    /// Lease of the claim: the right to go on.
    pub lease: Lease,
    /// Trace that joins the job to its origin: a W3C `traceparent`, the id of a request, or an occurrence of
    /// a schedule.
    pub trace: Option<Arc<str>>,
    pub(crate) queue: Arc<str>,
    pub(crate) saved: Option<Arc<str>>,
    pub(crate) advance: Arc<Advance>,
    pub(crate) recorder: Arc<dyn Recorder>,
}

#[cfg(feature = "testing")]
impl Context {
    /// Makes the context of a first run that no worker has claimed, to test a job alone. Its checkpoints are not kept.
    pub fn for_test() -> Self {
        let time = Duration::from_secs(3600);
        Self {
            id: Uuid::now_v7(),
            epoch: 1,
            spent: Attempts::default(),
            deadline: Instant::now() + time,
            cancel: CancellationToken::new(),
            lease: Lease::until(crate::lease::BootTime::now().after(time)),
            trace: None,
            queue: DEFAULT_QUEUE.into(),
            saved: None,
            advance: Arc::default(),
            recorder: Arc::new(Forgetful),
        }
    }
}

/// Keeps no checkpoint.
#[cfg(feature = "testing")]
#[derive(Debug)]
struct Forgetful;

#[cfg(feature = "testing")]
impl Recorder for Forgetful {
    fn record(&self, _held: Held, _queue: Arc<str>, _checkpoint: String) -> Recording<'_> {
        Box::pin(std::future::ready(Ok(true)))
    }
}

/// Progress of a run, shared with the task that renews its lease.
#[derive(Debug, Default)]
pub(crate) struct Advance {
    advanced: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Advance {
    pub(crate) fn has_advanced(&self) -> bool {
        self.advanced.load(Ordering::Acquire)
    }

    pub(crate) fn progress(&self) -> Option<Progress> {
        let total = self.total.load(Ordering::Acquire);
        (total > 0).then(|| Progress { done: self.done.load(Ordering::Acquire), total })
    }
}

/// Writes checkpoints for a run.
pub(crate) trait Recorder: Send + Sync + fmt::Debug {
    fn record(&self, held: Held, queue: Arc<str>, checkpoint: String) -> Recording<'_>;
}

pub(crate) type Recording<'a> = Pin<Box<dyn Future<Output = queue::Result<bool>> + Send + 'a>>;

/// Reasons why a run must not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// The run was asked to stop.
    #[error("the run was asked to stop")]
    Cancelled,
    /// The lease has expired: another worker may have taken the job.
    #[error("the lease has expired")]
    Lapsed,
}

impl Context {
    /// Returns the queue that the job waited in.
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Returns the occurrence of the schedule that enqueued the job; `None` if no schedule did. Jobs that
    /// follow from such a job return it, too.
    pub fn occurrence(&self) -> Option<Occurrence> {
        Occurrence::of_trace(self.trace.as_deref()?)
    }

    /// Returns the number of this attempt, from 1. Snoozes and hand-backs do not count.
    pub fn attempt(&self) -> u32 {
        self.spent.failures + self.spent.recoveries + 1
    }

    /// Checks whether the run may go on. Call it before each side effect.
    ///
    /// # Errors
    /// When there must be no further side effect.
    pub fn check(&self) -> Result<(), Stopped> {
        if !self.lease.is_held() {
            Err(Stopped::Lapsed)
        } else if self.cancel.is_cancelled() {
            Err(Stopped::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Returns the checkpoint that the last [`Context::save`] of an earlier run wrote.
    ///
    /// # Errors
    /// When the checkpoint does not fit the type.
    pub fn saved<T: DeserializeOwned>(&self) -> Result<Option<T>, serde_json::Error> {
        self.saved.as_deref().map(serde_json::from_str).transpose()
    }

    /// Writes a checkpoint from which a later run goes on. It also resets the failures and crashes of the
    /// job, since the job makes progress.
    ///
    /// # Errors
    /// [`Stopped::Lapsed`] when the claim is not held any more, and when the store fails.
    pub async fn save<T: Serialize + Sync>(&self, checkpoint: &T) -> anyhow::Result<()> {
        let held = Held { id: self.id, epoch: self.epoch };
        let checkpoint = serde_json::to_string(checkpoint)?;
        if !self.recorder.record(held, Arc::clone(&self.queue), checkpoint).await? {
            return Err(Stopped::Lapsed.into());
        }
        self.advanced();
        Ok(())
    }

    /// Says that this run makes progress, however it ends: failures and crashes are counted anew. It is for
    /// jobs that write their checkpoints into tables of their own.
    pub fn advanced(&self) {
        self.advance.advanced.store(true, Ordering::Release);
    }

    /// Sets the progress of the run, for operators. It is stored with the next renewal of the lease.
    pub fn progress(&self, done: u64, total: u64) {
        self.advance.done.store(done, Ordering::Release);
        self.advance.total.store(total, Ordering::Release);
    }

    /// Creates a job that follows from this one and carries its trace.
    ///
    /// # Errors
    /// When the payload cannot be written: see [`NewJob::new`].
    pub fn follow_up<J: Job>(&self, job: &J) -> queue::Result<NewJob> {
        Ok(NewJob { trace: self.trace.as_deref().map(str::to_owned), ..NewJob::new(job)? })
    }
}
