//! `POST /notify`: a notification is checked, stored together with the job that begins it, and only then accepted.

use crate::model::notification::Stage;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use parking_lot::Mutex;
use perennial_server::http::problem::{Errors, FieldError, Problem};
use perennial_server::http::scope::RequestScope;
use perennial_webpush::{HttpVersion, Payload, Topic, Urgency};
use perennial_workers::NewJob;
use perennial_workers::queue::Due;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};
use tracing::info;
use utoipa::ToSchema;
use uuid::Uuid;

use super::ApiState;
use crate::api::subscriptions::{PushSubscription, USER_WANTED, check_subscription, is_user};
use crate::config::MAX_TTL;
use crate::metrics;
use crate::model::audience::Audience;
use crate::model::jobs::Deliver;
use crate::model::jobs::FanOut;
use crate::model::queues::BULK_QUEUE;
use crate::model::queues::PACED_QUEUE;
use crate::model::queues::SMALL_QUEUE;
use crate::model::tags::TagExpression;
use crate::model::template::{Parsed, Template};
use crate::scopes::NotifyScope;
use crate::store::{Accepted, Idempotency, NewNotification, Recipient, SendPlan};
use perennial_host::access::Authorized;
use perennial_host::api::{Json, Result, trace};
use perennial_host::settings::parse_duration;
use perennial_host::sites::SiteId;

/// The most users in one audience.
const MAX_USERS: usize = 1000;
/// The most ids in one audience.
const MAX_IDS: usize = 10_000;
/// The most subscriptions that come with a notification.
const MAX_INLINE: usize = 1000;
/// Number of hosts of these subscriptions that are looked up at once.
const LOOKUPS: usize = 32;
/// Largest payload, in bytes, that all services on the way take; some, such as bridges to mobile phones, refuse a
/// longer one.
const SAFE_PAYLOAD: usize = 2700;
/// The longest ramp.
const MAX_RAMP: Duration = Duration::from_secs(24 * 3600);
/// How far ahead a notification may be scheduled, in seconds.
const MAX_AHEAD: i64 = 366 * 24 * 3600;
/// The longest idempotency key.
const MAX_IDEMPOTENCY_KEY: usize = 255;

/// A notification and its audience.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NotifyRequest {
    to: To,
    /// The notification that the browser shows: `title`, and any option of `showNotification`. A click opens `url`.
    #[schema(value_type = Option<Object>, example = json!({"title": "Hello", "body": "World", "url": "/news"}))]
    notification: Option<Map<String, Value>>,
    /// Instead of `notification`: any JSON value or a text, for your own service worker. An empty text is sent as a
    /// message without a body.
    payload: Option<Value>,
    /// How long push services keep the message for a device that is away, in seconds: 0 to 2419200.
    #[schema(minimum = 0, maximum = 2_419_200)]
    ttl: Option<i64>,
    /// The urgency: very-low, low, normal or high.
    #[schema(example = "normal", pattern = "^(very-low|low|normal|high)$")]
    urgency: Option<String>,
    /// A later notification with the same topic replaces this one while it waits at the push service.
    topic: Option<String>,
    /// Sends per second, evenly spread: 0.5 is one every two seconds. Without a rate, messages are sent as fast as push
    /// services take them.
    #[schema(exclusive_minimum = 0.0, maximum = 1_000_000.0, example = 500.0)]
    rate: Option<f64>,
    /// Time in which the rate rises linearly from 0.
    #[schema(example = "30s")]
    ramp_up: Option<String>,
    /// Time before which nothing is sent.
    #[schema(value_type = Option<String>, format = DateTime)]
    at: Option<Timestamp>,
    /// Time after which nothing is sent. Subscriptions that have not been sent to by then are counted as `expired`.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires: Option<Timestamp>,
    /// Name of a webhook in the settings that is called when the notification has ended.
    webhook: Option<String>,
    /// The deliveries that `/deliveries` will list: failures (the default) or all.
    log: Option<String>,
    /// Whether browsers that support it may show the notification without a service worker; this needs
    /// `notification.url`.
    declarative: Option<bool>,
    /// The version of HTTP to send with: auto, 1 or 2.
    #[serde(default, deserialize_with = "version")]
    http: Option<String>,
    /// Whether `{{name}}` in the text is replaced with the value from the metadata of each subscription; true if
    /// absent. A backslash before the braces makes one such place plain text.
    template: Option<bool>,
    /// Only counts the audience and sends nothing.
    dry_run: Option<bool>,
}

