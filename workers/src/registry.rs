//! The kinds of jobs that a process can run, and the slots of each queue.

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

/// One kind of job, with its type erased.
pub struct JobKind {
    /// Name of the kind in the store.
    pub name: &'static str,
    /// Queue, priority, limits and budget of the kind.
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
                // serde_json appends the position in the text; the path of the field is clearer.
                let reason = reason.split(" at line ").next().unwrap_or_default().to_owned();
                queue::Error::Misfit { kind: J::KIND, field, reason }
            })?)
        };
        Self { name: J::KIND, options: J::options(), read: Box::new(read), write: Box::new(write) }
    }

    pub(crate) fn read(&self, payload: &str) -> Result<Arc<dyn Runnable>, serde_json::Error> {
        (self.read)(payload)
    }

    /// Creates a job of this kind from a payload in JSON.
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

/// A kind whose queue no worker of this process serves: see [`Registry::check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("jobs of the kind {kind} wait in the queue {queue}, which no worker serves")]
pub struct Unserved {
    /// Name of the kind.
    pub kind: &'static str,
    /// Queue of the kind.
    pub queue: &'static str,
}

/// Slots and rate of one queue. A kind with limits of its own has such a queue for itself.
#[derive(Clone, Debug)]
pub struct QueueSlots {
    /// Name of the queue in the store.
    pub name: Arc<str>,
    /// Number of its jobs that run at once.
    pub slots: usize,
    /// Rate at which its jobs may start; `None` means unlimited.
    pub rate: Option<Rate>,
}

/// Kinds of jobs that this process can run, and the slots of each queue.
#[derive(Default)]
pub struct Registry {
    kinds: HashMap<&'static str, Arc<JobKind>>,
    queues: Vec<QueueSlots>,
}

impl Registry {
    /// Creates an empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a kind of job, with the handles that its runs need.
    ///
    /// # Panics
    /// When the kind is registered already: that is a mistake in the program.
    pub fn register<J: Job>(&mut self, tools: J::Tools) {
        let twice = self.kinds.insert(J::KIND, Arc::new(JobKind::of::<J>(tools))).is_some();
        assert!(!twice, "the job kind {} is registered twice", J::KIND);
    }

    /// Serves a queue: up to `slots` of its jobs run at once.
    ///
    /// # Panics
    /// When the queue is served already: that is a mistake in the program.
    pub fn serve(&mut self, queue: &str, slots: usize) {
        let twice = self.queues.iter().any(|lane| *lane.name == *queue);
        assert!(!twice, "the queue {queue} is served twice");
        self.queues.push(QueueSlots { name: queue.into(), slots, rate: None });
    }

    /// Checks that the queue of every kind is served.
    ///
    /// # Errors
    /// [`Unserved`] names a kind whose queue is not served: its jobs would never run, and nothing would say
    /// so.
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

    /// Returns a kind by its name.
    pub fn kind(&self, name: &str) -> Option<Arc<JobKind>> {
        self.kinds.get(name).cloned()
    }

    /// Returns the names of all kinds, sorted.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> {
        let mut names: Vec<&'static str> = self.kinds.keys().copied().collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// Returns the queues that this process serves, including those of kinds with limits of their own.
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

    /// Returns the budget of a kind; the default for a kind that is not known here.
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
