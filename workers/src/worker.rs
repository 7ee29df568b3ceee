//! The worker: claims as many jobs as there is room for, runs them, renews their leases, and settles them.
//!
//! ```text
//! run ─┬─ claim ──► execute (task per job) ──┐
//!      ├─ settle  (one task, many jobs at once) ◄┘
//!      └─ renew   (one task for all leases)
//! ```
//!
//! Every queue has slots of its own, and so has every kind with limits of its own, so that no queue can block
//! another.

mod execute;
mod renew;
mod settle;
mod slots;
mod start_rate;

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::Histogram;
use perennial_runtime::cgroup::Pressure;
use perennial_runtime::drain::{Drain, Phase};
use perennial_runtime::telemetry::Seldom;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::warn;

use crate::lease::{BootTime, Lease};
use crate::metrics;
use crate::queue::{Claim, MAX_PAYLOAD, Queue};
use crate::registry::{self, Registry};
use settle::Settler;
use slots::Slots;
pub use slots::{Busy, Status};
use start_rate::StartRate;

/// Settings of a worker.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the worker, for operators.
    pub name: String,
    /// Length of the leases.
    pub lease: Duration,
    /// How often leases are renewed: at least three times within one lease.
    pub renew_every: Duration,
    /// How often to look for jobs that the worker was not woken for.
    pub poll: Duration,
    /// Highest length of all payloads in hand, in bytes. At least one job is in hand in any case.
    pub payload_bytes: usize,
    /// Says whether memory is nearly used up.
    pub pressure: Pressure,
}

/// Error for a lease that does not hold three renewals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a lease must hold at least three renewals")]
pub struct LeaseTooShort;

/// Claims jobs from a store and runs them.
#[derive(Debug)]
pub struct Worker<Q> {
    queue: Q,
    registry: Arc<Registry>,
    config: Config,
    slots: Slots,
}

/// State of one queue in the loop of the worker.
struct QueueWorker {
    lane: registry::QueueSlots,
    start_rate: Option<StartRate>,
    /// Histogram of how long its jobs waited.
    waits: Histogram,
    /// When to look for jobs next.
    look_at: Instant,
    /// True if more jobs waited than there was room for.
    is_backed_up: bool,
    /// True if a job is expected before the next poll.
    is_promising: bool,
}

impl QueueWorker {
    fn new(lane: registry::QueueSlots) -> Self {
        let start_rate = lane.rate.map(StartRate::new);
        let waits = metrics::waits(&lane.name);
        Self { lane, start_rate, waits, look_at: Instant::now(), is_backed_up: false, is_promising: false }
    }
}

/// Limits the log lines: a store that is away fails every claim.
static NOT_CLAIMED: Seldom = Seldom::each_minute();

impl<Q: Queue> Worker<Q> {
    /// Creates a worker for the queues that `registry` serves.
    ///
    /// # Errors
    /// When the lease does not hold three renewals.
    pub fn new(queue: Q, registry: Arc<Registry>, config: Config) -> Result<Self, LeaseTooShort> {
        if config.renew_every * 3 > config.lease {
            return Err(LeaseTooShort);
        }
        let slots = Slots::new(&registry.lanes());
        Ok(Self { queue, registry, config, slots })
    }

    /// Returns the status of the worker, for operators.
    pub fn status(&self) -> Status {
        Status::new(self.slots.clone())
    }

    /// Works until the drain has begun and every job in hand has ended.
    ///
    /// # Errors
    /// Never: the type is that of a task. A store that fails is asked again.
    pub async fn run(self, drain: Drain) -> Result<(), Infallible> {
        let mut jobs = JoinSet::new();
        let mut attendants = JoinSet::new();
        attendants.spawn(renew::run(self.queue.clone(), self.slots.clone(), self.config.clone()));
        let (settler, settling) = settle::channel(self.queue.clone());
        attendants.spawn(settling);
        let mut lanes: Vec<QueueWorker> = self.registry.lanes().into_iter().map(QueueWorker::new).collect();
        while drain.phase() == Phase::Running {
            self.probe(&mut lanes).await;
            for lane in &mut lanes {
                self.look(lane, &settler, &mut jobs).await;
            }
            // The queues take turns in being the first.
            lanes.rotate_left(1);
            let next = lanes.iter().map(|lane| lane.look_at).min().unwrap_or_else(Instant::now);
            tokio::select! {
                woken = self.queue.wake().woken() => hasten(&mut lanes, &woken),
                () = tokio::time::sleep_until(next) => {}
                Some(_) = jobs.join_next() => {}
                () = drain.notice() => {}
            }
            while jobs.try_join_next().is_some() {}
            self.refill(&mut lanes);
        }
        tokio::select! {
            () = all(&mut jobs) => {}
            () = drain.hard() => {
                self.slots.cancel_all();
                all(&mut jobs).await;
            }
        }
        attendants.shutdown().await;
        Ok(())
    }

