//! The jobs in hand, and their status for operators.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use perennial_runtime::metrics::Counted;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::job::{Advance, Context};
use crate::lease::Lease;
use crate::metrics;
use crate::queue::{Claimed, Held, Progress};
use crate::registry::QueueSlots;

/// The jobs in hand. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Slots(Arc<SlotTable>);

#[derive(Debug)]
struct SlotTable {
    jobs: Mutex<InHandOfAll>,
    lanes: Vec<QueueSlots>,
    ended: AtomicU64,
}

#[derive(Debug, Default)]
struct InHandOfAll {
    by_claim: HashMap<Held, Slot>,
    by_queue: HashMap<Arc<str>, usize>,
    payload_bytes: usize,
}

#[derive(Debug)]
pub(super) struct Slot {
    kind: &'static str,
    pub(super) queue: Arc<str>,
    subject: Option<String>,
    trace: Option<Arc<str>>,
    payload_bytes: usize,
    since: Instant,
    pub(super) deadline: Instant,
    pub(super) lease: Lease,
    pub(super) cancel: CancellationToken,
    /// Reason why the job was cancelled, if it was.
    cancelled: Option<String>,
    advance: Arc<Advance>,
}

impl Slot {
    pub(super) fn progress(&self) -> Option<Progress> {
        self.advance.progress()
    }

    /// Cancels the run, because the job was cancelled for this reason.
    pub(super) fn cancel_for(&mut self, reason: String) {
        self.cancelled.get_or_insert(reason);
        self.cancel.cancel();
    }
}

/// A job that the worker runs now.
#[derive(Clone, Debug, Serialize)]
pub struct Busy {
    /// Id of the job.
    pub id: Uuid,
    /// Name of the kind.
    pub kind: &'static str,
    /// Queue of the job.
    pub queue: String,
    /// Subject of the job, such as the id of a notification.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Trace that joins the job to its origin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Epoch of the claim.
    pub epoch: i64,
    /// Progress that the job reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Time since the run began, in milliseconds.
    pub for_ms: u64,
}

/// The slots of a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Serving {
    /// Name of the queue.
    pub queue: String,
    /// Number of its jobs that may run at once.
    pub slots: usize,
    /// Number of its jobs that run now.
    pub busy: usize,
}

/// Status of a worker. A cheap handle.
#[derive(Clone, Debug)]
pub struct Status(Slots);

impl Status {
    pub(super) fn new(slots: Slots) -> Self {
        Self(slots)
    }

    /// Returns the jobs that run now.
    pub fn busy(&self) -> Vec<Busy> {
        let jobs = self.0.lock();
        let busy = jobs.by_claim.iter().map(|(held, slot)| Busy {
            id: held.id,
            kind: slot.kind,
            queue: slot.queue.to_string(),
            subject: slot.subject.clone(),
            trace: slot.trace.as_deref().map(str::to_owned),
            epoch: held.epoch,
            progress: slot.progress(),
            for_ms: u64::try_from(slot.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        busy.collect()
    }

    /// Returns the queues that the worker serves.
    pub fn serving(&self) -> Vec<Serving> {
        let lanes = self.0.0.lanes.iter();
        lanes
            .map(|lane| Serving {
                queue: lane.name.to_string(),
                slots: lane.slots,
                busy: self.0.of_queue(&lane.name),
            })
            .collect()
    }

    /// Returns the number of jobs that have ended here, with any outcome.
    pub fn ended(&self) -> u64 {
        self.0.0.ended.load(Ordering::Relaxed)
    }

    /// Tells a job that runs here to stop, without waiting for the store to do so.
    pub fn cancel(&self, job: Uuid, reason: &str) {
        let mut jobs = self.0.lock();
        for (_, slot) in jobs.by_claim.iter_mut().filter(|(held, _)| held.id == job) {
            slot.cancel_for(reason.to_owned());
        }
    }
}

impl Slots {
    pub(super) fn new(lanes: &[QueueSlots]) -> Self {
        Self(Arc::new(SlotTable { jobs: Mutex::default(), lanes: lanes.to_vec(), ended: AtomicU64::new(0) }))
    }

    fn lock(&self) -> MutexGuard<'_, InHandOfAll> {
        self.0.jobs.lock()
    }

    pub(super) fn of_queue(&self, queue: &str) -> usize {
        self.lock().by_queue.get(queue).copied().unwrap_or_default()
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.lock().payload_bytes
    }

    /// Takes a job in hand, until the returned guard is dropped.
    pub(super) fn take(
        &self,
        claimed: &Claimed,
        kind: &'static str,
        subject: Option<String>,
        context: &Context,
    ) -> InHand {
        let slot = Slot {
            kind,
            queue: Arc::clone(&claimed.queue),
            subject,
            trace: context.trace.clone(),
            payload_bytes: claimed.payload.len(),
            since: Instant::now(),
            deadline: context.deadline,
            lease: context.lease.clone(),
            cancel: context.cancel.clone(),
            cancelled: None,
            advance: Arc::clone(&context.advance),
        };
        let mut jobs = self.lock();
        jobs.payload_bytes += slot.payload_bytes;
        *jobs.by_queue.entry(Arc::clone(&slot.queue)).or_default() += 1;
        jobs.by_claim.insert(claimed.held(), slot);
        InHand { slots: self.clone(), held: claimed.held(), _counted: Counted::new(metrics::running()) }
    }

    /// Runs `look` on every job in hand.
    pub(super) fn each(&self, mut look: impl FnMut(Held, &mut Slot)) {
        for (held, slot) in &mut self.lock().by_claim {
            look(*held, slot);
        }
    }

    /// Runs `look` on one job, if it is in hand.
    pub(super) fn one(&self, held: Held, look: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.lock().by_claim.get_mut(&held) {
            look(slot);
        }
    }

    pub(super) fn cancel_all(&self) {
        self.each(|_, slot| slot.cancel.cancel());
    }
}

/// Guard of a job in hand, which leaves its slot when this is dropped.
pub(super) struct InHand {
    slots: Slots,
    held: Held,
    _counted: Counted,
}

impl InHand {
    /// Returns why the job was cancelled, if it was.
    pub(super) fn cancelled(&self) -> Option<String> {
        self.slots.lock().by_claim.get(&self.held)?.cancelled.clone()
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut jobs = self.slots.lock();
        if let Some(slot) = jobs.by_claim.remove(&self.held) {
            jobs.payload_bytes -= slot.payload_bytes;
            if let Some(count) = jobs.by_queue.get_mut(&slot.queue) {
                *count -= 1;
            }
        }
        drop(jobs);
        self.slots.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}
