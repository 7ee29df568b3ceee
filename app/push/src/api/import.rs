//! Import and export of subscriptions in bulk: NDJSON, one subscription per line, in the form that
//! `POST /subscriptions` takes.
//!
//! ```text
//! {"subscription": {"endpoint": "..", "keys": {"p256dh": "..", "auth": ".."}}, "key"?, "user"?, "tags"?, "metadata"?}
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::StreamExt;
use futures_util::stream;
use http::StatusCode;
use http_body_util::{BodyExt, Limited};
use parking_lot::Mutex;
use perennial_server::http::problem::Problem;
use perennial_webpush::{Endpoint, Keys, Sender, TargetError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::api::subscriptions::{MAX_TAGS, PushSubscription, is_metadata, is_user};
use crate::model::endpoint::refused;
use crate::model::tags::is_tag;
use crate::store::{Exported, NewSubscription, Proof, PushStore, Upserted};
use crate::vapid::{SiteKeys, VapidKeys};
use perennial_host::api::{Json, Query, Result, is_too_long};
use perennial_host::sites::{SiteId, Sites};

/// The most bytes in one request.
const MAX_CHUNK: usize = 1 << 20;
/// Number of rows in one write. SQLite keeps the changes of a savepoint in a list that it walks for every row.
const ROWS: usize = 250;
/// Number of hosts that are looked up at once.
const LOOKUPS: usize = 32;
/// Largest number of refused lines that one answer names.
const MAX_REFUSED: usize = 10_000;
/// The most subscriptions in one answer of an export.
const PAGE: usize = 1000;

/// One line of an import.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportLine {
    subscription: PushSubscription,
    /// The applicationServerKey that the subscription was made with, if it is not the one in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(
        default,
        deserialize_with = "perennial_host::api::given",
        skip_serializing_if = "Option::is_none"
    )]
    user: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Map<String, Value>>,
}

/// Result of importing one chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Imported {
    pub(crate) created: u64,
    pub(crate) updated: u64,
    pub(crate) refused: u64,
    /// The first refused lines: the number of the line within the chunk, from 1, and the reason.
    pub(crate) reasons: Vec<(usize, String)>,
    /// Number of lines without a `key`. Their subscriptions are taken to have been made with the key `bound_to`.
    pub(crate) without_key: u64,
    /// The VAPID key in use: its public half, base64url.
    pub(crate) bound_to: String,
    /// Whether push services have accepted a message that was signed with this key.
    pub(crate) is_proven: bool,
    /// Dry run only: number of subscriptions that would be stored.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) usable: u64,
    /// Dry run only: the same number for each push service, by host.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) services: BTreeMap<String, u64>,
    /// Number of the line and id of the subscription for each stored line, if the request asks for ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ids: Vec<(usize, i64)>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Options of an import.
#[derive(Clone, Copy, Debug)]
struct How {
    dry_run: bool,
    ids: bool,
}

impl Imported {
    fn refuse(&mut self, line: usize, why: String) {
        self.refused += 1;
        if self.reasons.len() < MAX_REFUSED {
            self.reasons.push((line, why));
        }
    }
}

/// Imports chunks of lines, and exports pages of them.
#[derive(Debug)]
pub(crate) struct Transfer {
    store: PushStore,
    sender: Sender,
    vapid: Arc<VapidKeys>,
    sites: Sites,
    /// Hosts that were looked up, each with the reason for which it is refused, if it is.
    hosts: Mutex<HashMap<String, Option<String>>>,
}

impl Transfer {
    pub(crate) fn new(store: PushStore, sender: Sender, vapid: Arc<VapidKeys>, sites: Sites) -> Self {
        Self { store, sender, vapid, sites, hosts: Mutex::default() }
    }