    /// Looks again at queues in which more jobs waited, as soon as a quarter of their slots is free. It does
    /// not look for each free slot, since a claim costs the same for one job and for a hundred.
    fn refill(&self, lanes: &mut [QueueWorker]) {
        for lane in lanes.iter_mut().filter(|lane| lane.is_backed_up) {
            if self.free(lane) * 4 >= lane.lane.slots {
                lane.look_at = Instant::now();
            }
        }
    }

    /// Asks with one query about all quiet queues whose time to look has come. Those without a job are looked
    /// at again together, so that an idle process hardly wakes up.
    async fn probe(&self, lanes: &mut [QueueWorker]) {
        let now = Instant::now();
        let is_quiet =
            |lane: &QueueWorker| !lane.is_promising && !lane.is_backed_up && lane.start_rate.is_none();
        if !lanes.iter().any(|lane| is_quiet(lane) && lane.look_at <= now) {
            return;
        }
        let soon = now + self.config.poll / 2;
        let mut quiet: Vec<&mut QueueWorker> =
            lanes.iter_mut().filter(|lane| is_quiet(lane) && lane.look_at <= soon).collect();
        let names = quiet.iter().map(|lane| Arc::clone(&lane.lane.name)).collect();
        // Without an answer, the claims that follow find out the same.
        let Ok(Some(found)) = self.queue.probe(names).await else { return };
        let found: HashMap<Arc<str>, Duration> = found.into_iter().collect();
        let poll = self.poll();
        for lane in &mut quiet {
            let wait = found.get(&lane.lane.name).copied().unwrap_or(poll);
            lane.look_at = now + wait.min(poll);
            lane.is_promising = wait < poll;
        }
    }

    /// Returns the wait until the next look. It is spread out, so that replicas do not look all at once.
    fn poll(&self) -> Duration {
        self.config.poll.mul_f64(0.75 + 0.5 * fastrand::f64())
    }

    /// Claims as many jobs as there is room for, if it is time to look.
    async fn look(&self, lane: &mut QueueWorker, settler: &Settler, jobs: &mut JoinSet<()>) {
        let now = Instant::now();
        if lane.look_at > now {
            return;
        }
        let poll = self.poll();
        lane.look_at = now + poll;
        lane.is_backed_up = false;
        lane.is_promising = false;
        let limit = self.free(lane).min(self.affordable());
        let limit = match &lane.start_rate {
            Some(rate) => match rate.available(now) {
                Ok(may) => limit.min(may),
                Err(next) => {
                    lane.look_at = next;
                    return;
                }
            },
            None => limit,
        };
        if limit == 0 {
            lane.is_backed_up = true;
            return;
        }
        let queue = Arc::clone(&lane.lane.name);
        let claim = Claim { queue, limit, worker: self.config.name.clone(), lease: self.config.lease };
        // Measured before the query: the lease in the store begins later, never earlier.
        let lease_end = BootTime::now().after(self.config.lease);
        let claims = match self.queue.claim(claim).await {
            Ok(claims) => claims,
            Err(error) => {
                let queue = &*lane.lane.name;
                if let Some(more) = NOT_CLAIMED.tell() {
                    warn!(
                        error = error.in_one_line(),
                        queue,
                        more_since_last = more,
                        "no jobs could be claimed"
                    );
                }
                return;
            }
        };
        if let Some(rate) = &mut lane.start_rate {
            rate.take(claims.jobs.len(), now);
        }
        lane.is_backed_up = claims.jobs.len() == limit;
        lane.look_at = now + claims.next_in.unwrap_or(poll).min(poll);
        lane.is_promising = claims.next_in.is_some_and(|next_in| next_in < poll);
        for claimed in claims.jobs {
            lane.waits.record(claimed.waited);
            execute::start(self, settler, jobs, claimed, Lease::until(lease_end));
        }
    }

    /// Returns how many more jobs of a queue may be in hand.
    fn free(&self, lane: &QueueWorker) -> usize {
        lane.lane.slots.saturating_sub(self.slots.of_queue(&lane.lane.name))
    }

    /// Returns how many more jobs may be in hand if each payload has the maximum length. While memory is
    /// nearly used up, no further job is claimed, unless none is in hand: waiting frees no memory in an idle
    /// process.
    fn affordable(&self) -> usize {
        let in_hand = self.slots.payload_bytes();
        if self.config.pressure.is_high() {
            return usize::from(in_hand == 0);
        }
        if in_hand == 0 {
            return (self.config.payload_bytes / MAX_PAYLOAD).max(1);
        }
        self.config.payload_bytes.saturating_sub(in_hand) / MAX_PAYLOAD
    }
}

fn hasten(lanes: &mut [QueueWorker], woken: &BTreeSet<Arc<str>>) {
    for lane in lanes.iter_mut().filter(|lane| woken.contains(&lane.lane.name)) {
        lane.look_at = Instant::now();
        lane.is_promising = true;
    }
}

async fn all(jobs: &mut JoinSet<()>) {
    while jobs.join_next().await.is_some() {}
}
