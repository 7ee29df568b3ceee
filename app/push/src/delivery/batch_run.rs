//! One run of the job that sends to a batch: begins sends, writes checkpoints, and stops when it must.
//!
//! How far the batch has come is in `batch_progress.rs`, what a checkpoint says of each member in `checkpoint.rs`.

mod checkpoint;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use perennial_webpush::{Sender, Verdict};
use perennial_workers::job::Stopped;
use perennial_workers::{Context, JobOutcome};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::DeliveryContext;
use super::batch_progress::BatchProgress;
use crate::delivery::send::{Outgoing, Sent};
use crate::model::notification::{NotificationStatus, Stage};
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::pacing::active::{Flow, PlaceInLine};
use crate::pacing::pace::Take;
use crate::store::{Batch, BatchPart, Member, Members, RestOfBatch};
use crate::vapid::SiteKeys;
use checkpoint::BUSY;
pub(crate) use checkpoint::save;

/// Number of crashes in a row after which a batch is in isolation mode: it sends one by one and notes each member first,
/// so that the next crash shows which member causes it.
pub(crate) const CAREFUL: u32 = 2;
/// Shortest and longest wait between two checks of a paused notification: the longer the pause, the longer the wait.
const PAUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// Time after which a batch that waits for its pace makes room for other batches.
const TURN: Duration = Duration::from_secs(60);
/// The same for a batch in a queue whose other jobs have no pace.
const SHORT_TURN: Duration = Duration::from_secs(1);
/// Time that other batches have before this one runs again.
const OTHERS: Duration = Duration::from_millis(200);
/// Delay of a batch behind the batch before it, when both wait for the next due send.
const LOOK_LATER: Duration = Duration::from_millis(2);

/// See the module.
pub(crate) struct BatchRun<'a> {
    delivery: &'a Arc<DeliveryContext>,
    context: &'a Context,
    sender: &'a Sender,
    flow: &'a Flow,
    /// The place among the batches of the notification; `None` once the last member is begun.
    place: Option<PlaceInLine>,
    batch: Arc<Batch>,
    outgoing: Arc<Outgoing>,
    /// Number of holds that operators had ended when the run began.
    resumed: u64,
    waiting: std::vec::IntoIter<Member>,
    /// Id after which the range of the batch goes on, if this run has not all of its members.
    rest_after: Option<i64>,
    progress: BatchProgress,
    /// Sends that have ended since the last checkpoint.
    ended: Vec<Sent>,
    totals: BTreeMap<Outcome, usize>,
    /// Number of members that are to be tried again.
    again: usize,
    /// The last send that was not delivered, although its subscription has not ended.
    failure: Option<SendFailure>,
}

/// Why a message was not delivered.
struct SendFailure {
    host: String,
    status: Option<u16>,
    detail: String,
}

/// Why no more sends are begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The process stops, or the job was taken away.
    Asked,
    /// The notification is paused.
    Paused,
    /// The notification is cancelled or has expired: members that are left have this outcome.
    Over(Outcome),
    /// Other batches should have a turn.
    Turn,
}

impl<'a> BatchRun<'a> {
    pub(crate) fn new(
        delivery: &'a Arc<DeliveryContext>,
        context: &'a Context,
        sender: &'a Sender,
        flow: &'a Arc<Flow>,
        batch: Batch,
        Members { list: members, unreadable, rest_after }: Members,
        keys: Arc<SiteKeys>,
    ) -> anyhow::Result<Self> {
        let waited = age(&batch);
        let mut run = Self {
            delivery,
            context,
            sender,
            flow,
            place: Some(flow.stand_in_line(batch.id)),
            outgoing: Arc::new(Outgoing::new(delivery, context.queue(), &batch, &members, waited, keys)?),
            resumed: delivery.services.resumed(),
            rest_after,
            progress: progress(delivery, context, &batch),
            ended: Vec::new(),
            totals: BTreeMap::new(),
            again: 0,
            failure: None,
            waiting: Vec::new().into_iter(),
            batch: Arc::new(batch),
        };
        run.note_deleted(&members, &unreadable);
        for (id, why) in unreadable {
            run.end_unsent(Sent::unreadable(id, &why));
        }
        run.waiting = members.into_iter();
        Ok(run)
    }

    /// Ends the members of a retry whose subscriptions have been deleted since the last attempt.
    fn note_deleted(&mut self, members: &[Member], unreadable: &[(i64, String)]) {
        let BatchPart::Ids(ids) = &self.batch.part else { return };
        let found = members.iter().map(|member| member.id).chain(unreadable.iter().map(|(id, _)| *id));
        let found: BTreeSet<i64> = found.collect();
        let is_deleted = |id: &&i64| !self.batch.is_recorded(**id) && !found.contains(id);
        for id in ids.iter().filter(is_deleted).copied().collect::<Vec<_>>() {
            self.end_unsent(Sent::deleted(id));
        }
    }

