//! The VAPID keys that identify us to push services: for each site, the key that its pages subscribe with, and the
//! earlier ones.
//!
//! A file `vapid.pem` may hold several keys: the first is in use, the others still sign for the subscriptions that
//! were made with them. A process caches the keys: a key that is made while it runs is in use soon.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use aws_lc_rs::{digest, hmac};
use parking_lot::Mutex;
use perennial_server::http::problem::FieldError;
use perennial_store::cache::{self, Cache, Caches, Kept};
use perennial_store::pool::sql::{self, Dialect};
use perennial_webpush::{VapidKey, decode_base64};
use secrecy::ExposeSecret;
use tracing::{info, warn};

use crate::model::profile::{KeyPlace, Profile, Profiles};
use crate::store::{self, PushStore};
use perennial_host::access::secrets;
use perennial_host::api::{Result, store_failed};
use perennial_host::data_dir::DataDir;
use perennial_host::sites::SiteId;

/// The cache of the keys in files and in the store.
pub(crate) const CACHE: cache::Config = cache::Config {
    name: "vapid_keys",
    bytes: 1 << 20,
    ttl: Duration::from_secs(60),
    negative_ttl: Duration::from_secs(5),
    stale: Duration::from_secs(24 * 3600),
};

/// Shortest time between two times that the store is asked for an unknown key.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// The keys of all sites.
#[derive(Debug)]
pub(crate) struct VapidKeys {
    data_dir: Arc<DataDir>,
    sql: sql::Store,
    store: PushStore,
    profiles: Profiles,
    caches: Caches,
    cache: Cache<Arc<SiteKeys>>,
    /// Time at which the store was last asked for an unknown key.
    looked: Mutex<Option<Instant>>,
}

/// The keys of one site.
#[derive(Debug)]
pub(crate) struct SiteKeys {
    /// The key in use, and the id of its row.
    pub(crate) current: VapidKey,
    pub(crate) current_id: i64,
    all: HashMap<i64, VapidKey>,
    /// Key with which addresses of strangers are hashed.
    pub(crate) guests: hmac::Key,
}

impl Kept for SiteKeys {
    fn bytes(&self) -> usize {
        // Approximate memory of a key pair in the library.
        self.all.len() * 1024
    }
}

impl SiteKeys {
    /// The key that a subscription was made with. A subscription that came with a notification takes the key in use.
    pub(crate) fn of(&self, id: Option<i64>) -> Option<&VapidKey> {
        id.map_or(Some(&self.current), |id| self.all.get(&id))
    }

    /// The id of the key with this public half, base64url.
    pub(crate) fn id_of(&self, public_key: &str) -> Option<i64> {
        let wanted = decode_base64(public_key)?;
        self.all.iter().find(|(_, key)| key.public_bytes()[..] == wanted).map(|(id, _)| *id)
    }
}

impl VapidKeys {
    /// Opens the keys of these sites. They are read once, so that missing keys are made, or reported, now.
    pub(crate) async fn open(
        data_dir: &Arc<DataDir>,
        sql: &sql::Store,
        store: &PushStore,
        profiles: &Profiles,
        caches: &Caches,
    ) -> anyhow::Result<Self> {
        let keys = Self {
            data_dir: Arc::clone(data_dir),
            sql: sql.clone(),
            store: store.clone(),
            profiles: profiles.clone(),
            caches: caches.clone(),
            cache: caches.make(CACHE),
            looked: Mutex::default(),
        };
        for (site, profile) in profiles.iter() {
            let found = keys.of(*site).await?;
            let known: Vec<i64> = found.all.keys().copied().collect();
            let orphans = store.made_with_other_keys(site.0, &known).await?;
            if orphans > 0 {
                warn!(
                    site = profile.name,
                    subscriptions = orphans,
                    "subscriptions were made with VAPID keys that are missing: push services refuse our keys for them"
                );
            }
        }
        Ok(keys)
    }

    /// The keys of one site.
    pub(crate) async fn of(&self, site: SiteId) -> anyhow::Result<Arc<SiteKeys>> {
        let keys = self.look_up(site).await.map_err(|error| anyhow!("{error:#}"))?;
        keys.context("there is no VAPID key")
    }

    /// Tags that pages of a site may set.
    pub(crate) fn public_tags(&self, site: SiteId) -> Arc<[String]> {
        self.profiles.find(site).map_or_else(|| Arc::from([]), |profile| Arc::clone(&profile.public_tags))
    }

