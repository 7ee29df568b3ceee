//! Wakes workers of queues that may have a job to claim.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Queues that may have a job to claim. A cheap handle.
///
/// The set may lack a queue, or contain one without a job: workers also poll.
#[derive(Clone, Debug, Default)]
pub struct Wake(Arc<WakeTable>);

#[derive(Debug, Default)]
struct WakeTable {
    queues: Mutex<BTreeSet<Arc<str>>>,
    notify: Notify,
}

impl Wake {
    /// Marks these queues as having a job to claim, and wakes the waiting task.
    pub fn queues<'a>(&self, queues: impl IntoIterator<Item = &'a str>) {
        let mut woken = self.0.queues.lock();
        for queue in queues {
            if !woken.contains(queue) {
                woken.insert(queue.into());
            }
        }
        drop(woken);
        self.0.notify.notify_one();
    }

    /// Waits until a queue is marked, and returns all marked queues.
    pub(crate) async fn woken(&self) -> BTreeSet<Arc<str>> {
        loop {
            let woken = std::mem::take(&mut *self.0.queues.lock());
            if !woken.is_empty() {
                return woken;
            }
            self.0.notify.notified().await;
        }
    }
}