    fn end_unsent(&mut self, sent: Sent) {
        self.progress.end_unsent(sent.id);
        self.ended.push(sent);
    }

    pub(crate) async fn run(mut self) -> anyhow::Result<JobOutcome> {
        let is_careful = is_careful(self.context);
        let mut standing = self.flow.standing();
        let mut stop = self.must_stop(&standing);
        let mut sends = FuturesUnordered::new();
        let mut saving = None;
        let turn = Instant::now() + if self.is_in_its_queue() { TURN } else { SHORT_TURN };
        let mut cut = pin!(sleep(Duration::MAX));
        let mut over = pin!(sleep(self.time_left(*standing.borrow())));
        loop {
            if stop.is_some() {
                self.outgoing.stop();
            }
            let pause = match stop {
                None => self.fill(&mut sends, Self::begin)?,
                Some(_) => None,
            };
            let idle = sends.is_empty();
            if idle && saving.is_none() && (stop.is_some() || self.waiting.len() == 0) {
                break;
            }
            if saving.is_none() && self.progress.should_record(idle, Instant::now()) {
                let (count, checkpoint) = self.checkpoint(None)?;
                saving = Some(Box::pin(self.save(checkpoint, count)));
            }
            let due = self.progress.due().filter(|_| saving.is_none());
            let rank = pause.and(self.place.as_ref()).map_or(0, PlaceInLine::rank);
            let saved = async {
                match saving.as_mut() {
                    Some(saving) => saving.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.context.cancel.cancelled(), if stop != Some(Stop::Asked) => {
                    stop = Some(Stop::Asked);
                    cut.set(sleep(self.delivery.config.last_sends));
                }
                changed = standing.changed() => {
                    changed?;
                    stop = stop.or_else(|| self.must_stop(&standing));
                }
                count = saved => {
                    self.progress.recorded(count?);
                    saving = None;
                    if is_careful {
                        // The batch makes progress: earlier crashes were not its fault.
                        self.context.save(&self.progress.newest()).await?;
                    }
                }
                Some(sent) = sends.next() => match sent {
                    Some(sent) => self.note(sent),
                    // The send was taken back: its member has not ended.
                    None => self.progress.take_back(),
                },
                () = paced(self.flow, pause, rank), if pause.is_some() => {
                    if stop.is_none() && Instant::now() >= turn {
                        stop = Some(Stop::Turn);
                    }
                }
                () = until(due), if due.is_some() => {}
                () = over.as_mut(), if stop.is_none() => stop = Some(Stop::Over(Outcome::Expired)),
                () = cut.as_mut(), if stop == Some(Stop::Asked) && !idle => {
                    // The push services may have accepted the sends in flight. That cannot be known, so they are sent again.
                    sends.clear();
                }
            }
        }
        self.end(stop).await
    }

    /// Returns true when a batch with a pace runs in the queue for such batches, where it blocks no other job. A notification
    /// that got its pace late has batches in other queues.
    fn is_in_its_queue(&self) -> bool {
        self.flow.pace().is_none() || self.context.queue() == queues::PACED_QUEUE
    }

    /// Returns why nothing may be sent, by the status of the notification.
    fn must_stop(&self, standing: &watch::Receiver<NotificationStatus>) -> Option<Stop> {
        let standing = *standing.borrow();
        // The message may have a shorter time to live than the notification.
        let outlived = || self.time_left(standing).is_zero().then_some(Outcome::Expired);
        match standing.over().or_else(outlived) {
            Some(outcome) => Some(Stop::Over(outcome)),
            None => (standing.state == Stage::Paused).then_some(Stop::Paused),
        }
    }

    /// Time in which sends may begin.
    fn time_left(&self, standing: NotificationStatus) -> Duration {
        // A message without a time to live is always tried once.
        let ttl = self.batch.ttl;
        let until = standing.time_left().unwrap_or(Duration::MAX);
        until.min(if ttl.is_zero() { Duration::MAX } else { ttl.saturating_sub(age(&self.batch)) })
    }

    /// Begins as many sends as the window, the checkpoints and the pace allow. Returns what to wait for where it is the pace
    /// that holds them back.
    fn fill<F: Future>(
        &mut self,
        sends: &mut FuturesUnordered<F>,
        begin: impl Fn(&mut Self, Member) -> F,
    ) -> anyhow::Result<Option<Take>> {
        while sends.len() < self.delivery.config.window && self.progress.may_begin() {
            match self.context.check() {
                // The cancellation is noticed by its token, and sends in flight get their time.
                Err(Stopped::Cancelled) => break,
                checked => checked?,
            }
            if self.waiting.len() == 0 {
                self.place = None;
                break;
            }
            match self.flow.pace().map_or(Take::Now, |pace| pace.take(Instant::now())) {
                Take::Now => {}
                wait => return Ok(Some(wait)),
            }
            let Some(member) = self.waiting.next() else { break };
            sends.push(begin(self, member));
        }
        Ok(None)
    }

    /// Begins to send to one member.
    fn begin(&mut self, member: Member) -> impl Future<Output = Option<Sent>> + use<> {
        self.progress.begin(member.id);
        let (delivery, sender) = (self.delivery.clone(), self.sender.clone());
        let outgoing = Arc::clone(&self.outgoing);
        let careful = is_careful(self.context).then_some((self.batch.id, self.context.epoch));
        async move {
            if let Some((batch, epoch)) = careful
                && let Err(error) = delivery.store.note_trying(batch, epoch, member.id).await
            {
                warn!(error = format!("{error:#}"), "who is tried next could not be noted");
            }
            outgoing.send(&delivery, &sender, member).await
        }
    }

    fn note(&mut self, sent: Sent) {
        if !matches!(sent.report.verdict, Verdict::Delivered | Verdict::Gone) {
            let host = sent.host().to_owned();
            let (status, detail) = (sent.report.status, sent.report.detail.clone());
            self.failure = Some(SendFailure { host, status, detail });
        }
        self.progress.end(sent.id);
        self.ended.push(sent);
    }

    /// Records the rest, and that the batch is finished if it is.
    async fn end(mut self, stop: Option<Stop>) -> anyhow::Result<JobOutcome> {
        let left = match stop {
            Some(Stop::Over(outcome)) => Some(outcome),
            _ => None,
        };
        let (_, mut checkpoint) = self.checkpoint(left)?;
        if stop == Some(Stop::Turn) && !self.is_in_its_queue() {
            let taken_back = self.progress.give_up().into_iter();
            let ids = taken_back.chain(std::mem::take(&mut self.waiting).map(|member| member.id)).collect();
            checkpoint.deferred.push(self.defer(0, self.batch.attempt, false, ids)?);
            checkpoint.left = 0;
        }
        let finished = self.waiting.len() == 0 && self.progress.in_flight() == 0;
        checkpoint.finished = finished;
        checkpoint.rest = match self.rest_after.filter(|_| finished) {
            Some(after) => Some(RestOfBatch { after, job: self.job(queues::BULK_QUEUE)? }),
            None => None,
        };
        self.save(checkpoint, 0).await?;
        self.log(finished);
        Ok(match stop {
            _ if finished => JobOutcome::Done,
            Some(Stop::Paused) => JobOutcome::Snooze(pause(&self.batch)),
            // At once it would keep its place before the other batches.
            Some(Stop::Turn) => JobOutcome::Snooze(OTHERS),
            _ => JobOutcome::HandBack,
        })
    }

    fn log(&self, finished: bool) {
        let totals = self.totals.iter().map(|(outcome, count)| format!("{} {count}", outcome.as_str()));
        let outcomes = totals.collect::<Vec<_>>().join(", ");
        let (notification, again) = (self.batch.notification, self.again);
        match &self.failure {
            None => info!(%notification, outcomes, again, finished, "batch sent"),
            Some(SendFailure { host, status, detail }) => {
                warn!(%notification, outcomes, again, finished, host, status, detail, "batch sent, with failures");
            }
        }
    }
}

/// The progress of a batch, as its last checkpoint has it.
fn progress(delivery: &DeliveryContext, context: &Context, batch: &Batch) -> BatchProgress {
    let config = &delivery.config;
    let limit = if is_careful(context) { 1 } else { config.checkpoint_sends };
    BatchProgress::new(limit, config.checkpoint_every, batch.low_id, &batch.above, Instant::now())
}

/// Returns true in isolation mode: the batch sends one by one, to find out which member crashes the process.
fn is_careful(context: &Context) -> bool {
    context.spent.recoveries >= CAREFUL
}

/// Waits until an instant, if there is one.
async fn until(due: Option<Instant>) {
    if let Some(due) = due {
        sleep_until(due).await;
    }
}

/// Waits until the next send may be due.
async fn paced(flow: &Flow, pause: Option<Take>, rank: u32) {
    match (pause, flow.pace()) {
        // The batches before it in the line look first.
        (Some(Take::At(at)), _) => sleep_until(at + LOOK_LATER * rank.min(10)).await,
        (Some(Take::WhenReserved), Some(pace)) => {
            // A change may have come just before: it is looked for again in a moment.
            tokio::select! {
                () = pace.changed() => {}
                () = sleep(BUSY) => {}
            }
        }
        _ => {}
    }
}

/// Returns true when the notification of the batch is paused and has not expired.
pub(crate) fn is_paused(batch: &Batch) -> bool {
    batch.standing.state == Stage::Paused && batch.standing.over().is_none()
}

/// Wait before the next check of a paused notification.
pub(crate) fn pause(batch: &Batch) -> Duration {
    let (first, last) = PAUSED;
    (age(batch) / 20).clamp(first, last)
}

/// Time since the notification was accepted, or due.
fn age(batch: &Batch) -> Duration {
    let age = Timestamp::now().as_millisecond() - batch.since;
    Duration::from_millis(u64::try_from(age).unwrap_or_default())
}
