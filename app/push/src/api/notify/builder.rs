//! A notification as the code of another module makes it. Each method stands for the field of `POST /notify` with its
//! name, and the same checks hold.

use std::time::Duration;

use jiff::Timestamp;
use perennial_webpush::Urgency;
use serde_json::{Map, Value};

use super::request::{NotifyRequest, To};

/// A notification and its audience. It needs one of the methods `to_..`.
///
/// ```
/// use perennial_push::Notification;
///
/// let notification = Notification::new("A new book").body("It is here.").url("/books/17").to_tags("new-books");
/// # let _ = notification.idempotency("book-17");
/// ```
#[derive(Clone, Debug)]
#[must_use = "it is sent by PushHandle::send or PushHandle::insert"]
pub struct Notification {
    to: Option<To>,
    request: NotifyRequest,
    pub(super) idempotency: Option<String>,
}

impl Notification {
    /// Makes a notification that the browser shows, with this title.
    pub fn new(title: impl Into<String>) -> Self {
        let shown = Map::from_iter([("title".to_owned(), Value::String(title.into()))]);
        Self::of(Some(shown), None)
    }

    /// Makes a message for a service worker of your own: any JSON value or a text.
    pub fn payload(payload: impl Into<Value>) -> Self {
        Self::of(None, Some(payload.into()))
    }

    fn of(notification: Option<Map<String, Value>>, payload: Option<Value>) -> Self {
        let request = NotifyRequest {
            // Another audience takes its place.
            to: To::Users(Vec::new()),
            notification,
            payload,
            ttl: None,
            urgency: None,
            topic: None,
            rate: None,
            ramp_up: None,
            at: None,
            expires: None,
            webhook: None,
            log: None,
            declarative: None,
            http: None,
            // The text may come from visitors, who must not put in data of the subscriptions.
            template: Some(false),
            dry_run: None,
        };
        Self { to: None, request, idempotency: None }
    }

    /// Sets the text below the title.
    pub fn body(self, body: impl Into<String>) -> Self {
        self.option("body", body.into())
    }

    /// Sets the page that a click opens.
    pub fn url(self, url: impl Into<String>) -> Self {
        self.option("url", url.into())
    }

    /// Sets any other option of `showNotification`: `icon`, `badge`, `actions`.
    pub fn option(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.request.notification.get_or_insert_default().insert(name.to_owned(), value.into());
        self
    }

    /// Sends to every subscription.
    pub fn to_all(self) -> Self {
        self.to(To::All(true))
    }

    /// Sends to the subscriptions of a user.
    pub fn to_user(self, user: impl Into<String>) -> Self {
        self.to(To::User(user.into()))
    }

    /// Sends to the subscriptions of up to 1000 users.
    pub fn to_users(self, users: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.to(To::Users(users.into_iter().map(Into::into).collect()))
    }

    /// Sends to the subscriptions whose tags match an expression: `news and fr and not muted`.
    pub fn to_tags(self, expression: impl Into<String>) -> Self {
        self.to(To::Tags(expression.into()))
    }

    /// Sends to up to 10000 subscriptions by id.
    pub fn to_subscriptions(self, ids: impl IntoIterator<Item = i64>) -> Self {
        self.to(To::Subscriptions(ids.into_iter().collect()))
    }

    fn to(mut self, to: To) -> Self {
        self.to = Some(to);
        self
    }

    /// Sets how long push services keep the message for a device that is away: at most 28 days.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.request.ttl = Some(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX));
        self
    }

    /// Sets the urgency.
    pub fn urgency(mut self, urgency: Urgency) -> Self {
        self.request.urgency = Some(urgency.as_str().to_owned());
        self
    }

    /// Sets the topic: a later notification with the same topic replaces this one while it waits at the push service.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.request.topic = Some(topic.into());
        self
    }

    /// Sends this many messages per second, evenly spread.
    pub fn rate(mut self, per_second: f64) -> Self {
        self.request.rate = Some(per_second);
        self
    }

    /// Sets the time in which the rate rises from 0.
    pub fn ramp_up(mut self, time: Duration) -> Self {
        self.request.ramp_up = Some(format!("{}ms", time.as_millis()));
        self
    }

    /// Sets the time before which nothing is sent.
    pub fn at(mut self, at: Timestamp) -> Self {
        self.request.at = Some(at);
        self
    }

    /// Sets the time after which nothing is sent.
    pub fn expires(mut self, at: Timestamp) -> Self {
        self.request.expires = Some(at);
        self
    }

    /// Sets the webhook of the settings that is called when the notification has ended.
    pub fn webhook(mut self, name: impl Into<String>) -> Self {
        self.request.webhook = Some(name.into());
        self
    }

    /// Logs all deliveries, not only failures.
    pub fn log_all(mut self) -> Self {
        self.request.log = Some("all".to_owned());
        self
    }

    /// Lets browsers that support it show the notification without a service worker. It needs a URL.
    pub fn declarative(mut self) -> Self {
        self.request.declarative = Some(true);
        self
    }

    /// Replaces `{{name}}` in the text with the value from the metadata of each subscription. Without this, braces are
    /// sent as they are: a text that visitors have written is no template.
    pub fn template(mut self) -> Self {
        self.request.template = Some(true);
        self
    }

    /// Sets the idempotency key: of notifications with the same key within 24 hours, only the first is sent.
    pub fn idempotency(mut self, key: impl Into<String>) -> Self {
        self.idempotency = Some(key.into());
        self
    }

    /// The request, or `None` without an audience.
    pub(super) fn request(self) -> Option<NotifyRequest> {
        Some(NotifyRequest { to: self.to?, ..self.request })
    }
}
