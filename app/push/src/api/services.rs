//! Routes of the admin listener for push services.
//!
//! | route of the admin listener | what |
//! |---|---|
//! | `GET /origins` | each push service, and whether it is held |
//! | `POST /origins/resume` | `{"origin"}`: ends the hold of a push service |
//! | `GET /notifications` | the newest notifications of a site |

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json as Answer, Router};
use perennial_server::http::problem::FieldError;
use perennial_webpush::ServiceStatus;
use perennial_workers::queue::Due;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use tracing::info;
use uuid::Uuid;

use super::ApiState;
use crate::delivery::services::EXCHANGE;
use crate::model::jobs::Deliver;
use crate::model::notification::NotificationView;
use crate::store::WaitingBatch;
use perennial_host::api::{Json, Query, Result, not_found};
use perennial_host::sites::SiteId;

/// Number of notifications that operators are shown.
const NOTIFICATIONS: usize = 100;

/// The state of a push service, for operators.
#[derive(Debug, Serialize)]
struct OriginView {
    origin: String,
    /// Why nothing is sent to the service now: throttled, unreachable or unauthorized.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<&'static str>,
    /// Whether the hold is for all subscriptions, or only for those without a delivery yet (unproven).
    #[serde(skip_serializing_if = "Option::is_none")]
    held_for: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_seconds: Option<f64>,
    connections: usize,
    /// Number of concurrent requests that the service bears, as far as is known: the sum of the AIMD limits.
    window: usize,
    in_flight: usize,
    clock_ahead_seconds: i64,
    /// Number of subscriptions that the service refuses and that may be given up; it is read once a minute and counts
    /// up to 10,000.
    at_risk: u64,
    addresses: Vec<AddressView>,
}

#[derive(Debug, Serialize)]
struct AddressView {
    address: String,
    connections: usize,
    aside: bool,
}

/// Routes with which operators read.
pub(crate) fn admin_read(api: ApiState) -> Router {
    Router::new().route("/origins", get(origins)).route("/notifications", get(notifications)).with_state(api)
}

/// Routes with which operators change state.
pub(crate) fn admin_write(api: ApiState) -> Router {
    Router::new().route("/origins/resume", post(resume)).with_state(api)
}

async fn origins(State(api): State<ApiState>) -> Answer<Vec<OriginView>> {
    let pools: Vec<_> = api.senders.all().flat_map(perennial_webpush::Sender::pools).collect();
    let view = |service: ServiceStatus| {
        let of = || pools.iter().filter(|pool| pool.origin == service.origin);
        let addresses = service.addresses.iter().map(|address| AddressView {
            address: address.address.to_string(),
            connections: address.connections,
            aside: address.aside,
        });
        OriginView {
            held: service.held.map(|(_, cause, _)| cause.as_str()),
            held_for: service.held.map(|(_, _, whom)| whom.as_str()),
            held_seconds: service.held.map(|(wait, ..)| wait.as_secs_f64()),
            connections: of().map(|pool| pool.connections).sum(),
            window: of().map(|pool| pool.window).sum(),
            in_flight: of().map(|pool| pool.in_flight).sum(),
            clock_ahead_seconds: service.clock_ahead_seconds,
            at_risk: api.services.at_risk.of(&service.origin),
            addresses: addresses.collect(),
            origin: service.origin.clone(),
        }
    };
    Answer(api.senders.any().services().into_iter().map(view).collect())
}

/// Selects a site; the default site if absent.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SiteQuery {
    site: Option<String>,
}

/// The newest notifications, as `GET /notifications` shows them.
async fn notifications(
    State(api): State<ApiState>,
    Query(of): Query<SiteQuery>,
) -> Result<Json<Vec<NotificationView>>> {
    let site = match &of.site {
        None => SiteId::DEFAULT,
        Some(name) => api.access.sites().named(name).ok_or_else(|| not_found("site"))?.id,
    };
    let found = api.store.notifications(site.0, Uuid::max(), NOTIFICATIONS).await?;
    Ok(Json(found.into_iter().map(|found| api.progress.view(found)).collect()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResumeRequest {
    origin: String,
}

async fn resume(State(api): State<ApiState>, Json(request): Json<ResumeRequest>) -> Result<http::StatusCode> {
    let known = api.senders.any().resume(&request.origin);
    if !known {
        return Err(FieldError::new("origin", "an origin of GET /origins").into());
    }
    api.services.note_resumed();
    api.store.resume_service(&request.origin).await?;
    api.services.is_told.store(true, Ordering::Relaxed);
    // In a shared store, the jobs are due after the other processes have read the change.
    let due = match api.store.is_shared() {
        true => Due::In(2 * EXCHANGE),
        false => Due::Now,
    };
    let new_job = |waiting: &WaitingBatch| Ok(Deliver::woken(&api.config, waiting)?.due(due));
    let woken = api.store.wake_batches(&request.origin, new_job).await?;
    info!(woken, origin = request.origin, "an operator lets a push service be sent to again");
    Ok(http::StatusCode::NO_CONTENT)
}
