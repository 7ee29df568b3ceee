//! Everything about a request that can be wrong, told at once.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use perennial_host::settings::parse_duration;
use perennial_host::sites::SiteId;
use perennial_server::http::problem::{Errors, FieldError, Problem};
use perennial_webpush::{HttpVersion, Payload, Topic, Urgency};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::request::{NotifyRequest, To};
use crate::api::ApiState;
use crate::api::subscriptions::{PushSubscription, USER_WANTED, check_subscription, is_user};
use crate::config::MAX_TTL;
use crate::model::audience::Audience;
use crate::model::endpoint::refused;
use crate::model::tags::TagExpression;
use crate::model::template::{Parsed, Template};
use crate::store::{Recipient, SendPlan};

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
/// A request that has passed all checks.
pub(super) struct Checked {
    pub(super) audience: Audience,
    pub(super) recipients: Vec<Recipient>,
    pub(super) payload: Vec<u8>,
    pub(super) ttl: Duration,
    pub(super) urgency: Urgency,
    pub(super) topic: Option<String>,
    pub(super) plan: SendPlan,
    pub(super) is_template: bool,
    /// Names of the metadata values without which a subscription gets nothing.
    pub(super) needed: Vec<String>,
    pub(super) warnings: Vec<String>,
}

pub(super) async fn check(
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
        checked.err().map(|error| FieldError::new(format!("{field}.endpoint"), refused(&error)))
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
