//! The first stage: the data directory, the store, and the parts that need only them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use perennial_store::cache::Caches;
use perennial_store::pool::sql;
use perennial_workers::Jobs;
use perennial_workers::admission::Admission;
use perennial_workers::outbox::Outbox;
use tracing::warn;

use super::open;
use super::plan::BootPlan;
use crate::access::{Access, first};
use crate::admin::keys::Keyring;
use crate::data_dir::{API_KEY, DataDir};
use crate::http_client::HttpClient;
use crate::pools::NamedPools;
use crate::sites::Sites;

/// Time that a predecessor may take to close everything, besides its drain.
const CLOSING: Duration = Duration::from_secs(30);

/// The parts that everything else is made from.
pub(super) struct Base {
    pub(super) data_dir: Arc<DataDir>,
    pub(super) store: sql::Store,
    /// The replica of the store that only reads.
    pub(super) replica: Option<sql::Store>,
    pub(super) pools: NamedPools,
    /// HTTP clients of the targets of modules.
    pub(super) clients: Vec<HttpClient>,
    pub(super) outbox: Option<Outbox>,
    pub(super) caches: Caches,
    pub(super) sites: Sites,
    pub(super) access: Access,
    pub(super) jobs: Jobs,
}

impl Base {
    /// Takes the data directory over from a predecessor, if there is one, and brings the store up to date.
    pub(super) async fn open(plan: &BootPlan) -> anyhow::Result<Self> {
        let config = &plan.config;
        // Servers that cannot be used must be noticed before the predecessor is asked to leave.
        let clients = config.targets.iter().cloned().map(HttpClient::new).collect::<anyhow::Result<_>>()?;
        let replica = open::replica(config).await?;
        let mut pools = NamedPools::open_servers(&config.pools).await?;
        let patience = config.phases.succession + config.phases.hard + CLOSING;
        let data_dir = Arc::new(plan.inheritance.lock(&config.data_dir, patience).await?);
        let store = open::store(&data_dir, &config.store).await?;
        store.migrate(&plan.tables).await.context("the store cannot be brought up to date")?;
        pools.open_files(&config.pools, &data_dir).await?;
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
        let jobs = Jobs::new(queue, Admission::new(config.bounds));
        let base = Self { data_dir, store, replica, pools, clients, outbox, caches, sites, access, jobs };
        base.check_first_key().await;
        Ok(base)
    }

    /// Warns when the first API key is not valid: its file may belong to another store.
    async fn check_first_key(&self) {
        if let Some(key) = self.data_dir.read(API_KEY)
            && self.access.caller(&key, None).await.is_ok_and(|caller| caller.is_none())
        {
            let file = self.data_dir.join(API_KEY);
            warn!(file = %file.display(), "this API key is not in the store, and opens nothing");
        }
    }

    /// Makes the state of the routes with which operators change API keys.
    pub(super) fn keyring(&self, plan: &BootPlan) -> Keyring {
        Keyring {
            store: self.store.clone(),
            sites: self.sites.clone(),
            caches: self.caches.clone(),
            scopes: plan.config.scopes.clone(),
        }
    }
}