/// Reads a version of HTTP that is given as a text or as a number.
fn version<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<String>, D::Error> {
    Ok(match Option::<Value>::deserialize(from)? {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text),
        Some(other) => Some(other.to_string()),
    })
}

/// The audience of a notification: exactly one of these.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum To {
    /// Every subscription; the value is `true`.
    All(bool),
    /// The subscriptions of one user.
    User(String),
    /// The subscriptions of up to 1000 users.
    Users(Vec<String>),
    /// The subscriptions whose tags match an expression: `news and fr and not muted`.
    Tags(String),
    /// Up to 10000 subscriptions, by id.
    Subscriptions(Vec<i64>),
    /// Up to 1000 subscriptions that are not stored.
    Push(Vec<PushSubscription>),
}

impl<'de> Deserialize<'de> for To {
    /// Like the derived implementation, but an object with two audiences gets an error of its own, not that of invalid
    /// JSON.
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        from.deserialize_map(OneOf)
    }
}

struct OneOf;

impl<'de> de::Visitor<'de> for OneOf {
    type Value = To;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with one of {NAMES}")
    }

    fn visit_map<M: de::MapAccess<'de>>(self, mut map: M) -> std::result::Result<To, M::Error> {
        let mut found: Option<(String, To)> = None;
        while let Some(name) = map.next_key::<String>()? {
            let to = match name.as_str() {
                "all" => To::All(map.next_value()?),
                "user" => To::User(map.next_value()?),
                "users" => To::Users(map.next_value()?),
                "tags" => To::Tags(map.next_value()?),
                "subscriptions" => To::Subscriptions(map.next_value()?),
                "push" => To::Push(map.next_value()?),
                other => return Err(de::Error::custom(format!("one of {NAMES}; there is no {other}"))),
            };
            if let Some((first, _)) = found {
                return Err(de::Error::custom(format!("one of {NAMES}; there are {first} and {name}")));
            }
            found = Some((name, to));
        }
        found.map(|(_, to)| to).ok_or_else(|| de::Error::custom(format!("one of {NAMES}")))
    }
}

const NAMES: &str = "all, user, users, tags, subscriptions, push";

/// An accepted notification.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Notified {
    id: Uuid,
    /// The state of the notification: scheduled or queued.
    #[schema(example = "queued")]
    state: &'static str,
    /// The value of `state` under its former name.
    #[schema(deprecated)]
    status: &'static str,
    /// Estimated number of subscriptions in the audience.
    audience: u64,
    /// Possible mistakes in the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// The audience that a notification would have.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DryRun {
    dry_run: bool,
    audience: u64,
    /// Number of subscriptions that would get nothing because their metadata lacks a value that the text needs. Present
    /// only for a text that has such places.
    #[serde(skip_serializing_if = "Option::is_none")]
    incomplete: Option<u64>,
    warnings: Vec<String>,
}

