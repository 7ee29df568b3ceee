//! `/subscriptions` and `/push/key`: subscriptions of browsers are stored, changed, listed and deleted.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::{FromRequestParts, State};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use perennial_server::http::problem::{Errors, FieldError, Problem};
use perennial_server::http::scope::RequestScope;
use perennial_webpush::{Endpoint, Keys, KeysError, TargetError};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tower_http::cors::{AllowOrigin, CorsLayer};
use tracing::debug;
use utoipa::{IntoParams, ToSchema};

use super::ApiState;
use crate::api::user_token;
use crate::model::endpoint::refused;
use crate::model::profile::Profile;
use crate::model::tags::{TAG_WANTED, is_tag};
use crate::scopes::{SUBSCRIBE, SubscribeScope};
use crate::store::{NewSubscription, Proof, Replaced, Subscription, Upserted, now_ms};
use crate::vapid::SiteKeys;
use perennial_host::access::{Authorized, Caller, ReadScope, Scope};
use perennial_host::api::{Json, Path, Query, Result, not_found, within_page};
use perennial_host::sites::{SiteId, Sites};

/// The longest user id, in bytes.
const MAX_USER: usize = 256;
/// The most tags of one subscription.
pub(crate) const MAX_TAGS: usize = 64;
/// The longest metadata, in bytes of JSON.
const MAX_METADATA: usize = 4096;
/// The most subscriptions in one answer.
const PAGE: usize = 1000;
/// `Retry-After` when the host of a push service cannot be looked up now.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(30);

/// A browser's subscription, as `PushSubscription.toJSON()` writes it.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct PushSubscription {
    /// URL that messages are sent to.
    #[schema(example = "https://updates.push.services.mozilla.com/wpush/v2/gAAAAA")]
    pub(crate) endpoint: String,
    /// Time at which the subscription ends and is deleted, in milliseconds since 1970, if the browser names one.
    #[serde(default, rename = "expirationTime")]
    pub(crate) expiration_time: Option<f64>,
    pub(crate) keys: SubscriptionKeys,
}

/// Description of a valid expiration time, for error messages.
pub(crate) const EXPIRES_WANTED: &str = "a time to come, in milliseconds since 1970, or null";

impl PushSubscription {
    /// Returns the time at which the subscription ends, in milliseconds since 1970. `None` stands for null, as browsers
    /// write it, and for 0, as dumps of databases do.
    ///
    /// # Errors
    /// Fails for a time in the past, such as one in seconds: the subscription would be stored and soon deleted.
    #[expect(clippy::cast_possible_truncation, reason = "within the bounds of a time")]
    pub(crate) fn expires_at(&self) -> std::result::Result<Option<i64>, &'static str> {
        const END: f64 = 253_402_300_799_000.0;
        match self.expiration_time {
            None | Some(0.0) => Ok(None),
            Some(time) if (0.0..=END).contains(&time) && time as i64 > now_ms() - SKEW_MS => {
                Ok(Some(time as i64))
            }
            Some(_) => Err(EXPIRES_WANTED),
        }
    }
}

/// Tolerance for clocks of browsers that are behind the clock of this server, in milliseconds.
const SKEW_MS: i64 = 60_000;

