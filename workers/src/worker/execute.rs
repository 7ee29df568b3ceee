//! One run of one job, from its claim to its settlement.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use jiff::Timestamp;
use perennial_runtime::breaker;
use perennial_runtime::panics::panic_message;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, info_span, warn};
use uuid::Uuid;

use super::Worker;
use super::settle::{Settled, Settler};
use super::slots::InHand;
use crate::job::{Advance, Context, JobOutcome, Recorder, Recording, Stopped};
use crate::lease::Lease;
use crate::metrics::{self, OutcomeLabel};
use crate::queue::{Claimed, Failure, Held, KEPT_ERRORS, MAX_PAYLOAD, Queue, Settlement};
use crate::registry::{JobKind, Runnable};
use crate::state::{Attempts, Event, State, Transition, next, spent_by_crashes};

/// Wait of a job whose kind this process does not know: the kind belongs to another version of the program.
const UNKNOWN_KIND: Duration = Duration::from_secs(60);
/// Longest time that giving up a job may take: less than a lease, which is not renewed after the job's
/// deadline.
const GIVE_UP: Duration = Duration::from_secs(5);

/// A job, or the error that its payload cannot be read.
type Readable = Result<Arc<dyn Runnable>, serde_json::Error>;

/// Writes checkpoints into a store.
#[derive(Debug)]
struct StoreRecorder<Q>(Q);

impl<Q: Queue> Recorder for StoreRecorder<Q> {
    fn record(&self, held: Held, queue: Arc<str>, checkpoint: String) -> Recording<'_> {
        Box::pin(self.0.record(held, queue, checkpoint))
    }
}

/// Starts the run of a claimed job.
pub(super) fn start<Q: Queue>(
    worker: &Worker<Q>,
    settler: &Settler,
    jobs: &mut JoinSet<()>,
    claimed: Claimed,
    lease: Lease,
) {
    let settler = settler.clone();
    let Some(kind) = worker.registry.kind(&claimed.kind) else {
        warn!(job = %claimed.id, kind = claimed.kind, "a job of a kind that is not known here is put back");
        let transition = Transition::Again { wait: UNKNOWN_KIND, spent: claimed.spent };
        jobs.spawn(async move {
            settler.settle(Settlement::of(Arc::new(claimed), transition), lease).await;
        });
        return;
    };
    let context = Context {
        id: claimed.id,
        epoch: claimed.epoch,
        spent: claimed.spent,
        deadline: Instant::now() + kind.options.timeout,
        cancel: CancellationToken::new(),
        lease,
        trace: claimed.trace.as_deref().map(Arc::from),
        queue: Arc::clone(&claimed.queue),
        saved: claimed.checkpoint.as_deref().map(Arc::from),
        advance: Arc::new(Advance::default()),
        recorder: Arc::new(StoreRecorder(worker.queue.clone())),
    };
    let job = kind.read(&claimed.payload);
    let subject = job.as_ref().ok().and_then(|job| job.subject());
    let span = info_span!(
        "job",
        id = %claimed.id,
        kind = kind.name,
        queue = &*claimed.queue,
        epoch = claimed.epoch,
        trace = claimed.trace,
        trace_id = claimed.trace.as_deref().and_then(trace_id),
        request_id = claimed.trace.as_deref().and_then(trace_id).and_then(request_id),
        subject
    );
    let in_hand = worker.slots.take(&claimed, kind.name, subject, &context);
    let run = RunningJob { settler, kind, claimed: Arc::new(claimed), job, context, in_hand };
    jobs.spawn(run.execute().instrument(span));
}