/// Sends a notification
///
/// Needs a key with the scope `notify`. After a 202, the notification is stored and will be sent, even if this process
/// crashes; its progress is at `Location`. With an `Idempotency-Key`, repeating the request is safe for 24 hours.
#[utoipa::path(
    post, path = "/notify", operation_id = "notify", request_body = NotifyRequest,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = ACCEPTED, body = Notified), (status = OK, body = DryRun, description = "A dry run"))
)]
pub(crate) async fn notify(
    Authorized { caller, .. }: Authorized<NotifyScope>,
    scope: RequestScope,
    State(api): State<ApiState>,
    headers: HeaderMap,
    Json(request): Json<NotifyRequest>,
) -> Result<Response> {
    let idempotency = idempotency(&headers, &caller.key, &request)?;
    let _only_one = match &idempotency {
        Some(promise) => Some(api.in_flight.enter(&promise.api_key, &promise.key)?),
        None => None,
    };
    if let Some(promise) = &idempotency {
        // The lookup comes before all checks: a request that was valid when it was accepted may be invalid now.
        match api.store.accepted_before(promise.clone()).await? {
            Some(Accepted::Before(id, estimate, stage)) => {
                return Ok(accepted(id, estimate, stage, Vec::new()));
            }
            Some(Accepted::Conflict) => return Err(conflict().into()),
            Some(Accepted::Now) | None => {}
        }
    }
    let id = Uuid::now_v7();
    let dry_run = request.dry_run.unwrap_or_default();
    let Checked {
        audience,
        recipients,
        payload,
        ttl,
        urgency,
        topic,
        plan,
        is_template,
        needed,
        mut warnings,
    } = check(&api, caller.site, id, request).await?;

    let (estimate, watermark) = if audience == Audience::Inline {
        (recipients.len() as u64, i64::try_from(recipients.len()).unwrap_or(i64::MAX))
    } else {
        let (count, watermark) = api.audiences.estimate(caller.site, &audience).await?;
        if !count.is_exact {
            warnings
                .push("the audience takes too long to count, so the number shown is an upper bound".into());
        }
        (count.members, watermark)
    };
    if dry_run {
        let incomplete = match needed.is_empty() {
            true => None,
            false if audience == Audience::Inline => Some(estimate),
            false => api.store.count_incomplete(caller.site.0, &audience, watermark, &needed).await?,
        };
        return Ok(axum::Json(DryRun { dry_run, audience: estimate, incomplete, warnings }).into_response());
    }
    let is_small = api.config.is_small(estimate);
    let direct = audience == Audience::Inline || is_small;
    let priority = Deliver::priority(urgency);
    let job = if plan.rate_milli.is_some() && direct {
        Deliver::job(id, PACED_QUEUE, priority)
    } else if is_small {
        Deliver::job(id, SMALL_QUEUE, priority)
    } else if direct {
        Deliver::job(id, BULK_QUEUE, priority)
    } else {
        NewJob::new(&FanOut { notification: id, priority }).map(|job| job.priority(priority))
    };
    let mut new_job = job?.trace(trace(&scope));
    if let Some(at) = plan.due_at {
        new_job = new_job.due(Due::At(Timestamp::from_millisecond(at).unwrap_or_default()));
    }
    let state = Stage::first(plan.due_at);
    api.store.admit(&new_job)?;
    let job = new_job.id;
    let new = NewNotification {
        id,
        site: caller.site.0,
        audience,
        recipients,
        payload,
        ttl,
        urgency: urgency.as_str(),
        topic,
        plan,
        is_template,
        estimate,
        watermark,
        job: new_job,
        direct,
        idempotency,
    };
    match api.store.accept(new).await? {
        Accepted::Now => {
            metrics::accepted();
            info!(notification = %id, %job, audience = estimate, "accepted");
            Ok(accepted(id, estimate, state, warnings))
        }
        Accepted::Before(id, estimate, stage) => Ok(accepted(id, estimate, stage, Vec::new())),
        Accepted::Conflict => Err(conflict().into()),
    }
}

fn conflict() -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "this Idempotency-Key was used for another request")
}

fn accepted(id: Uuid, audience: u64, state: Stage, warnings: Vec<String>) -> Response {
    let body = axum::Json(Notified { id, state: state.as_str(), status: state.as_str(), audience, warnings });
    (StatusCode::ACCEPTED, [(header::LOCATION, format!("/notifications/{id}"))], body).into_response()
}

/// Idempotency keys of requests that are being accepted now.
#[derive(Clone, Debug, Default)]
pub(crate) struct AcceptingKeys(Arc<Mutex<HashSet<(String, String)>>>);

/// An idempotency key in use; it is released on drop.
struct Entered {
    in_flight: AcceptingKeys,
    key: (String, String),
}

impl AcceptingKeys {
    fn enter(&self, api_key: &str, key: &str) -> std::result::Result<Entered, Problem> {
        let key = (api_key.to_owned(), key.to_owned());
        if self.0.lock().insert(key.clone()) {
            return Ok(Entered { in_flight: self.clone(), key });
        }
        let detail = "a request with this Idempotency-Key is being accepted just now";
        Err(Problem::new(StatusCode::CONFLICT, detail).retry_after(Duration::from_secs(1)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.in_flight.0.lock().remove(&self.key);
    }
}

fn idempotency(
    headers: &HeaderMap,
    api_key: &str,
    request: &NotifyRequest,
) -> std::result::Result<Option<Idempotency>, Problem> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= MAX_IDEMPOTENCY_KEY);
    let wanted =
        || FieldError::new("Idempotency-Key", format!("1 to {MAX_IDEMPOTENCY_KEY} printable characters"));
    let key = key.ok_or_else(wanted)?.to_owned();
    // The fingerprint covers the parsed request, not its bytes: white space and the order of fields do not matter.
    let canonical = serde_json::to_value(request).unwrap_or_default().to_string();
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    Ok(Some(Idempotency { api_key: api_key.to_owned(), key, fingerprint }))
}

