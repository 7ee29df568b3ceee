//! The only way to start a long-lived task. A task has a name, an owner that awaits it, and a stated meaning of its
//! end:
//!
//! * The process cannot run without a **critical** task: when one fails, or ends before the drain has begun,
//!   [`Tasks::died`] returns and the process stops with exit code 1.
//! * A **contained** task may fail: an error or a panic is counted and logged, and the task starts again after a
//!   backoff.
//!
//! Short-lived work (a connection, a job) lives in a `JoinSet` of the component that started it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, error, error_span};

use crate::backoff::Backoff;
use crate::drain::{Drain, Phase};
use crate::metrics;
use crate::panics::panic_message;
use crate::telemetry::Seldom;

/// Pause between two starts of a contained task.
const RESTART: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));

/// The unexpected end of a critical task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// The name of the task.
    pub task: &'static str,
    /// The error, the panic message, or the statement that the task ended by itself.
    pub reason: String,
}

/// All long-lived tasks of a process. A cheap handle.
#[derive(Clone, Debug)]
pub struct Tasks(Arc<TaskTable>);

#[derive(Debug)]
struct TaskTable {
    tracker: TaskTracker,
    live: Mutex<BTreeMap<u64, Live>>,
    death: watch::Sender<Option<Death>>,
    drain: Drain,
}

#[derive(Debug)]
struct Live {
    name: &'static str,
    abort: AbortHandle,
}

impl Tasks {
    /// Creates an empty set of tasks. `drain` tells an expected end from a death.
    pub fn new(drain: Drain) -> Self {
        Self(Arc::new(TaskTable {
            tracker: TaskTracker::new(),
            live: Mutex::default(),
            death: watch::Sender::new(None),
            drain,
        }))
    }

    /// Starts a task that the process cannot do without.
    pub fn critical<F, E>(&self, name: &'static str, future: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display,
    {
        let shared = Arc::clone(&self.0);
        self.start(name, async move {
            let reason = match AssertUnwindSafe(future).catch_unwind().await {
                Ok(Ok(())) if shared.drain.phase() > Phase::Running => return,
                Ok(Ok(())) => "it ended by itself".to_owned(),
                Ok(Err(error)) => format!("{error:#}"),
                Err(panic) => format!("it panicked: {}", panic_message(&*panic)),
            };
            error!(task = name, reason, "a critical task died");
            shared.death.send_if_modified(|death| {
                let first = death.is_none();
                death.get_or_insert(Death { task: name, reason });
                first
            });
        });
    }

    /// Starts a task that is started again after a failure and a backoff, until the soft phase of the drain. It ends
    /// for good when it returns `Ok`.
    pub fn contained<M, F, E>(&self, name: &'static str, mut make: M)
    where
        M: FnMut() -> F + Send + 'static,
        F: Future<Output = Result<(), E>> + Send,
        E: Display + Send,
    {
        let drain = self.0.drain.clone();
        metrics::task_may_fail(name);
        self.start(name, async move {
            // While a store is unreachable, the task fails for the same reason every time, which is not logged every
            // time.
            let (seldom, mut told) = (Seldom::each_minute(), String::new());
            for failures in 1u32.. {
                let reason = match AssertUnwindSafe(make()).catch_unwind().await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => format!("{error:#}"),
                    Err(panic) => format!("it panicked: {}", panic_message(&*panic)),
                };
                metrics::task_failed(name);
                let pause = RESTART.jittered(failures);
                let left_out = seldom.tell();
                if left_out.is_some() || reason != told {
                    error!(task = name, reason, restart_in = ?pause, left_out, "a contained task failed");
                    told = reason;
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = drain.soft() => return,
                }
            }
        });
    }

    fn start(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let shared = Arc::clone(&self.0);
        let (named, is_named) = tokio::sync::oneshot::channel::<u64>();
        let task = self.0.tracker.spawn(
            async move {
                let _listed = is_named.await.ok().map(|key| ListedTask { shared: Arc::clone(&shared), key });
                future.await;
            }
            .instrument(error_span!("task", task = name)),
        );
        let mut live = self.0.live.lock();
        let key = live.last_key_value().map_or(0, |(key, _)| key + 1);
        live.insert(key, Live { name, abort: task.abort_handle() });
        // The task removes its own entry when it ends by any path, so it starts only after it is listed.
        let _ = named.send(key);
    }

    /// Waits for the first critical task that dies. Never returns when no task dies.
    pub async fn died(&self) -> Death {
        let mut death = self.0.death.subscribe();
        match death.wait_for(Option::is_some).await {
            Ok(death) => death.clone().unwrap_or(Death { task: "unknown", reason: String::new() }),
            Err(_) => std::future::pending().await,
        }
    }

    /// The first critical task that died, if one did.
    pub fn death(&self) -> Option<Death> {
        self.0.death.borrow().clone()
    }

    /// Waits until every task has ended.
    pub async fn ended(&self) {
        self.0.tracker.close();
        self.0.tracker.wait().await;
    }

    /// The names of the tasks that run now.
    pub fn running(&self) -> Vec<&'static str> {
        self.0.live.lock().values().map(|live| live.name).collect()
    }

    /// Aborts all running tasks and returns their names.
    pub fn abort(&self) -> Vec<&'static str> {
        let live = self.0.live.lock();
        live.values()
            .map(|live| {
                live.abort.abort();
                live.name
            })
            .collect()
    }
}

/// The entry of a running task. Dropping it removes the entry.
struct ListedTask {
    shared: Arc<TaskTable>,
    key: u64,
}

impl Drop for ListedTask {
    fn drop(&mut self) {
        self.shared.live.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::drain;

    #[tokio::test]
    async fn a_critical_task_that_panics_is_a_death() {
        let (_trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain);
        tasks.critical("engine", async {
            if tokio::task::try_id().is_some() {
                panic!("out of steam");
            }
            Ok::<(), Infallible>(())
        });
        let death = tasks.died().await;
        assert_eq!(death, Death { task: "engine", reason: "it panicked: out of steam".into() });
        tasks.ended().await;
        assert!(tasks.running().is_empty());
    }

    #[tokio::test]
    async fn an_end_during_the_drain_is_no_death() {
        let (trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain.clone());
        tasks.critical("engine", async move {
            drain.soft().await;
            Ok::<(), Infallible>(())
        });
        trigger.advance(Phase::Soft);
        tasks.ended().await;
        assert_eq!(tasks.death(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_contained_task_is_started_again() {
        let (_trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain);
        let starts = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&starts);
        tasks.contained("sweeper", move || {
            let start = counter.fetch_add(1, Ordering::SeqCst);
            async move {
                match start {
                    0 => Err("no broom".to_owned()),
                    1 => panic!("no floor"),
                    _ => Ok(()),
                }
            }
        });
        tasks.ended().await;
        assert_eq!(starts.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn abort_names_what_still_ran() {
        let (_trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain);
        tasks.critical("stuck", std::future::pending::<Result<(), Infallible>>());
        assert_eq!(tasks.abort(), ["stuck"]);
        tasks.ended().await;
    }
}
