//! Routes of the admin listener for VAPID keys.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use http::StatusCode;
use perennial_host::api::{Json, Result};
use perennial_server::http::problem::{FieldError, Problem};
use perennial_webpush::VapidKey;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use crate::vapid::VapidKeys;

/// Routes with which operators change keys: `POST /vapid/rotate {"site"}`, `POST /vapid/import {"site", "pem"}`.
pub(crate) fn admin_write(keys: Arc<VapidKeys>) -> Router {
    Router::new()
        .route("/vapid/rotate", post(make_new))
        .route("/vapid/import", post(take_over))
        .with_state(keys)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportedKey {
    site: String,
    /// The key pair, as a PEM file.
    pem: String,
}

async fn take_over(
    State(keys): State<Arc<VapidKeys>>,
    Json(request): Json<ImportedKey>,
) -> Result<Json<Value>> {
    let (site, profile) = keys.named(&request.site)?;
    let key = VapidKey::from_pem(&request.pem).map_err(|error| FieldError::new("pem", error.to_string()))?;
    let refused = |error: anyhow::Error| Problem::new(StatusCode::CONFLICT, format!("{error:#}"));
    keys.import(site, &key).await.map_err(refused)?;
    info!(site = profile.name, key = key.public_key(), "an operator imported a VAPID key");
    Ok(Json(json!({ "key": key.public_key() })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RotateRequest {
    site: String,
}

async fn make_new(
    State(keys): State<Arc<VapidKeys>>,
    Json(request): Json<RotateRequest>,
) -> Result<Json<Value>> {
    let (site, profile) = keys.named(&request.site)?;
    let refused = |error: anyhow::Error| Problem::new(StatusCode::CONFLICT, format!("{error:#}"));
    let key = keys.rotate(site).await.map_err(refused)?;
    info!(site = profile.name, key = key.public_key(), "an operator made a new VAPID key");
    Ok(Json(json!({ "key": key.public_key() })))
}