/// Keys to encrypt messages with
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(crate) struct SubscriptionKeys {
    /// Public key of the browser: 65 bytes, base64url.
    #[schema(pattern = "^[A-Za-z0-9_+/-]{87}=?$")]
    pub(crate) p256dh: String,
    /// Authentication secret: 16 bytes, base64url.
    #[schema(pattern = "^[A-Za-z0-9_+/-]{22}(==)?$")]
    pub(crate) auth: String,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SubscribeRequest {
    subscription: PushSubscription,
    /// The applicationServerKey that the subscription was made with.
    key: Option<String>,
    /// The user of the subscription; null for none. When it changes from one user to another or to none, the metadata
    /// and the tags that pages may not set are deleted, unless this request has them.
    #[serde(default, deserialize_with = "perennial_host::api::given")]
    #[schema(value_type = Option<String>)]
    user: Option<Option<String>>,
    /// Needed to name a user without an API key: `v1.EXPIRES.` and the base64url of the HMAC-SHA256 of
    /// `v1.SITE.EXPIRES.USER` under the site's secret, with EXPIRES in seconds since 1970.
    user_token: Option<String>,
    tags: Option<Vec<String>>,
    /// An object of up to 4096 bytes of JSON.
    metadata: Option<Map<String, Value>>,
    /// The subscription that the browser had before: its id, user and tags are kept.
    replaces: Option<Replaces>,
}

/// A former subscription, and the secret that proves its possession
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Replaces {
    endpoint: String,
    auth: String,
}

/// The key that pages subscribe with
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct KeyView {
    /// The `applicationServerKey`: 65 bytes, base64url.
    key: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Subscribed {
    id: i64,
}

/// The key to subscribe with
///
/// Pages of the allowed origins may read it.
#[utoipa::path(get, path = "/push/key", operation_id = "getPushKey", security((), ("key" = [])), responses((status = OK, body = KeyView)))]
pub(crate) async fn key(visitor: Visitor, State(api): State<ApiState>) -> Result<Response> {
    visitor.may(&SUBSCRIBE)?;
    let key = KeyView { key: api.vapid.for_request(visitor.site).await?.current.public_key() };
    Ok(([(header::CACHE_CONTROL, "no-cache")], axum::Json(key)).into_response())
}

/// Stores a browser's subscription
///
/// Pages of the allowed origins may call this within rate limits, and backends with a key of the scope `subscribe`. A
/// request for a stored endpoint updates its subscription; without an API key, this takes the same `auth`.
#[utoipa::path(
    post, path = "/subscriptions", operation_id = "storeSubscription", security((), ("key" = [])), request_body = SubscribeRequest,
    responses((status = CREATED, body = Subscribed), (status = OK, body = Subscribed, description = "Updated"))
)]
pub(crate) async fn subscribe(
    visitor: Visitor,
    State(api): State<ApiState>,
    Json(request): Json<SubscribeRequest>,
) -> Result<Response> {
    visitor.may(&SUBSCRIBE)?;
    let keys = match &request.key {
        Some(key) => api.vapid.with(visitor.site, key).await?,
        None => api.vapid.for_request(visitor.site).await?,
    };
    let (endpoint, mut new) = check(&api, &visitor, &keys, request)?;
    if let Err(error) = api.senders.any().check_addresses(&endpoint).await {
        debug!(%error, "refused an endpoint");
        if let (TargetError::NotLookedUp(_), None) = (&error, &visitor.caller) {
            let detail = "the push service of this subscription cannot be looked up now";
            return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
                .retry_after(LOOK_UP_AGAIN)
                .into());
        }
        if let (TargetError::NotLookedUp(_), Some(_)) = (&error, &visitor.caller) {
            return store(&api, &visitor, new).await;
        }
        // The answers of our name servers are not disclosed to callers without an API key.
        let detail = match visitor.caller {
            Some(_) => refused(&error),
            None => "not at a public address of a push service".to_owned(),
        };
        return Err(FieldError::new("subscription.endpoint", detail).into());
    }
    // A user token of the backend counts as much as an API key.
    let is_vouched_for = visitor.caller.is_some() || matches!(new.user, Some(Some(_)));
    if !is_vouched_for {
        let site = (visitor.site, &*api.profiles.get(visitor.site)?.name);
        let guest = api.guests.stranger(&api.store, site, &keys.guests, visitor.address).await?;
        new.guest = Some(guest);
    }
    store(&api, &visitor, new).await
}

