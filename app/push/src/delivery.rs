//! The delivery of a notification, from its acceptance to its last outcome.
//!
//! ```text
//! fanout.rs     push.fan_out: the audience, cut into ranges of ids
//! deliver.rs    push.deliver: one range, sent on one of the threads of senders.rs,
//!   batch_run.rs  checkpointed (batch_progress.rs says how far it is); send.rs is one message to one member
//!   attempts.rs   the decision about a member after an attempt
//! close.rs      push.close: the waiting batches of a notification that was cancelled or has expired
//! webhook.rs    push.webhook: a request to the backend
//! services.rs   holds of push services, exchanged between replicas
//! progress.rs   the rate at which outcomes are decided
//! ```

mod attempts;
mod batch_progress;
mod batch_run;
mod close;
mod deliver;
mod fanout;
pub(crate) mod progress;
mod send;
pub(crate) mod senders;
pub(crate) mod services;
pub(crate) mod webhook;

use std::sync::Arc;
use std::time::Duration;

use perennial_host::module::Host;
use tracing::info;
use uuid::Uuid;

use crate::config::Config;
use crate::metrics::Meters;
use crate::model::jobs::{Close, Deliver, FanOut, Webhook};
use crate::model::profile::Profiles;
use crate::model::queues;
use crate::pacing::active::Flows;
use crate::store::PushStore;
use crate::vapid::VapidKeys;
use progress::ProgressRates;
use senders::Senders;
use services::HeldServices;
use webhook::Webhooks;

/// Maximum number of requests to the backend at once.
const WEBHOOKS: usize = 8;
/// Maximum number of audiences that are cut at once.
const FAN_OUTS: usize = 4;
/// Wait of a job for a site that this process does not serve: another process may, of a version that is just being
/// rolled out.
const NOT_SERVED: Duration = Duration::from_secs(30);

/// The state that the jobs of a delivery share.
#[derive(Debug)]
pub(crate) struct DeliveryContext {
    pub(crate) config: Arc<Config>,
    pub(crate) store: PushStore,
    pub(crate) profiles: Profiles,
    pub(crate) vapid: Arc<VapidKeys>,
    pub(crate) senders: Senders,
    pub(crate) flows: Flows,
    pub(crate) services: Arc<HeldServices>,
    pub(crate) webhooks: Webhooks,
    pub(crate) progress: ProgressRates,
    pub(crate) meters: Meters,
}

impl DeliveryContext {
    /// Logs the outcomes of a notification that has ended.
    async fn ended(&self, notification: Uuid, site: i64) {
        let Ok(Some(ended)) = self.store.notification(site, notification).await else { return };
        let outcomes = ended.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}"));
        let outcomes = outcomes.collect::<Vec<_>>().join(", ");
        let took = ended.ended_at.unwrap_or(ended.created_at).duration_since(ended.created_at);
        info!(%notification, outcomes, took_ms = took.as_millis(), "notification done");
    }
}

/// Registers the queues, the jobs and the tasks.
pub(crate) fn mount(host: &mut Host, delivery: &Arc<DeliveryContext>) {
    let config = &delivery.config;
    host.serve_queue(queues::FAN_OUT_QUEUE, FAN_OUTS);
    host.serve_queue(queues::BULK_QUEUE, config.batches);
    host.serve_queue(queues::SMALL_QUEUE, config.small_batches);
    host.serve_queue(queues::RETRY_QUEUE, config.retry_batches);
    host.serve_queue(queues::SLOW_QUEUE, config.retry_batches);
    host.serve_queue(queues::PACED_QUEUE, config.paced_batches);
    host.serve_queue(queues::WEBHOOK_QUEUE, WEBHOOKS);
    host.job::<Webhook>(Arc::clone(delivery));
    host.job::<Close>(Arc::clone(delivery));
    host.job::<FanOut>(Arc::clone(delivery));
    host.job::<Deliver>(Arc::clone(delivery));
    host.task("push flows", {
        let (flows, drain) = (delivery.flows.clone(), host.drain.clone());
        move || flows.clone().run(drain.clone())
    });
    host.task("push services", {
        let (delivery, drain) = (Arc::clone(delivery), host.drain.clone());
        move || services::run(Arc::clone(&delivery), drain.clone())
    });
    let senders = delivery.senders.clone();
    host.at_close(async move { senders.close().await });
}
