//! The worker: claim what there is room for, run it, renew the leases, settle.
//!
//! ```text
//! run ─┬─ claim ──► execute (a task a job) ──► settle
//!      └─ renew (one task for all leases)
//! ```

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use jiff::Timestamp;
use perennial_server::backoff::Backoff;
use perennial_server::drain::{Drain, Phase};
use perennial_server::metrics::Counted;
use perennial_server::tasks::panic_message;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, info_span, warn};
use uuid::Uuid;

use crate::job::{Context, Fate, Kind, Registry, Runnable, Stopped};
use crate::lease::{BootTime, Lease};
use crate::metrics;
use crate::queue::{Claim, Claimed, Held, Queue};
use crate::state::{Event, Spent, Transition, next, spent_by_crashes};

/// A job of a kind that this process does not know belongs to another version of it: left alone for so long.
const UNKNOWN_KIND: Duration = Duration::from_secs(60);
/// How long giving up a job may take: less than a lease, which is not renewed after the job's deadline.
const GIVE_UP: Duration = Duration::from_secs(5);
/// Between two attempts to settle while the store is away.
const SETTLE: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));

/// How a worker works.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who it is, for those who look.
    pub name: String,
    /// For how long a job is claimed.
    pub lease: Duration,
    /// How often leases are renewed: at least three times within one.
    pub renew_every: Duration,
    /// How often to look for jobs that nobody woke us for.
    pub poll: Duration,
}

/// A configuration that could not keep the promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a lease must hold at least three renewals")]
pub struct LeaseTooShort;

/// Takes jobs from a queue and runs them.
#[derive(Debug)]
pub struct Worker<Q> {
    queue: Q,
    registry: Arc<Registry>,
    config: Config,
    running: Running,
}

/// What one slot of the worker is busy with.
#[derive(Clone, Debug, Serialize)]
pub struct Busy {
    /// The job.
    pub id: Uuid,
    /// Its kind.
    pub kind: &'static str,
    /// Its queue.
    pub queue: &'static str,
    /// What it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// The claim's number.
    pub epoch: i64,
    /// For how long.
    pub for_ms: u64,
}

/// A worker as others see it. A cheap handle.
#[derive(Clone, Debug)]
pub struct Status(Running);