async fn store(api: &ApiState, visitor: &Visitor, new: NewSubscription) -> Result<Response> {
    let is_guest = new.guest.is_some();
    let (upserted, evicted) = api.store.upsert(new).await?;
    if evicted > 0 || (is_guest && matches!(upserted, Upserted::Created(_))) {
        api.guests.stored(visitor.site, &api.profiles.get(visitor.site)?.name, evicted);
    }
    Ok(match upserted {
        Upserted::Created(id) => {
            let location = format!("/subscriptions/{id}");
            (StatusCode::CREATED, [(header::LOCATION, location)], axum::Json(Subscribed { id }))
                .into_response()
        }
        Upserted::Updated(id) => axum::Json(Subscribed { id }).into_response(),
        Upserted::WrongAuth => {
            let detail = "this endpoint is stored with another auth secret; changing it takes an API key";
            return Err(Problem::new(StatusCode::FORBIDDEN, detail).into());
        }
    })
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnsubscribeRequest {
    endpoint: String,
    /// The authentication secret, which only the browser knows; a backend with an API key needs none.
    auth: Option<String>,
}

/// Deletes a browser's subscription
///
/// A page names its subscription by endpoint and secret; with an API key, the endpoint is enough.
#[utoipa::path(
    delete, path = "/subscriptions", operation_id = "deleteSubscriptionByEndpoint", security((), ("key" = [])), request_body = UnsubscribeRequest, responses((status = NO_CONTENT), (status = NOT_FOUND))
)]
pub(crate) async fn unsubscribe(
    visitor: Visitor,
    State(api): State<ApiState>,
    Json(request): Json<UnsubscribeRequest>,
) -> Result<StatusCode> {
    visitor.may(&SUBSCRIBE)?;
    let auth = match (&request.auth, &visitor.caller) {
        (Some(auth), _) => {
            let auth = Keys::decode_auth(auth).map_err(|error| FieldError::new("auth", error.to_string()))?;
            Some(auth.to_vec())
        }
        (None, Some(_)) => None,
        (None, None) => {
            return Err(FieldError::new("auth", "the secret of the subscription, or an API key").into());
        }
    };
    if api.store.delete_by_endpoint(visitor.site.0, &request.endpoint, auth).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(not_found("subscription").into())
    }
}

/// A stored subscription
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SubscriptionView {
    id: i64,
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    tags: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Box<RawValue>>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

impl From<Subscription> for SubscriptionView {
    fn from(stored: Subscription) -> Self {
        Self {
            id: stored.id,
            endpoint: stored.endpoint,
            user: stored.user,
            tags: stored.tags,
            metadata: stored.metadata,
            created_at: stored.created_at,
            updated_at: stored.updated_at,
        }
    }
}

/// One subscription
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/subscriptions/{id}", operation_id = "getSubscription", params(("id" = i64, Path)), responses((status = OK, body = SubscriptionView)))]
pub(crate) async fn one(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<Json<SubscriptionView>> {
    let found = match id.parse() {
        Ok(id) => api.store.subscription(caller.site.0, id).await?,
        Err(_) => None,
    };
    found.map(|found| Json(found.into())).ok_or_else(|| not_found("subscription").into())
}

/// Deletes one subscription
///
/// Needs a key with the scope `subscribe`.
#[utoipa::path(delete, path = "/subscriptions/{id}", operation_id = "deleteSubscription", params(("id" = i64, Path)), responses((status = NO_CONTENT), (status = NOT_FOUND)))]
pub(crate) async fn delete(
    Authorized { caller, .. }: Authorized<SubscribeScope>,
    State(api): State<ApiState>,
    Path(id): Path<String>,
) -> Result<StatusCode> {
    let deleted = match id.parse() {
        Ok(id) => api.store.delete(caller.site.0, id).await?,
        Err(_) => false,
    };
    if deleted { Ok(StatusCode::NO_CONTENT) } else { Err(not_found("subscription").into()) }
}

/// Selects subscriptions.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct SubscriptionFilter {
    /// Only subscriptions of this user.
    #[param(min_length = 1, max_length = 256)]
    user: Option<String>,
    /// Only subscriptions with this tag.
    #[param(pattern = "^[A-Za-z0-9_.:/-]{1,64}$")]
    tag: Option<String>,
    /// Only the subscription with this endpoint.
    endpoint: Option<String>,
    /// Only subscriptions after the one with this id.
    cursor: Option<i64>,
    /// Largest number of subscriptions in the answer, up to 1000; the answer has fewer when they are long.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
}

/// Subscriptions, in the order of their ids
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Subscriptions {
    subscriptions: Vec<SubscriptionView>,
    /// The `cursor` of the next page, if there may be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<i64>,
}

/// Subscriptions of a user, with a tag, or all
///
/// Needs a key with the scope `read`.
#[utoipa::path(get, path = "/subscriptions", operation_id = "listSubscriptions", params(SubscriptionFilter), responses((status = OK, body = Subscriptions)))]
pub(crate) async fn list(
    Authorized { caller, .. }: Authorized<ReadScope>,
    State(api): State<ApiState>,
    Query(filter): Query<SubscriptionFilter>,
) -> Result<Json<Subscriptions>> {
    if filter.user.as_ref().is_some_and(|user| !is_user(user)) {
        return Err(FieldError::new("user", USER_WANTED).into());
    }
    if filter.tag.as_ref().is_some_and(|tag| !is_tag(tag)) {
        return Err(FieldError::new("tag", TAG_WANTED).into());
    }
    let limit = within_page(filter.limit, 100, PAGE)?;
    let cursor = filter.cursor.unwrap_or(0);
    if let Some(endpoint) = &filter.endpoint {
        let found = api.store.subscription_at(caller.site.0, endpoint).await?;
        let fits = |found: &Subscription| {
            (filter.user.is_none() || filter.user == found.user)
                && filter.tag.as_ref().is_none_or(|tag| found.tags.contains(tag))
                && found.id > cursor
        };
        let subscriptions = found.into_iter().filter(fits).map(SubscriptionView::from).collect();
        return Ok(Json(Subscriptions { subscriptions, next: None }));
    }
    let (found, next) =
        api.store.subscriptions(caller.site.0, filter.user, filter.tag, cursor, limit).await?;
    Ok(Json(Subscriptions { subscriptions: found.into_iter().map(SubscriptionView::from).collect(), next }))
}

/// The caller of a route for pages: a backend with an API key, or a page of a site without one, within rate limits.
#[derive(Debug)]
pub(crate) struct Visitor {
    site: SiteId,
    caller: Option<Caller>,
    address: Option<IpAddr>,
}

impl Visitor {
    /// Checks the scope of the API key; a caller without a key passes.
    fn may(&self, scope: &Scope) -> std::result::Result<(), Problem> {
        self.caller.as_ref().map_or(Ok(()), |caller| caller.may(scope))
    }
}

impl FromRequestParts<ApiState> for Visitor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &ApiState) -> std::result::Result<Self, Problem> {
        let address = parts.extensions.get::<RequestScope>().and_then(RequestScope::client);
        if let Some(caller) = api.access.optional(parts).await? {
            return Ok(Self { site: caller.site, caller: Some(caller), address });
        }
        // This check comes before the rate limit: a page of another origin must not use up the limits of the networks
        // of its visitors.
        let Some(site) = api.access.sites().of_page(parts) else {
            let detail = "pages of this origin may not subscribe browsers here (sites.NAME.origins)";
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        };
        // Only writes are limited: reading the key changes nothing and costs nothing.
        if parts.method != Method::GET {
            api.limits.check(site.id, address)?;
        }
        Ok(Self { site: site.id, caller: None, address })
    }
}

