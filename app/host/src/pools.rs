//! Pools by name: databases and Redis servers that a module uses beside the store.
//!
//! ```
//! # use perennial_host::pools::Pool;
//! const POOLS: &[Pool] = &[Pool::database("reports"), Pool::redis("sessions").cache()];
//! ```
//!
//! Each has a section of settings, `[databases.reports]` and `[redis.sessions]`. Boot opens it, `/pools` and the metrics
//! of pools show it by its name, and `/readyz` by its readiness policy.

use std::collections::HashMap;
use std::convert::Infallible;

use anyhow::{Context as _, bail};
use perennial_runtime::drain::Drain;
use perennial_runtime::health::{Condition, Health, ReadinessPolicy};
use perennial_runtime::tasks::Tasks;
use perennial_store::pool::redis::{self, Redis};
use perennial_store::pool::sql::Store;
use perennial_store::pool::{PoolStatus, postgres};

use crate::boot::open;
use crate::config::StoreConfig;
use crate::config::stores::{self, POSTGRES, REDIS, REPLICA, SQLITE};
use crate::data_dir::DataDir;
use crate::settings::Reader;

/// Settings of a database, with their defaults; `NAME` stands for its name.
const DATABASE: &str = include_str!("../../../config/database.toml");
/// Settings of a Redis server, with their defaults; `NAME` stands for its name.
const SERVER: &str = include_str!("../../../config/redis.toml");

/// Names of the pools of the host.
pub(crate) const OF_HOST: [&str; 4] = [SQLITE, POSTGRES, REPLICA, REDIS];

/// A database or a Redis server that a module names in [`Module::POOLS`](crate::module::Module::POOLS).
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    name: &'static str,
    kind: PoolKind,
}

#[derive(Clone, Copy, Debug)]
enum PoolKind {
    Database,
    Redis { is_cache: bool },
}

impl Pool {
    /// A database: `databases.NAME.url` names a Postgres server, or a file of SQLite, which is the default. The module
    /// gets it with [`Host::database`](crate::module::Host::database).
    pub const fn database(name: &'static str) -> Self {
        Self { name, kind: PoolKind::Database }
    }

    /// A Redis server: `redis.NAME.url` names it. The module gets it with [`Host::redis`](crate::module::Host::redis).
    /// A server that evicts keys is refused, unless it is a [`cache`](Self::cache).
    pub const fn redis(name: &'static str) -> Self {
        Self { name, kind: PoolKind::Redis { is_cache: false } }
    }

    /// Allows the Redis server to evict keys: the module can do without any of them.
    #[must_use]
    pub const fn cache(self) -> Self {
        Self { kind: PoolKind::Redis { is_cache: true }, ..self }
    }

    /// The name.
    pub(crate) const fn name(self) -> &'static str {
        self.name
    }

    fn section(self) -> String {
        match self.kind {
            PoolKind::Database => format!("databases.{}", self.name),
            PoolKind::Redis { .. } => format!("redis.{}", self.name),
        }
    }

    /// Settings of the pool with their defaults, as commented TOML.
    pub(crate) fn defaults(self) -> String {
        let template = match self.kind {
            PoolKind::Database => DATABASE,
            PoolKind::Redis { .. } => SERVER,
        };
        template.replace("NAME", self.name)
    }

    pub(crate) fn read(self, settings: &mut Reader<'_>) -> PoolConfig {
        let (section, name) = (self.section(), self.name);
        let server = match self.kind {
            PoolKind::Database => {
                let may_only_read = settings.get(&format!("{section}.read_only"));
                ServerConfig::Sql(stores::database(settings, &section, (name, name), may_only_read))
            }
            PoolKind::Redis { is_cache } => {
                let wanted = (None, "redis://user:password@host/0");
                ServerConfig::Redis(stores::redis(settings, &section, name, wanted, is_cache))
            }
        };
        PoolConfig { name, section: section.clone(), server, policy: stores::readiness(settings, &section) }
    }
}

/// Settings of a pool.
#[derive(Clone, Debug)]
pub(crate) struct PoolConfig {
    name: &'static str,
    section: String,
    server: ServerConfig,
    policy: ReadinessPolicy,
}

#[derive(Clone, Debug)]
enum ServerConfig {
    Sql(StoreConfig),
    Redis(redis::Config),
}

impl PoolConfig {
    /// The name of the pool.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The key of its URL.
    pub(crate) fn url_key(&self) -> String {
        format!("{}.url", self.section)
    }

    /// The file of an embedded database.
    pub(crate) fn file(&self) -> Option<&std::path::Path> {
        match &self.server {
            ServerConfig::Sql(StoreConfig::Sqlite { file, .. }) => Some(file),
            _ => None,
        }
    }

    /// Opens an embedded database; `None` for the pool of a server.
    async fn open_file(&self, data_dir: &DataDir) -> anyhow::Result<Option<OpenPool>> {
        let ServerConfig::Sql(config @ StoreConfig::Sqlite { .. }) = &self.server else { return Ok(None) };
        let store = open::store(data_dir, config).await.with_context(|| self.url_key())?;
        Ok(Some(OpenPool::sql(store, self.policy)))
    }

