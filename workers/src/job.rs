//! A job is a type.

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

use crate::cron::Occurrence;
use crate::lease::Lease;
use crate::queue::{self, Held, NewJob, Progress};
use crate::state::{Attempts, Budget};

/// Work that can be written down, and done later, by whoever has it in hand.
///
/// It runs at least once: what it does must bear being done again, or be fenced by [`Context::epoch`].
pub trait Job: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Its name in the store: `push.deliver`. Never changed once jobs of it may exist.
    const KIND: &'static str;

    /// What it needs to run: handles, made once at boot.
    type Tools: Clone + Send + Sync + 'static;

    /// What it is about, for those who read logs: the id of a notification, say.
    fn subject(&self) -> Option<String> {
        None
    }

    /// How it is queued and how much may go wrong.
    fn options() -> Options {
        Options::default()
    }

    /// Under which key no second one is wanted, and for how long.
    fn unique(&self) -> Option<Unique> {
        None
    }

    /// Does the work. An error is a failure, to be tried again as the options say.
    fn run(
        &self,
        context: Context,
        tools: Self::Tools,
    ) -> impl Future<Output = anyhow::Result<JobOutcome>> + Send;

    /// Called before the job is given up for dead, so that whoever waits for it can be told, within five
    /// seconds. An error leaves the job as it is, to be given up again later.
    fn give_up(
        &self,
        _context: Context,
        _tools: Self::Tools,
        _reason: String,
    ) -> impl Future<Output = anyhow::Result<()>> + Send {
        async { Ok(()) }
    }
}

/// How a run ended, when it did not fail by an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// It did what it had to.
    Done,
    /// There was nothing to do, for this reason. Counted apart from what was done.
    Skipped(String),
    /// It wants to run again after this long; that is no failure.
    Snooze(Duration),
    /// It failed, and knows when to try again: what `Retry-After` is for.
    Retry {
        /// After this long, instead of its backoff.
        after: Duration,
        /// What was wrong.
        reason: String,
    },
    /// It must not go on: it ends without being dead.
    Cancel(String),
    /// It can never succeed: it ends at once, whatever attempts are left.
    Dead(String),
    /// It was told to stop, and what is left should be done by another.
    HandBack,
}

/// How a kind of job is queued and how much may go wrong.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The queue that its jobs wait in.
    pub queue: &'static str,
    /// Lower goes first within a queue.
    pub priority: i16,
    /// How long one run may take.
    pub timeout: Duration,
    /// How much may go wrong, and how long to wait after a failure.
    pub budget: Budget,
    /// How many run at once in a process, if that is not for the queue's slots to say. Such a kind waits in a
    /// lane of its own: it never keeps others of its queue waiting.
    pub concurrency: Option<usize>,
    /// How many may start in a while, in a process. Such a kind has a lane of its own, too.
    pub rate: Option<Rate>,
    /// Whether strangers with a key may enqueue it by `POST /jobs/{kind}`.
    pub public: bool,
}

/// So many in so long, evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many may start,
    pub jobs: u32,
    /// in this time.
    pub per: Duration,
}

/// The queue of jobs that name none.
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
    /// The queue that jobs of this kind wait in: its own lane `queue/kind` when it has limits of its own.
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
    /// For how long it is taken.
    pub until: UniqueUntil,
}

/// For how long a unique key is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UniqueUntil {
    /// Until the job is claimed for the first time: what changes while it runs is worth another job.
    Started,
    /// Until the job has ended.
    Ended,
    /// For so long, whatever becomes of the job.
    Window(Duration),
}

/// What a run knows about itself. A cheap handle.
#[derive(Clone, Debug)]
pub struct Context {
    /// The job's id.
    pub id: Uuid,
    /// Raised by every claim: rows that are written under a job carry it, so that an earlier run that wakes
    /// up late can change nothing.
    pub epoch: i64,
    /// What has gone wrong in earlier runs.
    pub spent: Attempts,
    /// When this run counts as failed.
    pub deadline: Instant,
    /// Cancelled when the run should stop soon and hand back, when somebody cancelled the job, or when it has
    /// lost its lease.
    pub cancel: CancellationToken,
    /// The right to go on.
    pub lease: Lease,
    /// What joins the job to whatever enqueued it: a W3C `traceparent`, or a request's id.
    pub trace: Option<Arc<str>>,
    pub(crate) queue: Arc<str>,
    pub(crate) saved: Option<Arc<str>>,
    pub(crate) advance: Arc<Advance>,
    pub(crate) recorder: Arc<dyn Recorder>,
}

/// How far a run has come.
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

/// The run must not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// It was asked to stop.
    #[error("the run was asked to stop")]
    Cancelled,
    /// Another worker may have taken the job.
    #[error("the lease has lapsed")]
    Lapsed,
}

impl Context {
    /// The queue that it waited in.
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// For which time of which schedule it was enqueued; none if something else did it. Jobs that follow from such
    /// a one know it, too.
    pub fn occurrence(&self) -> Option<Occurrence> {
        Occurrence::of_trace(self.trace.as_deref()?)
    }

    /// Which attempt this is: 1 is the first. Snoozes and hand-backs are none.
    pub fn attempt(&self) -> u32 {
        self.spent.failures + self.spent.recoveries + 1
    }

    /// To be asked before each side effect.
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

    /// What the last [`Context::save`] of an earlier run wrote.
    ///
    /// # Errors
    /// When it does not fit the type.
    pub fn saved<T: DeserializeOwned>(&self) -> Result<Option<T>, serde_json::Error> {
        self.saved.as_deref().map(serde_json::from_str).transpose()
    }

    /// Writes down how far the run has come, for a later one that must go on from there. What went wrong
    /// before is forgiven: the job gets on.
    ///
    /// # Errors
    /// [`Stopped::Lapsed`] when the job is in other hands by now, and when the store fails.
    pub async fn save<T: Serialize + Sync>(&self, checkpoint: &T) -> anyhow::Result<()> {
        let held = Held { id: self.id, epoch: self.epoch };
        let checkpoint = serde_json::to_string(checkpoint)?;
        if !self.recorder.record(held, Arc::clone(&self.queue), checkpoint).await? {
            return Err(Stopped::Lapsed.into());
        }
        self.advanced();
        Ok(())
    }

    /// Says that this run gets on, whatever becomes of it: failures and crashes are counted anew. For jobs
    /// that write their checkpoints into tables of their own.
    pub fn advanced(&self) {
        self.advance.advanced.store(true, Ordering::Release);
    }

    /// Says how far the run has come, for those who look. It is written down with the next renewal.
    pub fn progress(&self, done: u64, total: u64) {
        self.advance.done.store(done, Ordering::Release);
        self.advance.total.store(total, Ordering::Release);
    }

    /// A job that follows from this one, and carries its trace.
    ///
    /// # Errors
    /// When the payload cannot be written: see [`NewJob::new`].
    pub fn follow_up<J: Job>(&self, job: &J) -> queue::Result<NewJob> {
        Ok(NewJob { trace: self.trace.as_deref().map(str::to_owned), ..NewJob::new(job)? })
    }
}
