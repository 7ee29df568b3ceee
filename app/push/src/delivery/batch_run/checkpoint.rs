//! What a checkpoint says of each member, and writing it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use perennial_host::sites::SiteId;
use perennial_store::pool::{postgres, sql, sqlite};
use perennial_webpush::Verdict;
use perennial_workers::job::Stopped;
use perennial_workers::queue::Due;
use perennial_workers::{Context, NewJob};
use tokio::time::{Instant, sleep};

use super::{BatchRun, age};
use crate::delivery::DeliveryContext;
use crate::delivery::attempts::{Circumstances, Next, RETRY, next};
use crate::delivery::batch_progress::Mark;
use crate::delivery::send::Sent;
use crate::model::audience::Audience;
use crate::model::endpoint::origin;
use crate::model::jobs::Deliver;
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::store::{Batch, Checkpoint, Deferred, Delivery, Recorded};

/// Between two attempts to record while the store is busy.
pub(super) const BUSY: Duration = Duration::from_millis(100);
/// Number of members from which a group that waits for a push service is split, and the number of its parts.
const SCATTERED: usize = 64;
const PARTS: usize = 8;

/// Members that are tried again together: after the same wait, as the same attempt, for the same reason.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    /// In seconds.
    wait: u64,
    attempt: u32,
    /// The host of a slow push service: its members keep only each other waiting.
    slow: Option<String>,
    /// The origin of a push service that is held.
    waits_for: Option<String>,
}

impl<'a> BatchRun<'a> {
    /// Makes a checkpoint of the sends that have ended, and returns the number of members that it records. With `left`, members
    /// that were never sent to have this outcome: nothing is in flight any more.
    pub(super) fn checkpoint(&mut self, left: Option<Outcome>) -> anyhow::Result<(usize, Checkpoint)> {
        let never_sent = left.map(|outcome| {
            let waiting = std::mem::take(&mut self.waiting).len();
            (outcome, waiting + self.progress.give_up().len())
        });
        let Mark { low_id, above, ended: count } = self.progress.mark(Instant::now());
        let mut checkpoint = Checkpoint { low_id, above, ..Checkpoint::default() };
        let mut outcomes = BTreeMap::<Outcome, usize>::new();
        let mut later = BTreeMap::<Group, Vec<i64>>::new();
        // One draw for all that failed together and were asked for nothing else: one job, not hundreds.
        let usual = RETRY.jittered(self.batch.attempt + 1);
        for sent in std::mem::take(&mut self.ended) {
            match self.decide(&sent, usual, left) {
                Next::Decided(outcome) => {
                    *outcomes.entry(outcome).or_default() += 1;
                    self.record(sent, outcome, &mut checkpoint);
                }
                Next::Later(wait, attempt) => {
                    later.entry(Group::of(&sent, wait, attempt)).or_default().push(sent.id);
                }
            }
        }
        if let Some((outcome, count)) = never_sent.filter(|(_, count)| *count > 0) {
            *outcomes.entry(outcome).or_default() += count;
        }
        for (outcome, count) in &outcomes {
            *self.totals.entry(*outcome).or_default() += count;
        }
        self.again += later.values().map(Vec::len).sum::<usize>();
        checkpoint.deferred = self.defer_all(later)?;
        checkpoint.left = self.waiting.len() + self.progress.in_flight();
        checkpoint.tell = self
            .batch
            .webhook
            .clone()
            .filter(|name| self.delivery.webhooks.wants_pruned(SiteId(self.batch.site), name));
        checkpoint.outcomes = outcomes.into_iter().collect();
        Ok((count, checkpoint))
    }

