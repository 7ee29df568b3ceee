//! Renewing leases on a task of its own, so that no busy handler can hold it up.

use std::time::Instant;

use tracing::warn;

use super::Config;
use super::slots::Slots;
use crate::lease::BootTime;
use crate::metrics;
use crate::queue::{Queue, Renewal};

/// Highest number of leases that one query renews.
const BATCH: usize = 500;

/// Renews all leases, and cancels the runs that have lost their lease or whose job was cancelled.
pub(super) async fn run<Q: Queue>(queue: Q, slots: Slots, config: Config) {
    let mut due = tokio::time::Instant::now() + config.renew_every;
    loop {
        tokio::time::sleep_until(due).await;
        metrics::renewal_lag(due.elapsed());
        due = tokio::time::Instant::now() + config.renew_every;
        for renewals in renewals(&slots).chunks(BATCH) {
            renew(&queue, &slots, renewals, &config).await;
        }
        slots.each(|_, slot| {
            if !slot.lease.is_held() {
                slot.cancel.cancel();
            }
        });
    }
}

/// Returns the leases to renew. The lease of a job past its deadline is left out: if the job hangs, the lease
/// expires and another worker gets the job.
fn renewals(slots: &Slots) -> Vec<Renewal> {
    let now = Instant::now();
    let mut renewals = Vec::new();
    slots.each(|held, slot| {
        if now < slot.deadline {
            renewals.push(Renewal { held, queue: slot.queue.clone(), progress: slot.progress() });
        }
    });
    renewals
}

async fn renew<Q: Queue>(queue: &Q, slots: &Slots, renewals: &[Renewal], config: &Config) {
    let lease_end = BootTime::now().after(config.lease);
    // It waits no longer than that: the next attempt, on another connection, may still come in time.
    let renewing = queue.renew(renewals.to_vec(), config.lease);
    let renewed = match tokio::time::timeout(config.renew_every, renewing).await {
        Ok(Ok(renewed)) => renewed,
        Ok(Err(error)) => return warn!(error = error.in_one_line(), "leases could not be renewed"),
        Err(_elapsed) => return warn!("leases could not be renewed in time"),
    };
    for renewal in renewals {
        let kept = renewed.iter().find(|renewed| renewed.held == renewal.held);
        slots.one(renewal.held, |slot| match kept {
            Some(kept) => {
                slot.lease.extend(lease_end);
                if let Some(reason) = &kept.cancelled {
                    slot.cancel_for(reason.clone());
                }
            }
            None => slot.cancel.cancel(),
        });
    }
}