/// Lets pages of all sites read the answers. [`Sites::of_page`] decides which site a page belongs to.
pub(crate) fn cors(sites: &Sites) -> CorsLayer {
    let sites = sites.clone();
    let is_listed = move |origin: &HeaderValue, _: &Parts| {
        origin.to_str().is_ok_and(|origin| sites.of_origin(origin).is_some())
    };
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(is_listed))
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // A page knows from it when to try again.
        .expose_headers([header::RETRY_AFTER])
        .allow_headers([header::CONTENT_TYPE, header::AUTHORIZATION, HeaderName::from_static("x-request-id")])
}

/// Checks an endpoint and its keys. Errors name the fields below `field`.
pub(crate) fn check_subscription(
    api: &ApiState,
    field: &str,
    subscription: &PushSubscription,
    errors: &mut Errors,
) -> Option<(Endpoint, Keys)> {
    let endpoint = api.senders.any().policy().check(&subscription.endpoint);
    let keys = Keys::parse(&subscription.keys.p256dh, &subscription.keys.auth);
    if let Err(error) = &endpoint {
        errors.push(FieldError::new(format!("{field}.endpoint"), refused(error)));
    }
    if let Err(error) = &keys {
        let key = if *error == KeysError::Auth { "auth" } else { "p256dh" };
        errors.push(FieldError::new(format!("{field}.keys.{key}"), error.to_string()));
    }
    if let Err(wanted) = subscription.expires_at() {
        errors.push(FieldError::new(format!("{field}.expirationTime"), wanted));
    }
    endpoint.ok().zip(keys.ok())
}