    /// Opens the pool of a server; `None` for an embedded database. A server that is away fails boot only if it is required.
    async fn open_server(&self) -> anyhow::Result<Option<OpenPool>> {
        Ok(match &self.server {
            ServerConfig::Sql(StoreConfig::Sqlite { .. }) => None,
            ServerConfig::Sql(StoreConfig::Postgres(config)) => {
                let setting = format!("{}: Postgres", self.url_key());
                Some(OpenPool::sql(database(config, &setting, self.policy).await?, self.policy))
            }
            ServerConfig::Redis(config) => Some(self.open_redis(config).await?),
        })
    }

    async fn open_redis(&self, config: &redis::Config) -> anyhow::Result<OpenPool> {
        let setting = format!("{}: Redis", self.url_key());
        let unusable = |error: &redis::Error| open::not_usable(&setting, &config.url, error);
        let redis = Redis::new(config.clone()).map_err(|error| unusable(&error))?;
        match redis.connect().await {
            Err(error) if self.policy == ReadinessPolicy::Required || !error.is_passing() => {
                return Err(unusable(&error));
            }
            // The task of the pool reports it.
            _ => {}
        }
        Ok(OpenPool::redis(redis, self.policy))
    }
}

/// Opens a database on a Postgres server. A server that is away fails only if it is required.
pub(crate) async fn database(
    config: &postgres::Config,
    setting: &str,
    policy: ReadinessPolicy,
) -> anyhow::Result<Store> {
    let unusable = |error: &postgres::Error| open::not_usable(setting, &config.url, error);
    let postgres = postgres::Postgres::new(config.clone()).map_err(|error| unusable(&error))?;
    match postgres.connect().await {
        Err(error) if policy == ReadinessPolicy::Required || !error.is_passing() => Err(unusable(&error)),
        // The task of the pool reports it.
        _ => Ok(Store::Postgres(postgres)),
    }
}

/// A pool that is open, with its effect on readiness.
#[derive(Clone, Debug)]
pub(crate) struct OpenPool {
    server: PoolServer,
    policy: ReadinessPolicy,
}

#[derive(Clone, Debug)]
enum PoolServer {
    Sql(Store),
    Redis(Redis),
}

impl OpenPool {
    pub(crate) fn sql(store: Store, policy: ReadinessPolicy) -> Self {
        Self { server: PoolServer::Sql(store), policy }
    }

    /// The replica of the store, without which the program goes on.
    pub(crate) fn of_replica(replica: Store) -> Self {
        Self::sql(replica, ReadinessPolicy::Degraded)
    }

    pub(crate) fn redis(redis: Redis, policy: ReadinessPolicy) -> Self {
        Self { server: PoolServer::Redis(redis), policy }
    }

    /// The name of the pool, and its status.
    pub(crate) fn status(&self) -> (&'static str, PoolStatus) {
        match &self.server {
            PoolServer::Sql(store) => store.pool(),
            PoolServer::Redis(redis) => (redis.name(), redis.status()),
        }
    }

    /// Starts the task that maintains the connections and reports on the server.
    pub(crate) fn start(&self, tasks: &Tasks, health: &Health, drain: &Drain) {
        let (name, _) = self.status();
        let condition = health.dependency(name, self.policy);
        let (server, drain) = (self.server.clone(), drain.clone());
        tasks.contained(name, move || server.clone().tend(condition.clone(), drain.clone()));
    }

    /// Closes the connections.
    pub(crate) async fn close(self) {
        match self.server {
            PoolServer::Sql(store) => store.close().await,
            PoolServer::Redis(redis) => redis.close(),
        }
    }
}

impl PoolServer {
    async fn tend(self, condition: Condition, drain: Drain) -> Result<(), Infallible> {
        match self {
            Self::Sql(Store::Sqlite(sqlite)) => sqlite.tend(condition, drain).await,
            Self::Sql(Store::Postgres(postgres)) => postgres.tend(condition, drain).await,
            Self::Redis(redis) => redis.tend(condition, drain).await,
        }
    }
}

/// The pools of all modules, by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct NamedPools(HashMap<&'static str, OpenPool>);

impl NamedPools {
    /// Opens the pools of servers.
    pub(crate) async fn open_servers(configs: &[PoolConfig]) -> anyhow::Result<Self> {
        let mut pools = HashMap::new();
        for config in configs {
            pools.extend(config.open_server().await?.map(|pool| (config.name, pool)));
        }
        Ok(Self(pools))
    }

    /// Opens the embedded databases, which need the data directory.
    pub(crate) async fn open_files(
        &mut self,
        configs: &[PoolConfig],
        data_dir: &DataDir,
    ) -> anyhow::Result<()> {
        for config in configs {
            self.0.extend(config.open_file(data_dir).await?.map(|pool| (config.name, pool)));
        }
        Ok(())
    }

    /// All of them.
    pub(crate) fn named(&self) -> Vec<OpenPool> {
        self.0.values().cloned().collect()
    }

    /// The database with this name.
    pub(crate) fn database(&self, name: &str) -> anyhow::Result<Store> {
        match self.0.get(name) {
            Some(OpenPool { server: PoolServer::Sql(store), .. }) => Ok(store.clone()),
            _ => bail!("no module names the database {name}: add Pool::database({name:?}) to its POOLS"),
        }
    }

    /// The Redis server with this name.
    pub(crate) fn redis(&self, name: &str) -> anyhow::Result<Redis> {
        match self.0.get(name) {
            Some(OpenPool { server: PoolServer::Redis(redis), .. }) => Ok(redis.clone()),
            _ => bail!("no module names the Redis server {name}: add Pool::redis({name:?}) to its POOLS"),
        }
    }
}
