//! One message to one member.

use crate::model::endpoint::origin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use perennial_webpush::{
    Endpoint, Keys, Message, Payload, Report, Reputation, Sender, Signer, Urgency, VapidKey, Verdict,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::DeliveryContext;
use crate::model::outcome::Outcome;
use crate::model::refusals::{RefusalKind, SubscriptionRefusal};
use crate::model::template::Template;
use crate::store::{Batch, Member};
use crate::vapid::SiteKeys;

/// The longest that a message waits for the rate of its origin before others have its place.
const ORIGIN_WAIT: Duration = Duration::from_secs(5);
/// The longest that it waits for a turn while others wait that go to other push services, and how soon it is tried again: in
/// the queue of those that wait for slow ones.
const TURN_WAIT: Duration = Duration::from_secs(1);
/// How many bytes are kept of why a message was not sent.
const MAX_DETAIL: usize = 200;
/// After a VAPID key was missing.
const NO_KEY: Duration = Duration::from_secs(300);

/// What a batch sends.
pub(crate) struct Outgoing {
    message: Message,
    template: Option<Template>,
    keys: Arc<SiteKeys>,
    /// How long a message waits for a turn at most, if others are in need of its place.
    patience: Option<Duration>,
    /// Nothing more is sent: what waits is taken back.
    stopped: CancellationToken,
}

/// What came of it.
pub(crate) struct Sent {
    pub(crate) id: i64,
    /// Empty when it was delivered.
    pub(crate) endpoint: String,
    /// Whether something was delivered to it before, and whether it was refused since.
    pub(crate) is_proven: bool,
    pub(crate) is_refused: bool,
    /// What the message was signed with, if it was.
    pub(crate) signer: Option<Signer>,
    pub(crate) report: Report,
    /// When that is not for the report to say.
    pub(crate) outcome: Option<Outcome>,
    /// Whether it has waited for a turn for too long: its push service bears no more at once.
    pub(crate) is_slow: bool,
}

impl Sent {
    /// The host that it was for, if that was not delivered.
    pub(crate) fn host(&self) -> &str {
        self.endpoint.split('/').nth(2).unwrap_or_default()
    }

    /// Somebody else has deleted the subscription.
    pub(crate) fn deleted(id: i64) -> Self {
        Self::of(id, Verdict::Gone, "deleted")
    }

    /// Its row cannot be read.
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

    /// What is to be held against the subscription, if anything is.
    pub(crate) fn refusal(&self) -> Option<SubscriptionRefusal> {
        let (kind, Signer(signer)) = RefusalKind::of(&self.report, self.host()).zip(self.signer)?;
        Some(SubscriptionRefusal { kind, signer, counts: self.report.counts })
    }
}

impl Outgoing {
    /// The message of a batch, its time to live shortened by the time that its members have waited.
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
        // A template's own text may be longer than what comes of it.
        let payload = if template.is_some() { Payload::new("")? } else { Payload::new(text)? };
        let urgency: Urgency = batch.urgency.parse()?;
        let until = batch.standing.time_left();
        let waited = Duration::from_secs(waited.as_secs());
        let ttl = batch.ttl.saturating_sub(waited).min(until.unwrap_or(Duration::MAX));
        // It may have grown since it was estimated.
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
        let others_wait = bulk && (queue == crate::model::queues::RETRY_QUEUE || is_mixed());
        let patience = others_wait.then_some(TURN_WAIT);
        Ok(Self { message, template, keys, patience, stopped: CancellationToken::new() })
    }

    /// Takes back what waits for its turn.
    pub(crate) fn stop(&self) {
        self.stopped.cancel();
    }

    /// None when it was taken back before it was sent.
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
        // Checked when it was stored; the policy may have changed since.
        let endpoint = match sender.endpoint(member.endpoint) {
            Ok(endpoint) => endpoint,
            Err(error) => return Some(Attempt::not_sent(Verdict::Forbidden, &error, None)),
        };
        let keys = match Keys::from_store(&member.p256dh, &member.auth) {
            Ok(keys) => keys,
            Err(error) => return Some(Attempt::not_sent(Verdict::Forbidden, &error, Some(endpoint))),
        };
        let Some(vapid) = self.keys.of(member.vapid_key) else {
            // It may come with the next start: of another replica that has it, or of this one with a copy restored.
            let detail = "made with a VAPID key that is not there";
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
            // Others need the place.
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
                let detail = "its push service bears no more at once";
                let attempt = Attempt::not_sent(Verdict::Held(TURN_WAIT), &detail, Some(endpoint));
                Some(Attempt { is_slow: true, ..attempt })
            }
        }
    }
}

/// What came of one attempt, as [`Sent`] has it.
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
