//! Everything of one user: to be shown to them, and to be forgotten.

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

/// How many rows one part of an answer has.
const PAGE: usize = 200;

/// Everything that is kept of a user
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what is written in parts")]
pub(crate) struct UserView {
    user: String,
    subscriptions: Vec<SubscriptionView>,
    /// How notifications went for these subscriptions, as far as that is logged
    #[schema(value_type = Vec<Object>)]
    deliveries: Vec<DeliveryView>,
}

/// What was deleted
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Deleted {
    subscriptions: u64,
    deliveries: u64,
}

/// Everything of one user
///
/// Texts of notifications, which may name them, stay for as long as notifications are kept (`push.retention`). Needs a key with the scope `read`.
#[utoipa::path(get, path = "/users/{user}", operation_id = "getUser", params(("user" = String, Path)), responses((status = OK, body = UserView)))]
pub(crate) async fn one(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Path(user): Path<String>,
) -> Result<Response> {
    check(&user)?;
    let site = caller.site.0;
    let begin = format!(r#"{{"user":{},"subscriptions":["#, serde_json::Value::from(user.as_str()));
    // In parts, however much there is: first all subscriptions, then the deliveries of each.
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

/// How far an answer has come.
struct ExportPart {
    api: ApiState,
    site: i64,
    user: String,
    /// The subscriptions whose deliveries come next.
    ids: std::vec::IntoIter<i64>,
    at: At,
    /// Whether nothing stands before what comes next in its list.
    is_first: bool,
}

enum At {
    /// Behind this one.
    Subscriptions(i64),
    /// Of this one, behind that of a notification.
    Deliveries(Option<(i64, Vec<u8>)>),
}

impl ExportPart {
    /// The next piece of JSON, and whether it is the last.
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

/// Deletes everything of one user
///
/// Texts of notifications, which may name them, stay for as long as notifications are kept (`push.retention`). Needs a key with the scope `subscribe`.
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