    /// Writes a checkpoint, and returns `count`. Members that were put off because of a hold do not wait for its end
    /// if an operator has ended it during this run: the operator's request woke only what waited already.
    pub(super) fn save(
        &self,
        checkpoint: Checkpoint,
        count: usize,
    ) -> impl Future<Output = anyhow::Result<usize>> + use<'a> {
        let (delivery, context, batch) = (self.delivery, self.context, Arc::clone(&self.batch));
        let resumed = self.resumed;
        let deferred = checkpoint.deferred.iter();
        let held: BTreeSet<_> = deferred.filter_map(|deferred| deferred.waits_for.clone()).collect();
        async move {
            save(delivery, context, batch, checkpoint, count).await?;
            if delivery.services.resumed() != resumed {
                for origin in held {
                    delivery.wake(&origin).await?;
                }
            }
            Ok(count)
        }
    }

    /// Writes down what a decided member means for the log of deliveries and for its subscription.
    fn record(&self, sent: Sent, outcome: Outcome, checkpoint: &mut Checkpoint) {
        // Subscriptions that came with the notification are not stored, whatever their numbers.
        let is_stored = self.batch.audience != Audience::Inline;
        let refusal = sent.refusal();
        if outcome != Outcome::Delivered || self.batch.logs_all {
            let subscription = if is_stored { sent.id } else { -sent.id };
            let (status, detail) = (sent.report.status, sent.report.detail);
            checkpoint.deliveries.push(Delivery { subscription, outcome, status, detail });
        }
        if !is_stored {
            return;
        }
        match sent.report.verdict {
            Verdict::Delivered => {
                checkpoint.cleared.extend(sent.is_refused.then_some(sent.id));
                checkpoint.proven.extend((!sent.is_proven).then_some(sent.id));
            }
            Verdict::Gone if !sent.endpoint.is_empty() => {
                checkpoint.ended.push((sent.id, sent.endpoint));
            }
            Verdict::Gone
            | Verdict::Unauthorized
            | Verdict::TooLarge
            | Verdict::Rejected
            | Verdict::Forbidden
            | Verdict::Unresolvable
            | Verdict::Retry { .. }
            | Verdict::Held(_) => {
                checkpoint.refused.extend(refusal.map(|refusal| (sent.id, sent.endpoint, refusal)));
            }
        }
    }

    /// The jobs of members that are tried again.
    fn defer_all(&self, later: BTreeMap<Group, Vec<i64>>) -> anyhow::Result<Vec<Deferred>> {
        let mut all = Vec::new();
        for (Group { wait, attempt, slow, waits_for }, mut ids) in later {
            ids.sort_unstable();
            let parts = if waits_for.is_some() { parts(&ids) } else { vec![&*ids] };
            for part in parts {
                let deferred = self.defer(wait, attempt, slow.is_some(), part.to_vec())?;
                all.push(Deferred { waits_for: waits_for.clone(), ..deferred });
            }
        }
        Ok(all)
    }

    /// What becomes of a member; with `left`, one that would be tried again has that outcome.
    fn decide(&self, sent: &Sent, usual: Duration, left: Option<Outcome>) -> Next {
        if let Some(outcome) = sent.outcome {
            return Next::Decided(outcome);
        }
        let circumstances = Circumstances {
            attempt: self.batch.attempt,
            attempts: self.delivery.config.attempts,
            ttl: self.batch.ttl,
            age: age(&self.batch),
            time_left: self.batch.standing.time_left(),
            usual,
        };
        match (Outcome::of(sent.report.verdict), left) {
            (None, Some(outcome)) => Next::Decided(outcome),
            (Some(_), _) | (None, None) => next(sent.report.verdict, sent.host(), circumstances),
        }
    }

    /// Members that are tried again, and the job that does it.
    pub(super) fn defer(
        &self,
        seconds: u64,
        attempt: u32,
        is_slow: bool,
        ids: Vec<i64>,
    ) -> anyhow::Result<Deferred> {
        let is_small = self.delivery.config.is_small(self.batch.estimate.max(ids.len() as u64));
        let job = self.job(match is_small {
            true => queues::SMALL_QUEUE,
            false if is_slow => queues::SLOW_QUEUE,
            false => queues::RETRY_QUEUE,
        })?;
        let job = if seconds == 0 { job } else { job.due(Due::In(Duration::from_secs(seconds))) };
        Ok(Deferred { ids, job, attempt, waits_for: None })
    }

    /// A job for some of the members, in this queue unless they have a pace.
    pub(super) fn job(&self, queue: &'static str) -> anyhow::Result<NewJob> {
        let queue = if self.flow.pace().is_some() { queues::PACED_QUEUE } else { queue };
        let priority = Deliver::priority(self.batch.urgency.parse()?);
        Ok(Deliver::follow_up(self.context, self.batch.notification, queue, priority)?)
    }
}

impl Group {
    fn of(sent: &Sent, wait: Duration, attempt: u32) -> Self {
        let is_held = matches!(sent.report.verdict, Verdict::Held(_));
        Self {
            wait: wait.as_secs().max(1),
            attempt,
            slow: sent.is_slow.then(|| sent.host().to_owned()),
            waits_for: is_held.then(|| origin(&sent.endpoint).to_owned()),
        }
    }
}

/// Splits members that wait for a push service into parts that run in random order. One of them finds out whether the service
/// accepts messages again, and the first members of the list may be the ones that it refuses.
fn parts(ids: &[i64]) -> Vec<&[i64]> {
    if ids.len() < SCATTERED {
        return vec![ids];
    }
    let mut parts: Vec<_> = ids.chunks(ids.len().div_ceil(PARTS)).collect();
    fastrand::shuffle(&mut parts);
    parts
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