/// Returns the trace id of a `traceparent` (W3C Trace Context, section 3.2).
fn trace_id(trace: &str) -> Option<&str> {
    let mut parts = trace.split('-').skip(1);
    parts.next().filter(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Returns the id of the request that a trace began with; `None` for a trace that another program began.
fn request_id(trace_id: &str) -> Option<String> {
    let id = Uuid::try_parse(trace_id).ok()?;
    (id.get_version_num() == 7).then(|| id.hyphenated().to_string())
}

struct RunningJob {
    settler: Settler,
    kind: Arc<JobKind>,
    claimed: Arc<Claimed>,
    job: Readable,
    context: Context,
    in_hand: InHand,
}

impl RunningJob {
    /// Runs the job and settles it.
    async fn execute(self) {
        let began = Instant::now();
        let Attempts { failures, recoveries, .. } = self.claimed.spent;
        // A run after a snooze goes on with the same work, so it is not logged as a start.
        if self.claimed.first || failures > 0 || recoveries > 0 {
            info!(attempt = self.context.attempt(), failures, recoveries, "job started");
        }
        let (event, outcome) = self.attempt().await;
        let event = event.in_short();
        let spent =
            if self.context.advance.has_advanced() { Attempts::default() } else { self.claimed.spent };
        let (failure, detail) = match &event {
            Event::Failed { error, .. } => (Some(error.clone()), Some(error.clone())),
            Event::Hopeless(reason) | Event::Cancelled(reason) => (None, Some(reason.clone())),
            _ => (None, None),
        };
        let budget = &self.kind.options.budget;
        let mut transition = next(budget, spent, event, Timestamp::now(), fastrand::f64());
        if let Transition::Ended { state: State::Dead, reason, spent } = &transition
            && !self.gave_up(reason).await
        {
            let spent = Attempts { failures: spent.failures.saturating_sub(1), ..*spent };
            transition = Transition::Again { wait: budget.backoff.cap, spent };
        }
        let outcome = match &transition {
            Transition::Ended { state: State::Dead, .. } => OutcomeLabel::Dead,
            Transition::Ended { .. } => OutcomeLabel::Cancelled,
            _ => outcome,
        };
        let settlement = Settlement { job: self.claimed.clone(), errors: self.errors(failure), transition };
        let settled = self.settler.settle(settlement, self.context.lease.clone()).await;
        let took = began.elapsed();
        metrics::ended(self.kind.name, outcome, took);
        if settled == Settled::Stale {
            metrics::stale(self.kind.name);
        }
        log_end(outcome, detail.as_deref(), settled, took);
        drop(self.in_hand);
    }

    /// Runs the job, and returns how the run ended and its label.
    async fn attempt(&self) -> (Event, OutcomeLabel) {
        if let Some(reason) = &self.claimed.cancelled {
            return (Event::Cancelled(reason.clone()), OutcomeLabel::Cancelled);
        }
        if let Some(reason) = spent_by_crashes(&self.kind.options.budget, self.claimed.spent) {
            return (Event::Hopeless(reason), OutcomeLabel::Dead);
        }
        // Other programs may enqueue a payload that this program would refuse.
        let length = self.claimed.payload.len();
        if length > MAX_PAYLOAD {
            let reason = format!("its payload has {length} bytes, at most {MAX_PAYLOAD} are possible");
            return (Event::Hopeless(reason), OutcomeLabel::Dead);
        }
        let job = match &self.job {
            Ok(job) => Arc::clone(job),
            Err(error) => {
                return (Event::Hopeless(format!("its payload cannot be read: {error}")), OutcomeLabel::Dead);
            }
        };
        let running = AssertUnwindSafe(job.run(self.context.clone())).catch_unwind();
        let ended = tokio::time::timeout_at(self.context.deadline.into(), running).await;
        let failed = |error: String, outcome| (Event::Failed { error, after: None }, outcome);
        match ended {
            Ok(Ok(Ok(fate))) => self.fated(fate),
            Ok(Ok(Err(error))) => self.erred(&error),
            Ok(Err(panic)) => failed(format!("panic: {}", panic_message(&*panic)), OutcomeLabel::Panicked),
            Err(_elapsed) => {
                failed(format!("not done within {:?}", self.kind.options.timeout), OutcomeLabel::TimedOut)
            }
        }
    }

    fn fated(&self, fate: JobOutcome) -> (Event, OutcomeLabel) {
        match fate {
            JobOutcome::Done => (Event::Done, OutcomeLabel::Done),
            JobOutcome::Skipped(reason) => {
                debug!(reason, "skipped");
                (Event::Done, OutcomeLabel::Skipped)
            }
            JobOutcome::Snooze(wait) => self.unless_cancelled(Event::Snoozed(wait), OutcomeLabel::Snoozed),
            JobOutcome::Retry { after, reason } => {
                (Event::Failed { error: reason, after: Some(after) }, OutcomeLabel::Failed)
            }
            JobOutcome::Cancel(reason) => (Event::Cancelled(reason), OutcomeLabel::Cancelled),
            JobOutcome::Dead(reason) => (Event::Hopeless(reason), OutcomeLabel::Dead),
            JobOutcome::HandBack => self.unless_cancelled(Event::HandedBack, OutcomeLabel::HandedBack),
        }
    }

    fn erred(&self, error: &anyhow::Error) -> (Event, OutcomeLabel) {
        // The run was asked to stop and stopped: that is no failure of the job.
        if error.downcast_ref() == Some(&Stopped::Cancelled) {
            return self.unless_cancelled(Event::HandedBack, OutcomeLabel::HandedBack);
        }
        // A dependency of the job is away: the job waits for it, and has not failed.
        if let Some(open) = error.chain().find_map(|cause| cause.downcast_ref::<breaker::Open>()) {
            debug!(dependency = open.dependency, "the breaker is open");
            return self.unless_cancelled(Event::Snoozed(open.retry_after), OutcomeLabel::Snoozed);
        }
        let error = format!("{error:#}");
        self.unless_cancelled(Event::Failed { error, after: None }, OutcomeLabel::Failed)
    }

    /// Returns the event and its label; the cancellation instead, if the job was cancelled meanwhile.
    fn unless_cancelled(&self, event: Event, outcome: OutcomeLabel) -> (Event, OutcomeLabel) {
        match self.in_hand.cancelled() {
            Some(reason) => (Event::Cancelled(reason), OutcomeLabel::Cancelled),
            None => (event, outcome),
        }
    }

    /// Tells the job that it is given up. Returns false when that failed, too.
    async fn gave_up(&self, reason: &str) -> bool {
        // Without a readable payload there is no job to tell.
        let Ok(job) = &self.job else { return true };
        let told = Arc::clone(job).give_up(self.context.clone(), reason.to_owned());
        match tokio::time::timeout(GIVE_UP, AssertUnwindSafe(told).catch_unwind()).await {
            Ok(Ok(Ok(()))) => return true,
            Ok(Ok(Err(error))) => error!(error = format!("{error:#}"), "a job could not be given up"),
            Ok(Err(_panic)) => error!("giving up a job panicked"),
            Err(_elapsed) => error!(within = ?GIVE_UP, "a job could not be given up in time"),
        }
        false
    }

    /// Returns the last errors of the job, with this failure added.
    fn errors(&self, failure: Option<String>) -> Vec<Failure> {
        let attempt = self.context.attempt();
        let failure = failure.map(|error| Failure { at: Timestamp::now(), attempt, error });
        let mut errors: Vec<Failure> = self.claimed.errors.iter().cloned().chain(failure).collect();
        errors.drain(..errors.len().saturating_sub(KEPT_ERRORS));
        errors
    }
}

fn log_end(outcome: OutcomeLabel, detail: Option<&str>, settled: Settled, took: Duration) {
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let (outcome, settled, word) = (outcome.as_str(), settled == Settled::Kept, outcome);
    match word {
        OutcomeLabel::Snoozed => debug!(outcome, settled, took_ms, "job ended"),
        OutcomeLabel::Dead => error!(outcome, detail, settled, took_ms, "job ended"),
        OutcomeLabel::Failed | OutcomeLabel::TimedOut | OutcomeLabel::Panicked => {
            warn!(outcome, detail, settled, took_ms, "job ended");
        }
        _ => info!(outcome, detail, settled, took_ms, "job ended"),
    }
}
