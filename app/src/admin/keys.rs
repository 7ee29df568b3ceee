//! API keys, as operators see them and act on them. Those in files are not among them: they are whoever's who has the
//! files.
//!
//! | route | what |
//! |---|---|
//! | `GET /keys` | what each may be used for, and until when; never a key itself |
//! | `POST /keys` | `{"name", "site"?, "scopes"?, "per_minute"?, "expires_in"?}`: makes one, and shows it this once |
//! | `POST /keys/{name}/replace` | `{"site"?, "overlap"?}`: makes another in its place; the old one is good for a while |
//! | `POST /keys/{name}/revoke` | `{"site"?}`: ends it now |

use std::collections::BTreeSet;
use std::time::Duration;

use axum::extract::Path;
use axum::routing::{get, post};
use axum::{Extension, Router};
use http::StatusCode;
use jiff::Timestamp;
use perennial_server::cache::Caches;
use perennial_server::http::problem::{FieldError, Problem};
use perennial_server::pool::sql::Store;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::access::keys::{self, Grant, KeyView};
use crate::access::{self, Scope};
use crate::api::{Json, Result, not_found};
use crate::settings::{Setting, parse_duration};
use crate::sites::{self, Site, Sites};

/// How long a key that was replaced is good, unless it is said.
const OVERLAP: Duration = Duration::from_secs(24 * 3600);

/// What these routes work with. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Keyring {
    pub(crate) store: Store,
    pub(crate) sites: Sites,
    pub(crate) caches: Caches,
}

impl Keyring {
    fn site(&self, name: Option<&str>) -> std::result::Result<&Site, FieldError> {
        let wanted = || FieldError::new("site", "the name of a site in the settings");
        self.sites.named(name.unwrap_or(sites::DEFAULT)).ok_or_else(wanted)
    }

    /// Makes a key, and has every process know.
    async fn make(&self, site: &Site, grant: &Grant) -> Result<Json<Made>> {
        let key = access::random_key();
        keys::insert(&self.store, grant, key.expose_secret()).await?;
        self.caches.forget(access::CACHE.name, None).await;
        let scopes = grant.scopes.iter().map(|scope| scope.as_str()).collect();
        Ok(Json(Made {
            name: grant.name.clone(),
            site: site.name.clone(),
            scopes,
            key: key.expose_secret().to_owned(),
        }))
    }
}

/// A key that was just made.
#[derive(Serialize)]
struct Made {
    name: String,
    site: String,
    scopes: Vec<&'static str>,
    key: String,
}

/// What may be looked at.
pub(crate) fn looking<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/keys", get(list))
}

/// What may be changed.
pub(crate) fn acting<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/keys", post(add))
        .route("/keys/{name}/replace", post(replace))
        .route("/keys/{name}/revoke", post(revoke))
}

async fn list(Extension(keyring): Extension<Keyring>) -> Result<Json<Vec<KeyView>>> {
    Ok(Json(keys::list(&keyring.store).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKey {
    name: String,
    site: Option<String>,
    /// All without it
    scopes: Option<Vec<String>>,
    per_minute: Option<u32>,
    /// A duration such as 720h
    expires_in: Option<String>,
}

async fn add(Extension(keyring): Extension<Keyring>, Json(new): Json<NewKey>) -> Result<Json<Made>> {
    let mut errors = Vec::new();
    if !keys::is_name(&new.name) {
        errors.push(FieldError::new("name", "1 to 64 of a-z, 0-9, dots, dashes and underscores"));
    }
    let scopes = match &new.scopes {
        None => Some(Scope::ALL.into()),
        Some(words) => words.iter().map(|word| word.parse().ok()).collect::<Option<BTreeSet<Scope>>>(),
    };
    if scopes.as_ref().is_none_or(BTreeSet::is_empty) {
        let words = Scope::ALL.map(Scope::as_str).join(", ");
        errors.push(FieldError::new("scopes", format!("at least one of {words}")));
    }
    if new.per_minute == Some(0) {
        errors.push(FieldError::new("per_minute", "a whole number from 1"));
    }
    let life = duration("expires_in", new.expires_in.as_deref(), &mut errors);
    let site = keyring.site(new.site.as_deref())?;
    if !errors.is_empty() {
        return Err(Problem::invalid(errors).into());
    }
    let now = Timestamp::now().as_millisecond();
    if !keys::named(&keyring.store, site.id, &new.name, now).await?.is_empty() {
        let detail = format!("the site {} has a key {}: replace it, or revoke it first", site.name, new.name);
        return Err(Problem::new(StatusCode::CONFLICT, detail).into());
    }
    let grant = Grant {
        site: site.id,
        name: new.name,
        scopes: scopes.unwrap_or_default(),
        per_minute: new.per_minute,
        ends_at: life.map(|life| after(now, life)),
    };
    let made = keyring.make(site, &grant).await?;
    info!(key = grant.name, site = site.name, "an operator made an API key");
    Ok(made)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replace {
    site: Option<String>,
    /// How long the old one is good: a duration, 24h without it
    overlap: Option<String>,
}

async fn replace(
    Extension(keyring): Extension<Keyring>,
    Path(name): Path<String>,
    Json(request): Json<Replace>,
) -> Result<Json<Made>> {
    let mut errors = Vec::new();
    let overlap = duration("overlap", request.overlap.as_deref(), &mut errors).unwrap_or(OVERLAP);
    let site = keyring.site(request.site.as_deref())?;
    if !errors.is_empty() {
        return Err(Problem::invalid(errors).into());
    }
    let now = Timestamp::now().as_millisecond();
    let newest = keys::named(&keyring.store, site.id, &name, now).await?.into_iter().next();
    let grant = newest.ok_or_else(|| not_found("API key"))?;
    keys::end(&keyring.store, site.id, &name, after(now, overlap)).await?;
    let made = keyring.make(site, &grant).await?;
    info!(key = name, site = site.name, ?overlap, "an operator replaced an API key");
    Ok(made)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoke {
    site: Option<String>,
}

/// How many keys of a name have ended.
#[derive(Debug, Serialize)]
struct Revoked {
    revoked: u64,
}

async fn revoke(
    Extension(keyring): Extension<Keyring>,
    Path(name): Path<String>,
    Json(request): Json<Revoke>,
) -> Result<Json<Revoked>> {
    let site = keyring.site(request.site.as_deref())?;
    let revoked = keys::end(&keyring.store, site.id, &name, Timestamp::now().as_millisecond()).await?;
    if revoked == 0 {
        return Err(not_found("API key").into());
    }
    keyring.caches.forget(access::CACHE.name, None).await;
    info!(key = name, site = site.name, "an operator revoked an API key");
    Ok(Json(Revoked { revoked }))
}

fn duration(field: &str, text: Option<&str>, errors: &mut Vec<FieldError>) -> Option<Duration> {
    let read = parse_duration(text?);
    if read.is_none() {
        errors.push(FieldError::new(field, Duration::WANTED));
    }
    read
}

fn after(now: i64, life: Duration) -> i64 {
    now.saturating_add(i64::try_from(life.as_millis()).unwrap_or(i64::MAX))
}
