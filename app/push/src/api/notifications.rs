//! `GET /notifications` and `GET /notifications/{id}`: the progress of notifications.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::ApiState;
use crate::model::notification::NotificationView;
use perennial_host::access::{Authorized, ReadScope};
use perennial_host::api::{Json, Path, Query, Result, not_found, within_page};

/// The most notifications in one answer.
const PAGE: usize = 100;

/// Selects a page of notifications.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct Page {
    /// Only notifications that are older than the one with this id.
    cursor: Option<Uuid>,
    /// Largest number of notifications in the answer, up to 100.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
}

/// Notifications, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Notifications {
    notifications: Vec<NotificationView>,
    /// The `cursor` of the next page, if there may be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Uuid>,
}

/// One notification
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/notifications/{id}", operation_id = "getNotification", params(("id" = Uuid, Path)), responses((status = OK, body = NotificationView)))]
pub(crate) async fn one(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Json<NotificationView>> {
    view(&api, caller.site.0, parse(&id)?).await
}

pub(super) fn parse(id: &str) -> Result<Uuid> {
    Ok(Uuid::parse_str(id).map_err(|_| not_found("notification"))?)
}

pub(super) async fn view(api: &ApiState, site: i64, id: Uuid) -> Result<Json<NotificationView>> {
    let found = api.store.notification(site, id).await?.ok_or_else(|| not_found("notification"))?;
    Ok(Json(api.progress.view(found)))
}

/// All notifications, the newest first
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/notifications", operation_id = "listNotifications", params(Page), responses((status = OK, body = Notifications)))]
pub(crate) async fn list(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Query(page): Query<Page>,
) -> Result<Json<Notifications>> {
    let limit = within_page(page.limit, 20, PAGE)?;
    let cursor = page.cursor.unwrap_or(Uuid::max());
    let found = api.store.notifications(caller.site.0, cursor, limit).await?;
    let next = if found.len() == limit { found.last().map(|last| last.id) } else { None };
    let notifications = found.into_iter().map(|found| api.progress.view(found)).collect();
    Ok(Json(Notifications { notifications, next }))
}
