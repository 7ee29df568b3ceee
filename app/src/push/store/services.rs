//! Push services that are not sent to for a while, as all replicas know it.

use std::time::Duration;

use perennial_server::pool::sql::Result;
use perennial_server::values;

use super::Store;

/// A push service that somebody has stopped sending to, or begun again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) origin: String,
    /// For how long still; not at all when an operator has ended it.
    pub(crate) wait: Option<Duration>,
    pub(crate) cause: String,
    /// By the store's clock, in milliseconds since 1970.
    pub(crate) changed_at: i64,
}

impl Store {
    /// Notes that a service is not sent to for this long.
    pub(crate) async fn hold_service(&self, origin: &str, wait: Duration, cause: &str) -> Result<()> {
        let now = self.now();
        let wait = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let sql = format!(
            "INSERT INTO push_services AS known (origin, held_until, cause, changed_at)
             VALUES (?1, {now} + ?2, ?3, {now})
             ON CONFLICT (origin) DO UPDATE
             SET held_until = excluded.held_until, cause = excluded.cause, changed_at = excluded.changed_at
             WHERE known.held_until IS NULL OR known.held_until < excluded.held_until"
        );
        self.sql.execute(sql, values![origin, wait, cause]).await.map(drop)
    }

    /// Notes that a service is to be sent to again.
    pub(crate) async fn resume_service(&self, origin: &str) -> Result<()> {
        let now = self.now();
        let sql = format!(
            "INSERT INTO push_services (origin, changed_at) VALUES (?1, {now})
             ON CONFLICT (origin) DO UPDATE SET held_until = NULL, cause = NULL, changed_at = {now}"
        );
        self.sql.execute(sql, values![origin]).await.map(drop)
    }

    /// What has changed since `changed_at`.
    pub(crate) async fn held_services(&self, changed_at: i64) -> Result<Vec<Held>> {
        let now = self.now();
        let sql = format!(
            "SELECT origin, cause, changed_at, held_until - {now} AS wait FROM push_services
             WHERE changed_at > ? AND changed_at > 0 ORDER BY changed_at DESC LIMIT 2048"
        );
        let rows = self.sql.query(sql, values![changed_at]).await?;
        let read = |row: &perennial_server::pool::sql::Row| {
            let wait: Option<i64> = row.get("wait")?;
            Ok(Held {
                origin: row.get("origin")?,
                wait: wait.map(|wait| Duration::from_millis(u64::try_from(wait).unwrap_or_default())),
                cause: row.get::<Option<String>>("cause")?.unwrap_or_default(),
                changed_at: row.get("changed_at")?,
            })
        };
        rows.iter().map(read).collect()
    }

    /// Forgets services that nothing has been said about for a day.
    pub(crate) async fn forget_services(&self) -> Result<()> {
        let now = self.now();
        let sql = format!(
            "DELETE FROM push_services WHERE changed_at < {now} - 86400000
             AND coalesce(held_until, 0) < {now} AND coalesce(pace_next, 0) / 1000 < {now} - 86400000"
        );
        self.sql.execute(sql, values![]).await.map(drop)
    }

    /// The store's clock in milliseconds, as an expression.
    fn now(&self) -> String {
        format!("({} / 1000)", self.sql.dialect().now_us())
    }
}
