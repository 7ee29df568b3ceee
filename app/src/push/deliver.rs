//! The job that sends to one batch, and writes down how far it has come.
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

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use perennial_server::backoff::Backoff;
use perennial_server::pool::{postgres, sql, sqlite};
use perennial_webpush::{Keys, Message, Payload, Report, Urgency, Verdict};
use perennial_workers::job::Stopped;
use perennial_workers::queue::{self, Due};
use perennial_workers::{Context, Fate, Job, NewJob, Options};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::fanout::BUDGET;
use super::outcome::Outcome;
use super::store::{Batch, Checkpoint, Deferred, Member, Part, Recorded};
use super::{Tools, metrics};

/// Between two attempts for one subscription, unless its push service says otherwise.
const RETRY: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(900));
/// Between two attempts to record while the store is busy.
const BUSY: Duration = Duration::from_millis(100);
/// After so many crashes in a row a batch sends one by one, and writes down each: so that the next crash shows
/// which of its members it is.
const CAREFUL: u32 = 2;

/// See the module. The batch has the id of its job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Deliver {
    pub(crate) notification: Uuid,
}

impl Deliver {
    pub(crate) fn job(notification: Uuid, queue: &'static str, priority: i16) -> queue::Result<NewJob> {
        Ok(NewJob::new(&Self { notification })?.queue(queue).priority(priority))
    }
}

impl Job for Deliver {
    const KIND: &'static str = "push.deliver";
    type Tools = Tools;

    fn options() -> Options {
        // A thousand sends to a service that answers nobody take batch / window times push.timeout.
        Options {
            queue: super::BULK_QUEUE,
            timeout: Duration::from_secs(1800),
            budget: BUDGET,
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("notification {}", self.notification))
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<Fate> {
        let Some(batch) = tools.store.open_batch(context.id, context.epoch).await? else {
            return Ok(Fate::Done);
        };
        let members = tools.store.members(&batch).await?;
        let round = Round::new(&tools, &context, batch, members)?;
        if round.is_too_late() { round.expire().await } else { round.run().await }
    }

    async fn give_up(&self, context: Context, tools: Tools, _reason: String) -> anyhow::Result<()> {
        let Some(batch) = tools.store.open_batch(context.id, context.epoch).await? else { return Ok(()) };
        let mut left: Vec<i64> = match &batch.part {
            Part::Range { .. } => tools.store.members(&batch).await?.iter().map(|member| member.id).collect(),
            // Whether they still exist or not.
            Part::Ids(ids) => ids.iter().copied().filter(|id| !batch.is_recorded(*id)).collect(),
        };
        let mut checkpoint = Checkpoint { finished: true, ..Checkpoint::default() };
        // It was sent to alone, and the process crashed: the others are none the worse for it.
        let suspect = batch.trying.filter(|id| left.contains(id));
        let attempt = batch.attempt + u32::from(suspect.is_none());
        let by_crashes = context.spent.recoveries >= BUDGET.recoveries && attempt < tools.config.attempts;
        let failed = if by_crashes {
            if let Some(suspect) = suspect {
                warn!(subscription = suspect, "sending to this member crashes the process; it is left out");
                left.retain(|id| *id != suspect);
            }
            if !left.is_empty() {
                let job = Deliver::job(self.notification, super::RETRY_QUEUE, 0)?;
                let job = NewJob { recoveries: CAREFUL, ..job };
                checkpoint.deferred = vec![Deferred { ids: left, job, attempt }];
            }
            usize::from(suspect.is_some())
        } else {
            left.len()
        };
        if failed > 0 {
            checkpoint.outcomes = vec![(Outcome::Failed, failed)];
        }
        save(&tools, &context, Arc::new(batch), checkpoint, 0).await?;
        Ok(())
    }
}

/// One run of the job.
struct Round<'a> {
    tools: &'a Tools,
    context: &'a Context,
    batch: Arc<Batch>,
    message: Arc<Message>,
    waiting: std::vec::IntoIter<Member>,
    /// The highest id that was begun.
    newest: i64,
    in_flight: BTreeSet<i64>,
    /// Ended, and above the lowest that is in flight.
    above: BTreeSet<i64>,
    /// Ended since the last checkpoint.
    ended: Vec<Ended>,
    /// Begun, and in no checkpoint that was committed.
    unrecorded: usize,
    totals: BTreeMap<Outcome, usize>,
    /// How many are to be tried again.
    again: usize,
    /// The last send that was not delivered, although its subscription has not ended.
    failure: Option<Failure>,
}