    /// The keys of one site, for a request.
    ///
    /// # Errors
    /// 503 while the store cannot be asked for keys that are not cached.
    pub(crate) async fn for_request(&self, site: SiteId) -> Result<Arc<SiteKeys>> {
        match self.look_up(site).await {
            Ok(keys) => Ok(keys.context("there is no VAPID key")?),
            Err(error) => Err(match error.downcast_ref::<sql::Error>() {
                Some(away) => store_failed(away, away.is_passing()).into(),
                None => anyhow!("{error:#}").into(),
            }),
        }
    }

    /// The keys of one site, read again when `public_key` is unknown: another process may have made it a moment ago.
    pub(crate) async fn with(&self, site: SiteId, public_key: &str) -> Result<Arc<SiteKeys>> {
        let keys = self.for_request(site).await?;
        let may_look = {
            let mut looked = self.looked.lock();
            let is_due = looked.is_none_or(|at| at.elapsed() >= LOOK_AGAIN);
            let may_look = is_due && keys.id_of(public_key).is_none();
            if may_look {
                *looked = Some(Instant::now());
            }
            may_look
        };
        if !may_look {
            return Ok(keys);
        }
        self.cache.forget(Some(&site.0.to_string())).await;
        self.for_request(site).await
    }

    /// The cached keys, by the name of the site.
    pub(crate) fn known(&self) -> Vec<(String, Arc<SiteKeys>)> {
        let named = |(site, keys): (String, _)| {
            let site = SiteId(site.parse().ok()?);
            Some((self.profiles.find(site)?.name.clone(), keys))
        };
        self.cache.known().into_iter().filter_map(named).collect()
    }

    /// The site of this name, for an operator.
    pub(crate) fn named(&self, name: &str) -> std::result::Result<(SiteId, &Profile), FieldError> {
        let found = self.profiles.iter().find(|(_, profile)| profile.name == name);
        let (site, profile) =
            found.ok_or_else(|| FieldError::new("site", "the name of a site in the settings"))?;
        Ok((*site, profile))
    }

    /// Makes a new key for the pages of a site to subscribe with. Every process has it soon.
    pub(crate) async fn rotate(&self, site: SiteId) -> anyhow::Result<VapidKey> {
        let profile = self.profiles.find(site).context("this site is not in the settings")?;
        let key = rotate(&self.data_dir, &self.sql, &profile.vapid).await?;
        self.caches.forget(CACHE.name, Some(&site.0.to_string())).await;
        Ok(key)
    }

    /// Makes a foreign key the one that pages of a site subscribe with. The earlier keys still sign for their
    /// subscriptions.
    pub(crate) async fn import(&self, site: SiteId, key: &VapidKey) -> anyhow::Result<()> {
        let profile = self.profiles.find(site).context("this site is not in the settings")?;
        import(&self.data_dir, &self.sql, &profile.vapid, key).await?;
        self.caches.forget(CACHE.name, Some(&site.0.to_string())).await;
        Ok(())
    }

    async fn look_up(&self, site: SiteId) -> std::result::Result<Option<Arc<SiteKeys>>, Arc<anyhow::Error>> {
        let load = async { self.load(site).await.map(Some) };
        self.cache.get(&site.0.to_string(), load).await
    }

    async fn load(&self, site: SiteId) -> anyhow::Result<Arc<SiteKeys>> {
        let profile = self.profiles.find(site).context("this site is not in the settings")?;
        let mut all = HashMap::new();
        let mut current = None;
        for key in read(&self.data_dir, &self.sql, site, &profile.vapid).await? {
            let id = self.store.vapid_key(site.0, *key.public_bytes()).await?;
            let key = key.or_contact(profile.contact.as_ref());
            current.get_or_insert_with(|| (id, key.clone()));
            all.insert(id, key);
        }
        let (current_id, current) = current.context("there is no VAPID key")?;
        // A secret that all replicas have, and that does not have to be stored.
        let secret = digest::digest(&digest::SHA256, current.to_pem()?.as_bytes());
        let guests = hmac::Key::new(hmac::HMAC_SHA256, secret.as_ref());
        Ok(Arc::new(SiteKeys { current, current_id, all, guests }))
    }
}

