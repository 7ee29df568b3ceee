//! What `POST /notify` takes and answers.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::api::subscriptions::PushSubscription;
use crate::model::notification::Stage;

/// A notification and its audience.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NotifyRequest {
    pub(super) to: To,
    /// The notification that the browser shows: `title`, and any option of `showNotification`. A click opens `url`.
    #[schema(value_type = Option<Object>, example = json!({"title": "Hello", "body": "World", "url": "/news"}))]
    pub(super) notification: Option<Map<String, Value>>,
    /// Instead of `notification`: any JSON value or a text, for your own service worker. An empty text is sent as a
    /// message without a body.
    pub(super) payload: Option<Value>,
    /// How long push services keep the message for a device that is away, in seconds: 0 to 2419200.
    #[schema(minimum = 0, maximum = 2_419_200)]
    pub(super) ttl: Option<i64>,
    /// The urgency: very-low, low, normal or high.
    #[schema(example = "normal", pattern = "^(very-low|low|normal|high)$")]
    pub(super) urgency: Option<String>,
    /// A later notification with the same topic replaces this one while it waits at the push service.
    pub(super) topic: Option<String>,
    /// Sends per second, evenly spread: 0.5 is one every two seconds. Without a rate, messages are sent as fast as push
    /// services take them.
    #[schema(exclusive_minimum = 0.0, maximum = 1_000_000.0, example = 500.0)]
    pub(super) rate: Option<f64>,
    /// Time in which the rate rises linearly from 0.
    #[schema(example = "30s")]
    pub(super) ramp_up: Option<String>,
    /// Time before which nothing is sent.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) at: Option<Timestamp>,
    /// Time after which nothing is sent. Subscriptions that have not been sent to by then are counted as `expired`.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(super) expires: Option<Timestamp>,
    /// Name of a webhook in the settings that is called when the notification has ended.
    pub(super) webhook: Option<String>,
    /// The deliveries that `/deliveries` will list: failures (the default) or all.
    pub(super) log: Option<String>,
    /// Whether browsers that support it may show the notification without a service worker; this needs
    /// `notification.url`.
    pub(super) declarative: Option<bool>,
    /// The version of HTTP to send with: auto, 1 or 2.
    #[serde(default, deserialize_with = "version")]
    pub(super) http: Option<String>,
    /// Whether `{{name}}` in the text is replaced with the value from the metadata of each subscription; true if
    /// absent. A backslash before the braces makes one such place plain text.
    pub(super) template: Option<bool>,
    /// Only counts the audience and sends nothing.
    pub(super) dry_run: Option<bool>,
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
#[derive(Clone, Debug, Serialize, ToSchema)]
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

pub(super) const NAMES: &str = "all, user, users, tags, subscriptions, push";

/// An accepted notification.
#[derive(Debug, Serialize, ToSchema)]
pub struct Notified {
    /// Id of the notification.
    pub id: Uuid,
    /// The state of the notification: scheduled or queued.
    #[schema(example = "queued")]
    pub state: &'static str,
    /// The value of `state` under its former name.
    #[schema(deprecated)]
    pub(super) status: &'static str,
    /// Estimated number of subscriptions in the audience.
    pub audience: u64,
    /// Possible mistakes in the request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Notified {
    pub(super) fn new(id: Uuid, audience: u64, stage: Stage, warnings: Vec<String>) -> Self {
        Self { id, state: stage.as_str(), status: stage.as_str(), audience, warnings }
    }
}

/// The audience that a notification would have.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DryRun {
    pub(super) dry_run: bool,
    pub(super) audience: u64,
    /// Number of subscriptions that would get nothing because their metadata lacks a value that the text needs. Present
    /// only for a text that has such places.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) incomplete: Option<u64>,
    pub(super) warnings: Vec<String>,
}
