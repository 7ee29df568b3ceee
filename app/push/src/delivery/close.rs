//! The job that ends the waiting batches of a notification that was cancelled or has expired: for example a batch
//! that is to be tried again in an hour, or one that was not to begin before next month.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_workers::{Context, Job, JobOutcome, Options};
use uuid::Uuid;

use super::fanout::BUDGET;
use super::{DeliveryContext, deliver};
use crate::model::jobs::{Close, Deliver};
use crate::model::notification::Stage;
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::store::{Checkpoint, Recorded, RestOfBatch};

/// The epoch of this job's claim on a batch: later than that of any worker.
const LAST_EPOCH: i64 = i64::MAX / 2;
/// Time that a batch may take to stop, besides its sends in flight.
const STOP: Duration = Duration::from_secs(5);

impl Job for Close {
    const KIND: &'static str = "push.close";
    type Tools = Arc<DeliveryContext>;

    fn options() -> Options {
        Options {
            queue: queues::FAN_OUT_QUEUE,
            timeout: Duration::from_secs(300),
            budget: BUDGET,
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("notification {}", self.notification))
    }

    async fn run(&self, context: Context, delivery: Arc<DeliveryContext>) -> anyhow::Result<JobOutcome> {
        let (store, id) = (&delivery.store, self.notification);
        let Some(found) = store.any_notification(id).await?.filter(|found| found.ended_at.is_none()) else {
            return Ok(JobOutcome::Done);
        };
        let now = Timestamp::now().as_millisecond();
        let outcome = match found.expires_at {
            _ if found.state == Stage::Cancelled.as_str() => Outcome::Cancelled,
            Some(at) if at.as_millisecond() <= now => Outcome::Expired,
            _ => return Ok(JobOutcome::Done),
        };
        // Running batches stop by themselves, and record the outcomes of their last sends.
        let patience = delivery.config.send_timeout + STOP;
        let waited = Duration::from_millis(u64::try_from(now - self.since).unwrap_or_default());
        if found.started_at.is_some() && waited < patience {
            return Ok(JobOutcome::Snooze(patience.checked_sub(waited).unwrap_or_default()));
        }
        let mut last = store.give_up_fan_out(id, LAST_EPOCH, outcome, None).await?;
        loop {
            let batches = store.batches_of(id).await?;
            if batches.is_empty() {
                break;
            }
            for batch in batches {
                context.check()?;
                last |= self.end(&context, &delivery, batch, outcome).await?;
            }
        }
        if last {
            delivery.ended(id, found.site).await;
        }
        Ok(JobOutcome::Done)
    }
}

impl Close {
    /// Ends a batch. Returns true when it was the last one.
    async fn end(
        &self,
        context: &Context,
        delivery: &DeliveryContext,
        id: Uuid,
        outcome: Outcome,
    ) -> anyhow::Result<bool> {
        let Some(batch) = deliver::open(delivery, id, LAST_EPOCH).await? else { return Ok(false) };
        let (left, rest_after) = delivery.store.left(&batch, delivery.config.batch).await?;
        let mut checkpoint = Checkpoint {
            low_id: batch.low_id,
            above: batch.above.clone(),
            finished: true,
            ..Checkpoint::default()
        };
        if !left.is_empty() {
            checkpoint.outcomes = vec![(outcome, left.len())];
        }
        if let Some(after) = rest_after {
            let job = Deliver::follow_up(context, self.notification, queues::BULK_QUEUE, 0)?;
            checkpoint.rest = Some(RestOfBatch { after, job });
        }
        delivery.meters.decided(&checkpoint.outcomes);
        Ok(delivery.store.checkpoint(&batch, LAST_EPOCH, checkpoint).await? == Recorded::Last)
    }
}
