//! A job is a type.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use perennial_server::backoff::Backoff;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::lease::Lease;
use crate::state::{Budget, Spent};

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

    /// Does the work. An error is a failure, to be tried again as the options say.
    fn run(&self, context: Context, tools: Self::Tools) -> impl Future<Output = anyhow::Result<Fate>> + Send;

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

/// How a run ended, when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It did what it had to.
    Done,
    /// It wants to run again after this long; that is no failure.
    Snooze(Duration),
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
                recoveries: 5,
                backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(600)),
            },
        }
    }
}

/// What a run knows about itself.
#[derive(Clone, Debug)]
pub struct Context {
    /// The job's id.
    pub id: Uuid,
    /// Raised by every claim: rows that are written under a job carry it, so that an earlier run that wakes
    /// up late can change nothing.
    pub epoch: i64,
    /// What has gone wrong in earlier runs.
    pub spent: Spent,
    /// When this run counts as failed.
    pub deadline: Instant,
    /// Cancelled when the run should stop soon and hand back, or when it has lost its lease.
    pub cancel: CancellationToken,
    /// The right to go on.
    pub lease: Lease,
}

/// The run must not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// It was asked to hand back.
    #[error("the run was asked to stop")]
    Cancelled,
    /// Another worker may have taken the job.
    #[error("the lease has lapsed")]
    Lapsed,
}

impl Context {
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
}

type Running<T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send>>;

/// A job of any kind, read from its payload.
pub(crate) trait Runnable: Send + Sync {
    fn subject(&self) -> Option<String>;
    fn run(self: Arc<Self>, context: Context) -> Running<Fate>;
    fn give_up(self: Arc<Self>, context: Context, reason: String) -> Running<()>;
}

struct WithTools<J: Job> {
    job: J,
    tools: J::Tools,
}

impl<J: Job> Runnable for WithTools<J> {
    fn subject(&self) -> Option<String> {
        self.job.subject()
    }

    fn run(self: Arc<Self>, context: Context) -> Running<Fate> {
        Box::pin(async move { self.job.run(context, self.tools.clone()).await })
    }

    fn give_up(self: Arc<Self>, context: Context, reason: String) -> Running<()> {
        Box::pin(async move { self.job.give_up(context, self.tools.clone(), reason).await })
    }
}

/// One kind of job, with its type taken off.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) options: Options,
    read: Box<Reader>,
}

type Reader = dyn Fn(&str) -> Result<Arc<dyn Runnable>, serde_json::Error> + Send + Sync;

impl Kind {
    fn of<J: Job>(tools: J::Tools) -> Self {
        let read = move |payload: &str| {
            let job: J = serde_json::from_str(payload)?;
            Ok(Arc::new(WithTools { job, tools: tools.clone() }) as Arc<dyn Runnable>)
        };
        Self { name: J::KIND, options: J::options(), read: Box::new(read) }
    }

    /// Reads a payload.
    pub(crate) fn read(&self, payload: &str) -> Result<Arc<dyn Runnable>, serde_json::Error> {
        (self.read)(payload)
    }
}

/// Jobs that are waited for by nobody: see [`Registry::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("jobs of the kind {kind} wait in the queue {queue}, which nobody serves")]
pub struct Unserved {
    /// The kind.
    pub kind: &'static str,
    /// Its queue.
    pub queue: &'static str,
}

/// The kinds of jobs that this process can run, and how many of each queue at once.
#[derive(Default)]
pub struct Registry {
    kinds: HashMap<&'static str, Arc<Kind>>,
    slots: Vec<(&'static str, usize)>,
}

impl Registry {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a kind of job, and what it needs to run.
    ///
    /// # Panics
    /// When the kind is there already: that is a mistake in the program.
    pub fn register<J: Job>(&mut self, tools: J::Tools) {
        let twice = self.kinds.insert(J::KIND, Arc::new(Kind::of::<J>(tools))).is_some();
        assert!(!twice, "the job kind {} is registered twice", J::KIND);
    }

    /// Runs up to `slots` jobs of a queue at once.
    ///
    /// # Panics
    /// When the queue is served already: that is a mistake in the program.
    pub fn serve(&mut self, queue: &'static str, slots: usize) {
        let twice = self.slots.iter().any(|(name, _)| *name == queue);
        assert!(!twice, "the queue {queue} is served twice");
        self.slots.push((queue, slots));
    }

    /// Whether the queue of every kind is served.
    ///
    /// # Errors
    /// The first that is not: its jobs would never run, and nothing would say so.
    pub fn check(&self) -> Result<(), Unserved> {
        for kind in self.kinds.values() {
            let queue = kind.options.queue;
            if !self.slots.iter().any(|(name, _)| *name == queue) {
                return Err(Unserved { kind: kind.name, queue });
            }
        }
        Ok(())
    }

    pub(crate) fn kind(&self, name: &str) -> Option<Arc<Kind>> {
        self.kinds.get(name).cloned()
    }

    pub(crate) fn slots(&self) -> &[(&'static str, usize)] {
        &self.slots
    }

    /// How much may go wrong with jobs of a kind; the default for kinds that are not known here.
    pub(crate) fn budget(&self, kind: &str) -> Budget {
        self.kinds.get(kind).map_or_else(|| Options::default().budget, |kind| kind.options.budget)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.kinds.keys().collect();
        f.debug_struct("Registry").field("kinds", &kinds).field("slots", &self.slots).finish()
    }
}
