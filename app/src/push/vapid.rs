//! The keys that identify us to push services: the one that pages subscribe with, and those they subscribed with before.
//!
//! A file `vapid.pem` may hold several: the first is in use, the others go on signing for the subscriptions that were
//! made with them.

use std::collections::HashMap;

use anyhow::Context as _;
use perennial_server::pool::sql::{self, Dialect};
use perennial_webpush::VapidKey;
use secrecy::ExposeSecret;
use tracing::{info, warn};

use super::store::{self, Store};
use crate::access::{self, SiteId};
use crate::data_dir::{DataDir, VAPID_KEY};

/// The keys of a site.
#[derive(Debug)]
pub(super) struct VapidKeys {
    /// The one in use, and the id of its row.
    pub(super) current: VapidKey,
    pub(super) current_id: i64,
    all: HashMap<i64, VapidKey>,
}

impl VapidKeys {
    /// Reads the keys, makes a first one if there is none, and notes them in the store.
    pub(super) async fn load(data_dir: &DataDir, sql: &sql::Store, store: &Store) -> anyhow::Result<Self> {
        let mut all = HashMap::new();
        let mut current = None;
        for key in read(data_dir, sql).await? {
            let id = store.vapid_key(SiteId::DEFAULT.0, *key.public_bytes()).await?;
            current.get_or_insert_with(|| (id, key.clone()));
            all.insert(id, key);
        }
        let (current_id, current) = current.context("there is no VAPID key")?;
        let known: Vec<i64> = all.keys().copied().collect();
        let orphans = store.made_with_other_keys(&known).await?;
        if orphans > 0 {
            warn!(
                subscriptions = orphans,
                "made with VAPID keys that are not there: push services will refuse ours for them"
            );
        }
        Ok(Self { current, current_id, all })
    }

    /// The key that a subscription was made with; one that came with a notification takes the one in use.
    pub(super) fn of(&self, id: Option<i64>) -> Option<&VapidKey> {
        id.map_or(Some(&self.current), |id| self.all.get(&id))
    }

    /// The id of the key with this public half, base64url.
    pub(super) fn id_of(&self, public_key: &str) -> Option<i64> {
        let wanted = public_key.trim_end_matches('=');
        self.all.iter().find(|(_, key)| key.public_key() == wanted).map(|(id, _)| *id)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }
}

/// Makes the key pair if there is none, and returns the one in use.
pub(super) async fn make(data_dir: &DataDir, sql: &sql::Store) -> anyhow::Result<VapidKey> {
    let keys = match sql.dialect() {
        Dialect::Sqlite => read(data_dir, sql).await?,
        // All replicas share it: the file's if there is one, or the one that is stored, or a new one.
        Dialect::Postgres => {
            let pem = match data_dir.read(VAPID_KEY) {
                Some(pem) => pem,
                None => VapidKey::generate()?.to_pem()?,
            };
            let pem = access::share_secret(sql, VAPID_KEY, &pem).await?;
            VapidKey::all_from_pem(pem.expose_secret())?
        }
    };
    keys.into_iter().next().context("there is no VAPID key")
}

/// Makes a new key for pages to subscribe with, and keeps those there are for the subscriptions made with them.
pub(super) async fn rotate(data_dir: &DataDir, sql: &sql::Store) -> anyhow::Result<VapidKey> {
    make(data_dir, sql).await?;
    let new = VapidKey::generate()?;
    let before = match sql.dialect() {
        Dialect::Postgres if !data_dir.join(VAPID_KEY).exists() => {
            let shared = access::shared_secret(sql, VAPID_KEY).await?;
            shared.context("there is no VAPID key in the store")?.expose_secret().to_owned()
        }
        _ => data_dir.read(VAPID_KEY).context("there is no VAPID key")?,
    };
    let pem = format!("{}{before}", new.to_pem()?);
    if data_dir.join(VAPID_KEY).exists() {
        data_dir.write(VAPID_KEY, &pem)?;
    } else {
        access::replace_secret(sql, VAPID_KEY, &before, &pem).await?;
    }
    Ok(new)
}

/// The keys in the data directory, or in a shared store. A first one is made, but never a second: whoever lost the
/// first has lost its subscribers, and should hear of it.
async fn read(data_dir: &DataDir, sql: &sql::Store) -> anyhow::Result<Vec<VapidKey>> {
    let file = data_dir.join(VAPID_KEY);
    if sql.dialect() == Dialect::Postgres && !file.exists() {
        let shared = access::shared_secret(sql, VAPID_KEY).await?;
        let shared = shared
            .context("there is no VAPID key in the store: make it once, with `perennial keys generate`")?;
        return VapidKey::all_from_pem(shared.expose_secret())
            .context("the VAPID key in the store cannot be used");
    }
    if !file.exists() && store::has_subscriptions(sql).await? {
        anyhow::bail!(
            "{} is missing, and the stored subscriptions were made with it: restore the file, \
             or delete the subscriptions with the store",
            file.display()
        );
    }
    let new = VapidKey::generate()?.to_pem()?;
    let (pem, made) = data_dir.secret(VAPID_KEY, || new)?;
    if made {
        info!(file = %file.display(), "made the VAPID key pair; losing it loses every subscriber");
    }
    VapidKey::all_from_pem(&pem).with_context(|| format!("{} cannot be used", file.display()))
}
