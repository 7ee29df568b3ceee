//! `GET /notifications`: how far they have come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Tools;
use super::store::Notification;
use perennial_host::access::{Authorized, Read};
use perennial_host::api::{Json, Path, Query, Result, not_found, within_page};

/// Over how long the rate of now is measured.
const WINDOW: Duration = Duration::from_secs(5);
/// How far apart two readings must be to tell a rate: outcomes are written down once a second.
const APART: Duration = Duration::from_secs(2);
/// How much later than the last a reading is kept.
const BETWEEN: Duration = Duration::from_millis(200);
/// The most notifications in one answer.
const PAGE: usize = 100;

/// How fast outcomes are decided. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress(Arc<Mutex<HashMap<Uuid, Recent>>>);

/// Within [`WINDOW`]:
#[derive(Debug, Default)]
struct Recent {
    /// how many this process has recorded when,
    recorded: VecDeque<(Instant, u64)>,
    /// and how many there were by all replicas when somebody asked.
    read: VecDeque<(Instant, u64)>,
}

impl Recent {
    /// Forgets what is too old. False when nothing is left.
    fn tidy(&mut self, now: Instant) -> bool {
        for all in [&mut self.recorded, &mut self.read] {
            while all.front().is_some_and(|(when, _)| now - *when > WINDOW) {
                all.pop_front();
            }
        }
        !(self.recorded.is_empty() && self.read.is_empty())
    }

    /// Outcomes a second: by all replicas if that was asked for before, else by this process.
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    fn rate(&self, decided: u64, now: Instant) -> f64 {
        if let Some((when, before)) = self.read.front().filter(|(when, _)| now - *when >= APART) {
            return decided.saturating_sub(*before) as f64 / (now - *when).as_secs_f64();
        }
        let Some((first, _)) = self.recorded.front() else { return 0.0 };
        let count: u64 = self.recorded.iter().map(|(_, count)| count).sum();
        count as f64 / (now - *first).as_secs_f64().max(0.5)
    }
}

impl Progress {
    pub(crate) fn record(&self, notification: Uuid, count: usize) {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.entry(notification).or_default().recorded.push_back((now, count as u64));
        all.retain(|_, recent| recent.tidy(now));
    }

    /// Outcomes a second, lately, of one of which so many are decided.
    fn rate(&self, notification: Uuid, decided: u64) -> f64 {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.retain(|_, recent| recent.tidy(now));
        let recent = all.entry(notification).or_default();
        if recent.read.back().is_none_or(|(when, _)| now - *when >= BETWEEN) {
            recent.read.push_back((now, decided));
        }
        recent.rate(decided, now)
    }
}

/// A notification and how far it has come.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NotificationView {
    id: Uuid,
    /// scheduled, queued, sending, paused, done, cancelled or expired
    #[schema(example = "sending")]
    state: String,
    /// How many subscriptions it is for: an estimate until `audience_final`
    audience: u64,
    audience_final: bool,
    /// How many subscriptions have met which outcome: delivered, gone, rejected, unauthorized, too_large,
    /// forbidden, unreachable, expired, incomplete, cancelled, failed. In the end they add up to the audience.
    #[schema(example = json!({"delivered": 480, "gone": 20}))]
    outcomes: BTreeMap<String, u64>,
    /// The sum of the outcomes
    decided: u64,
    /// How many wait to be tried again
    retrying: u64,
    /// Outcomes a second over the last five seconds
    rate: f64,
    /// Sends a second that were asked for
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_wanted: Option<f64>,
    /// How long it will still take at this rate, in seconds
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<u64>,
    /// Why not everybody could be reached, when that is our fault
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Not before then
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<Timestamp>,
    /// Not after then
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
    /// Whether nothing of it will change any more.
    pub(crate) fn is_over(&self) -> bool {
        self.ended_at.is_some()
    }

    pub(crate) fn of(notification: Notification, progress: &Progress) -> Self {
        let decided = notification.outcomes.values().sum();
        let done = notification.ended_at.is_some();
        // Members may have left or joined since it was estimated.
        let audience = if done { decided } else { notification.estimate.max(decided) };
        let rate = if done { 0.0 } else { progress.rate(notification.id, decided) };
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

/// Which notifications.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct Page {
    /// Older than the one with this id
    cursor: Option<Uuid>,
    /// At most so many, up to 100
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
}

/// Notifications, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Notifications {
    notifications: Vec<NotificationView>,
    /// The `cursor` of the next page, if there may be one
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Uuid>,
}

/// One notification
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/notifications/{id}", operation_id = "getNotification", params(("id" = Uuid, Path)), responses((status = OK, body = NotificationView)))]
pub(super) async fn one(
    Authorized { caller, .. }: Authorized<Read>,
    State(tools): State<Tools>,
    Path(id): Path<String>,
) -> Result<Json<NotificationView>> {
    let id = Uuid::parse_str(&id).map_err(|_| not_found("notification"))?;
    let notification =
        tools.store.notification(caller.site.0, id).await?.ok_or_else(|| not_found("notification"))?;
    Ok(Json(NotificationView::of(notification, &tools.progress)))
}

/// All notifications, the newest first
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/notifications", operation_id = "listNotifications", params(Page), responses((status = OK, body = Notifications)))]
pub(super) async fn list(
    Authorized { caller, .. }: Authorized<Read>,
    State(tools): State<Tools>,
    Query(page): Query<Page>,
) -> Result<Json<Notifications>> {
    let limit = within_page(page.limit, 20, PAGE)?;
    let cursor = page.cursor.unwrap_or(Uuid::max());
    let found = tools.store.notifications(caller.site.0, cursor, limit).await?;
    let next = if found.len() == limit { found.last().map(|last| last.id) } else { None };
    let notifications = found.into_iter().map(|found| NotificationView::of(found, &tools.progress)).collect();
    Ok(Json(Notifications { notifications, next }))
}