    /// Stores a chunk of lines. Invalid lines are refused by their number; all others are stored.
    async fn take(&self, site: SiteId, chunk: &[u8], how: How) -> anyhow::Result<Imported> {
        let keys = self.vapid.of(site).await?;
        // A refused host is looked up again for each chunk, since its addresses may have changed.
        self.hosts.lock().retain(|_, refused| refused.is_none());
        let current = &keys.current;
        let mut imported = Imported {
            bound_to: current.public_key(),
            is_proven: self.store.was_accepted(current.signer().0).await?,
            ..Imported::default()
        };
        let mut read = Vec::new();
        for (number, line) in (1..).zip(chunk.split(|byte| *byte == b'\n')) {
            if line.trim_ascii().is_empty() {
                continue;
            }
            match self.read(site, &keys, line) {
                Ok((endpoint, new, has_key)) => {
                    imported.without_key += u64::from(!has_key);
                    read.push((number, endpoint, new));
                }
                Err(why) => imported.refuse(number, why),
            }
        }
        self.look_up(&read).await;
        let (mut rows, mut numbers) = (Vec::with_capacity(read.len()), Vec::with_capacity(read.len()));
        {
            let hosts = self.hosts.lock();
            for (number, endpoint, new) in read {
                match hosts.get(endpoint.host()) {
                    Some(Some(why)) => imported.refuse(number, format!("subscription.endpoint: {why}")),
                    _ => {
                        rows.push(new);
                        numbers.push(number);
                        if how.dry_run {
                            *imported.services.entry(endpoint.host().to_owned()).or_default() += 1;
                        }
                    }
                }
            }
        }
        if how.dry_run {
            imported.usable = rows.len() as u64;
            return Ok(imported);
        }
        for (number, upserted) in numbers.into_iter().zip(self.store.import_all(rows, ROWS).await?) {
            let id = match upserted {
                Upserted::Created(id) => {
                    imported.created += 1;
                    Some(id)
                }
                Upserted::Updated(id) => {
                    imported.updated += 1;
                    Some(id)
                }
                Upserted::WrongAuth => {
                    imported.updated += 1;
                    None
                }
            };
            imported.ids.extend(id.filter(|_| how.ids).map(|id| (number, id)));
        }
        Ok(imported)
    }

    fn read(
        &self,
        site: SiteId,
        keys_of_site: &SiteKeys,
        line: &[u8],
    ) -> std::result::Result<(Endpoint, NewSubscription, bool), String> {
        let line: ImportLine = perennial_host::api::parse_line(line)?;
        let expires_at = line
            .subscription
            .expires_at()
            .map_err(|wanted| format!("subscription.expirationTime: {wanted}"))?;
        let PushSubscription { endpoint: url, keys, .. } = line.subscription;
        let endpoint = self
            .sender
            .policy()
            .check(&url)
            .map_err(|error| format!("subscription.endpoint: {}", refused(&error)))?;
        let keys =
            Keys::parse(&keys.p256dh, &keys.auth).map_err(|error| format!("subscription.keys: {error}"))?;
        let vapid_key = match &line.key {
            None => keys_of_site.current_id,
            Some(key) => keys_of_site.id_of(key).ok_or("key: not a VAPID key of this site")?,
        };
        if line.user.iter().flatten().any(|user| !is_user(user)) {
            return Err("user: not a valid user id".to_owned());
        }
        if line.tags.as_ref().is_some_and(|tags| tags.len() > MAX_TAGS) {
            return Err(format!("tags: at most {MAX_TAGS} tags"));
        }
        if let Some(bad) = line.tags.iter().flatten().find(|tag| !is_tag(tag)) {
            return Err(format!("tags: {bad:?} is not a valid tag"));
        }
        let metadata = line.metadata.map(|metadata| Value::Object(metadata).to_string());
        if metadata.as_ref().is_some_and(|metadata| !is_metadata(metadata)) {
            return Err("metadata: too long".to_owned());
        }
        let new = NewSubscription {
            site: site.0,
            vapid_key,
            endpoint: url,
            keys,
            user: line.user,
            tags: line.tags,
            only_public: false,
            public_tags: self.vapid.public_tags(site),
            metadata,
            expires_at,
            replaces: None,
            proof: Proof::Key,
            guest: None,
            most_of_user: None,
        };
        Ok((endpoint, new, line.key.is_some()))
    }

