//! The job that sends to one batch: how it is queued, and the outcomes of its members when it is given up. Its run
//! is in `batch_run.rs`.

use std::sync::Arc;
use std::time::Duration;

use perennial_host::sites::SiteId;
use perennial_store::pool::{set_apart, sql};
use perennial_webpush::Urgency;
use perennial_workers::{Context, Job, JobOutcome, NewJob, Options, queue};
use tracing::warn;
use uuid::Uuid;

use super::DeliveryContext;
use super::fanout::BUDGET;
use crate::config::Config;
use crate::delivery::batch_run::{BatchRun, CAREFUL, is_paused, pause, save};
use crate::model::jobs::Deliver;
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::store::{Batch, Checkpoint, Deferred, RestOfBatch, WaitingBatch, job};

impl Deliver {
    pub(crate) fn job(notification: Uuid, queue: &'static str, priority: i16) -> queue::Result<NewJob> {
        Ok(NewJob::new(&Self { notification })?.queue(queue).priority(priority))
    }

    /// Makes a job that follows from the job of `context`, and carries its trace.
    pub(crate) fn follow_up(
        context: &Context,
        notification: Uuid,
        queue: &'static str,
        priority: i16,
    ) -> queue::Result<NewJob> {
        Ok(context.follow_up(&Self { notification })?.queue(queue).priority(priority))
    }

    /// Makes a job for a batch that waits for a push service which is sent to again.
    pub(crate) fn woken(config: &Config, waiting: &WaitingBatch) -> sql::Result<NewJob> {
        let queue = match config.is_small(waiting.estimate) {
            _ if waiting.is_paced => queues::PACED_QUEUE,
            true => queues::SMALL_QUEUE,
            false => queues::RETRY_QUEUE,
        };
        // The stored urgency is one of four words.
        let urgency = waiting.urgency.parse().unwrap_or_default();
        let job = job(&Self { notification: waiting.notification })?.queue(queue);
        Ok(job.priority(Self::priority(urgency)))
    }

    /// Priority of the job: lower numbers run first.
    pub(crate) fn priority(urgency: Urgency) -> i16 {
        match urgency {
            Urgency::High => 0,
            Urgency::Normal => 10,
            Urgency::Low => 20,
            Urgency::VeryLow => 30,
        }
    }
}

impl Job for Deliver {
    const KIND: &'static str = "push.deliver";
    type Tools = Arc<DeliveryContext>;

    fn options() -> Options {
        // To a service that never answers, a batch takes batch / window times twice push.timeout: ten minutes.
        Options {
            queue: queues::BULK_QUEUE,
            timeout: Duration::from_secs(1800),
            budget: BUDGET,
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("notification {}", self.notification))
    }

    async fn run(&self, context: Context, delivery: Arc<DeliveryContext>) -> anyhow::Result<JobOutcome> {
        let Some(batch) = open(&delivery, context.id, context.epoch).await? else {
            return Ok(JobOutcome::Done);
        };
        if is_paused(&batch) {
            return Ok(JobOutcome::Snooze(pause(&batch)));
        }
        let members = delivery.store.members(&batch, delivery.config.batch).await?;
        if delivery.profiles.find(SiteId(batch.site)).is_none() {
            return Ok(JobOutcome::Snooze(super::NOT_SERVED));
        }
        let keys = delivery.vapid.of(SiteId(batch.site)).await?;
        let flow = delivery.flows.flow(batch.notification, batch.standing);
        let senders = delivery.senders.clone();
        senders
            .run(move |sender| async move {
                let run = BatchRun::new(&delivery, &context, &sender, &flow, batch, members, keys)?;
                run.run().await
            })
            .await
    }

    async fn give_up(
        &self,
        context: Context,
        delivery: Arc<DeliveryContext>,
        _reason: String,
    ) -> anyhow::Result<()> {
        let Some(batch) = open(&delivery, context.id, context.epoch).await? else { return Ok(()) };
        let (mut left, rest_after) = delivery.store.left(&batch, delivery.config.batch).await?;
        let mut checkpoint = Checkpoint { finished: true, ..Checkpoint::default() };
        let priority = Self::priority(batch.urgency.parse()?);
        if let Some(after) = rest_after {
            let job = Self::follow_up(&context, self.notification, queues::BULK_QUEUE, priority)?;
            checkpoint.rest = Some(RestOfBatch { after, job });
        }
        // The process crashed while this member was sent to alone: the others are not at fault.
        let suspect = batch.trying.filter(|id| left.contains(id));
        let attempt = batch.attempt + u32::from(suspect.is_none());
        let by_crashes = context.spent.recoveries >= BUDGET.recoveries && attempt < delivery.config.attempts;
        let failed = if by_crashes {
            if let Some(suspect) = suspect {
                warn!(subscription = suspect, "sending to this member crashes the process; it is left out");
                left.retain(|id| *id != suspect);
            }
            if !left.is_empty() {
                let job = Self::follow_up(&context, self.notification, queues::RETRY_QUEUE, priority)?;
                let job = NewJob { recoveries: CAREFUL, ..job };
                checkpoint.deferred = vec![Deferred { ids: left, job, attempt, waits_for: None }];
            }
            usize::from(suspect.is_some())
        } else {
            left.len()
        };
        if failed > 0 {
            checkpoint.outcomes = vec![(Outcome::Failed, failed)];
        }
        save(&delivery, &context, Arc::new(batch), checkpoint, 0).await?;
        Ok(())
    }
}

/// Opens a batch; `None` when nothing is left to do. An unreadable batch is given up, since its notification would
/// never end otherwise.
pub(crate) async fn open(delivery: &DeliveryContext, id: Uuid, epoch: i64) -> anyhow::Result<Option<Batch>> {
    match delivery.store.open_batch(id, epoch).await {
        Err(error @ sql::Error::Unreadable { .. }) => {
            set_apart("batches", &id.to_string(), &error);
            delivery.store.abandon_batch(id, epoch, error.to_string()).await?;
            Ok(None)
        }
        opened => Ok(opened?),
    }
}