/// A request that has passed all checks.
struct Checked {
    audience: Audience,
    recipients: Vec<Recipient>,
    payload: Vec<u8>,
    ttl: Duration,
    urgency: Urgency,
    topic: Option<String>,
    plan: SendPlan,
    is_template: bool,
    /// Names of the metadata values without which a subscription gets nothing.
    needed: Vec<String>,
    warnings: Vec<String>,
}

async fn check(
    api: &ApiState,
    site: SiteId,
    id: Uuid,
    request: NotifyRequest,
) -> std::result::Result<Checked, Problem> {
    let mut errors = Errors::default();
    let plan = plan(api, site, &request, &mut errors);
    let (audience, recipients) = audience(api, request.to, &mut errors).await;
    let payload = payload(id, request.notification, request.payload, plan.is_declarative, &mut errors);
    let Text { payload, is_template, needed } = text(payload, request.template.unwrap_or(true));
    let warnings = warnings(&payload, &needed);
    let ttl = match request.ttl {
        None => api.config.ttl,
        Some(seconds) => {
            u64::try_from(seconds).ok().map(Duration::from_secs).filter(|ttl| *ttl <= MAX_TTL).unwrap_or_else(
                || {
                    errors.push(FieldError::new("ttl", format!("seconds from 0 to {}", MAX_TTL.as_secs())));
                    Duration::ZERO
                },
            )
        }
    };
    let urgency =
        request.urgency.map(|urgency| urgency.parse::<Urgency>()).transpose().unwrap_or_else(|_| {
            errors.push(FieldError::new("urgency", "very-low, low, normal or high"));
            None
        });
    if let Some(Err(error)) = request.topic.as_ref().map(|topic| topic.parse::<Topic>()) {
        errors.push(FieldError::new("topic", error.to_string()));
    }
    if !errors.is_empty() {
        return Err(errors.into());
    }
    Ok(Checked {
        audience,
        recipients,
        payload,
        ttl,
        urgency: urgency.unwrap_or_default(),
        topic: request.topic,
        plan,
        is_template,
        needed,
        warnings,
    })
}

/// A payload as it is stored.
struct Text {
    payload: Vec<u8>,
    is_template: bool,
    needed: Vec<String>,
}

fn text(payload: Vec<u8>, may_be_template: bool) -> Text {
    let plain = |payload| Text { payload, is_template: false, needed: Vec::new() };
    if !may_be_template {
        return plain(payload);
    }
    match Template::read(&payload) {
        Parsed::Plain(payload) => plain(payload),
        Parsed::Template(template) => {
            let needed = template.needed().into_iter().map(str::to_owned).collect();
            Text { payload, is_template: true, needed }
        }
    }
}

/// Returns warnings about possible mistakes in the request.
fn warnings(payload: &[u8], needed: &[String]) -> Vec<String> {
    let long = (payload.len() > SAFE_PAYLOAD).then(|| {
        let bytes = payload.len();
        format!("the payload has {bytes} bytes: some services on the way take no more than {SAFE_PAYLOAD}")
    });
    let places = (!needed.is_empty()).then(|| {
        let names = needed.join(", ");
        format!(
            "subscriptions without these values in their metadata get nothing: {names}; {{{{name|default}}}} gives one a default, and \"template\": false sends the text as it is"
        )
    });
    long.into_iter().chain(places).collect()
}

