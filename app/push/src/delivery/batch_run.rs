//! One run of the job that sends to a batch, and writes down how far it has come.
//!
//! ```text
//!           low_id                     the newest that was begun
//!  ───────────┼──────────────────────────────┼───────────────────►  members, by id
//!   recorded  │ begun: in flight, or ended   │  not begun
//!             │ (those that ended: `above`)  │
//! ```
//!
//! Sends run side by side and end in any order. A checkpoint records the outcomes of those that have ended
//! since the last one, together with the highest id below which all are recorded, in one transaction under
//! the job's epoch. No more than `push.checkpoint.sends` are begun and not recorded, so that a crash repeats
//! at most so many; and none is counted twice, since what is recorded is never sent again.

use crate::model::endpoint::origin;
use crate::model::notification::NotificationStatus;
use crate::model::notification::Stage;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use perennial_runtime::backoff::Backoff;
use perennial_store::pool::{postgres, sql, sqlite};
use perennial_webpush::{Sender, Verdict};
use perennial_workers::job::Stopped;
use perennial_workers::queue::Due;
use perennial_workers::{Context, JobOutcome, NewJob};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::DeliveryContext;
use crate::delivery::send::{Outgoing, Sent};
use crate::model::audience::Audience;
use crate::model::jobs::Deliver;
use crate::model::outcome::Outcome;
use crate::pacing::active::{Flow, PlaceInLine};
use crate::pacing::pace::Take;
use crate::store::{
    Batch, BatchPart, Checkpoint, Deferred, Delivery, Member, Members, Recorded, RestOfBatch,
};
use crate::vapid::SiteKeys;
use perennial_host::sites::SiteId;

/// Between two attempts for one subscription, unless its push service says otherwise.
const RETRY: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(900));
/// Between two attempts to record while the store is busy.
const BUSY: Duration = Duration::from_millis(100);
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
/// For how long a message without a time to live may wait for being tried.
const NOW: Duration = Duration::from_secs(600);
/// From how many members on those that wait for a push service are tried again in parts, and in how many.
const SCATTERED: usize = 64;
const PARTS: usize = 8;
/// The longest that sends wait for a push service that nothing is sent to.
const LONGEST_HOLD: Duration = Duration::from_secs(3600);

/// See the module.
pub(crate) struct Round<'a> {
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
    /// The highest id that was begun.
    newest: i64,
    in_flight: BTreeSet<i64>,
    /// Ended, and above the lowest that is in flight.
    above: BTreeSet<i64>,
    /// Ended since the last checkpoint.
    ended: Vec<Sent>,
    /// Begun, and in no checkpoint that was committed.
    unrecorded: usize,
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

/// What becomes of one member.
enum Next {
    Decided(Outcome),
    /// After this long, as this attempt.
    Later(Duration, u32),
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

impl<'a> Round<'a> {
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
        let mut round = Self {
            delivery,
            context,
            sender,
            flow,
            place: Some(flow.stand_in_line(batch.id)),
            outgoing: Arc::new(Outgoing::new(delivery, context.queue(), &batch, &members, waited, keys)?),
            rest_after,
            newest: batch.low_id,
            above: batch.above.iter().copied().collect(),
            in_flight: BTreeSet::new(),
            ended: Vec::new(),
            unrecorded: 0,
            totals: BTreeMap::new(),
            again: 0,
            failure: None,
            waiting: Vec::new().into_iter(),
            batch: Arc::new(batch),
        };
        round.note_deleted(&members, &unreadable);
        for (id, why) in unreadable {
            round.above.insert(id);
            round.ended.push(Sent::unreadable(id, &why));
            round.unrecorded += 1;
        }
        round.waiting = members.into_iter();
        Ok(round)
    }

    /// Members that were tried before and have been deleted since had ended, as it turns out.
    fn note_deleted(&mut self, members: &[Member], unreadable: &[(i64, String)]) {
        let BatchPart::Ids(ids) = &self.batch.part else { return };
        let found = members.iter().map(|member| member.id).chain(unreadable.iter().map(|(id, _)| *id));
        let found: BTreeSet<i64> = found.collect();
        for id in ids.iter().filter(|id| !self.batch.is_recorded(**id) && !found.contains(id)) {
            self.above.insert(*id);
            self.ended.push(Sent::deleted(*id));
            self.unrecorded += 1;
        }
    }

