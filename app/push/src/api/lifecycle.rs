//! Routes for accepted notifications: pause, resume, cancel, change of the rate, progress events, and the delivery to
//! each subscription.

use axum::body::Body;
use axum::extract::State;
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::header;
use perennial_server::http::problem::FieldError;
use perennial_server::http::scope::RequestScope;
use serde::{Deserialize, Serialize};
use tracing::info;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use super::notifications::{parse, view};
use crate::api::notify::{RATE_WANTED, rate_milli};
use crate::model::notification::NotificationView;
use crate::model::outcome::Outcome;
use crate::scopes::NotifyScope;
use crate::store::Change;
use perennial_host::access::{Authorized, ReadScope};
use perennial_host::api::{Json, Path, Query, Result, not_found};

/// Number of deliveries that are read at once.
const PAGE: usize = 200;

/// Pauses a notification
///
/// No new send begins: in this process from now on, in the other replicas within a second. Needs a key with the scope
/// `notify`, as do resuming, cancelling and changing the rate.
#[utoipa::path(post, path = "/notifications/{id}/pause", operation_id = "pauseNotification", params(("id" = Uuid, Path)), responses((status = OK, body = NotificationView)))]
pub(crate) async fn pause(
    caller: Authorized<NotifyScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Json<NotificationView>> {
    change(&caller, &api, &id, Change::Pause).await
}

/// Resumes a paused notification
#[utoipa::path(post, path = "/notifications/{id}/resume", operation_id = "resumeNotification", params(("id" = Uuid, Path)), responses((status = OK, body = NotificationView)))]
pub(crate) async fn resume(
    caller: Authorized<NotifyScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Json<NotificationView>> {
    change(&caller, &api, &id, Change::Resume).await
}

/// Cancels a notification
///
/// Subscriptions that have not been sent to yet are counted as `cancelled`.
#[utoipa::path(post, path = "/notifications/{id}/cancel", operation_id = "cancelNotification", params(("id" = Uuid, Path)), responses((status = OK, body = NotificationView)))]
pub(crate) async fn cancel(
    caller: Authorized<NotifyScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Json<NotificationView>> {
    change(&caller, &api, &id, Change::Cancel).await
}

/// A new rate for a notification.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RateRequest {
    /// Sends per second; null for as fast as push services take them.
    #[serde(default, deserialize_with = "perennial_host::api::given")]
    #[schema(value_type = Option<f64>, exclusive_minimum = 0.0, maximum = 1_000_000.0)]
    rate: Option<Option<f64>>,
}

/// Changes the rate of a notification
///
/// The new rate holds within a second, also while the notification is being sent.
#[utoipa::path(
    patch, path = "/notifications/{id}", operation_id = "changeNotification", params(("id" = Uuid, Path)), request_body = RateRequest,
    responses((status = OK, body = NotificationView))
)]
pub(crate) async fn set_rate(
    caller: Authorized<NotifyScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
    Json(request): Json<RateRequest>,
) -> Result<Json<NotificationView>> {
    let wanted = || FieldError::new("rate", format!("{RATE_WANTED}; or null"));
    let rate = match request.rate.ok_or_else(wanted)? {
        Some(rate) => Some(rate_milli(rate).ok_or_else(wanted)?),
        None => None,
    };
    change(&caller, &api, &id, Change::Rate(rate)).await
}

async fn change(
    Authorized { caller, .. }: &Authorized<NotifyScope>,
    api: &ApiState,
    id: &str,
    change: Change,
) -> Result<Json<NotificationView>> {
    let (id, site) = (parse(id)?, caller.site.0);
    let standing = api.store.change(site, id, change).await?.ok_or_else(|| not_found("notification"))?;
    api.flows.changed(id, standing);
    info!(notification = %id, ?change, state = standing.state.as_str(), "changed");
    view(api, site, id).await
}

/// Follows a notification
///
/// Sends a server-sent event `progress` after each change, and `end` as the last one. Needs a key with the scope
/// `read`; one key may have `push.followers_per_key` such requests at once.
#[utoipa::path(
    get, path = "/notifications/{id}/events", operation_id = "followNotification", params(("id" = Uuid, Path)),
    responses((status = OK, content_type = "text/event-stream", body = ProgressEvent, description = "One event after the other, until the notification has ended"))
)]
pub(crate) async fn events(
    Authorized { caller, .. }: Authorized<ReadScope>,
    scope: RequestScope,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Response> {
    let id = parse(&id)?;
    let Json(view) = view(&api, caller.site.0, id).await?;
    let follower = api.followers.follow(&caller.key, id, &view)?;
    let events = follower.events(scope.drain().clone());
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

/// A server-sent event
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProgressEvent {
    /// `progress`, or `end` for the last event.
    event: String,
    /// The body of `GET /notifications/{id}`, as JSON.
    data: String,
}

/// Selects deliveries.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeliveriesQuery {
    /// Only deliveries with this outcome.
    #[param(
        pattern = "^(delivered|gone|unauthorized|too_large|rejected|expired|unreachable|failed|cancelled|incomplete|forbidden)$"
    )]
    outcome: Option<String>,
}

/// Lists the deliveries of a notification
///
/// NDJSON with one object per line, `{"subscription", "outcome", "status"?, "detail"?, "at"}`, in the order of the
/// subscription ids. Subscriptions that came with the notification have the ids -1, -2 and so on. The list has failures
/// only, or all deliveries if the notification has `"log": "all"`. Needs a key with the scope `read`.
#[utoipa::path(
    get, path = "/notifications/{id}/deliveries", operation_id = "listDeliveries", params(("id" = Uuid, Path), DeliveriesQuery),
    responses((status = OK, content_type = "application/x-ndjson"))
)]
pub(crate) async fn deliveries(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
    Query(which): Query<DeliveriesQuery>,
) -> Result<Response> {
    let id = parse(&id)?;
    if which.outcome.as_ref().is_some_and(|word| Outcome::parse(word).is_none()) {
        return Err(FieldError::new("outcome", "a word of the outcomes of a notification").into());
    }
    view(&api, caller.site.0, id).await?;
    let pages = stream::try_unfold(Some(i64::MIN), move |cursor| {
        let (api, outcome) = (api.clone(), which.outcome.clone());
        async move {
            let Some(cursor) = cursor else { return Ok(None) };
            let (page, next) = api.store.deliveries(id, outcome, cursor, PAGE).await?;
            Ok::<_, perennial_store::pool::sql::Error>(Some((lines(&page), next)))
        }
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(pages)).into_response())
}

/// Writes the values as JSON, one per line.
pub(crate) fn lines<T: serde::Serialize>(values: &[T]) -> Bytes {
    let mut text = String::new();
    for value in values {
        text.push_str(&serde_json::to_string(value).unwrap_or_default());
        text.push('\n');
    }
    Bytes::from(text)
}
