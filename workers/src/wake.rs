//! Who tells whom that there is something to do.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Queues that may have something to claim. A cheap handle.
///
/// It may be wrong either way: workers also poll.
#[derive(Clone, Debug, Default)]
pub struct Wake(Arc<WakeTable>);

#[derive(Debug, Default)]
struct WakeTable {
    queues: Mutex<BTreeSet<Arc<str>>>,
    notify: Notify,
}

impl Wake {
    /// There may be something in these queues.
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

    /// Waits until there may be something, and returns where.
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
