//! One message to one member.

use std::sync::Arc;
use std::time::{Duration, Instant};

use perennial_webpush::{
    Endpoint, Keys, Message, Payload, Report, Reputation, Sender, Signer, Urgency, VapidKey, Verdict,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::DeliveryContext;
use crate::model::endpoint::{origin, refused};
use crate::model::outcome::Outcome;
use crate::model::queues;
use crate::model::refusals::{RefusalKind, SubscriptionRefusal};
use crate::model::template::Template;
use crate::store::{Batch, Member};
use crate::vapid::SiteKeys;

/// Longest wait of a message for the rate of its origin before it makes room for others.
const ORIGIN_WAIT: Duration = Duration::from_secs(5);
/// Longest wait of a message for a permit while messages to other push services wait, and the time until it is
/// tried again, in the queue for slow push services.
const TURN_WAIT: Duration = Duration::from_secs(1);
/// Longest reason why a message was not sent that is kept, in bytes.
const MAX_DETAIL: usize = 200;
/// Wait after a VAPID key was missing.
const NO_KEY: Duration = Duration::from_secs(300);

/// The message that a batch sends.
pub(crate) struct Outgoing {
    message: Message,
    template: Option<Template>,
    keys: Arc<SiteKeys>,
    /// Longest wait of a message for a permit when other messages need its place.
    patience: Option<Duration>,
    /// Cancelled when nothing more is sent: waiting messages are taken back.
    stopped: CancellationToken,
}

/// The result of a message to one member.
pub(crate) struct Sent {
    pub(crate) id: i64,
    /// The endpoint; empty when the message was delivered.
    pub(crate) endpoint: String,
    /// True when a message was delivered to the subscription before.
    pub(crate) is_proven: bool,
    /// True when the subscription was refused since.
    pub(crate) is_refused: bool,
    /// Signer of the message, if it was signed.
    pub(crate) signer: Option<Signer>,
    pub(crate) report: Report,
    /// The outcome, when it does not follow from the report.
    pub(crate) outcome: Option<Outcome>,
    /// True when the message has waited for a permit for too long: its push service takes no more at once.
    pub(crate) is_slow: bool,
}

impl Sent {
    /// Host of the push service; empty when the message was delivered.
    pub(crate) fn host(&self) -> &str {
        self.endpoint.split('/').nth(2).unwrap_or_default()
    }

    /// The result for a subscription that was deleted in the meantime.
    pub(crate) fn deleted(id: i64) -> Self {
        Self::of(id, Verdict::Gone, "deleted")
    }

    /// The result for a member whose row cannot be read.
    pub(crate) fn unreadable(id: i64, why: &str) -> Self {
        Self { outcome: Some(Outcome::Failed), ..Self::of(id, Verdict::Rejected, why) }
    }

    fn of(id: i64, verdict: Verdict, detail: &str) -> Self {
        let report = Report { verdict, status: None, detail: detail.to_owned(), counts: false };
        Self {
            id,
            endpoint: String::new(),
            is_proven: true,
            is_refused: false,
            signer: None,
            report,
            outcome: None,
            is_slow: false,
        }
    }

    /// The refusal that counts against the subscription, if there is one.
    pub(crate) fn refusal(&self) -> Option<SubscriptionRefusal> {
        let (kind, Signer(signer)) = RefusalKind::of(&self.report, self.host()).zip(self.signer)?;
        Some(SubscriptionRefusal { kind, signer, counts: self.report.counts })
    }
}

impl Outgoing {
    /// Makes the message of a batch. Its time to live is shortened by the time that its members have waited.
    pub(crate) fn new(
        delivery: &DeliveryContext,
        queue: &str,
        batch: &Batch,
        members: &[Member],
        waited: Duration,
        keys: Arc<SiteKeys>,
    ) -> anyhow::Result<Self> {
        let text = batch.payload.clone();
        let template = if batch.is_template { Template::parse(&text) } else { None };
        // The text of a template may be longer than the rendered payload.
        let payload = if template.is_some() { Payload::new("")? } else { Payload::new(text)? };
        let urgency: Urgency = batch.urgency.parse()?;
        let until = batch.standing.time_left();
        let waited = Duration::from_secs(waited.as_secs());
        let ttl = batch.ttl.saturating_sub(waited).min(until.unwrap_or(Duration::MAX));
        // The audience may have grown since it was estimated.
        let bulk = !delivery.config.is_small(batch.estimate.max(members.len() as u64));
        let mut message =
            Message::new(payload).ttl(ttl).urgency(urgency).bulk(bulk).http(batch.http.parse()?);
        if let Some(topic) = &batch.topic {
            message = message.topic(&topic.parse()?);
        }
        if batch.is_declarative {
            message = message.declarative();
        }
        let is_mixed =
            || members.windows(2).any(|pair| origin(&pair[0].endpoint) != origin(&pair[1].endpoint));
        let others_wait = bulk && (queue == queues::RETRY_QUEUE || is_mixed());
        let patience = others_wait.then_some(TURN_WAIT);
        Ok(Self { message, template, keys, patience, stopped: CancellationToken::new() })
    }

    /// Takes back the waiting messages.
    pub(crate) fn stop(&self) {
        self.stopped.cancel();
    }

    /// Sends to one member; `None` when the message was taken back before it was sent.
    pub(crate) async fn send(
        &self,
        delivery: &DeliveryContext,
        sender: &Sender,
        member: Member,
    ) -> Option<Sent> {
        let began = Instant::now();
        let Member { id, is_proven, is_refused, vapid_key, .. } = member;
        let Attempt { report, outcome, endpoint, is_slow } = self.attempt(delivery, sender, member).await?;
        delivery.meters.sent(report.verdict, began.elapsed());
        let mut sent = Sent { is_proven, is_refused, outcome, is_slow, ..Sent::of(id, report.verdict, "") };
        if report.verdict != Verdict::Delivered {
            sent.endpoint = endpoint.map(|endpoint| endpoint.url()).unwrap_or_default();
            sent.signer = self.keys.of(vapid_key).map(VapidKey::signer);
            debug!(
                subscription = id,
                verdict = ?report.verdict,
                status = report.status,
                detail = report.detail,
                "not delivered"
            );
        }
        sent.report = report;
        Some(sent)
    }

    async fn attempt(&self, delivery: &DeliveryContext, sender: &Sender, member: Member) -> Option<Attempt> {
        if self.stopped.is_cancelled() {
            return None;
        }
        let who = if member.is_proven { Reputation::Proven } else { Reputation::Unproven };
        // The endpoint was checked when it was stored; the policy may have changed since.
        let endpoint = match sender.endpoint(member.endpoint) {
            Ok(endpoint) => endpoint,
            Err(error) => return Some(Attempt::not_sent(Verdict::Forbidden, &refused(&error), None)),
        };
        let keys = match Keys::from_store(&member.p256dh, &member.auth) {
            Ok(keys) => keys,
            Err(error) => return Some(Attempt::not_sent(Verdict::Forbidden, &error, Some(endpoint))),
        };
        let Some(vapid) = self.keys.of(member.vapid_key) else {
            // The key may come with the next start: of another replica that has it, or of this one with a restored
            // copy.
            let detail = "the subscription was made with a VAPID key that is missing";
            return Some(Attempt::not_sent(Verdict::Held(NO_KEY), &detail, Some(endpoint)));
        };
        let rendered;
        let message = match &self.template {
            None => &self.message,
            Some(template) => match template.render(member.metadata.as_deref()) {
                Ok(text) => match Payload::new(text) {
                    Ok(payload) => {
                        rendered = self.message.with_payload(payload);
                        &rendered
                    }
                    Err(error) => return Some(Attempt::not_sent(Verdict::TooLarge, &error, Some(endpoint))),
                },
                Err(missing) => {
                    let detail = format!("its metadata has no {missing}");
                    let attempt = Attempt::not_sent(Verdict::Rejected, &detail, Some(endpoint));
                    return Some(Attempt { outcome: Some(Outcome::Incomplete), ..attempt });
                }
            },
        };
        if let Some(pace) = delivery.flows.origin(endpoint.origin()) {
            let waited = tokio::time::timeout(ORIGIN_WAIT, pace.wait(!message.is_bulk()));
            let waited = self.stopped.run_until_cancelled(waited).await?;
            // Other messages need the place.
            if waited.is_err() {
                let detail = "it waits for push.origin_rate";
                return Some(Attempt::not_sent(Verdict::Held(ORIGIN_WAIT), &detail, Some(endpoint)));
            }
        }
        let given_up = async {
            match self.patience {
                Some(patience) => drop(tokio::time::timeout(patience, self.stopped.cancelled()).await),
                None => self.stopped.cancelled().await,
            }
        };
        match sender.send_unless(&endpoint, &keys, message, vapid, who, given_up).await {
            Some(report) => Some(Attempt { report, outcome: None, endpoint: Some(endpoint), is_slow: false }),
            None if self.stopped.is_cancelled() => None,
            None => {
                let detail = "its push service takes no more at once";
                let attempt = Attempt::not_sent(Verdict::Held(TURN_WAIT), &detail, Some(endpoint));
                Some(Attempt { is_slow: true, ..attempt })
            }
        }
    }
}

/// Outcome of one attempt: these fields of [`Sent`].
struct Attempt {
    report: Report,
    outcome: Option<Outcome>,
    endpoint: Option<Endpoint>,
    is_slow: bool,
}

impl Attempt {
    fn not_sent(verdict: Verdict, why: &dyn ToString, endpoint: Option<Endpoint>) -> Self {
        let mut detail = why.to_string();
        detail.truncate(detail.floor_char_boundary(MAX_DETAIL));
        let report = Report { verdict, status: None, detail, counts: false };
        Self { report, outcome: None, endpoint, is_slow: false }
    }
}
