//! One run of the job that sends to a batch: begins sends, writes checkpoints, and stops when it must.
//!
//! How far the batch has come is in `batch_progress.rs`, what a checkpoint says of each member in `checkpoint.rs`.

mod checkpoint;

use crate::model::notification::NotificationStatus;
use crate::model::notification::Stage;
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
use crate::model::outcome::Outcome;
use crate::pacing::active::{Flow, PlaceInLine};
use crate::pacing::pace::Take;
use crate::store::{Batch, BatchPart, Member, Members, RestOfBatch};
use crate::vapid::SiteKeys;
use checkpoint::BUSY;
pub(crate) use checkpoint::save;

/// After so many crashes in a row a batch sends one by one, and writes down each: so that the next crash shows
/// which of its members it is.
pub(crate) const CAREFUL: u32 = 2;
/// How often a batch of a paused notification looks whether it may go on: the longer the pause, the less often.
const PAUSED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// A batch that waits for its pace makes room for others after this long.
const TURN: Duration = Duration::from_secs(60);
/// The same where it keeps others from their work.
const SHORT_TURN: Duration = Duration::from_secs(1);
/// How long others have their turn.
const OTHERS: Duration = Duration::from_millis(200);
/// How much later than the batch before it a batch looks whether a send is due.
const LOOK_LATER: Duration = Duration::from_millis(2);

/// See the module.
pub(crate) struct BatchRun<'a> {
    delivery: &'a Arc<DeliveryContext>,
    context: &'a Context,
    sender: &'a Sender,
    flow: &'a Flow,
    /// Until its last member is begun.
    place: Option<PlaceInLine>,
    batch: Arc<Batch>,
    outgoing: Arc<Outgoing>,
    waiting: std::vec::IntoIter<Member>,
    /// Behind which the range of the batch goes on, if this is not all of it.
    rest_after: Option<i64>,
    progress: BatchProgress,
    /// Sends that have ended since the last checkpoint.
    ended: Vec<Sent>,
    totals: BTreeMap<Outcome, usize>,
    /// How many are to be tried again.
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
    /// Somebody has paused the notification,
    Paused,
    /// or cancelled it, or its time is over: what is left has this outcome.
    Over(Outcome),
    /// Others should have a turn.
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

    /// Members that were tried before and have been deleted since had ended, as it turns out.
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
                let batch = Arc::clone(&self.batch);
                saving = Some(Box::pin(save(self.delivery, self.context, batch, checkpoint, count)));
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
                        // It gets on: crashes up to here were not this batch's fault.
                        self.context.save(&self.progress.newest()).await?;
                    }
                }
                Some(sent) = sends.next() => match sent {
                    Some(sent) => self.note(sent),
                    // It was taken back, and stays among those that have not ended.
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
                    // Those in flight may have been taken; nobody knows, and so they are sent again.
                    sends.clear();
                }
            }
        }
        self.end(stop).await
    }

    /// Whether a batch that has a pace waits where it keeps nobody waiting: its notification may have got one late.
    fn is_in_its_queue(&self) -> bool {
        self.flow.pace().is_none() || self.context.queue() == crate::model::queues::PACED_QUEUE
    }

    /// Whether nothing may be sent, as the notification stands.
    fn must_stop(&self, standing: &watch::Receiver<NotificationStatus>) -> Option<Stop> {
        let standing = *standing.borrow();
        match standing.state {
            Stage::Cancelled => Some(Stop::Over(Outcome::Cancelled)),
            // Also of one that is paused.
            _ if self.time_left(standing).is_zero() => Some(Stop::Over(Outcome::Expired)),
            Stage::Paused => Some(Stop::Paused),
            _ => None,
        }
    }

    /// How long there is for sending.
    fn time_left(&self, standing: NotificationStatus) -> Duration {
        // A message for now or never is always tried once.
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
            Some(after) => Some(RestOfBatch { after, job: self.job(crate::model::queues::BULK_QUEUE)? }),
            None => None,
        };
        save(self.delivery, self.context, Arc::clone(&self.batch), checkpoint, 0).await?;
        self.log(finished);
        Ok(match stop {
            _ if finished => JobOutcome::Done,
            Some(Stop::Paused) => JobOutcome::Snooze(pause(&self.batch)),
            // Not at once: then it would keep its place before the others.
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
        // Those before it in the line look first.
        (Some(Take::At(at)), _) => sleep_until(at + LOOK_LATER * rank.min(10)).await,
        (Some(Take::WhenReserved), Some(pace)) => {
            // Whoever was told just before is told again in a moment.
            tokio::select! {
                () = pace.changed() => {}
                () = sleep(BUSY) => {}
            }
        }
        _ => {}
    }
}

/// Whether there is nothing to do now: not before somebody goes on with it, or its time is over.
pub(crate) fn is_paused(batch: &Batch) -> bool {
    batch.standing.state == Stage::Paused && !batch.standing.has_expired()
}

/// How soon to look again at a notification that is paused.
pub(crate) fn pause(batch: &Batch) -> Duration {
    let (first, last) = PAUSED;
    (age(batch) / 20).clamp(first, last)
}

/// Since the notification was accepted, or due.
fn age(batch: &Batch) -> Duration {
    let age = Timestamp::now().as_millisecond() - batch.since;
    Duration::from_millis(u64::try_from(age).unwrap_or_default())
}
