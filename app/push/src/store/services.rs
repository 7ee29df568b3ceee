//! The state of push services that all replicas share: which services are held, and which have accepted messages.

use std::time::Duration;

use jiff::Timestamp;
use perennial_store::pool::sql::{self, Result};
use perennial_store::values;
use perennial_webpush::Acceptance;

use super::{PushStore, now_ms};

/// How long acceptances of services are kept, in milliseconds, and the largest number of them.
const ACCEPTANCES: (i64, i64) = (90 * 24 * 3600 * 1000, 10_000);

/// The end of a hold by an operator stays at least this long, in which all replicas read it.
const RESUMED: Duration = Duration::from_secs(2);

/// A push service whose hold has begun or ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldService {
    pub(crate) origin: String,
    /// Remaining time of the hold; `None` when an operator has ended it.
    pub(crate) wait: Option<Duration>,
    pub(crate) cause: String,
    /// Time of the change by the store's clock, in milliseconds since 1970.
    pub(crate) changed_at: i64,
    /// Time since the change.
    pub(crate) age: Duration,
}

impl PushStore {
    /// Records that a service is held for `wait`. A hold that ends later stays, and so does the end of a hold by an
    /// operator for [`RESUMED`]: the replica that asks may not have read it yet. Returns false when the service is
    /// not held.
    pub(crate) async fn hold_service(&self, origin: &str, wait: Duration, cause: &str) -> Result<bool> {
        let now = self.now();
        let wait = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let sql = format!(
            "INSERT INTO push_services AS known (origin, held_until, cause, changed_at)
             VALUES (?1, {now} + ?2, ?3, {now})
             ON CONFLICT (origin) DO UPDATE
             SET held_until = excluded.held_until, cause = excluded.cause, changed_at = excluded.changed_at
             WHERE known.held_until < excluded.held_until
             OR (known.held_until IS NULL AND known.changed_at <= {now} - ?4)"
        );
        let resumed = i64::try_from(RESUMED.as_millis()).unwrap_or(i64::MAX);
        if self.sql.execute(sql, values![origin, wait, cause, resumed]).await? > 0 {
            return Ok(true);
        }
        // A hold that ends later says the same.
        let is_held = "SELECT count(*) FROM push_services WHERE origin = ? AND held_until IS NOT NULL";
        Ok(self.sql.value::<i64>(is_held, values![origin]).await? > 0)
    }

    /// Records that a service is sent to again.
    pub(crate) async fn resume_service(&self, origin: &str) -> Result<()> {
        let now = self.now();
        let sql = format!(
            "INSERT INTO push_services (origin, changed_at) VALUES (?1, {now})
             ON CONFLICT (origin) DO UPDATE SET held_until = NULL, cause = NULL, changed_at = {now}"
        );
        self.sql.execute(sql, values![origin]).await.map(drop)
    }

    /// Returns the services whose hold has changed since `changed_at`, the newest change first.
    pub(crate) async fn held_services(&self, changed_at: i64) -> Result<Vec<HeldService>> {
        let now = self.now();
        let sql = format!(
            "SELECT origin, cause, changed_at, {now} - changed_at AS age, held_until - {now} AS wait FROM push_services
             WHERE changed_at > ? AND changed_at > 0 ORDER BY changed_at DESC LIMIT 2048"
        );
        let rows = self.sql.query(sql, values![changed_at]).await?;
        let duration = |ms: i64| Duration::from_millis(u64::try_from(ms).unwrap_or_default());
        let read = |row: &perennial_store::pool::sql::Row| {
            Ok(HeldService {
                origin: row.get("origin")?,
                wait: row.get::<Option<i64>>("wait")?.map(duration),
                cause: row.get::<Option<String>>("cause")?.unwrap_or_default(),
                changed_at: row.get("changed_at")?,
                age: duration(row.get("age")?),
            })
        };
        Ok(sql::each(&rows, "push_services", "origin", read))
    }

    /// Deletes services that have not changed for a day, are not held and were not paced for a day.
    pub(crate) async fn forget_services(&self) -> Result<()> {
        let now = self.now();
        let sql = format!(
            "DELETE FROM push_services WHERE changed_at < {now} - 86400000
             AND coalesce(held_until, 0) < {now} AND coalesce(pace_next, 0) / 1000 < {now} - 86400000"
        );
        self.sql.execute(sql, values![]).await.map(drop)
    }

    /// Records that services have accepted messages.
    pub(crate) async fn note_accepted(&self, accepted: Vec<Acceptance>) -> Result<()> {
        let at = |acceptance: &Acceptance| {
            let at = Timestamp::try_from(acceptance.at).unwrap_or_default();
            at.as_millisecond()
        };
        for acceptance in accepted {
            let sql =
                "INSERT INTO push_acceptances AS known (origin, signer, accepted_at) VALUES (?1, ?2, ?3)
                       ON CONFLICT (origin, signer) DO UPDATE SET accepted_at = excluded.accepted_at
                       WHERE known.accepted_at < excluded.accepted_at";
            self.sql.execute(sql, values![&acceptance.origin, acceptance.signer.0, at(&acceptance)]).await?;
        }
        Ok(())
    }

    /// Returns true when any service has accepted a message of this signer.
    pub(crate) async fn was_accepted(&self, signer: i64) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM push_acceptances WHERE signer = ?)";
        self.sql.value(sql, values![signer]).await
    }

    /// Returns the endpoints of up to `most` subscriptions that were refused since their last delivery.
    pub(crate) async fn at_risk(&self, most: usize) -> Result<Vec<String>> {
        let sql = "SELECT endpoint FROM subscriptions WHERE refused_since IS NOT NULL LIMIT ?";
        let rows = self.sql.query(sql, values![most]).await?;
        Ok(rows.iter().filter_map(|row| row.first().ok()).collect())
    }

    /// Deletes acceptances that are too old to be evidence, and the oldest when there are too many.
    pub(crate) async fn forget_acceptances(&self) -> Result<()> {
        let sql = "DELETE FROM push_acceptances WHERE accepted_at < ?";
        self.sql.execute(sql, values![now_ms() - ACCEPTANCES.0]).await?;
        let sql = "DELETE FROM push_acceptances WHERE accepted_at < (
                       SELECT accepted_at FROM push_acceptances ORDER BY accepted_at DESC LIMIT 1 OFFSET ?)";
        self.sql.execute(sql, values![ACCEPTANCES.1]).await.map(drop)
    }

    /// The store's clock in milliseconds, as an SQL expression.
    fn now(&self) -> String {
        format!("({} / 1000)", self.sql.dialect().now_us())
    }
}
