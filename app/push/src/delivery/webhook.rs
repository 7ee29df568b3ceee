//! Webhooks: a signed request to the backend when a notification has ended, and for deleted subscriptions.
//!
//! Requests are signed by Standard Webhooks (1.0): `webhook-id`, `webhook-timestamp` and `webhook-signature`, which
//! is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`. The id is the same for every attempt.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use jiff::Timestamp;
use perennial_host::http_client::HttpClient;
use perennial_host::sites::SiteId;
use perennial_runtime::backoff::Backoff;
use perennial_workers::state::Budget;
use perennial_workers::{Context, Job, JobOutcome, Options};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use uuid::Uuid;

use super::DeliveryContext;
use crate::model::jobs::{Webhook, WebhookEvent};
use crate::model::profile::Registered;
use crate::model::queues;

/// Time that the backend has for its answer.
const TIMEOUT: Duration = Duration::from_secs(15);
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
        let timestamp = Timestamp::now().as_second();
        let request = self
            .http
            .post(webhook.url.to_string())
            .header("content-type", "application/json")
            .header("webhook-id", &id.to_string())
            .header("webhook-timestamp", &timestamp.to_string())
            .header("webhook-signature", &sign(&webhook.secret, id, timestamp, &body))
            .body(body)
            .timeout(TIMEOUT);
        // The job tries again, with longer pauses.
        let answer = request.retries(0).send().await?;
        Ok((answer.status(), answer.retry_after()))
    }
}

fn sign(secret: &SecretString, id: Uuid, timestamp: i64, body: &str) -> String {
    // Secrets of Standard Webhooks are often given as base64 behind this prefix.
    let text = secret.expose_secret();
    let decoded = text.strip_prefix("whsec_").and_then(|encoded| STANDARD.decode(encoded).ok());
    let key = hmac::Key::new(hmac::HMAC_SHA256, decoded.as_deref().unwrap_or(text.as_bytes()));
    let signature = hmac::sign(&key, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(signature))
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
            timeout: TIMEOUT * 2,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_standard_webhooks() {
        // Made with openssl dgst -sha256 -hmac over the text; the second is the specification's form of a secret.
        let id = Uuid::nil();
        let plain = sign(&"secret".to_owned().into(), id, 1_700_000_000, "{}");
        let encoded = sign(&format!("whsec_{}", STANDARD.encode("secret")).into(), id, 1_700_000_000, "{}");
        assert_eq!(plain, encoded);
        assert!(plain.starts_with("v1,") && plain.len() == 3 + 44);
    }
}
