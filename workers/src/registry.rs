//! What a process can run: its kinds of jobs, and how many of each queue at once.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::job::{Context, Job, JobOutcome, Options, Rate};
use crate::metrics;
use crate::queue::{self, NewJob};
use crate::state::Budget;

type Running<T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send>>;

/// A job of any kind, read from its payload.
pub(crate) trait Runnable: Send + Sync {
    fn subject(&self) -> Option<String>;
    fn run(self: Arc<Self>, context: Context) -> Running<JobOutcome>;
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

    fn run(self: Arc<Self>, context: Context) -> Running<JobOutcome> {
        Box::pin(async move { self.job.run(context, self.tools.clone()).await })
    }

    fn give_up(self: Arc<Self>, context: Context, reason: String) -> Running<()> {
        Box::pin(async move { self.job.give_up(context, self.tools.clone(), reason).await })
    }
}

/// One kind of job, with its type taken off.
pub struct JobKind {
    /// Its name in the store.
    pub name: &'static str,
    /// How it is queued.
    pub options: Options,
    read: Box<Reader>,
    write: Box<Writer>,
}

type Reader = dyn Fn(&str) -> Result<Arc<dyn Runnable>, serde_json::Error> + Send + Sync;
type Writer = dyn Fn(&str) -> queue::Result<NewJob> + Send + Sync;

impl JobKind {
    fn of<J: Job>(tools: J::Tools) -> Self {
        let read = move |payload: &str| {
            let job: J = serde_json::from_str(payload)?;
            Ok(Arc::new(WithTools { job, tools: tools.clone() }) as Arc<dyn Runnable>)
        };
        let write = |payload: &str| {
            let job: Result<J, _> =
                serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(payload));
            NewJob::new(&job.map_err(|error| {
                let (field, reason) = (error.path().to_string(), error.inner().to_string());
                // The place in the text follows the message; the field says it better.
                let reason = reason.split(" at line ").next().unwrap_or_default().to_owned();
                queue::Error::Misfit { kind: J::KIND, field, reason }
            })?)
        };
        Self { name: J::KIND, options: J::options(), read: Box::new(read), write: Box::new(write) }
    }

    /// Reads a payload.
    pub(crate) fn read(&self, payload: &str) -> Result<Arc<dyn Runnable>, serde_json::Error> {
        (self.read)(payload)
    }

    /// A new job of this kind from a payload in JSON, if the type can be read from it.
    ///
    /// # Errors
    /// [`queue::Error::Misfit`] names the field that does not fit.
    pub fn job(&self, payload: &str) -> queue::Result<NewJob> {
        (self.write)(payload)
    }
}

impl fmt::Debug for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kind").field("name", &self.name).finish_non_exhaustive()
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

/// A queue, or the lane of a kind with limits of its own.
#[derive(Clone, Debug)]
pub struct QueueSlots {
    /// Its name in the store.
    pub name: Arc<str>,
    /// How many of its jobs run at once.
    pub slots: usize,
    /// How many may start in a while.
    pub rate: Option<Rate>,
}

/// The kinds of jobs that this process can run, and how many of each queue at once.
#[derive(Default)]
pub struct Registry {
    kinds: HashMap<&'static str, Arc<JobKind>>,
    queues: Vec<QueueSlots>,
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
        let twice = self.kinds.insert(J::KIND, Arc::new(JobKind::of::<J>(tools))).is_some();
        assert!(!twice, "the job kind {} is registered twice", J::KIND);
    }

    /// Runs up to `slots` jobs of a queue at once.
    ///
    /// # Panics
    /// When the queue is served already: that is a mistake in the program.
    pub fn serve(&mut self, queue: &str, slots: usize) {
        let twice = self.queues.iter().any(|lane| *lane.name == *queue);
        assert!(!twice, "the queue {queue} is served twice");
        self.queues.push(QueueSlots { name: queue.into(), slots, rate: None });
    }

    /// Whether the queue of every kind is served.
    ///
    /// # Errors
    /// The first that is not: its jobs would never run, and nothing would say so.
    pub fn check(&self) -> Result<(), Unserved> {
        for kind in self.kinds.values() {
            let queue = kind.options.queue;
            if !self.queues.iter().any(|lane| *lane.name == *queue) {
                return Err(Unserved { kind: kind.name, queue });
            }
            metrics::may_run(kind.name);
        }
        Ok(())
    }

    /// A kind by its name.
    pub fn kind(&self, name: &str) -> Option<Arc<JobKind>> {
        self.kinds.get(name).cloned()
    }

    /// The names of all kinds, in their order.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> {
        let mut names: Vec<&'static str> = self.kinds.keys().copied().collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// The queues, and the lanes of kinds with limits of their own.
    pub fn lanes(&self) -> Vec<QueueSlots> {
        let limited = self.kinds.values().filter_map(|kind| {
            let name = kind.options.lane(kind.name);
            let queue = self.queues.iter().find(|lane| *lane.name == *kind.options.queue)?;
            (*name != *queue.name).then(|| QueueSlots {
                name: Arc::from(&*name),
                slots: kind.options.concurrency.unwrap_or(queue.slots),
                rate: kind.options.rate,
            })
        });
        self.queues.iter().cloned().chain(limited).collect()
    }

    /// How much may go wrong with jobs of a kind; the default for kinds that are not known here.
    pub(crate) fn budget(&self, kind: &str) -> Budget {
        self.kinds.get(kind).map_or_else(|| Options::default().budget, |kind| kind.options.budget)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.kinds.keys().collect();
        f.debug_struct("Registry").field("kinds", &kinds).field("queues", &self.queues).finish()
    }
}
