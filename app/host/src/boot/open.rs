//! The stores, and the parts that need only them, for boot and for commands that run while no server does.

use std::time::Duration;

use anyhow::Context as _;
use perennial_runtime::health::ReadinessPolicy;
use perennial_store::cache::{Bus, Caches};
use perennial_store::pool::redis::Redis;
use perennial_store::pool::sql::{self, Tables};
use perennial_store::pool::sqlite::{self, Sqlite};
use perennial_store::pool::{Url, postgres::Postgres, with_causes};
use perennial_workers::outbox::{self, Outbox};
use perennial_workers::store as workers;
use perennial_workers::store::postgres::PostgresQueue;
use perennial_workers::store::redis::RedisQueue;
use perennial_workers::store::sqlite::SqliteQueue;

use crate::access;
use crate::config::{self, Config};
use crate::data_dir::DataDir;
use crate::{locks, pools, sessions};

/// How many writes may wait for the store's writer.
const WRITE_QUEUE: usize = 4096;
/// How long a caller waits for a commit. A disk that takes longer is out of order.
const COMMIT_WAIT: Duration = Duration::from_secs(60);

/// All tables: first the tables of the host, then the tables of each module.
pub(crate) fn tables(modules: impl Iterator<Item = Tables>) -> Vec<Tables> {
    [access::keys::TABLES, workers::TABLES, outbox::TABLES, locks::TABLES, sessions::TABLES]
        .into_iter()
        .chain(modules)
        .collect()
}

/// Opens the store.
pub(crate) async fn store(data_dir: &DataDir, store: &config::StoreConfig) -> anyhow::Result<sql::Store> {
    let opened = match store {
        config::StoreConfig::Sqlite { name, file, readers, wait, statement_timeout } => {
            let path = data_dir.join(file);
            data_dir.lock_store(&path)?;
            let config = sqlite::Config {
                name,
                path,
                readers: *readers,
                write_queue: WRITE_QUEUE,
                wait: *wait,
                commit_wait: COMMIT_WAIT,
            };
            let opened =
                Sqlite::open(config).await.map(|store| store.with_statement_timeout(*statement_timeout));
            opened.map(sql::Store::Sqlite).map_err(sql::Error::from)
        }
        config::StoreConfig::Postgres(config) => {
            let opened = Postgres::open(config.clone()).await.map(sql::Store::Postgres);
            return opened.map_err(|error| not_usable("store.url: Postgres", &config.url, &error));
        }
    };
    opened.context("the store cannot be opened")
}

/// Opens the replica of the store, if there is one. Boot goes on without it, and its task reports when it is there.
pub(super) async fn replica(config: &Config) -> anyhow::Result<Option<sql::Store>> {
    let Some(replica) = &config.replica else { return Ok(None) };
    let setting = "store.read_url: Postgres";
    pools::database(replica, setting, ReadinessPolicy::Degraded).await.map(Some)
}

/// Makes the error for a server that cannot be used: one sentence with its setting, its address and the cause.
pub(crate) fn not_usable(
    server: &str,
    url: &Url,
    error: &(dyn std::error::Error + 'static),
) -> anyhow::Error {
    anyhow::anyhow!("{server} at {} cannot be used: {}", url.place(), with_causes(error))
}

/// Opens the store of jobs, and the outbox if jobs are not in the main store.
pub(crate) async fn queue(
    config: &Config,
    store: &sql::Store,
) -> anyhow::Result<(workers::JobStore, Option<Outbox>)> {
    if let Some(config::RedisQueueConfig { redis, prefix }) = &config.queue {
        let opened = Redis::open(redis.clone()).await;
        let redis = opened.map_err(|error| not_usable("queue.url: Redis", &redis.url, &error))?;
        let outbox = Outbox::new(store.clone());
        let queue = RedisQueue::with_outbox(redis, prefix, outbox.clone());
        return Ok((workers::JobStore::Redis(queue), Some(outbox)));
    }
    let queue = match store {
        sql::Store::Sqlite(sqlite) => workers::JobStore::Sqlite(SqliteQueue::new(sqlite.clone())),
        sql::Store::Postgres(postgres) => workers::JobStore::Postgres(PostgresQueue::new(postgres.clone())),
    };
    Ok((queue, None))
}

/// Makes the caches. Replicas that share a Redis drop entries together.
pub(crate) fn caches(queue: &workers::JobStore, config: &Config) -> Caches {
    Caches::new(shared_redis(queue, config).map(|(redis, prefix)| Bus::new(redis, &prefix)))
}

/// Returns the Redis that replicas share, if there is one, and the prefix of its keys.
pub(super) fn shared_redis(queue: &workers::JobStore, config: &Config) -> Option<(Redis, String)> {
    match (queue, &config.queue) {
        (workers::JobStore::Redis(queue), Some(shared)) => {
            Some((queue.redis().clone(), shared.prefix.clone()))
        }
        _ => None,
    }
}
