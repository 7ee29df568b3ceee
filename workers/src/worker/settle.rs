//! Settling: many jobs in one query, since stores answer for a hundred as fast as for one.

use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use crate::lease::Lease;
use crate::queue::{Queue, Settlement};

/// Highest number of jobs that are settled at once.
const BATCH: usize = 500;
/// Wait between two attempts while the store is away.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));

/// Result of a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// The transition is stored.
    Kept,
    /// The claim was not held any more: nothing has changed.
    Stale,
    /// The store was away for longer than the lease: the job runs again.
    Lost,
}

/// Passes settlements to the task that stores them. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Settler(mpsc::Sender<PendingSettlement>);

#[derive(Debug)]
struct PendingSettlement {
    settlement: Settlement,
    lease: Lease,
    answer: oneshot::Sender<Settled>,
}

impl Settler {
    /// Settles a job. Returns when its transition is stored, or cannot be any more.
    pub(super) async fn settle(&self, settlement: Settlement, lease: Lease) -> Settled {
        let (answer, settled) = oneshot::channel();
        if self.0.send(PendingSettlement { settlement, lease, answer }).await.is_err() {
            return Settled::Lost;
        }
        settled.await.unwrap_or(Settled::Lost)
    }
}

/// Returns a settler, and the future that does its work: it is to be run until every settler is dropped.
pub(super) fn channel<Q: Queue>(queue: Q) -> (Settler, impl Future<Output = ()> + Send) {
    let (sender, receiver) = mpsc::channel(BATCH);
    (Settler(sender), run(queue, receiver))
}

async fn run<Q: Queue>(queue: Q, mut waiting: mpsc::Receiver<PendingSettlement>) {
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, BATCH).await > 0 {
        settle(&queue, std::mem::take(&mut batch)).await;
    }
}

/// Settles a batch. While the store is away it tries again, for the jobs whose leases are held.
async fn settle<Q: Queue>(queue: &Q, mut batch: Vec<PendingSettlement>) {
    for failures in 1.. {
        let settlements = batch.iter().map(|waiting| waiting.settlement.clone()).collect();
        let error = match queue.settle(settlements).await {
            Ok(kept) => {
                for (waiting, kept) in batch.into_iter().zip(kept) {
                    let _ = waiting.answer.send(if kept { Settled::Kept } else { Settled::Stale });
                }
                return;
            }
            Err(error) if !error.is_passing() && batch.len() > 1 => {
                // One settlement cannot be stored, and must not block the others.
                let rest = batch.split_off(batch.len() / 2);
                Box::pin(settle(queue, batch)).await;
                return Box::pin(settle(queue, rest)).await;
            }
            Err(error) => error.in_one_line(),
        };
        let (held, lost): (Vec<_>, Vec<_>) = batch.into_iter().partition(|waiting| waiting.lease.is_held());
        for waiting in lost {
            error!(job = %waiting.settlement.job.id, error, "a job was not settled; it will run again");
            let _ = waiting.answer.send(Settled::Lost);
        }
        if held.is_empty() {
            return;
        }
        warn!(jobs = held.len(), error, "jobs could not be settled yet");
        tokio::time::sleep(AGAIN.jittered(failures)).await;
        batch = held;
    }
}
