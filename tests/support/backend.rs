//! A job store of a test, of any kind.

use std::time::Duration;

use jiff::SignedDuration;
use perennial_store::pool::postgres::Postgres;
use perennial_store::pool::redis::Redis;
use perennial_store::pool::redis::client::cmd;
use perennial_store::pool::sql::Store;
use perennial_store::pool::sqlite::{self, Sqlite};
use perennial_workers::store::postgres::PostgresQueue;
use perennial_workers::store::redis::RedisQueue;
use perennial_workers::store::sqlite::{MIGRATIONS, SqliteQueue};
use perennial_workers::store::{self, JobStore};
use tempfile::TempDir;

use crate::postgres::Database;
use crate::redis::Prefix;

/// Kind of a job store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    Sqlite,
    /// A database of a Postgres server.
    Postgres,
    /// A prefix of a Redis server.
    Redis,
}

/// A job store, empty at first.
#[derive(Debug)]
pub struct Backend(Inner);

#[derive(Debug)]
enum Inner {
    Sqlite { store: Sqlite, _directory: TempDir },
    Postgres { database: Box<Database>, postgres: Postgres },
    Redis { prefix: Box<Prefix>, redis: Redis },
}

impl Backend {
    /// Creates an empty store.
    pub async fn new(kind: Kind) -> Self {
        Self(match kind {
            Kind::Sqlite => {
                let directory = TempDir::new().unwrap();
                let store = Sqlite::open(sqlite_config(directory.path().join("jobs.db"))).await.unwrap();
                store.migrate(&[MIGRATIONS]).await.unwrap();
                Inner::Sqlite { store, _directory: directory }
            }
            Kind::Postgres => {
                let database = Database::new().await;
                let postgres = database.connect().await;
                postgres.migrate(&[store::postgres::MIGRATIONS]).await.unwrap();
                Inner::Postgres { database: Box::new(database), postgres }
            }
            Kind::Redis => {
                let prefix = Prefix::new().await;
                let redis = prefix.connect().await;
                Inner::Redis { prefix: Box::new(prefix), redis }
            }
        })
    }

    /// Opens a handle of its own, as another process would.
    pub async fn queue(&self) -> JobStore {
        match &self.0 {
            Inner::Sqlite { store, .. } => JobStore::Sqlite(SqliteQueue::new(store.clone())),
            Inner::Postgres { database, .. } => {
                JobStore::Postgres(PostgresQueue::new(database.connect().await))
            }
            Inner::Redis { prefix, .. } => {
                JobStore::Redis(RedisQueue::new(prefix.connect().await, prefix.name()))
            }
        }
    }

    /// Ends every lease, as if its time had passed.
    pub async fn end_leases(&self) {
        match &self.0 {
            Inner::Sqlite { store, .. } => {
                SqliteQueue::new(store.clone()).end_leases().await.unwrap();
            }
            Inner::Postgres { postgres, .. } => {
                let sql = "UPDATE jobs SET lease_until = now() - interval '1 second' WHERE state = 'running'";
                postgres.execute(sql, &[]).await.unwrap();
            }
            Inner::Redis { prefix, redis } => {
                store::shift_scores(redis, prefix.name(), "tests", &["leases"], 3_600_000).await.unwrap();
            }
        }
    }

    /// Makes the clock of the store jump by `seconds`: all times that the store has written down are shifted that
    /// much into the past.
    pub async fn jump(&self, seconds: i64) {
        match &self.0 {
            Inner::Sqlite { store, .. } => shift_sql(Store::Sqlite(store.clone()), seconds).await,
            Inner::Postgres { postgres, .. } => shift_sql(Store::Postgres(postgres.clone()), seconds).await,
            Inner::Redis { prefix, redis } => {
                let by = SignedDuration::from_secs(seconds);
                store::shift_redis(redis, prefix.name(), ["tests"], by).await.unwrap();
            }
        }
    }

    /// Deletes all that the store knows about schedules.
    pub async fn forget_schedules(&self) {
        let sql = "DELETE FROM schedules";
        match &self.0 {
            Inner::Sqlite { store, .. } => drop(store.write(move |tx| tx.execute(sql, [])).await.unwrap()),
            Inner::Postgres { postgres, .. } => drop(postgres.execute(sql, &[]).await.unwrap()),
            Inner::Redis { prefix, redis } => {
                let key = |key: &str| format!("{}:{key}", prefix.name());
                redis.query::<()>(cmd("DEL").arg(key("schedules")).arg(key("schedule:test"))).await.unwrap();
            }
        }
    }
}

/// Shifts the times of jobs and schedules in a SQL store into the past.
async fn shift_sql(store: Store, seconds: i64) {
    store::shift(&store, SignedDuration::from_secs(seconds)).await.unwrap();
}

/// Opens a store by its name, `sqlite:FILE`, `postgres://..` or `redis://..`, and creates its tables, as a
/// process of its own would do.
pub async fn open(name: &str) -> JobStore {
    if let Some(file) = name.strip_prefix("sqlite:") {
        let store = Sqlite::open(sqlite_config(file.into())).await.unwrap();
        store.migrate(&[MIGRATIONS]).await.unwrap();
        return JobStore::Sqlite(SqliteQueue::new(store));
    }
    if name.starts_with("postgres:") {
        let postgres = crate::postgres::connect(name).await;
        postgres.migrate(&[store::postgres::MIGRATIONS]).await.unwrap();
        return JobStore::Postgres(PostgresQueue::new(postgres));
    }
    let redis = Redis::open(crate::redis::config(name)).await.unwrap();
    JobStore::Redis(RedisQueue::new(redis, "perennial"))
}

/// Settings with which the tests open a SQLite store.
pub fn sqlite_config(path: std::path::PathBuf) -> sqlite::Config {
    sqlite::Config {
        name: "sqlite",
        path,
        readers: 2,
        write_queue: 1000,
        wait: Duration::from_secs(5),
        commit_wait: Duration::from_secs(5),
    }
}
