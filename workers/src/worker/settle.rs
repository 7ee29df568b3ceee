//! Writing down what becomes of jobs: many in one question, since stores answer for a hundred as fast as for
//! one.

use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use crate::lease::Lease;
use crate::queue::{Queue, Settlement};

/// How many are settled at once at most.
const BATCH: usize = 500;
/// Between two attempts while the store is away.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));

/// What became of a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// It is written down.
    Kept,
    /// The claim was not held any more: nothing has changed.
    Stale,
    /// The store was away for longer than the lease: the job runs again.
    Lost,
}

/// Takes settlements. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Settler(mpsc::Sender<PendingSettlement>);

#[derive(Debug)]
struct PendingSettlement {
    settlement: Settlement,
    lease: Lease,
    answer: oneshot::Sender<Settled>,
}

impl Settler {
    /// Returns when it is written down, or cannot be any more.
    pub(super) async fn settle(&self, settlement: Settlement, lease: Lease) -> Settled {
        let (answer, settled) = oneshot::channel();
        if self.0.send(PendingSettlement { settlement, lease, answer }).await.is_err() {
            return Settled::Lost;
        }
        settled.await.unwrap_or(Settled::Lost)
    }
}

/// A settler, and what it does: to be run until nobody has the settler any more.
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

/// Settles a batch: again and again while the store is away, and those whose leases are held.
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
                // One of them cannot be written: the others must not wait for it.
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