/// Reads from the request how and when to send, and which webhook to call.
fn plan(api: &ApiState, site: SiteId, request: &NotifyRequest, errors: &mut Errors) -> SendPlan {
    let mut plan = SendPlan::default();
    let mut wanted = |field: &str, wanted: &str| errors.push(FieldError::new(field, wanted));
    if let Some(rate) = request.rate {
        plan.rate_milli = rate_milli(rate);
        if plan.rate_milli.is_none() {
            wanted("rate", RATE_WANTED);
        }
    }
    if let Some(text) = &request.ramp_up {
        match parse_duration(text).filter(|ramp| *ramp <= MAX_RAMP) {
            Some(_) if request.rate.is_none() => wanted("ramp_up", "together with a rate"),
            Some(ramp) => plan.ramp_ms = i64::try_from(ramp.as_millis()).unwrap_or(i64::MAX),
            None => wanted("ramp_up", "a duration such as 30s, at most 24h"),
        }
    }
    let now = Timestamp::now();
    if let Some(at) = request.at {
        if at.duration_since(now).as_secs() > MAX_AHEAD {
            wanted("at", "a time within a year");
        }
        // A notification with a time in the past is sent now.
        plan.due_at = (at > now).then(|| at.as_millisecond());
    }
    if let Some(expires) = request.expires {
        if expires <= now || request.at.is_some_and(|at| expires <= at) {
            wanted("expires", "a time to come, and after `at`");
        }
        plan.expires_at = Some(expires.as_millisecond());
    }
    if let Some(name) = &request.webhook {
        if api.webhooks.get(site, name).is_none() {
            let names = api.webhooks.names(site).join(", ");
            let known = if names.is_empty() { "it has none".to_owned() } else { names };
            wanted("webhook", &format!("the name of a webhook of this site: {known}"));
        }
        plan.webhook = Some(name.clone());
    }
    match request.log.as_deref() {
        None | Some("failures") => {}
        Some("all") => plan.logs_all = true,
        Some(_) => wanted("log", "failures or all"),
    }
    match request.http.as_deref().map(str::parse::<HttpVersion>) {
        None => {}
        Some(Ok(http)) => plan.http = http,
        Some(Err(error)) => wanted("http", &error.to_string()),
    }
    plan.is_declarative = request.declarative.unwrap_or_default();
    if plan.is_declarative && request.notification.is_none() {
        wanted("declarative", "only together with a notification");
    }
    plan
}

/// Description of a valid rate, for error messages.
pub(crate) const RATE_WANTED: &str =
    "sends per second: more than 0, up to 1000000, with up to three decimals";

/// Converts sends per second to sends per 1000 seconds; `None` when the rate is out of range.
#[expect(clippy::cast_possible_truncation, reason = "within the bounds")]
pub(crate) fn rate_milli(rate: f64) -> Option<i64> {
    (0.001..=1e6).contains(&rate).then(|| (rate * 1e3).round() as i64)
}

async fn audience(api: &ApiState, to: To, errors: &mut Errors) -> (Audience, Vec<Recipient>) {
    let mut wanted = |field: String, wanted: String| errors.push(FieldError::new(field, wanted));
    let audience = match to {
        To::All(all) => {
            if !all {
                wanted("to.all".to_owned(), "true".to_owned());
            }
            Audience::All
        }
        To::User(user) => {
            if !is_user(&user) {
                wanted("to.user".to_owned(), USER_WANTED.to_owned());
            }
            Audience::User(user)
        }
        To::Users(users) => {
            if users.is_empty() || users.len() > MAX_USERS {
                wanted("to.users".to_owned(), format!("1 to {MAX_USERS} user ids"));
            } else {
                for (index, _) in users.iter().enumerate().filter(|(_, user)| !is_user(user)) {
                    wanted(format!("to.users[{index}]"), USER_WANTED.to_owned());
                }
            }
            Audience::Users(users)
        }
        To::Tags(text) => {
            if let Err(error) = TagExpression::parse(&text) {
                errors.push(FieldError::new("to.tags", error.wanted).at(error.position));
            }
            Audience::Tags(text)
        }
        To::Subscriptions(ids) => {
            if ids.is_empty() || ids.len() > MAX_IDS {
                wanted("to.subscriptions".to_owned(), format!("1 to {MAX_IDS} ids"));
            }
            Audience::Subscriptions(ids)
        }
        To::Push(subscriptions) => {
            if subscriptions.is_empty() || subscriptions.len() > MAX_INLINE {
                wanted("to.push".to_owned(), format!("1 to {MAX_INLINE} subscriptions"));
                return (Audience::Inline, Vec::new());
            }
            return (Audience::Inline, inline(api, &subscriptions, errors).await);
        }
    };
    (audience, Vec::new())
}