    pub(crate) async fn run(mut self) -> anyhow::Result<JobOutcome> {
        let is_careful = self.is_careful();
        let limit = if is_careful { 1 } else { self.delivery.config.checkpoint_sends };
        let every = self.delivery.config.checkpoint_every;
        let mut standing = self.flow.standing();
        let mut stop = self.must_stop(&standing);
        let mut sends = FuturesUnordered::new();
        let mut saving = None;
        let mut due = Instant::now() + every;
        let turn = Instant::now() + if self.is_in_its_queue() { TURN } else { SHORT_TURN };
        let mut cut = pin!(sleep(Duration::MAX));
        let mut over = pin!(sleep(self.time_left(*standing.borrow())));
        loop {
            if stop.is_some() {
                self.outgoing.stop();
            }
            let mut pause = None;
            while stop.is_none() && sends.len() < self.delivery.config.window && self.unrecorded < limit {
                match self.context.check() {
                    // It is told below, and what is in flight gets its time.
                    Err(Stopped::Cancelled) => break,
                    checked => checked?,
                }
                if self.waiting.len() == 0 {
                    self.place = None;
                    break;
                }
                match self.flow.pace().map_or(Take::Now, |pace| pace.take(Instant::now())) {
                    Take::Now => {}
                    wait => {
                        pause = Some(wait);
                        break;
                    }
                }
                let Some(member) = self.waiting.next() else { break };
                sends.push(self.begin(member));
            }
            let idle = sends.is_empty();
            if idle && saving.is_none() && (stop.is_some() || self.waiting.len() == 0) {
                break;
            }
            // In time, so that nothing waits for the commit while there is room for some more.
            let full = self.ended.len() * 4 >= limit * 3 || idle || Instant::now() >= due;
            if full && saving.is_none() && !self.ended.is_empty() {
                let (count, checkpoint) = self.checkpoint(None)?;
                let batch = Arc::clone(&self.batch);
                saving = Some(Box::pin(save(self.delivery, self.context, batch, checkpoint, count)));
                due = Instant::now() + every;
            }
            let timed = saving.is_none() && !self.ended.is_empty();
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
                    self.unrecorded -= count?;
                    saving = None;
                    if is_careful {
                        // It gets on: crashes up to here were not this batch's fault.
                        self.context.save(&self.newest).await?;
                    }
                }
                Some(sent) = sends.next() => match sent {
                    Some(sent) => self.note(sent),
                    // It was taken back, and stays among those that have not ended.
                    None => self.unrecorded -= 1,
                },
                () = paced(self.flow, pause, rank), if pause.is_some() => {
                    if stop.is_none() && Instant::now() >= turn {
                        stop = Some(Stop::Turn);
                    }
                }
                () = sleep_until(due), if timed => {}
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

    /// Whether it sends one by one, to find out what crashes the process.
    fn is_careful(&self) -> bool {
        self.context.spent.recoveries >= CAREFUL
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

    /// Begins to send to one member.
    fn begin(&mut self, member: Member) -> impl Future<Output = Option<Sent>> + use<> {
        self.newest = member.id;
        self.in_flight.insert(member.id);
        self.unrecorded += 1;
        let (delivery, sender) = (self.delivery.clone(), self.sender.clone());
        let outgoing = Arc::clone(&self.outgoing);
        let careful = self.is_careful().then_some((self.batch.id, self.context.epoch));
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
        self.in_flight.remove(&sent.id);
        self.above.insert(sent.id);
        self.ended.push(sent);
    }

    /// What to record now, and how many members it is about. With `left`, those that were never sent to have this outcome:
    /// nothing is in flight any more.
    fn checkpoint(&mut self, left: Option<Outcome>) -> anyhow::Result<(usize, Checkpoint)> {
        let never_sent = left.map(|outcome| {
            let count = self.waiting.len() + self.in_flight.len();
            (self.waiting, self.in_flight) = (Vec::new().into_iter(), BTreeSet::new());
            (outcome, count)
        });
        let low_id = self.in_flight.first().map_or(self.newest, |first| first - 1);
        self.above.retain(|id| *id > low_id);
        let count = self.ended.len();
        let mut checkpoint = Checkpoint { low_id, ..Checkpoint::default() };
        let mut outcomes = BTreeMap::<Outcome, usize>::new();
        // Those that wait for a slow service keep only each other waiting.
        let mut later = BTreeMap::<(u64, u32, Option<String>, Option<String>), Vec<i64>>::new();
        // One draw for all that failed together and were asked for nothing else: one job, not hundreds.
        let usual = RETRY.jittered(self.batch.attempt + 1);
        for sent in std::mem::take(&mut self.ended) {
            let outcome = match self.decide(&sent, usual, left) {
                Next::Decided(outcome) => outcome,
                Next::Later(wait, attempt) => {
                    let slow = sent.is_slow.then(|| sent.host().to_owned());
                    let waits_for = matches!(sent.report.verdict, Verdict::Held(_))
                        .then(|| origin(&sent.endpoint).to_owned());
                    let group = (wait.as_secs().max(1), attempt, slow, waits_for);
                    later.entry(group).or_default().push(sent.id);
                    continue;
                }
            };
            *outcomes.entry(outcome).or_default() += 1;
            // Those that came with the notification are no stored subscriptions, whatever their numbers.
            let is_stored = self.batch.audience != Audience::Inline;
            let refusal = sent.refusal();
            if outcome != Outcome::Delivered || self.batch.logs_all {
                let subscription = if is_stored { sent.id } else { -sent.id };
                let (status, detail) = (sent.report.status, sent.report.detail);
                checkpoint.deliveries.push(Delivery { subscription, outcome, status, detail });
            }
            match (sent.report.verdict, refusal) {
                _ if !is_stored => {}
                (Verdict::Delivered, _) => {
                    checkpoint.cleared.extend(sent.is_refused.then_some(sent.id));
                    checkpoint.proven.extend((!sent.is_proven).then_some(sent.id));
                }
                (Verdict::Gone, _) if !sent.endpoint.is_empty() => {
                    checkpoint.ended.push((sent.id, sent.endpoint));
                }
                (_, Some(refusal)) => checkpoint.refused.push((sent.id, sent.endpoint, refusal)),
                _ => {}
            }
        }
        if let Some((outcome, count)) = never_sent.filter(|(_, count)| *count > 0) {
            *outcomes.entry(outcome).or_default() += count;
        }
        for (outcome, count) in &outcomes {
            *self.totals.entry(*outcome).or_default() += count;
        }
        self.again += later.values().map(Vec::len).sum::<usize>();
        for ((wait, attempt, slow, waits_for), mut ids) in later {
            ids.sort_unstable();
            let parts = if waits_for.is_some() { parts(&ids) } else { vec![&*ids] };
            for part in parts {
                let deferred = self.defer(wait, attempt, slow.is_some(), part.to_vec())?;
                checkpoint.deferred.push(Deferred { waits_for: waits_for.clone(), ..deferred });
            }
        }
        checkpoint.left = self.waiting.len() + self.in_flight.len();
        checkpoint.tell = self
            .batch
            .webhook
            .clone()
            .filter(|name| self.delivery.webhooks.wants_pruned(SiteId(self.batch.site), name));
        checkpoint.above = self.above.iter().copied().collect();
        checkpoint.outcomes = outcomes.into_iter().collect();
        Ok((count, checkpoint))
    }

    fn decide(&self, sent: &Sent, usual: Duration, left: Option<Outcome>) -> Next {
        if let Some(outcome) = sent.outcome.or_else(|| Outcome::of(sent.report.verdict)) {
            return Next::Decided(outcome);
        }
        if let Some(outcome) = left {
            return Next::Decided(outcome);
        }
        let is_untried = matches!(sent.report.verdict, Verdict::Held(_));
        let (wait, attempt) = match sent.report.verdict {
            Verdict::Held(wait) => (coarse(wait.min(LONGEST_HOLD)), self.batch.attempt),
            // There never will be such a host (RFC 2606, section 2).
            Verdict::Unresolvable if sent.host().ends_with(".invalid") => {
                return Next::Decided(Outcome::Unreachable);
            }
            Verdict::Retry { after: Some(after), .. } => {
                (coarse(after.max(RETRY.base)), self.batch.attempt + 1)
            }
            _ => (usual, self.batch.attempt + 1),
        };
        if attempt >= self.delivery.config.attempts {
            return Next::Decided(Outcome::Unreachable);
        }
        let ends_before = self.batch.standing.time_left().is_some_and(|left| left <= wait);
        // A message for now or never is tried once, if that can be soon.
        let ttl = if is_untried && self.batch.ttl.is_zero() { NOW } else { self.batch.ttl };
        let outlives = age(&self.batch) + wait < ttl;
        if ends_before || !outlives {
            return Next::Decided(Outcome::Expired);
        }
        Next::Later(wait, attempt)
    }

    fn defer(&self, seconds: u64, attempt: u32, is_slow: bool, ids: Vec<i64>) -> anyhow::Result<Deferred> {
        let is_small = self.delivery.config.is_small(self.batch.estimate.max(ids.len() as u64));
        let job = self.job(match is_small {
            true => crate::model::queues::SMALL_QUEUE,
            false if is_slow => crate::model::queues::SLOW_QUEUE,
            false => crate::model::queues::RETRY_QUEUE,
        })?;
        let job = if seconds == 0 { job } else { job.due(Due::In(Duration::from_secs(seconds))) };
        Ok(Deferred { ids, job, attempt, waits_for: None })
    }

    /// A job for some of the members, in this queue unless they have a pace.
    fn job(&self, queue: &'static str) -> anyhow::Result<NewJob> {
        let queue = if self.flow.pace().is_some() { crate::model::queues::PACED_QUEUE } else { queue };
        let priority = Deliver::priority(self.batch.urgency.parse()?);
        Ok(Deliver::follow_up(self.context, self.batch.notification, queue, priority)?)
    }

    /// Records the rest, and that the batch is finished if it is.
    async fn end(mut self, stop: Option<Stop>) -> anyhow::Result<JobOutcome> {
        let left = match stop {
            Some(Stop::Over(outcome)) => Some(outcome),
            _ => None,
        };
        let (_, mut checkpoint) = self.checkpoint(left)?;
        if stop == Some(Stop::Turn) && !self.is_in_its_queue() {
            let taken_back = std::mem::take(&mut self.in_flight).into_iter();
            let ids = taken_back.chain(std::mem::take(&mut self.waiting).map(|member| member.id)).collect();
            checkpoint.deferred.push(self.defer(0, self.batch.attempt, false, ids)?);
            checkpoint.left = 0;
        }
        let finished = self.waiting.len() == 0 && self.in_flight.is_empty();
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

/// Members that wait for a push service, in parts that come in any order: whether it takes messages again is found out by one
/// of them, and those that begin the list may be the very ones that it refuses.
fn parts(ids: &[i64]) -> Vec<&[i64]> {
    if ids.len() < SCATTERED {
        return vec![ids];
    }
    let mut parts: Vec<_> = ids.chunks(ids.len().div_ceil(PARTS)).collect();
    fastrand::shuffle(&mut parts);
    parts
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

/// A wait rounded up by at most an eighth: a service that asks each subscription for another wait makes a few
/// jobs, not one for each.
fn coarse(wait: Duration) -> Duration {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let step = (seconds / 8 + 1).next_power_of_two().div_ceil(2).max(1);
    Duration::from_secs(seconds.next_multiple_of(step))
}

/// Whether an error says that nothing was written.
fn has_not_happened(error: &sql::Error) -> bool {
    if let sql::Error::Postgres(error) = error
        && error.is_rollback()
    {
        return true;
    }
    matches!(
        error,
        sql::Error::Sqlite(sqlite::Error::Busy(_) | sqlite::Error::Lost(_))
            | sql::Error::Postgres(postgres::Error::Busy | postgres::Error::Away(_))
    )
}

/// Writes a checkpoint, again while the store is busy, and returns `count`.
pub(crate) async fn save(
    delivery: &DeliveryContext,
    context: &Context,
    batch: Arc<Batch>,
    checkpoint: Checkpoint,
    count: usize,
) -> anyhow::Result<usize> {
    loop {
        let recorded = match delivery.store.checkpoint(&batch, context.epoch, checkpoint.clone()).await {
            Ok(recorded) => recorded,
            // Nothing of it has happened.
            Err(error) if has_not_happened(&error) && context.lease.is_held() => {
                sleep(BUSY).await;
                continue;
            }
            // It may have been written or not: the next run reads which.
            Err(error) => return Err(error.into()),
        };
        if recorded == Recorded::TooLate {
            return Err(Stopped::Lapsed.into());
        }
        delivery.meters.decided(&checkpoint.outcomes);
        if !checkpoint.refused.is_empty() {
            delivery.services.at_risk.refused();
        }
        delivery
            .progress
            .record(batch.notification, checkpoint.outcomes.iter().map(|(_, count)| count).sum());
        if recorded == Recorded::Last {
            delivery.ended(batch.notification, batch.site).await;
        }
        return Ok(count);
    }
}

/// Since the notification was accepted, or due.
fn age(batch: &Batch) -> Duration {
    let age = Timestamp::now().as_millisecond() - batch.since;
    Duration::from_millis(u64::try_from(age).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_lengthened_by_at_most_an_eighth_to_few_values() {
        let coarse = |seconds| coarse(Duration::from_secs(seconds)).as_secs();
        assert_eq!([1, 2, 15, 17, 63, 65, 3600, 3601].map(coarse), [1, 2, 15, 18, 64, 72, 3840, 3840]);
        for seconds in 0..100_000 {
            let waits = coarse(seconds);
            assert!((seconds..=seconds + seconds / 8).contains(&waits), "{seconds}: {waits}");
        }
        let distinct: BTreeSet<u64> = (0..86_400).map(coarse).collect();
        assert!(distinct.len() < 120, "{}", distinct.len());
    }
}