impl Status {
    /// What it is busy with now.
    pub fn busy(&self) -> Vec<Busy> {
        let running = self.0.lock();
        let busy = running.iter().map(|(held, slot)| Busy {
            id: held.id,
            kind: slot.kind,
            queue: slot.queue,
            subject: slot.subject.clone(),
            epoch: held.epoch,
            for_ms: u64::try_from(slot.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        busy.collect()
    }
}

/// The jobs in hand.
#[derive(Clone, Debug, Default)]
struct Running(Arc<Mutex<HashMap<Held, Slot>>>);

#[derive(Debug)]
struct Slot {
    kind: &'static str,
    queue: &'static str,
    subject: Option<String>,
    since: Instant,
    deadline: Instant,
    lease: Lease,
    cancel: CancellationToken,
}

impl Running {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Held, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_queue(&self, queue: &str) -> usize {
        self.lock().values().filter(|slot| slot.queue == queue).count()
    }
}

/// The entry of a job in hand; gone when it drops.
struct InHand {
    running: Running,
    held: Held,
    _counted: Counted,
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.running.lock().remove(&self.held);
    }
}

impl<Q: Queue> Worker<Q> {
    /// A worker for the queues that `registry` serves.
    ///
    /// # Errors
    /// When the lease does not hold three renewals.
    pub fn new(queue: Q, registry: Arc<Registry>, config: Config) -> Result<Self, LeaseTooShort> {
        if config.renew_every * 3 > config.lease {
            return Err(LeaseTooShort);
        }
        Ok(Self { queue, registry, config, running: Running::default() })
    }

    /// What it does, for those who look.
    pub fn status(&self) -> Status {
        Status(self.running.clone())
    }

    /// Works until the drain has begun and every job in hand has ended.
    ///
    /// # Errors
    /// Never: the type is that of a task. A store that fails is asked again.
    pub async fn run(self, drain: Drain) -> Result<(), Infallible> {
        let mut jobs = JoinSet::new();
        let mut renewer = JoinSet::new();
        renewer.spawn(renew(self.queue.clone(), self.running.clone(), self.config.clone()));
        while drain.phase() == Phase::Running {
            let pause = self.claim(&mut jobs).await;
            tokio::select! {
                () = self.queue.woken() => {}
                () = tokio::time::sleep(pause) => {}
                Some(_) = jobs.join_next() => {}
                () = drain.notice() => {}
            }
            while jobs.try_join_next().is_some() {}
        }
        tokio::select! {
            () = all(&mut jobs) => {}
            () = drain.hard() => {
                for slot in self.running.lock().values() {
                    slot.cancel.cancel();
                }
                all(&mut jobs).await;
            }
        }
        renewer.shutdown().await;
        Ok(())
    }

    /// Claims what there is room for, and returns how long to wait before the next look.
    async fn claim(&self, jobs: &mut JoinSet<()>) -> Duration {
        // Spread out, so that replicas do not look all at once.
        let mut pause = self.config.poll.mul_f64(0.75 + 0.5 * fastrand::f64());
        for (queue, slots) in self.registry.slots() {
            let limit = slots.saturating_sub(self.running.of_queue(queue));
            if limit == 0 {
                continue;
            }
            let claim = Claim { queue, limit, worker: self.config.name.clone(), lease: self.config.lease };
            // From before the question: the store's lease begins later, never earlier.
            let lease_end = BootTime::now().after(self.config.lease);
            match self.queue.claim(claim).await {
                Ok(claims) => {
                    pause = pause.min(claims.next_in.unwrap_or(pause));
                    for claimed in claims.jobs {
                        metrics::waited(queue, claimed.waited);
                        self.start(jobs, queue, claimed, Lease::until(lease_end));
                    }
                }
                Err(error) => warn!(error = error.in_one_line(), queue, "no jobs could be claimed"),
            }
        }
        pause
    }

    fn start(&self, jobs: &mut JoinSet<()>, queue: &'static str, claimed: Claimed, lease: Lease) {
        let held = Held { id: claimed.id, epoch: claimed.epoch };
        let store = self.queue.clone();
        let Some(kind) = self.registry.kind(&claimed.kind) else {
            warn!(job = %claimed.id, kind = claimed.kind, "a job of a kind that is not known here");
            let transition = Transition::Again { at: soon(UNKNOWN_KIND), spent: claimed.spent, error: None };
            jobs.spawn(async move {
                settle(&store, held, &lease, transition).await;
            });
            return;
        };
        let now = Instant::now();
        let context = Context {
            id: claimed.id,
            epoch: claimed.epoch,
            spent: claimed.spent,
            deadline: now + kind.options.timeout,
            cancel: CancellationToken::new(),
            lease,
        };
        let job = kind.read(&claimed.payload);
        let subject = job.as_ref().ok().and_then(|job| job.subject());
        let slot = Slot {
            kind: kind.name,
            queue,
            subject: subject.clone(),
            since: now,
            deadline: context.deadline,
            lease: context.lease.clone(),
            cancel: context.cancel.clone(),
        };
        self.running.lock().insert(held, slot);
        let in_hand =
            InHand { running: self.running.clone(), held, _counted: Counted::new(metrics::running()) };
        let span = info_span!("job", id = %claimed.id, kind = kind.name, epoch = claimed.epoch, subject);
        jobs.spawn(
            async move {
                execute(&store, &kind, claimed, job, context).await;
                drop(in_hand);
            }
            .instrument(span),
        );
    }
}

/// Runs one job and settles it.
async fn execute<Q: Queue>(queue: &Q, kind: &Kind, claimed: Claimed, job: Readable, context: Context) {
    let began = Instant::now();
    let spent = claimed.spent;
    // A run after a snooze is the same piece of work going on.
    if claimed.epoch == 1 || spent != Spent::default() {
        info!(failures = spent.failures, recoveries = spent.recoveries, "job started");
    }
    let (event, outcome) = attempt(kind, &job, context.clone()).await;
    let error = match &event {
        Event::Failed(error) | Event::Hopeless(error) => Some(error.clone()),
        _ => None,
    };
    let mut transition = next(&kind.options.budget, spent, event, Timestamp::now(), fastrand::f64());
    if let Transition::Dead { reason, spent } = &transition
        && !gave_up(&job, context.clone(), reason).await
    {
        let spent = Spent { failures: spent.failures.saturating_sub(1), ..*spent };
        let error = Some(reason.clone());
        transition = Transition::Again { at: soon(kind.options.budget.backoff.cap), spent, error };
    }
    let outcome = if matches!(transition, Transition::Dead { .. }) { "dead" } else { outcome };
    let held = Held { id: claimed.id, epoch: claimed.epoch };
    let settled = settle(queue, held, &context.lease, transition).await;
    let took = began.elapsed();
    metrics::ended(kind.name, outcome, took);
    if !settled {
        metrics::stale(kind.name);
    }
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    match outcome {
        "snoozed" => debug!(outcome, settled, took_ms, "job ended"),
        "dead" => error!(outcome, error, settled, took_ms, "job ended"),
        "failed" | "timed-out" | "panicked" => warn!(outcome, error, settled, took_ms, "job ended"),
        _ => info!(outcome, settled, took_ms, "job ended"),
    }
}

/// A job, or why its payload cannot be read.
type Readable = Result<Arc<dyn Runnable>, serde_json::Error>;

/// Runs one job: how it ended, and the word for it.
async fn attempt(kind: &Kind, job: &Readable, context: Context) -> (Event, &'static str) {
    if let Some(reason) = spent_by_crashes(&kind.options.budget, context.spent) {
        return (Event::Hopeless(reason), "dead");
    }
    let job = match job {
        Ok(job) => Arc::clone(job),
        Err(error) => return (Event::Hopeless(format!("its payload cannot be read: {error}")), "dead"),
    };
    let deadline = context.deadline;
    let running = AssertUnwindSafe(job.run(context)).catch_unwind();
    match tokio::time::timeout_at(deadline.into(), running).await {
        Ok(Ok(Ok(Fate::Done))) => (Event::Done, "done"),
        Ok(Ok(Ok(Fate::Snooze(wait)))) => (Event::Snoozed(wait), "snoozed"),
        Ok(Ok(Ok(Fate::HandBack))) => (Event::HandedBack, "handed-back"),
        // Asked to stop, and it stopped: no failure of the job.
        Ok(Ok(Err(error))) if error.downcast_ref() == Some(&Stopped::Cancelled) => {
            (Event::HandedBack, "handed-back")
        }
        Ok(Ok(Err(error))) => (Event::Failed(format!("{error:#}")), "failed"),
        Ok(Err(panic)) => (Event::Failed(format!("panic: {}", panic_message(&*panic))), "panicked"),
        Err(_elapsed) => {
            let limit = kind.options.timeout;
            (Event::Failed(format!("not done within {limit:?}")), "timed-out")
        }
    }
}

/// Lets the job know that it is given up. False when that failed, too.
async fn gave_up(job: &Readable, context: Context, reason: &str) -> bool {
    // A payload that cannot be read has nobody to tell.
    let Ok(job) = job else { return true };
    let told = Arc::clone(job).give_up(context, reason.to_owned());
    match tokio::time::timeout(GIVE_UP, AssertUnwindSafe(told).catch_unwind()).await {
        Ok(Ok(Ok(()))) => return true,
        Ok(Ok(Err(error))) => error!(error = format!("{error:#}"), "a job could not be given up"),
        Ok(Err(_panic)) => error!("giving up a job panicked"),
        Err(_elapsed) => error!(within = ?GIVE_UP, "a job could not be given up in time"),
    }
    false
}

/// Settles, again and again while the store is away, as long as the lease is held.
async fn settle<Q: Queue>(queue: &Q, held: Held, lease: &Lease, transition: Transition) -> bool {
    for failures in 1.. {
        match queue.settle(held, transition.clone()).await {
            Ok(settled) => return settled,
            Err(error) if lease.is_held() => {
                warn!(error = error.in_one_line(), "a job could not be settled yet");
                tokio::time::sleep(SETTLE.jittered(failures)).await;
            }
            Err(error) => {
                error!(error = error.in_one_line(), "a job was not settled; it will run again");
                return false;
            }
        }
    }
    false
}

/// Renews all leases, and tells the jobs that have lost theirs.
async fn renew<Q: Queue>(queue: Q, running: Running, config: Config) {
    loop {
        tokio::time::sleep(config.renew_every).await;
        let now = Instant::now();
        // A job past its deadline is not renewed: if it hangs, its lease lapses and another worker gets it.
        let held: Vec<Held> =
            running.lock().iter().filter(|(_, slot)| now < slot.deadline).map(|(held, _)| *held).collect();
        if held.is_empty() {
            continue;
        }
        let lease_end = BootTime::now().after(config.lease);
        let answer = tokio::time::timeout(config.lease, queue.renew(held.clone(), config.lease)).await;
        let running = running.lock();
        match answer {
            Ok(Ok(kept)) => {
                for held in held {
                    let Some(slot) = running.get(&held) else { continue };
                    if kept.contains(&held) { slot.lease.extend(lease_end) } else { slot.cancel.cancel() }
                }
            }
            Ok(Err(error)) => warn!(error = error.in_one_line(), "leases could not be renewed"),
            Err(_elapsed) => warn!("leases could not be renewed in time"),
        }
        running.values().filter(|slot| !slot.lease.is_held()).for_each(|slot| slot.cancel.cancel());
    }
}

async fn all(jobs: &mut JoinSet<()>) {
    while jobs.join_next().await.is_some() {}
}

fn soon(wait: Duration) -> Timestamp {
    Timestamp::now() + wait
}
