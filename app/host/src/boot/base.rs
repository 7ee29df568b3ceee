//! The first stage: the data directory, the store, and what hangs on them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use perennial_store::cache::Caches;
use perennial_store::pool::sql;
use perennial_workers::admission::Admission;
use perennial_workers::outbox::Outbox;
use perennial_workers::{Jobs, store};
use tracing::warn;

use super::open;
use super::plan::BootPlan;
use crate::access::{Access, first};
use crate::admin::keys::Keyring;
use crate::data_dir::{API_KEY, DataDir};
use crate::sites::Sites;

/// How long a predecessor may take, besides its drain, until it has closed everything.
const CLOSING: Duration = Duration::from_secs(30);

/// What everything else is made from.
pub(super) struct Base {
    pub(super) data_dir: Arc<DataDir>,
    pub(super) store: sql::Store,
    pub(super) queue: store::JobStore,
    pub(super) outbox: Option<Outbox>,
    pub(super) caches: Caches,
    pub(super) sites: Sites,
    pub(super) access: Access,
    pub(super) admission: Admission,
    pub(super) jobs: Jobs,
}

impl Base {
    /// Takes the data directory over from a predecessor, if there is one, and brings the store up to date.
    pub(super) async fn open(plan: &BootPlan) -> anyhow::Result<Self> {
        let config = &plan.config;
        let patience = config.phases.succession + config.phases.hard + CLOSING;
        let data_dir = Arc::new(plan.inheritance.lock(&config.data_dir, patience).await?);
        let store = open::store(&data_dir, &config.store).await?;
        store.migrate(&plan.tables).await.context("the store cannot be brought up to date")?;
        let (queue, outbox) = open::queue(config, &store).await?;
        let caches = open::caches(&queue, config);
        let has_others = !config.key_files.is_empty();
        let admin_token = first::make(&data_dir, &store, &config.scopes, has_others).await?;
        let sites = config.sites.clone().open(&store).await.context("the sites cannot be written down")?;
        let access = Access::new(
            store.clone(),
            sites.clone(),
            &caches,
            config.key_files.clone(),
            open::shared_redis(&queue, config),
            admin_token,
        );
        let admission = Admission::new(config.bounds);
        let jobs = Jobs::new(queue.clone(), admission.clone());
        let base = Self { data_dir, store, queue, outbox, caches, sites, access, admission, jobs };
        base.check_first_key().await;
        Ok(base)
    }

    /// Says when the first API key is of no use: its file may be that of another store.
    async fn check_first_key(&self) {
        if let Some(key) = self.data_dir.read(API_KEY)
            && self.access.caller(&key, None).await.is_ok_and(|caller| caller.is_none())
        {
            let file = self.data_dir.join(API_KEY);
            warn!(file = %file.display(), "this API key is not in the store, and opens nothing");
        }
    }

    /// What operators change API keys with.
    pub(super) fn keyring(&self, plan: &BootPlan) -> Keyring {
        Keyring {
            store: self.store.clone(),
            sites: self.sites.clone(),
            caches: self.caches.clone(),
            scopes: plan.config.scopes.clone(),
        }
    }
}
