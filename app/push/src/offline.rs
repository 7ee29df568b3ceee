//! Work of commands on the store of web push while no server runs.

use std::sync::Arc;

use anyhow::anyhow;
use perennial_host::command::Offline;
use perennial_host::data_dir::DataDir;
use perennial_host::module::SecretFile;
use perennial_host::settings::{Reader, Settings};
use perennial_host::sites::Sites;
use perennial_store::pool::sql;
use perennial_webpush::{Sender, VapidKey};

use crate::api::import::Transfer;
use crate::config;
use crate::model::profile::{self, Profiles, VAPID_KEY};
use crate::store::PushStore;
use crate::vapid::{self, VapidKeys};

/// Makes the transfer for imports and exports.
pub(crate) async fn transfer(settings: &Settings, offline: &Offline) -> anyhow::Result<Transfer> {
    let (vapid, sites) = vapid_keys(settings, offline).await?;
    let sender = Sender::new(config::sender(&mut Reader::new(settings)))?;
    Ok(Transfer::new(store(offline), sender, Arc::new(vapid), sites))
}

/// Opens the VAPID keys of all sites.
pub(crate) async fn vapid_keys(settings: &Settings, offline: &Offline) -> anyhow::Result<(VapidKeys, Sites)> {
    let sites = offline.sites().await?;
    let reader = &mut Reader::new(settings);
    let contact = config::contact(reader).ok();
    let profiles = Profiles::of(profile::read(reader, contact.as_ref()), &sites);
    let (sql, caches) = (&offline.store, offline.caches());
    let keys = VapidKeys::open(&offline.data_dir, sql, &store(offline), &profiles, &caches).await?;
    Ok((keys, sites))
}

/// Makes a foreign key the one that pages of a site subscribe with.
pub(crate) async fn import_key(
    settings: &Settings,
    site: &str,
    data_dir: &DataDir,
    store: &sql::Store,
    key: &VapidKey,
) -> anyhow::Result<()> {
    let places = profile::places(&mut Reader::new(settings));
    let place = places.into_iter().find(|(name, _)| name == site);
    let (_, place) = place.ok_or_else(|| anyhow!("--site: wanted the name of a site in the settings"))?;
    vapid::import(data_dir, store, &place, key).await
}

/// The files of the VAPID keys of all sites.
pub(crate) fn files(settings: &Settings) -> Vec<SecretFile> {
    let places = profile::places(&mut Reader::new(settings));
    let file = |(_, profile::KeyPlace { file, shared: name })| SecretFile {
        label: if name == VAPID_KEY { "VAPID key pair".to_owned() } else { name.clone() },
        file,
        name,
        public: |pem| Some(VapidKey::from_pem(pem).ok()?.public_key()),
        loss: "Keep a copy of the VAPID keys: every subscription is bound to one, and losing it loses them all.",
    };
    places.into_iter().map(file).collect()
}

fn store(offline: &Offline) -> PushStore {
    PushStore::new(offline.store.clone(), offline.jobs.clone())
}