/// Makes the key pair of a site if there is none, and returns the one in use.
pub(crate) async fn make(
    data_dir: &DataDir,
    sql: &sql::Store,
    site: SiteId,
    place: &KeyPlace,
) -> anyhow::Result<VapidKey> {
    let keys = match sql.dialect() {
        Dialect::Sqlite => read(data_dir, sql, site, place).await?,
        // All replicas share it: the stored key, or else that of the file, or else a new one.
        Dialect::Postgres => {
            let pem = match data_dir.read(&place.file) {
                Some(pem) => pem,
                None => VapidKey::generate()?.to_pem()?,
            };
            let pem = secrets::share(sql, &place.shared, &pem).await?;
            VapidKey::all_from_pem(pem.expose_secret())?
        }
    };
    keys.into_iter().next().context("there is no VAPID key")
}

/// Makes a new key for pages to subscribe with, and keeps the earlier ones for the subscriptions made with them.
pub(crate) async fn rotate(
    data_dir: &DataDir,
    sql: &sql::Store,
    place: &KeyPlace,
) -> anyhow::Result<VapidKey> {
    let new = VapidKey::generate()?;
    let before = before(data_dir, sql, place).await?.context("there is no VAPID key")?;
    put_first(data_dir, sql, place, &new, Some(before)).await?;
    Ok(new)
}

/// Makes a foreign key the one that pages subscribe with. In a store without keys it is the first one.
pub(crate) async fn import(
    data_dir: &DataDir,
    sql: &sql::Store,
    place: &KeyPlace,
    key: &VapidKey,
) -> anyhow::Result<()> {
    let before = before(data_dir, sql, place).await?;
    put_first(data_dir, sql, place, key, before).await
}

/// The present keys, as a PEM file.
async fn before(data_dir: &DataDir, sql: &sql::Store, place: &KeyPlace) -> anyhow::Result<Option<String>> {
    let is_file = data_dir.join(&place.file).exists();
    match sql.dialect() {
        Dialect::Postgres if is_file => {
            // Other processes have their own files, which this process cannot change.
            let file = data_dir.join(&place.file);
            bail!("the keys are in {}: put a new one first in it, wherever it comes from", file.display());
        }
        Dialect::Postgres => {
            Ok(secrets::shared(sql, &place.shared).await?.map(|pem| pem.expose_secret().to_owned()))
        }
        Dialect::Sqlite => Ok(data_dir.read(&place.file)),
    }
}

/// Writes a key in front of the present ones. It may already be one of them.
async fn put_first(
    data_dir: &DataDir,
    sql: &sql::Store,
    place: &KeyPlace,
    key: &VapidKey,
    before: Option<String>,
) -> anyhow::Result<()> {
    let mut pem = key.to_pem()?;
    for other in before.as_deref().map(VapidKey::all_from_pem).transpose()?.into_iter().flatten() {
        if other != *key {
            pem.push_str(&other.to_pem()?);
        }
    }
    match (sql.dialect(), before) {
        (Dialect::Sqlite, _) => data_dir
            .write(&place.file, &pem)
            .context("the file of the keys cannot be changed: put a new one first in it")?,
        (Dialect::Postgres, Some(before)) => secrets::replace(sql, &place.shared, &before, &pem).await?,
        (Dialect::Postgres, None) => _ = secrets::share(sql, &place.shared, &pem).await?,
    }
    Ok(())
}

/// Reads the keys in a file, or in a shared store. A first key is made, but never a second one: the loss of the
/// first key loses its subscribers, and an operator should learn that.
async fn read(
    data_dir: &DataDir,
    sql: &sql::Store,
    site: SiteId,
    place: &KeyPlace,
) -> anyhow::Result<Vec<VapidKey>> {
    let file = data_dir.join(&place.file);
    if sql.dialect() == Dialect::Postgres && !file.exists() {
        let shared = secrets::shared(sql, &place.shared).await?;
        let shared = shared.with_context(|| {
            let (name, program) = (&place.shared, perennial_host::program_name());
            format!("there is no {name} in the store: make it once, with `{program} keys generate`")
        })?;
        return VapidKey::all_from_pem(shared.expose_secret())
            .with_context(|| format!("{} in the store cannot be used", place.shared));
    }
    if !file.exists() && store::has_subscriptions(sql, site.0).await? {
        anyhow::bail!(
            "{} is missing, and the stored subscriptions were made with it: restore the file, \
             or delete the subscriptions with the store",
            file.display()
        );
    }
    let new = VapidKey::generate()?.to_pem()?;
    let (pem, made) = data_dir.secret(&place.file, || new)?;
    if made {
        info!(file = %file.display(), "made the VAPID key pair; losing it loses every subscriber");
    }
    VapidKey::all_from_pem(&pem).with_context(|| format!("{} cannot be used", file.display()))
}
