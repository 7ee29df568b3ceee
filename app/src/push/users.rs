//! Everything of one user: to be shown to them, and to be forgotten.

use axum::extract::{Path, State};
use perennial_server::http::problem::FieldError;
use serde::Serialize;
use tracing::info;
use utoipa::ToSchema;

use super::Tools;
use super::store::DeliveryView;
use super::subscriptions::{SubscriptionView, USER_WANTED, is_user};
use crate::access::{Authorized, Read, Subscribe};
use crate::api::{Json, Result};

/// Everything that is kept of a user
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UserView {
    user: String,
    subscriptions: Vec<SubscriptionView>,
    /// How notifications went for these subscriptions, as far as that is logged
    #[schema(value_type = Vec<Object>)]
    deliveries: Vec<DeliveryView>,
}

/// What was deleted
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Deleted {
    subscriptions: u64,
    deliveries: u64,
}

/// Everything of one user
///
/// Texts of notifications, which may name them, stay for as long as notifications are kept (`push.retention`). Needs a key with the scope `read`.
#[utoipa::path(get, path = "/users/{user}", params(("user" = String, Path)), responses((status = OK, body = UserView)))]
pub(super) async fn one(
    Authorized { caller, .. }: Authorized<Read>,
    State(tools): State<Tools>,
    Path(user): Path<String>,
) -> Result<Json<UserView>> {
    check(&user)?;
    let (subscriptions, deliveries) = tools.store.all_of_user(caller.site.0, &user).await?;
    let subscriptions = subscriptions.into_iter().map(SubscriptionView::from).collect();
    Ok(Json(UserView { user, subscriptions, deliveries }))
}

/// Deletes everything of one user
///
/// Texts of notifications, which may name them, stay for as long as notifications are kept (`push.retention`). Needs a key with the scope `subscribe`.
#[utoipa::path(delete, path = "/users/{user}", params(("user" = String, Path)), responses((status = OK, body = Deleted)))]
pub(super) async fn delete(
    Authorized { caller, .. }: Authorized<Subscribe>,
    State(tools): State<Tools>,
    Path(user): Path<String>,
) -> Result<Json<Deleted>> {
    check(&user)?;
    let (subscriptions, deliveries) = tools.store.delete_user(caller.site.0, &user).await?;
    info!(subscriptions, deliveries, "deleted everything of a user");
    Ok(Json(Deleted { subscriptions, deliveries }))
}

fn check(user: &str) -> Result<()> {
    if is_user(user) { Ok(()) } else { Err(FieldError::new("user", USER_WANTED).into()) }
}
