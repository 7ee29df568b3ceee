//! Subscriptions in and out by the million: NDJSON, one subscription a line, as `POST /subscriptions` takes it.
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
use crate::model::tags::is_tag;
use crate::store::{Exported, NewSubscription, Proof, PushStore, Upserted};
use crate::vapid::{SiteKeys, VapidKeys};
use perennial_host::api::{Json, Query, Result, is_too_long};
use perennial_host::sites::{SiteId, Sites};

/// The most bytes in one request.
const MAX_CHUNK: usize = 1 << 20;
/// How many rows one write takes. SQLite keeps what its savepoint changes in a list that it walks for every row.
const ROWS: usize = 250;
/// How many hosts are looked up at once.
const LOOKUPS: usize = 32;
/// How many lines that were refused are told of each request.
const MAX_REFUSED: usize = 10_000;
/// The most subscriptions in one answer of an export.
const PAGE: usize = 1000;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportLine {
    subscription: PushSubscription,
    /// The applicationServerKey that it was made with, if it is not the one in use
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

/// What came of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Imported {
    pub(crate) created: u64,
    pub(crate) updated: u64,
    pub(crate) refused: u64,
    /// The first of those that were refused: the number of the line within the chunk, from 1, and why.
    pub(crate) reasons: Vec<(usize, String)>,
    /// How many came without a `key`: they are taken to have been made with this one.
    pub(crate) without_key: u64,
    pub(crate) bound_to: String,
    /// Whether push services have accepted anything that was signed with it.
    pub(crate) is_proven: bool,
    /// Of a dry run: how many would be stored, and of each push service.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) usable: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) services: BTreeMap<String, u64>,
    /// If they were asked for: the number of the line and the id of its subscription.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ids: Vec<(usize, i64)>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What is done with a chunk.
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

/// Takes chunks of lines, and gives pages.
#[derive(Debug)]
pub(crate) struct Transfer {
    store: PushStore,
    sender: Sender,
    vapid: Arc<VapidKeys>,
    sites: Sites,
    /// What is known about hosts: why nobody is sent there, if so.
    hosts: Mutex<HashMap<String, Option<String>>>,
}

impl Transfer {
    pub(crate) fn new(store: PushStore, sender: Sender, vapid: Arc<VapidKeys>, sites: Sites) -> Self {
        Self { store, sender, vapid, sites, hosts: Mutex::default() }
    }

    /// Stores a chunk of lines. What does not fit is refused by its line; all else is stored.
    async fn take(&self, site: SiteId, chunk: &[u8], how: How) -> anyhow::Result<Imported> {
        let keys = self.vapid.of(site).await?;
        // A name that was not found before may be there now.
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
        let endpoint =
            self.sender.policy().check(&url).map_err(|error| format!("subscription.endpoint: {error}"))?;
        let keys =
            Keys::parse(&keys.p256dh, &keys.auth).map_err(|error| format!("subscription.keys: {error}"))?;
        let vapid_key = match &line.key {
            None => keys_of_site.current_id,
            Some(key) => keys_of_site.id_of(key).ok_or("key: no VAPID key that is there")?,
        };
        if line.user.iter().flatten().any(|user| !is_user(user)) {
            return Err("user: no user id".to_owned());
        }
        if line.tags.as_ref().is_some_and(|tags| tags.len() > MAX_TAGS) {
            return Err(format!("tags: at most {MAX_TAGS} tags"));
        }
        if let Some(bad) = line.tags.iter().flatten().find(|tag| !is_tag(tag)) {
            return Err(format!("tags: {bad:?} is no tag"));
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

    /// The next subscriptions after `cursor`, as lines, and the cursor of the next page if there may be one.
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

    /// Looks up each host once.
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
            // Whoever imports answers for it: every send looks again.
            let refused = match self.sender.check_addresses(&endpoint).await {
                Ok(()) | Err(TargetError::NotLookedUp(_)) => None,
                Err(error) => Some(error.to_string()),
            };
            (host, refused)
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

/// What operators may do.
pub(crate) fn admin_write(transfer: Arc<Transfer>) -> Router {
    Router::new()
        .route("/subscriptions/import", post(import))
        .route("/subscriptions/export", post(export))
        .with_state(transfer)
}

/// Of which site.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportQuery {
    /// Its name; the default one without
    site: Option<String>,
}

/// Into which site, and how.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Into {
    /// The name of the site; the default one without
    site: Option<String>,
    /// Nothing is stored
    #[serde(default)]
    dry_run: bool,
    /// The ids of the stored ones are answered
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
    /// After the one with this id
    cursor: i64,
}

/// Subscriptions as lines of an import.
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