    /// Returns the next subscriptions after `cursor` as lines, and the cursor of the next page if there may be one.
    async fn page(&self, site: SiteId, cursor: i64) -> anyhow::Result<ExportPage> {
        let (page, next) = self.store.export(site.0, cursor, PAGE).await?;
        let line = |exported: Exported| {
            let keys = json!({ "p256dh": base64(&exported.p256dh), "auth": base64(&exported.auth) });
            let subscription = json!({
                "endpoint": exported.endpoint,
                "expirationTime": exported.expires_at,
                "keys": keys,
            });
            without_nulls(json!({
                "subscription": without_nulls(subscription),
                "key": base64(&exported.public_key),
                "user": exported.user,
                "tags": exported.tags,
                "metadata": exported.metadata,
            }))
        };
        Ok(ExportPage { subscriptions: page.into_iter().map(line).collect(), next })
    }

    /// Looks up each host of a chunk that is not known yet.
    async fn look_up(&self, read: &[(usize, Endpoint, NewSubscription)]) {
        let mut new = HashMap::new();
        {
            let hosts = self.hosts.lock();
            for (_, endpoint, _) in read {
                if !hosts.contains_key(endpoint.host()) {
                    new.entry(endpoint.host().to_owned()).or_insert_with(|| endpoint.clone());
                }
            }
        }
        let looked_up = stream::iter(new.into_iter().map(async |(host, endpoint)| {
            // An import accepts a name that cannot be looked up now: every send looks it up again.
            let why = match self.sender.check_addresses(&endpoint).await {
                Ok(()) | Err(TargetError::NotLookedUp(_)) => None,
                Err(error) => Some(refused(&error)),
            };
            (host, why)
        }));
        let found: Vec<_> = looked_up.buffer_unordered(LOOKUPS).collect().await;
        self.hosts.lock().extend(found);
    }
}

fn without_nulls(mut line: Value) -> Value {
    if let Some(fields) = line.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    line
}

fn base64(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Routes with which operators import and export.
pub(crate) fn admin_write(transfer: Arc<Transfer>) -> Router {
    Router::new()
        .route("/subscriptions/import", post(import))
        .route("/subscriptions/export", post(export))
        .with_state(transfer)
}

/// Query of an export.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportQuery {
    /// Name of the site; the default site if absent.
    site: Option<String>,
}

/// Query of an import.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Into {
    /// Name of the site; the default site if absent.
    site: Option<String>,
    /// Checks the lines and stores nothing.
    #[serde(default)]
    dry_run: bool,
    /// Answers with the ids of the stored subscriptions.
    #[serde(default)]
    ids: bool,
}

async fn import(
    State(transfer): State<Arc<Transfer>>,
    Query(into): Query<Into>,
    request: Request,
) -> Result<Json<Imported>> {
    let site = transfer.sites.wanted(into.site.as_deref())?.id;
    let chunk = match Limited::new(request.into_body(), MAX_CHUNK).collect().await {
        Ok(chunk) => chunk.to_bytes(),
        Err(error) if is_too_long(&*error) => {
            let detail = format!("a chunk has at most {MAX_CHUNK} bytes: send several");
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail).into());
        }
        Err(_) => return Err(Problem::new(StatusCode::BAD_REQUEST, "the body broke off").into()),
    };
    let how = How { dry_run: into.dry_run, ids: into.ids };
    Ok(Json(transfer.take(site, &chunk, how).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportRequest {
    /// Id after which the page begins.
    cursor: i64,
}

/// A page of subscriptions in the form of import lines.
#[derive(Debug, Serialize)]
struct ExportPage {
    subscriptions: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<i64>,
}

async fn export(
    State(transfer): State<Arc<Transfer>>,
    Query(of): Query<ImportQuery>,
    Json(request): Json<ExportRequest>,
) -> Result<Json<ExportPage>> {
    let site = transfer.sites.wanted(of.site.as_deref())?.id;
    Ok(Json(transfer.page(site, request.cursor).await?))
}