/// Checks subscriptions that came with the notification, and the addresses of each of their hosts once.
async fn inline(api: &ApiState, subscriptions: &[PushSubscription], errors: &mut Errors) -> Vec<Recipient> {
    let mut hosts = BTreeMap::new();
    let mut recipients = Vec::<Recipient>::new();
    let mut places = HashMap::new();
    for (index, subscription) in subscriptions.iter().enumerate() {
        if errors.is_full() {
            break;
        }
        let field = format!("to.push[{index}]");
        if let Some((endpoint, keys)) = check_subscription(api, &field, subscription, errors) {
            let recipient = Recipient { endpoint: endpoint.url(), keys };
            // Two entries with one endpoint are one browser, and the later one has the newer keys.
            match places.entry(recipient.endpoint.clone()) {
                Entry::Occupied(place) => recipients[*place.get()] = recipient,
                Entry::Vacant(place) => {
                    place.insert(recipients.len());
                    recipients.push(recipient);
                }
            }
            hosts.entry(endpoint.host().to_owned()).or_insert((field, endpoint));
        }
    }
    let looked_up = futures_util::stream::iter(hosts.into_values().map(async |(field, endpoint)| {
        let checked = api.senders.any().check_addresses(&endpoint).await;
        checked.err().map(|error| FieldError::new(format!("{field}.endpoint"), error.to_string()))
    }));
    let found: Vec<_> = looked_up.buffer_unordered(LOOKUPS).filter_map(std::future::ready).collect().await;
    found.into_iter().for_each(|error| errors.push(error));
    recipients
}

/// Converts a notification to the form that browsers show without a service worker (Push API, section 3.3).
fn declared(mut notification: Map<String, Value>, errors: &mut Errors) -> Value {
    let navigate = notification.remove("url").or_else(|| notification.remove("navigate"));
    match navigate.as_ref().and_then(Value::as_str) {
        Some(url) if is_web(url) => {}
        _ => errors.push(FieldError::new(
            "notification.url",
            "the URL that a click opens, by http or https: a declarative notification needs it",
        )),
    }
    let mut message = Map::new();
    message.insert("web_push".to_owned(), 8030.into());
    // `app_badge` and `mutable` stand beside the notification, not inside it.
    if let Some(badge) = notification.remove("app_badge") {
        if badge.as_u64().is_none() {
            errors.push(FieldError::new("notification.app_badge", "a whole number from 0"));
        }
        message.insert("app_badge".to_owned(), badge);
    }
    if let Some(mutable) = notification.remove("mutable") {
        if !mutable.is_boolean() {
            errors.push(FieldError::new("notification.mutable", "true or false"));
        }
        message.insert("mutable".to_owned(), mutable);
    }
    notification.insert("navigate".to_owned(), navigate.unwrap_or_default());
    message.insert("notification".to_owned(), notification.into());
    Value::Object(message)
}

/// Returns true for a URL, absolute or relative to a page, with the scheme http or https.
fn is_web(url: &str) -> bool {
    let page = url::Url::parse("https://page.invalid/");
    let opened = page.and_then(|page| page.join(url));
    !url.is_empty() && opened.is_ok_and(|url| matches!(url.scheme(), "http" | "https"))
}

fn payload(
    id: Uuid,
    notification: Option<Map<String, Value>>,
    payload: Option<Value>,
    declarative: bool,
    errors: &mut Errors,
) -> Vec<u8> {
    let (field, text) = match (notification, payload) {
        (Some(mut notification), None) => {
            if notification.get("title").and_then(Value::as_str).is_none_or(str::is_empty) {
                errors.push(FieldError::new("notification.title", "a text that is not empty"));
            }
            // A notification that is sent twice, after a crash, replaces itself instead of being shown twice.
            notification.entry("tag").or_insert_with(|| id.to_string().into());
            if declarative {
                ("notification", declared(notification, errors).to_string())
            } else {
                ("notification", Value::Object(notification).to_string())
            }
        }
        (None, Some(Value::String(text))) => ("payload", text),
        (None, Some(payload)) => ("payload", payload.to_string()),
        (None, None) => {
            errors.push(FieldError::new("notification", "a notification, or a payload"));
            return Vec::new();
        }
        (Some(_), Some(_)) => {
            errors.push(FieldError::new("payload", "either a notification or a payload"));
            return Vec::new();
        }
    };
    match Payload::new(text) {
        Ok(payload) => payload.as_bytes().to_vec(),
        Err(error) => {
            errors.push(FieldError::new(field, error.to_string()));
            Vec::new()
        }
    }
}
