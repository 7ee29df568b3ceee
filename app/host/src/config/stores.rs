//! Settings of databases and of Redis servers: of the store, of the store of jobs, and of pools that modules name.

use std::path::PathBuf;
use std::time::Duration;

use perennial_runtime::health::ReadinessPolicy;
use perennial_store::pool::{Url, postgres, redis};
use secrecy::{ExposeSecret, SecretString};

use super::{DAY, MILLISECOND, SECOND};
use crate::capacity::processors;
use crate::settings::Reader;

/// Name of the pool of the store when it is embedded.
pub(crate) const SQLITE: &str = "sqlite";
/// Name of the pool of the store on a Postgres server.
pub(crate) const POSTGRES: &str = "postgres";
/// Name of the pool of the replica of the store that only reads.
pub(crate) const REPLICA: &str = "postgres-replica";
/// Name of the pool of the store of jobs on a Redis server.
pub(crate) const REDIS: &str = "redis";

/// Schemes of the URL of a database.
const DATABASES: [&str; 3] = ["sqlite:", "postgres://", "postgresql://"];
/// Schemes of the URL of a Redis server.
const SERVERS: [&str; 3] = ["redis://", "rediss://", "redis+unix://"];

/// Settings of a database.
#[derive(Clone, Debug)]
pub(crate) enum StoreConfig {
    /// An embedded database: a file that only this process uses.
    Sqlite {
        /// Name of the pool of readers.
        name: &'static str,
        /// A relative path is inside the data directory.
        file: PathBuf,
        readers: usize,
        wait: Duration,
        statement_timeout: Duration,
    },
    /// A Postgres server, which is shared with other processes.
    Postgres(postgres::Config),
}

/// Settings of the store of jobs, if that is not the main store.
#[derive(Clone, Debug)]
pub(crate) struct RedisQueueConfig {
    pub(crate) redis: redis::Config,
    /// Prefix of the keys in Redis.
    pub(crate) prefix: String,
}

/// Reads the store.
pub(super) fn store(settings: &mut Reader<'_>) -> StoreConfig {
    database(settings, "store", (SQLITE, POSTGRES), false)
}

/// Reads the replica of the store that only reads, which has the settings of the store but for its URL.
pub(super) fn replica(settings: &mut Reader<'_>, store: &StoreConfig) -> Option<postgres::Config> {
    let text: String = settings.get("store.read_url");
    let file: Option<PathBuf> = settings.get("store.read_url_file");
    if text.is_empty() && file.is_none() {
        return None;
    }
    let wanted = "postgres://user:password@host/database, or nothing";
    let url = url(settings, "store.read_url", wanted, &DATABASES[1..]);
    let StoreConfig::Postgres(store) = store else {
        return settings.refuse("store.read_url", "nothing, since store.url is no Postgres server");
    };
    Some(postgres::Config { name: REPLICA, url: Url::new(url, file), may_only_read: true, ..store.clone() })
}

/// Reads a database from a section: its pool is called by the first name when it is embedded, else by the second.
pub(crate) fn database(
    settings: &mut Reader<'_>,
    section: &str,
    (embedded, shared): (&'static str, &'static str),
    may_only_read: bool,
) -> StoreConfig {
    let key = |name: &str| format!("{section}.{name}");
    let url = url(settings, &key("url"), "sqlite:FILE or postgres://user:password@host/database", &DATABASES);
    let processors = processors(settings).get();
    let readers = match settings.number(&key("readers"), 0..=64) {
        0_usize => (processors * 2).clamp(4, 64),
        readers => readers,
    };
    let wait = settings.duration(&key("wait"), MILLISECOND..=DAY);
    let postgres = postgres::Config {
        name: shared,
        url: Url::new(url.clone(), settings.get(&key("url_file"))),
        ca_file: settings.file(&key("ca_file")),
        size: connections(settings, &key("connections")),
        wait,
        connect_timeout: settings.duration(&key("connect_timeout"), MILLISECOND..=DAY),
        statement_timeout: settings.duration(&key("statement_timeout"), MILLISECOND..=DAY),
        max_age: settings.duration(&key("max_age"), SECOND..=30 * DAY),
        pgbouncer: settings.get(&key("pgbouncer")),
        may_only_read,
    };
    match url.expose_secret().strip_prefix("sqlite:") {
        Some(file) => {
            let statement_timeout = postgres.statement_timeout;
            StoreConfig::Sqlite { name: embedded, file: file.into(), readers, wait, statement_timeout }
        }
        None => StoreConfig::Postgres(postgres),
    }
}

/// Reads the store of jobs; `None` when jobs are in the store.
pub(super) fn queue(settings: &mut Reader<'_>) -> Option<RedisQueueConfig> {
    let wanted = (Some("store"), "store, or redis://user:password@host/0");
    let redis = redis(settings, "queue", REDIS, wanted, false);
    let prefix = settings.get("queue.prefix");
    (redis.url.text.expose_secret() != "store").then_some(RedisQueueConfig { redis, prefix })
}

/// Reads a Redis server from a section. Its URL may also be the first of the words, and the second says what is wanted.
pub(crate) fn redis(
    settings: &mut Reader<'_>,
    section: &str,
    name: &'static str,
    (also, wanted): (Option<&str>, &str),
    may_evict: bool,
) -> redis::Config {
    let key = |name: &str| format!("{section}.{name}");
    let schemes: Vec<&str> = SERVERS.into_iter().chain(also).collect();
    let url = url(settings, &key("url"), wanted, &schemes);
    redis::Config {
        name,
        may_evict,
        url: Url::new(url, settings.get(&key("url_file"))),
        ca_file: settings.file(&key("ca_file")),
        size: connections(settings, &key("connections")),
        wait: settings.duration(&key("wait"), MILLISECOND..=DAY),
        connect_timeout: settings.duration(&key("connect_timeout"), MILLISECOND..=DAY),
        response_timeout: settings.duration(&key("response_timeout"), MILLISECOND..=DAY),
        max_age: settings.duration(&key("max_age"), SECOND..=30 * DAY),
    }
}

/// Reads the effect on readiness while a server is away.
pub(crate) fn readiness(settings: &mut Reader<'_>, section: &str) -> ReadinessPolicy {
    settings.parse(&format!("{section}.readiness"), "required or degraded")
}

/// Reads the number of connections of a pool. By default it is the number that the processors can keep busy.
fn connections(settings: &mut Reader<'_>, key: &str) -> usize {
    match settings.number(key, 0..=1000) {
        0_usize => (6 + 2 * processors(settings).get()).min(64),
        connections => connections,
    }
}

/// Reads a URL, from its file if there is one, since a URL may contain a password.
fn url(settings: &mut Reader<'_>, key: &str, wanted: &str, schemes: &[&str]) -> SecretString {
    let text: String = settings.get(key);
    let file = settings.secret_file(&format!("{key}_file"));
    let is_from_file = file.is_some();
    let url = file.unwrap_or_else(|| text.into());
    let text = url.expose_secret();
    let is_readable = !text.starts_with("redis") || redis::is_url(text);
    if !schemes.iter().any(|scheme| text.starts_with(scheme)) || text == "sqlite:" || !is_readable {
        match is_from_file {
            true => settings.refuse::<()>(&format!("{key}_file"), &format!("a file with {wanted}")),
            false => settings.refuse::<()>(key, wanted),
        };
    }
    url
}