/// Why a message was not delivered.
struct Failure {
    host: String,
    status: Option<u16>,
    detail: String,
}

/// What came of one send.
struct Ended {
    id: i64,
    endpoint: String,
    report: Report,
}

/// What becomes of one member.
enum Next {
    Decided(Outcome),
    Later(Duration),
}

impl<'a> Round<'a> {
    fn new(
        tools: &'a Tools,
        context: &'a Context,
        batch: Batch,
        members: Vec<Member>,
    ) -> anyhow::Result<Self> {
        let mut round = Self {
            tools,
            context,
            message: Arc::new(message(tools, &batch)?),
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
        round.note_deleted(&members);
        round.waiting = members.into_iter();
        Ok(round)
    }

    /// Members that were tried before and have been deleted since had ended, as it turns out.
    fn note_deleted(&mut self, members: &[Member]) {
        let Part::Ids(ids) = &self.batch.part else { return };
        let found: BTreeSet<i64> = members.iter().map(|member| member.id).collect();
        for id in ids.iter().filter(|id| !self.batch.is_recorded(**id) && !found.contains(id)) {
            let report = Report { verdict: Verdict::Gone, status: None, detail: "deleted".to_owned() };
            self.above.insert(*id);
            self.ended.push(Ended { id: *id, endpoint: String::new(), report });
            self.unrecorded += 1;
        }
    }

    /// Whether the time to live ended while the batch waited. A message for now or never is always tried once.
    fn is_too_late(&self) -> bool {
        !self.batch.ttl.is_zero() && age(&self.batch) >= self.batch.ttl
    }

    async fn expire(mut self) -> anyhow::Result<Fate> {
        let late = self.waiting.len();
        let (_, mut checkpoint) = self.checkpoint(true);
        checkpoint.outcomes.push((Outcome::Expired, late));
        save(self.tools, self.context, Arc::clone(&self.batch), checkpoint, 0).await?;
        info!(notification = %self.batch.notification, expired = late, "the time to live has ended");
        Ok(Fate::Done)
    }

    async fn run(mut self) -> anyhow::Result<Fate> {
        let is_careful = self.is_careful();
        let limit = if is_careful { 1 } else { self.tools.config.checkpoint_sends };
        let every = self.tools.config.checkpoint_every;
        let mut sends = FuturesUnordered::new();
        let mut saving = None;
        let mut due = Instant::now() + every;
        let mut stopping = false;
        let mut cut = pin!(sleep(Duration::MAX));
        loop {
            while !stopping && sends.len() < self.tools.config.window && self.unrecorded < limit {
                match self.context.check() {
                    // It is told below, and what is in flight gets its time.
                    Err(Stopped::Cancelled) => break,
                    checked => checked?,
                }
                let Some(member) = self.waiting.next() else { break };
                sends.push(self.begin(member));
            }
            let idle = sends.is_empty();
            if idle && saving.is_none() && (stopping || self.waiting.len() == 0) {
                break;
            }
            let full = self.ended.len() * 2 >= limit || idle || Instant::now() >= due;
            if full && saving.is_none() && !self.ended.is_empty() {
                let (count, checkpoint) = self.checkpoint(false);
                saving = Some(Box::pin(save(
                    self.tools,
                    self.context,
                    Arc::clone(&self.batch),
                    checkpoint,
                    count,
                )));
                due = Instant::now() + every;
            }
            let timed = saving.is_none() && !self.ended.is_empty();
            let saved = async {
                match saving.as_mut() {
                    Some(saving) => saving.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(ended) = sends.next() => self.note(ended),
                count = saved => {
                    self.unrecorded -= count?;
                    saving = None;
                    if is_careful {
                        // It gets on: crashes up to here were not this batch's fault.
                        self.context.save(&self.newest).await?;
                    }
                }
                () = sleep_until(due), if timed => {}
                () = self.context.cancel.cancelled(), if !stopping => {
                    stopping = true;
                    cut.set(sleep(self.tools.config.last_sends));
                }
                () = cut.as_mut(), if stopping && !idle => {
                    // Those in flight may have been taken; nobody knows, and so they are sent again.
                    sends.clear();
                }
            }
        }
        let finished = self.waiting.len() == 0 && self.in_flight.is_empty();
        self.end(finished).await
    }

    /// Whether it sends one by one, to find out what crashes the process.
    fn is_careful(&self) -> bool {
        self.context.spent.recoveries >= CAREFUL
    }

    /// Begins to send to one member.
    fn begin(&mut self, member: Member) -> impl Future<Output = Ended> + use<> {
        self.newest = member.id;
        self.in_flight.insert(member.id);
        self.unrecorded += 1;
        let (tools, message) = (Arc::clone(self.tools), Arc::clone(&self.message));
        let (batch, epoch, is_careful) = (self.batch.id, self.context.epoch, self.is_careful());
        async move {
            if is_careful && let Err(error) = tools.store.note_trying(batch, epoch, member.id).await {
                warn!(error = format!("{error:#}"), "who is tried next could not be noted");
            }
            let report = send(&tools, &member, &message).await;
            Ended { id: member.id, endpoint: member.endpoint, report }
        }
    }

    fn note(&mut self, ended: Ended) {
        if !matches!(ended.report.verdict, Verdict::Delivered | Verdict::Gone) {
            let host = ended.endpoint.split('/').nth(2).unwrap_or_default().to_owned();
            let (status, detail) = (ended.report.status, ended.report.detail.clone());
            self.failure = Some(Failure { host, status, detail });
        }
        self.in_flight.remove(&ended.id);
        self.above.insert(ended.id);
        self.ended.push(ended);
    }

    /// What to record now, and how many members it is about.
    fn checkpoint(&mut self, finished: bool) -> (usize, Checkpoint) {
        let low_id = self.in_flight.first().map_or(self.newest, |first| first - 1);
        self.above.retain(|id| *id > low_id);
        let count = self.ended.len();
        let mut outcomes = BTreeMap::<Outcome, usize>::new();
        let mut later = BTreeMap::<u64, Vec<i64>>::new();
        let mut gone = Vec::new();
        // One draw for all that failed together and were asked for nothing else: one job, not hundreds.
        let usual = RETRY.jittered(self.batch.attempt + 1);
        for Ended { id, endpoint, report } in std::mem::take(&mut self.ended) {
            match self.decide(&report, usual) {
                Next::Decided(outcome) => {
                    *outcomes.entry(outcome).or_default() += 1;
                    if outcome == Outcome::Gone && !endpoint.is_empty() {
                        gone.push((id, endpoint));
                    }
                }
                Next::Later(wait) => later.entry(wait.as_secs().max(1)).or_default().push(id),
            }
        }
        for (outcome, count) in &outcomes {
            *self.totals.entry(*outcome).or_default() += count;
        }
        self.again += later.values().map(Vec::len).sum::<usize>();
        let deferred = later.into_iter().filter_map(|(seconds, ids)| self.defer(seconds, ids)).collect();
        let above = self.above.iter().copied().collect();
        let outcomes = outcomes.into_iter().collect();
        (count, Checkpoint { low_id, above, outcomes, ended: gone, deferred, finished })
    }

    fn decide(&self, report: &Report, usual: Duration) -> Next {
        if let Some(outcome) = Outcome::of(report.verdict) {
            return Next::Decided(outcome);
        }
        if self.batch.attempt + 1 >= self.tools.config.attempts {
            return Next::Decided(Outcome::Unreachable);
        }
        let wait = match report.verdict {
            Verdict::Retry { after: Some(after), .. } => coarse(after.max(RETRY.base)),
            _ => usual,
        };
        if age(&self.batch) + wait >= self.batch.ttl {
            return Next::Decided(Outcome::Expired);
        }
        Next::Later(wait)
    }

    fn defer(&self, seconds: u64, ids: Vec<i64>) -> Option<Deferred> {
        let job = Deliver::job(self.batch.notification, super::RETRY_QUEUE, 0).ok()?;
        let job = job.due(Due::In(Duration::from_secs(seconds)));
        Some(Deferred { ids, job, attempt: self.batch.attempt + 1 })
    }

    /// Records the rest, and that the batch is finished if it is.
    async fn end(mut self, finished: bool) -> anyhow::Result<Fate> {
        let (_, checkpoint) = self.checkpoint(finished);
        save(self.tools, self.context, Arc::clone(&self.batch), checkpoint, 0).await?;
        self.log(finished);
        Ok(if finished { Fate::Done } else { Fate::HandBack })
    }
}

impl Round<'_> {
    fn log(&self, finished: bool) {
        let totals = self.totals.iter().map(|(outcome, count)| format!("{} {count}", outcome.as_str()));
        let outcomes = totals.collect::<Vec<_>>().join(", ");
        let (notification, again) = (self.batch.notification, self.again);
        match &self.failure {
            None => info!(%notification, outcomes, again, finished, "batch sent"),
            Some(Failure { host, status, detail }) => {
                warn!(%notification, outcomes, again, finished, host, status, detail, "batch sent, with failures");
            }
        }
    }
}

/// A wait rounded up by at most an eighth: a service that asks each subscription for another wait makes a few
/// jobs, not one for each.
fn coarse(wait: Duration) -> Duration {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let step = (seconds / 8 + 1).next_power_of_two().div_ceil(2).max(1);
    Duration::from_secs(seconds.next_multiple_of(step))
}

/// Sends to one member.
async fn send(tools: &Tools, member: &Member, message: &Message) -> Report {
    let forbidden = |detail: String| Report { verdict: Verdict::Forbidden, status: None, detail };
    let began = Instant::now();
    // Checked when it was stored; the policy may have changed since.
    let report =
        match (tools.sender.policy().check(&member.endpoint), Keys::from_bytes(&member.p256dh, &member.auth))
        {
            (Ok(endpoint), Ok(keys)) => tools.sender.send(&endpoint, &keys, message, &tools.vapid).await,
            (Err(error), _) => forbidden(error.to_string()),
            (_, Err(error)) => forbidden(error.to_string()),
        };
    metrics::sent(report.verdict, began.elapsed());
    if report.verdict != Verdict::Delivered {
        debug!(subscription = member.id, verdict = ?report.verdict, status = report.status, detail = report.detail, "not delivered");
    }
    report
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
async fn save(
    tools: &Tools,
    context: &Context,
    batch: Arc<Batch>,
    checkpoint: Checkpoint,
    count: usize,
) -> anyhow::Result<usize> {
    loop {
        let recorded = match tools.store.checkpoint(&batch, context.epoch, checkpoint.clone()).await {
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
        metrics::decided(&checkpoint.outcomes);
        tools.progress.record(batch.notification, checkpoint.outcomes.iter().map(|(_, count)| count).sum());
        if recorded == Recorded::Last {
            tools.ended(batch.notification, batch.site).await;
        }
        return Ok(count);
    }
}

/// Since the notification was accepted.
fn age(batch: &Batch) -> Duration {
    let age = Timestamp::now().as_millisecond() - batch.created_at;
    Duration::from_millis(u64::try_from(age).unwrap_or_default())
}

/// The message, its time to live shortened by the time that its members have waited.
fn message(tools: &Tools, batch: &Batch) -> anyhow::Result<Message> {
    let payload = Payload::new(batch.payload.clone())?;
    let urgency: Urgency = batch.urgency.parse()?;
    let waited = Duration::from_secs(age(batch).as_secs());
    let message = Message::new(payload).ttl(batch.ttl.saturating_sub(waited)).urgency(urgency);
    let bulk = batch.attempt > 0 || batch.estimate > tools.config.small_audience;
    let message = message.bulk(bulk);
    Ok(match &batch.topic {
        Some(topic) => message.topic(&topic.parse()?),
        None => message,
    })
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
