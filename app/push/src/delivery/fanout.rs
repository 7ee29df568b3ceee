//! The job that cuts a big audience into batches: ranges of ids, not lists, so that the audience may be of any
//! size. It stays only a few batches ahead of the batches that send, so that the batches of other notifications run
//! in between.

use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use perennial_workers::state::Budget;
use perennial_workers::{Context, Job, JobOutcome, Options};

use super::DeliveryContext;
use crate::config::Config;
use crate::model::jobs::{Deliver, FanOut};
use crate::model::notification::{NotificationStatus, Stage};
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::store::AddedBatches;

/// Number of batches of one notification that may wait or run, for each one that can run at once.
const AHEAD: usize = 4;
/// Number of batches that one transaction adds.
const AT_ONCE: usize = 16;
/// Wait before the next run when this many batches are ahead.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest wait before the next run.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Wait before the next run for a paused notification.
const PAUSED: Duration = Duration::from_secs(1);
/// A batch of a paced notification has the members that are due in this many seconds.
const PACED_SECONDS: i64 = 2;
/// A batch of a paced notification has at least this many members.
const PACED_SIZE: usize = 10;
/// At least this many batches of a paced notification may wait or run.
const PACED_AHEAD: usize = 4;

/// Wait before the next run: for a paced notification, the time in which a quarter of the members ahead may be sent.
fn pause(standing: NotificationStatus, ahead: usize) -> Duration {
    let Some((rate_milli, _)) = standing.rate else { return PAUSE };
    let ahead_ms = i64::try_from(ahead).unwrap_or(i64::MAX).saturating_mul(1_000_000) / rate_milli.max(1);
    Duration::from_millis(u64::try_from(ahead_ms / 4).unwrap_or_default()).clamp(PAUSE, LONGEST_PAUSE)
}

/// The limit by which the cutting is ahead of the sending.
struct Ahead {
    batches: usize,
    size: usize,
}

impl Ahead {
    fn of(standing: NotificationStatus, config: &Config) -> Self {
        let most = AHEAD * config.batches;
        let Some((rate_milli, _)) = standing.rate else { return Self { batches: most, size: config.batch } };
        let wanted = usize::try_from(rate_milli * PACED_SECONDS / 1000).unwrap_or(usize::MAX);
        let size = wanted.clamp(PACED_SIZE.min(config.batch), config.batch);
        Self { batches: (wanted / size).clamp(PACED_AHEAD, most.max(PACED_AHEAD)), size }
    }
}

impl Job for FanOut {
    const KIND: &'static str = "push.fan_out";
    type Tools = Arc<DeliveryContext>;

    fn options() -> Options {
        Options {
            queue: queues::FAN_OUT_QUEUE,
            timeout: Duration::from_secs(60),
            budget: BUDGET,
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("notification {}", self.notification))
    }

    async fn run(&self, context: Context, delivery: Arc<DeliveryContext>) -> anyhow::Result<JobOutcome> {
        let (store, id) = (&delivery.store, self.notification);
        let Some(mut fan_out) = store.open_fan_out(id, context.epoch).await? else {
            return Ok(JobOutcome::Done);
        };
        let standing = fan_out.standing;
        if let Some(outcome) = standing.over() {
            if store.give_up_fan_out(id, context.epoch, outcome, None).await? {
                delivery.ended(id, fan_out.site).await;
            }
            return Ok(JobOutcome::Done);
        }
        if standing.state == Stage::Paused {
            return Ok(JobOutcome::Snooze(PAUSED));
        }
        let Ahead { batches: most, size } = Ahead::of(standing, &delivery.config);
        let queue = if standing.rate.is_some() { queues::PACED_QUEUE } else { queues::BULK_QUEUE };
        while fan_out.ahead < most {
            context.check()?;
            let from = fan_out.fanned_to;
            let (mut batches, mut last) = (Vec::new(), false);
            while fan_out.ahead < most && batches.len() < AT_ONCE {
                let Some(upto) = store.next_page(&fan_out, size).await? else {
                    last = true;
                    break;
                };
                batches.push((upto, Deliver::follow_up(&context, id, queue, self.priority)?));
                fan_out.fanned_to = upto;
                fan_out.ahead += 1;
            }
            match store.add_batches(id, context.epoch, from, batches, last).await? {
                AddedBatches::Some => {}
                AddedBatches::NoMore => return Ok(JobOutcome::Done),
                AddedBatches::Last => {
                    delivery.ended(id, fan_out.site).await;
                    return Ok(JobOutcome::Done);
                }
            }
        }
        context.advanced();
        Ok(JobOutcome::Snooze(pause(standing, fan_out.ahead * size)))
    }

    async fn give_up(
        &self,
        context: Context,
        delivery: Arc<DeliveryContext>,
        reason: String,
    ) -> anyhow::Result<()> {
        let failed = Outcome::Failed;
        delivery.store.give_up_fan_out(self.notification, context.epoch, failed, Some(reason)).await?;
        Ok(())
    }
}

/// Failures here are store outages, so retries go on for long.
pub(crate) const BUDGET: Budget = Budget {
    failures: 50,
    recoveries: 4,
    window: Duration::from_secs(72 * 3600),
    backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(60)),
};
