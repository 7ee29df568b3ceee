//! A notification as it is stored, its states, and its view for callers.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use perennial_store::pool::sql::{Result, Row};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::model::outcome::Outcome;
use crate::store::now_ms;

/// The states of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::EnumString, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Stage {
    Scheduled,
    Queued,
    Sending,
    Paused,
    Done,
    Cancelled,
    Expired,
}

impl Stage {
    /// The first state of a notification that is due at `due_at`.
    pub(crate) fn first(due_at: Option<i64>) -> Self {
        if due_at.is_some() { Self::Scheduled } else { Self::Queued }
    }

    /// The word for the state, in the store and in answers.
    pub(crate) fn as_str(self) -> &'static str {
        self.into()
    }

    pub(crate) fn parse(word: &str) -> Option<Self> {
        word.parse().ok()
    }
}

/// State, rate and expiry of a notification: they decide whether and how fast it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotificationStatus {
    pub(crate) state: Stage,
    /// Sends per 1000 seconds, and the length of the ramp to this rate in milliseconds.
    pub(crate) rate: Option<(i64, i64)>,
    /// Time of expiry, in milliseconds since 1970.
    pub(crate) expires_at: Option<i64>,
}

impl NotificationStatus {
    /// The status of a notification that does not exist any more.
    pub(crate) const GONE: Self = Self { state: Stage::Cancelled, rate: None, expires_at: None };

    /// Time until the expiry; `None` when the notification does not expire.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        let left = self.expires_at? - now_ms();
        Some(Duration::from_millis(u64::try_from(left).unwrap_or_default()))
    }

    /// The outcome of members that are left, if nothing may be sent any more. A paused notification expires, too.
    pub(crate) fn over(&self) -> Option<Outcome> {
        if self.state == Stage::Cancelled {
            return Some(Outcome::Cancelled);
        }
        self.time_left().is_some_and(|left| left.is_zero()).then_some(Outcome::Expired)
    }

    pub(crate) const COLUMNS: &'static str = "state, rate_milli, ramp_ms, expires_at";

    pub(crate) fn read(row: &Row) -> Result<Self> {
        let state: String = row.get("state")?;
        let rate: Option<i64> = row.get("rate_milli")?;
        let ramp: i64 = row.get("ramp_ms")?;
        Ok(Self {
            state: Stage::parse(&state).unwrap_or(Stage::Cancelled),
            rate: rate.map(|rate| (rate, ramp)),
            expires_at: row.get("expires_at")?,
        })
    }
}

/// A stored notification.
#[derive(Clone, Debug)]
pub(crate) struct Notification {
    pub(crate) id: Uuid,
    pub(crate) site: i64,
    pub(crate) state: String,
    pub(crate) estimate: u64,
    pub(crate) outcomes: BTreeMap<String, u64>,
    /// Number of subscriptions that wait for another attempt.
    pub(crate) again: u64,
    pub(crate) error: Option<String>,
    pub(crate) rate_milli: Option<i64>,
    pub(crate) due_at: Option<Timestamp>,
    pub(crate) expires_at: Option<Timestamp>,
    pub(crate) created_at: Timestamp,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) ended_at: Option<Timestamp>,
}

/// A notification and its progress.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NotificationView {
    id: Uuid,
    /// The state: scheduled, queued, sending, paused, done, cancelled or expired.
    #[schema(example = "sending")]
    state: String,
    /// Number of subscriptions in the audience; an estimate until `audience_final` is true.
    audience: u64,
    audience_final: bool,
    /// Number of subscriptions for each outcome: delivered, gone, rejected, unauthorized, too_large, forbidden,
    /// unreachable, expired, incomplete, cancelled, failed. In the end they add up to the audience.
    #[schema(example = json!({"delivered": 480, "gone": 20}))]
    outcomes: BTreeMap<String, u64>,
    /// The sum of the outcomes.
    decided: u64,
    /// Number of subscriptions that wait for another attempt.
    retrying: u64,
    /// Outcomes per second over the last five seconds.
    rate: f64,
    /// Sends per second that were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_wanted: Option<f64>,
    /// Remaining time at this rate, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<u64>,
    /// Why some subscriptions could not be reached, when the cause is a failure of this server.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Time before which nothing is sent.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<Timestamp>,
    /// Time after which nothing is sent.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<Timestamp>,
}

impl NotificationView {
    /// Returns true when the notification has ended, so that nothing will change any more.
    pub(crate) fn is_over(&self) -> bool {
        self.ended_at.is_some()
    }

    pub(crate) fn new(notification: Notification, rate: f64) -> Self {
        let decided = notification.outcomes.values().sum();
        let done = notification.ended_at.is_some();
        // Members may have left or joined since the audience was estimated.
        let audience = if done { decided } else { notification.estimate.max(decided) };
        let rate = if done { 0.0 } else { rate };
        Self {
            id: notification.id,
            audience,
            audience_final: done,
            outcomes: notification.outcomes,
            decided,
            retrying: notification.again,
            rate: (rate * 10.0).round() / 10.0,
            rate_wanted: notification.rate_milli.map(|milli| {
                #[expect(clippy::cast_precision_loss, reason = "a rate")]
                let rate = milli as f64 / 1e3;
                rate
            }),
            eta_seconds: eta(audience - decided, rate),
            error: notification.error,
            state: notification.state,
            created_at: notification.created_at,
            at: notification.due_at,
            expires: notification.expires_at,
            started_at: notification.started_at,
            ended_at: notification.ended_at,
        }
    }
}

fn eta(left: u64, rate: f64) -> Option<u64> {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate"
    )]
    let eta = (left as f64 / rate).ceil() as u64;
    (rate > 0.0 && left > 0).then_some(eta)
}
