//! Routes with which operators list and change the API keys in the store. Keys in files are not among them: they change
//! with their files.
//!
//! | route | what |
//! |---|---|
//! | `GET /keys` | the scopes and the end of each key; never a key itself |
//! | `POST /keys` | `{"name", "site"?, "scopes"?, "per_minute"?, "expires_in"?}`: makes a key, and shows it only here |
//! | `POST /keys/{name}/replace` | `{"site"?, "overlap"?, "expires_in"?}`: makes a new key; the old one ends later |
//! | `POST /keys/{name}/revoke` | `{"site"?}`: ends the key now |

use std::collections::BTreeSet;
use std::time::Duration;

use axum::routing::{get, post};
use axum::{Extension, Router};
use http::StatusCode;
use jiff::Timestamp;
use perennial_server::http::problem::{Errors, FieldError, Problem};
use perennial_store::cache::Caches;
use perennial_store::pool::sql::Store;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::access::keys::{self, ApiKeyView, Ends, Grant, Hash, MAX_PER_MINUTE};
use crate::access::{self, Scopes};
use crate::api::{Json, Path, Result, not_found};
use crate::settings::{Setting, parse_duration};
use crate::sites::{Site, Sites};

/// Time for which a replaced key stays valid by default.
const OVERLAP: Duration = Duration::from_secs(24 * 3600);

/// State of these routes. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Keyring {
    pub(crate) store: Store,
    pub(crate) sites: Sites,
    pub(crate) caches: Caches,
    pub(crate) scopes: Scopes,
}

impl Keyring {
    /// Drops these keys from the caches of every process, so that the store is asked about them.
    async fn forget(&self, hashes: &[Hash]) {
        for hash in hashes {
            self.caches.forget(access::CACHE.name, Some(&access::hex(hash))).await;
        }
    }
}

/// Makes the answer that shows a new key.
fn made(site: &Site, grant: &Grant, key: &SecretString) -> Json<Made> {
    let scopes = grant.scopes.iter().map(|scope| scope.as_str().to_owned()).collect();
    let (name, site) = (grant.name.clone(), site.name.clone());
    let ends_at = grant.ends_at.and_then(|at| Timestamp::from_millisecond(at).ok());
    Json(Made { name, site, scopes, ends_at, key: key.expose_secret().to_owned() })
}

/// Answer with a new key, which is shown only once.
#[derive(Serialize)]
struct Made {
    name: String,
    site: String,
    scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ends_at: Option<Timestamp>,
    key: String,
}

/// Routes with which operators read.
pub(crate) fn admin_read<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/keys", get(list))
}

/// Routes with which operators change state.
pub(crate) fn admin_write<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/keys", post(add))
        .route("/keys/{name}/replace", post(replace))
        .route("/keys/{name}/revoke", post(revoke))
}

async fn list(Extension(keyring): Extension<Keyring>) -> Result<Json<Vec<ApiKeyView>>> {
    Ok(Json(keys::list(&keyring.store).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKey {
    name: String,
    site: Option<String>,
    /// Scopes of the key; all scopes if absent.
    scopes: Option<Vec<String>>,
    per_minute: Option<u32>,
    /// Validity of the key, a duration such as 720h; no end if absent.
    expires_in: Option<String>,
}

async fn add(Extension(keyring): Extension<Keyring>, Json(new): Json<NewKey>) -> Result<Json<Made>> {
    let mut errors = Errors::default();
    if !keys::is_name(&new.name) {
        errors.push(FieldError::new("name", keys::NAME_WANTED));
    }
    let scopes = match &new.scopes {
        None => Some(keyring.scopes.all()),
        Some(words) => words.iter().map(|word| keyring.scopes.named(word)).collect(),
    };
    if scopes.as_ref().is_none_or(BTreeSet::is_empty) {
        errors.push(FieldError::new("scopes", format!("at least one of {}", keyring.scopes.words())));
    }
    if new.per_minute.is_some_and(|number| !(1..=MAX_PER_MINUTE).contains(&number)) {
        errors.push(FieldError::new("per_minute", format!("a whole number from 1 to {MAX_PER_MINUTE}")));
    }
    let life = duration("expires_in", new.expires_in.as_deref(), &mut errors);
    let site = keyring.sites.wanted(new.site.as_deref())?;
    if !errors.is_empty() {
        return Err(Problem::from(errors).into());
    }
    let now = Timestamp::now().as_millisecond();
    let grant = Grant {
        site: site.id,
        name: new.name,
        scopes: scopes.unwrap_or_default(),
        per_minute: new.per_minute,
        ends_at: life.map(|life| after(now, life)),
    };
    let key = access::random_key();
    if !keys::add(&keyring.store, grant.clone(), key.expose_secret(), now).await? {
        let detail =
            format!("the site {} has a key {}: replace it, or revoke it first", site.name, grant.name);
        return Err(Problem::new(StatusCode::CONFLICT, detail).into());
    }
    info!(key = grant.name, site = site.name, "an operator made an API key");
    Ok(made(site, &grant, &key))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplaceRequest {
    site: Option<String>,
    /// Time for which the old key stays valid, a duration; 24h if absent.
    overlap: Option<String>,
    /// Validity of the new key, a duration; if absent, the new key keeps the end that the old key had.
    expires_in: Option<String>,
}

async fn replace(
    Extension(keyring): Extension<Keyring>,
    Path(name): Path<String>,
    Json(request): Json<ReplaceRequest>,
) -> Result<Json<Made>> {
    let mut errors = Errors::default();
    let overlap = duration("overlap", request.overlap.as_deref(), &mut errors).unwrap_or(OVERLAP);
    let life = duration("expires_in", request.expires_in.as_deref(), &mut errors);
    let site = keyring.sites.wanted(request.site.as_deref())?;
    if !errors.is_empty() {
        return Err(Problem::from(errors).into());
    }
    let now = Timestamp::now().as_millisecond();
    let (key, of) = (access::random_key(), (site.id, name.clone()));
    let ends = Ends { old: after(now, overlap), new: life.map(|life| after(now, life)) };
    let replaced = keys::replace(&keyring.store, of, key.expose_secret(), now, ends).await?;
    let (grant, ended) = replaced.ok_or_else(|| not_found("API key"))?;
    keyring.forget(&ended).await;
    info!(key = name, site = site.name, ?overlap, "an operator replaced an API key");
    Ok(made(site, &grant, &key))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoke {
    site: Option<String>,
}

/// Number of keys with a name that were ended.
#[derive(Debug, Serialize)]
struct Revoked {
    revoked: usize,
}

async fn revoke(
    Extension(keyring): Extension<Keyring>,
    Path(name): Path<String>,
    Json(request): Json<Revoke>,
) -> Result<Json<Revoked>> {
    let site = keyring.sites.wanted(request.site.as_deref())?;
    let now = Timestamp::now().as_millisecond();
    let ended = keys::revoke(&keyring.store, site.id, name.clone(), now).await?;
    if ended.is_empty() {
        return Err(not_found("API key").into());
    }
    keyring.forget(&ended).await;
    info!(key = name, site = site.name, "an operator revoked an API key");
    Ok(Json(Revoked { revoked: ended.len() }))
}

fn duration(field: &str, text: Option<&str>, errors: &mut Errors) -> Option<Duration> {
    let read = parse_duration(text?);
    if read.is_none() {
        errors.push(FieldError::new(field, Duration::WANTED));
    }
    read
}

fn after(now: i64, life: Duration) -> i64 {
    now.saturating_add(i64::try_from(life.as_millis()).unwrap_or(i64::MAX))
}
