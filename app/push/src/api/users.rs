//! `/users/{user}`: shows or deletes everything that is stored about one user.

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use http::header;
use perennial_server::http::problem::FieldError;
use perennial_store::pool::sql;
use serde::Serialize;
use tracing::info;
use utoipa::ToSchema;

use super::ApiState;
use crate::api::subscriptions::{SubscriptionView, USER_WANTED, is_user};
use crate::scopes::SubscribeScope;
use crate::store::DeliveryView;
use perennial_host::access::{Authorized, ReadScope};
use perennial_host::api::{Json, Path, Result};

/// Number of rows in one part of an answer.
const PAGE: usize = 200;

/// Everything that is stored about a user
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what is written in parts")]
pub(crate) struct UserView {
    user: String,
    subscriptions: Vec<SubscriptionView>,
    /// Logged deliveries to these subscriptions.
    #[schema(value_type = Vec<Object>)]
    deliveries: Vec<DeliveryView>,
}

/// Numbers of deleted rows
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Deleted {
    subscriptions: u64,
    deliveries: u64,
}

/// Shows everything about one user
///
/// Texts of notifications may name the user; they stay for as long as notifications are kept (`push.retention`). Needs
/// a key with the scope `read`.
#[utoipa::path(get, path = "/users/{user}", operation_id = "getUser", params(("user" = String, Path)), responses((status = OK, body = UserView)))]
pub(crate) async fn one(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Path(user): Path<String>,
) -> Result<Response> {
    check(&user)?;
    let site = caller.site.0;
    let begin = format!(r#"{{"user":{},"subscriptions":["#, serde_json::Value::from(user.as_str()));
    // The answer is streamed in parts, whatever its size: first all subscriptions, then the deliveries of each.
    let first =
        ExportPart { api, site, user, ids: Vec::new().into_iter(), at: At::Subscriptions(0), is_first: true };
    let parts = stream::try_unfold(Some(first), |part| async move {
        let Some(mut part) = part else { return Ok::<_, sql::Error>(None) };
        let (text, is_last) = part.next().await?;
        Ok(Some((Bytes::from(text), (!is_last).then_some(part))))
    });
    let body = stream::once(std::future::ready(Ok(Bytes::from(begin)))).chain(parts);
    Ok(([(header::CONTENT_TYPE, "application/json")], Body::from_stream(body)).into_response())
}

/// Progress of an answer.
struct ExportPart {
    api: ApiState,
    site: i64,
    user: String,
    /// Ids of the subscriptions whose deliveries come next.
    ids: std::vec::IntoIter<i64>,
    at: At,
    /// Whether the next value is the first of its list, so that no comma goes before it.
    is_first: bool,
}

enum At {
    /// Subscriptions after this id.
    Subscriptions(i64),
    /// Deliveries to this subscription after the one of this notification; `None` for the next subscription.
    Deliveries(Option<(i64, Vec<u8>)>),
}

impl ExportPart {
    /// Returns the next piece of JSON, and whether it is the last.
    async fn next(&mut self) -> std::result::Result<(String, bool), sql::Error> {
        match std::mem::replace(&mut self.at, At::Deliveries(None)) {
            At::Subscriptions(after) => {
                let user = Some(self.user.clone());
                let (found, next) = self.api.store.subscriptions(self.site, user, None, after, PAGE).await?;
                let mut ids = self.ids.as_slice().to_vec();
                ids.extend(found.iter().map(|subscription| subscription.id));
                self.ids = ids.into_iter();
                let mut text = self.list(found.into_iter().map(SubscriptionView::from));
                match next {
                    Some(next) => self.at = At::Subscriptions(next),
                    None => {
                        text.push_str(r#"],"deliveries":["#);
                        self.is_first = true;
                    }
                }
                Ok((text, false))
            }
            At::Deliveries(at) => {
                let Some((id, after)) = at.or_else(|| Some((self.ids.next()?, Vec::new()))) else {
                    return Ok(("]}".to_owned(), true));
                };
                let (found, next) = self.api.store.deliveries_of(id, after, PAGE).await?;
                self.at = At::Deliveries(next.map(|next| (id, next)));
                Ok((self.list(found.into_iter()), false))
            }
        }
    }

    fn list<T: Serialize>(&mut self, values: impl Iterator<Item = T>) -> String {
        let mut text = String::new();
        for value in values {
            if !std::mem::replace(&mut self.is_first, false) {
                text.push(',');
            }
            text.push_str(&serde_json::to_string(&value).unwrap_or_default());
        }
        text
    }
}

/// Deletes everything about one user
///
/// Texts of notifications may name the user; they stay for as long as notifications are kept (`push.retention`). Needs
/// a key with the scope `subscribe`.
#[utoipa::path(delete, path = "/users/{user}", operation_id = "deleteUser", params(("user" = String, Path)), responses((status = OK, body = Deleted)))]
pub(crate) async fn delete(
    Authorized { caller, .. }: Authorized<SubscribeScope>,
    State(api): State<ApiState>,
    Path(user): Path<String>,
) -> Result<Json<Deleted>> {
    check(&user)?;
    let (subscriptions, deliveries) = api.store.delete_user(caller.site.0, &user).await?;
    info!(subscriptions, deliveries, "deleted everything of a user");
    Ok(Json(Deleted { subscriptions, deliveries }))
}

fn check(user: &str) -> Result<()> {
    if is_user(user) { Ok(()) } else { Err(FieldError::new("user", USER_WANTED).into()) }
}
