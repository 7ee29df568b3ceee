//! Nested-acquire detector: finds tasks that take a second connection while they hold one. That works as long as few
//! tasks do so; when as many do so as there are connections, all of them wait for each other.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::task::{self, Id};
use tracing::warn;

use crate::metrics;

/// The tasks that hold connections of one pool, each with its number of connections.
#[derive(Debug)]
pub(super) struct Holders {
    pool: &'static str,
    by_task: Mutex<HashMap<Id, usize>>,
    warned: AtomicBool,
}

/// One connection that a task holds. Another task may drop it.
#[derive(Debug)]
pub(super) struct HeldConnection {
    holders: Arc<Holders>,
    task: Option<Id>,
}

impl Holders {
    pub(super) fn new(pool: &'static str) -> Arc<Self> {
        Arc::new(Self { pool, by_task: Mutex::default(), warned: AtomicBool::new(false) })
    }

    /// Checks whether the current task, which is about to wait for a connection, already holds one. Counts every such
    /// case and logs the first.
    pub(super) fn asked(&self) {
        let holds = task::try_id().is_some_and(|task| self.lock().contains_key(&task));
        if !holds {
            return;
        }
        metrics::pool_nested(self.pool);
        if !self.warned.swap(true, Ordering::Relaxed) {
            warn!(
                pool = self.pool,
                "a task takes a second connection while it holds one: when all do so at once, all wait for each other"
            );
        }
    }

    pub(super) fn hold(self: &Arc<Self>) -> HeldConnection {
        let task = task::try_id();
        if let Some(task) = task {
            *self.lock().entry(task).or_default() += 1;
        }
        HeldConnection { holders: Arc::clone(self), task }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, HashMap<Id, usize>> {
        self.by_task.lock()
    }
}

impl Drop for HeldConnection {
    fn drop(&mut self) {
        let Some(task) = self.task else { return };
        let mut by_task = self.holders.lock();
        match by_task.get_mut(&task) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(by_task.remove(&task)),
        }
    }
}
