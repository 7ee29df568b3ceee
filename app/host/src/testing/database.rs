//! A database, and a part of a Redis server, of its own for each program within a test.

use std::time::Duration;

use perennial_store::pool::postgres::{Config, Postgres};
use uuid::Uuid;

use crate::program;

/// A database on the server that a variable of the environment names.
#[derive(Debug)]
pub(super) struct TestDatabase {
    server: String,
    name: String,
}

impl TestDatabase {
    /// Creates a database, if the environment names a server.
    pub(super) async fn of_environment() -> anyhow::Result<Option<Self>> {
        let variable = format!("{}TEST_POSTGRES", program::identity().env_prefix);
        let Ok(server) = std::env::var(variable) else { return Ok(None) };
        let database = Self { server, name: format!("test_{}", Uuid::now_v7().simple()) };
        database.on_server(&format!("CREATE DATABASE {}", database.name)).await?;
        Ok(Some(database))
    }

    pub(super) fn url(&self) -> String {
        at(&self.server, &self.name)
    }

    /// Drops the database.
    pub(super) async fn drop_it(self) -> anyhow::Result<()> {
        self.on_server(&format!("DROP DATABASE {} WITH (FORCE)", self.name)).await
    }

    async fn on_server(&self, sql: &str) -> anyhow::Result<()> {
        let config = Config {
            name: "tests",
            may_only_read: false,
            url: at(&self.server, "postgres").as_str().into(),
            ca_file: None,
            size: 1,
            wait: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(30),
            max_age: Duration::from_secs(60),
            pgbouncer: false,
        };
        let postgres = Postgres::open(config).await?;
        postgres.execute(sql, &[]).await?;
        postgres.close();
        Ok(())
    }
}

/// The URL of a database on a server: `postgres://user@host/`, with or without the name of another database and a query.
fn at(server: &str, database: &str) -> String {
    let (base, query) = match server.split_once('?') {
        Some((base, query)) => (base, format!("?{query}")),
        None => (server, String::new()),
    };
    let authority = base.find("://").map_or(0, |at| at + 3);
    let end = base[authority..].find('/').map_or(base.len(), |at| authority + at);
    format!("{}/{database}{query}", &base[..end])
}

/// A prefix of its own on the Redis server that a variable of the environment names.
#[derive(Debug)]
pub(super) struct TestRedis {
    url: String,
}

impl TestRedis {
    /// Uses the server that the environment names, unless the test has chosen where jobs are kept.
    pub(super) fn of_environment(set: &[String]) -> Option<Self> {
        let variable = format!("{}TEST_REDIS", program::identity().env_prefix);
        let is_chosen = set.iter().any(|setting| setting.starts_with("queue.url="));
        let url = std::env::var(variable).ok().filter(|_| !is_chosen)?;
        Some(Self { url })
    }

    /// Settings with which a program keeps its jobs there.
    pub(super) fn settings(&self) -> [String; 2] {
        let prefix = format!("test-{}", Uuid::now_v7().simple());
        [format!("queue.url={}", self.url), format!("queue.prefix={prefix}")]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_another_database_is_replaced() {
        for server in ["postgres://u@h:5432", "postgres://u@h:5432/", "postgres://u@h:5432/postgres"] {
            assert_eq!(at(server, "test_1"), "postgres://u@h:5432/test_1");
        }
        assert_eq!(at("postgres://u@/?host=/run", "test_1"), "postgres://u@/test_1?host=/run");
    }
}
