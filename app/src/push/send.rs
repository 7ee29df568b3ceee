//! One message to one member.

use std::sync::Arc;
use std::time::{Duration, Instant};

use perennial_webpush::{Endpoint, Keys, Message, Payload, Report, Sender, Urgency, Verdict};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Tools;
use super::outcome::Outcome;
use super::store::{Batch, Member};
use super::template::Template;
use super::vapid::SiteKeys;

/// The longest that a message waits for the rate of its origin before others have its place.
const ORIGIN_WAIT: Duration = Duration::from_secs(5);
/// The longest that it waits for a turn while others wait that go to other push services, and how soon it is tried again: in
/// the queue of those that wait for slow ones.
const TURN_WAIT: Duration = Duration::from_secs(1);
/// After a VAPID key was missing.
const NO_KEY: Duration = Duration::from_secs(300);

/// What a batch sends.
pub(super) struct Outgoing {
    message: Message,
    template: Option<Template>,
    keys: Arc<SiteKeys>,
    /// How long a message waits for a turn at most, if others are in need of its place.
    patience: Option<Duration>,
    /// Nothing more is sent: what waits is taken back.
    stopped: CancellationToken,
}

/// What came of it.
pub(super) struct Sent {
    pub(super) id: i64,
    /// Empty when it was delivered.
    pub(super) endpoint: String,
    pub(super) strikes: u32,
    pub(super) report: Report,
    /// When that is not for the report to say.
    pub(super) outcome: Option<Outcome>,
    /// Whether it has waited for a turn for too long: its push service bears no more at once.
    pub(super) is_slow: bool,
}

impl Sent {
    /// The host that it was for, if that was not delivered.
    pub(super) fn host(&self) -> &str {
        self.endpoint.split('/').nth(2).unwrap_or_default()
    }

    /// Somebody else has deleted the subscription.
    pub(super) fn deleted(id: i64) -> Self {
        let report = Report { verdict: Verdict::Gone, status: None, detail: "deleted".to_owned() };
        Self { id, endpoint: String::new(), strikes: 0, report, outcome: None, is_slow: false }
    }
}

impl Outgoing {
    /// The message of a batch, its time to live shortened by the time that its members have waited.
    pub(super) fn new(
        tools: &Tools,
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
        let bulk = !tools.config.is_small(batch.estimate.max(members.len() as u64));
        let mut message =
            Message::new(payload).ttl(ttl).urgency(urgency).bulk(bulk).http(batch.http.parse()?);
        if let Some(topic) = &batch.topic {
            message = message.topic(&topic.parse()?);
        }
        if batch.is_declarative {
            message = message.declarative();
        }
        let is_mixed = || members.windows(2).any(|pair| origin(&pair[0]) != origin(&pair[1]));
        let others_wait = bulk && (queue == super::RETRY_QUEUE || is_mixed());
        let patience = others_wait.then_some(TURN_WAIT);
        Ok(Self { message, template, keys, patience, stopped: CancellationToken::new() })
    }

    /// Takes back what waits for its turn.
    pub(super) fn stop(&self) {
        self.stopped.cancel();
    }

    /// None when it was taken back before it was sent.
    pub(super) async fn send(&self, tools: &Tools, sender: &Sender, member: Member) -> Option<Sent> {
        let began = Instant::now();
        let Member { id, strikes, .. } = member;
        let Attempt { report, outcome, endpoint, is_slow } = self.attempt(tools, sender, member).await?;
        tools.meters.sent(report.verdict, began.elapsed());
        if report.verdict == Verdict::Delivered {
            return Some(Sent { id, endpoint: String::new(), strikes, report, outcome, is_slow });
        }
        let endpoint = endpoint.map(|endpoint| endpoint.url()).unwrap_or_default();
        debug!(
            subscription = id,
            verdict = ?report.verdict,
            status = report.status,
            detail = report.detail,
            "not delivered"
        );
        Some(Sent { id, endpoint, strikes, report, outcome, is_slow })
    }

    async fn attempt(&self, tools: &Tools, sender: &Sender, member: Member) -> Option<Attempt> {
        if self.stopped.is_cancelled() {
            return None;
        }
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
        if let Some(pace) = tools.flows.origin(endpoint.origin()) {
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
        match sender.send_unless(&endpoint, &keys, message, vapid, given_up).await {
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
        let report = Report { verdict, status: None, detail: why.to_string() };
        Self { report, outcome: None, endpoint, is_slow: false }
    }
}

/// The scheme and the host of an endpoint.
fn origin(member: &Member) -> &str {
    let ends = member.endpoint.match_indices('/').nth(2).map_or(member.endpoint.len(), |(at, _)| at);
    &member.endpoint[..ends]
}