fn check(
    api: &ApiState,
    visitor: &Visitor,
    keys_of_site: &SiteKeys,
    request: SubscribeRequest,
) -> std::result::Result<(Endpoint, NewSubscription), Problem> {
    let mut errors = Errors::default();
    let profile = api.profiles.get(visitor.site)?;
    let checked = check_subscription(api, "subscription", &request.subscription, &mut errors);
    let vapid_key = match &request.key {
        None => keys_of_site.current_id,
        Some(key) => keys_of_site.id_of(key).unwrap_or_else(|| {
            let wanted = "the key of GET /push/key, or an earlier one";
            errors.push(FieldError::new("key", wanted));
            keys_of_site.current_id
        }),
    };
    if request.user.iter().flatten().any(|user| !is_user(user)) {
        errors.push(FieldError::new("user", USER_WANTED));
    }
    check_tags(profile, visitor, request.tags.as_deref().unwrap_or_default(), &mut errors)?;
    let metadata = request.metadata.map(|metadata| Value::Object(metadata).to_string());
    if metadata.as_ref().is_some_and(|metadata| !is_metadata(metadata)) {
        errors.push(FieldError::new("metadata", format!("at most {MAX_METADATA} bytes of JSON")));
    }
    let replaces = request.replaces.map(|replaces| (Keys::decode_auth(&replaces.auth), replaces.endpoint));
    let replaces = match replaces {
        Some((Ok(auth), endpoint)) => Some(Replaced { endpoint, auth: auth.to_vec() }),
        Some((Err(error), _)) => {
            errors.push(FieldError::new("replaces.auth", error.to_string()));
            None
        }
        None => None,
    };
    let (Some((endpoint, keys)), true) = (checked, errors.is_empty()) else {
        return Err(errors.into());
    };
    if let Some(Some(user)) = &request.user
        && visitor.caller.is_none()
    {
        check_user_token(api, profile, user, request.user_token.as_deref())?;
    }
    let expires_at = request.subscription.expires_at().unwrap_or_default();
    let new = NewSubscription {
        site: visitor.site.0,
        vapid_key,
        endpoint: endpoint.url(),
        keys,
        user: request.user,
        tags: request.tags,
        // A page must not remove tags that the backend has set.
        only_public: visitor.caller.is_none(),
        public_tags: Arc::clone(&profile.public_tags),
        metadata,
        expires_at,
        replaces,
        proof: if visitor.caller.is_some() { Proof::Key } else { Proof::Auth },
        guest: None,
        most_of_user: visitor.caller.is_none().then_some(api.config.subscriptions_per_user),
    };
    Ok((endpoint, new))
}

/// Description of a valid user id, for error messages.
pub(crate) const USER_WANTED: &str = "a user id: 1 to 256 bytes, without control characters";

/// Returns true when the JSON of the metadata is short enough.
pub(crate) fn is_metadata(text: &str) -> bool {
    text.len() <= MAX_METADATA
}

/// Returns true for a valid user id.
pub(crate) fn is_user(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_USER && !text.chars().any(char::is_control)
}

fn check_tags(
    profile: &Profile,
    visitor: &Visitor,
    tags: &[String],
    errors: &mut Errors,
) -> std::result::Result<(), Problem> {
    if tags.len() > MAX_TAGS {
        errors.push(FieldError::new("tags", format!("at most {MAX_TAGS} tags")));
    }
    for (index, tag) in tags.iter().enumerate().take(MAX_TAGS) {
        if !is_tag(tag) {
            errors.push(FieldError::new(format!("tags[{index}]"), TAG_WANTED));
        } else if visitor.caller.is_none() && !profile.public_tags.contains(tag) {
            let site = &profile.name;
            let detail =
                format!("the tag {tag} takes an API key; pages may set those in sites.{site}.public_tags");
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
    }
    Ok(())
}

/// Checks the token with which a backend allows a page to name the user of its browser.
fn check_user_token(
    api: &ApiState,
    profile: &Profile,
    user: &str,
    token: Option<&str>,
) -> std::result::Result<(), Problem> {
    let refused = |detail: &str| Err(Problem::new(StatusCode::FORBIDDEN, detail));
    let Some(secret) = &profile.user_secret else {
        let site = &profile.name;
        return refused(&format!(
            "naming a user takes an API key (or sites.{site}.user_secret_file, and a user_token)"
        ));
    };
    let Some(token) = token else {
        return refused("naming a user takes an API key or a user_token");
    };
    let secret = secret.expose_secret().as_bytes();
    let old_until = api.config.old_user_tokens_until;
    match user_token::verify(secret, &profile.name, user, token, SystemTime::now(), old_until) {
        Ok(()) => Ok(()),
        Err(error) => refused(&error.to_string()),
    }
}
