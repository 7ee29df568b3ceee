//! Webhooks: a signed request to the backend when a notification has ended, and for deleted subscriptions. The id is the
//! same for every attempt.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use jiff::Timestamp;
use perennial_host::http_client::HttpClient;
use perennial_host::sites::SiteId;
use perennial_runtime::backoff::Backoff;
use perennial_workers::state::Budget;
use perennial_workers::{Context, Job, JobOutcome, Options};
use serde_json::{Value, json};
use uuid::Uuid;

use super::DeliveryContext;
use crate::model::jobs::{Webhook, WebhookEvent};
use crate::model::profile::Registered;
use crate::model::queues;

/// Time limit of one run. The backend has `targets.push-webhooks.timeout` for its answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest and longest wait between two attempts.
const FIRST: Duration = Duration::from_secs(2);
const LAST: Duration = Duration::from_secs(3600);

/// All webhooks, by site and name.
#[derive(Clone, Debug)]
pub(crate) struct Webhooks {
    registered: Arc<HashMap<SiteId, BTreeMap<String, Registered>>>,
    http: HttpClient,
}

impl Webhooks {
    /// Makes the webhooks, which are called with `http`.
    pub(crate) fn new(registered: HashMap<SiteId, BTreeMap<String, Registered>>, http: HttpClient) -> Self {
        Self { registered: Arc::new(registered), http }
    }

    /// The names of a site's webhooks, for the error about an unknown name.
    pub(crate) fn names(&self, site: SiteId) -> Vec<&str> {
        self.registered.get(&site).into_iter().flatten().map(|(name, _)| name.as_str()).collect()
    }

    /// The webhook of a site with this name.
    pub(crate) fn get(&self, site: SiteId, name: &str) -> Option<&Registered> {
        self.registered.get(&site)?.get(name)
    }

    /// Returns true when the webhook wants to know which subscriptions are deleted.
    pub(crate) fn wants_pruned(&self, site: SiteId, name: &str) -> bool {
        self.get(site, name).is_some_and(|webhook| webhook.pruned)
    }

    async fn post(
        &self,
        webhook: &Registered,
        id: Uuid,
        body: String,
    ) -> anyhow::Result<(StatusCode, Option<Duration>)> {
        let request = self.http.post(webhook.url.to_string()).header("content-type", "application/json");
        let request = request.body(body).webhook(id, &webhook.secret);
        // The job tries again, with longer pauses.
        let answer = request.send().await?;
        Ok((answer.status(), answer.retry_after()))
    }
}

impl WebhookEvent {
    async fn told(&self, delivery: &DeliveryContext) -> anyhow::Result<Option<Value>> {
        Ok(match self {
            Self::Ended { notification } => {
                let found = delivery.store.any_notification(*notification).await?;
                found.map(
                    |found| json!({ "type": "notification.ended", "data": delivery.progress.view(found) }),
                )
            }
            Self::Pruned { notification, subscriptions } => Some(json!({
                "type": "subscriptions.pruned",
                "data": { "notification": notification, "subscriptions": subscriptions },
            })),
        })
    }
}

impl Job for Webhook {
    const KIND: &'static str = "push.webhook";
    type Tools = Arc<DeliveryContext>;

    fn options() -> Options {
        Options {
            queue: queues::WEBHOOK_QUEUE,
            timeout: TIMEOUT,
            budget: Budget {
                failures: 20,
                recoveries: 10,
                window: Duration::from_secs(72 * 3600),
                backoff: Backoff::new(FIRST, LAST),
            },
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("webhook {}", self.webhook))
    }

    async fn run(&self, context: Context, delivery: Arc<DeliveryContext>) -> anyhow::Result<JobOutcome> {
        if delivery.profiles.find(SiteId(self.site)).is_none() {
            return Ok(JobOutcome::Snooze(super::NOT_SERVED));
        }
        let Some(webhook) = delivery.webhooks.get(SiteId(self.site), &self.webhook) else {
            return Ok(JobOutcome::Dead(format!("there is no webhook {} in the settings", self.webhook)));
        };
        let Some(mut told) = self.event.told(&delivery).await? else {
            return Ok(JobOutcome::Skipped("the notification is not there any more".to_owned()));
        };
        told["timestamp"] = Timestamp::now().to_string().into();
        let (status, after) = delivery.webhooks.post(webhook, context.id, told.to_string()).await?;
        if status.is_success() {
            return Ok(JobOutcome::Done);
        }
        let reason = format!("the webhook {} answered {status}", self.webhook);
        Ok(match (status, after) {
            (StatusCode::GONE, _) => JobOutcome::Dead(reason),
            (_, Some(after)) => JobOutcome::Retry { after: after.clamp(FIRST, LAST), reason },
            _ => anyhow::bail!(reason),
        })
    }
}
