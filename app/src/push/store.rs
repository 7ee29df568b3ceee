//! The tables of web push, and every statement on them.
//!
//! | table | a row is |
//! |---|---|
//! | `vapid_keys` | a key that subscriptions were made with |
//! | `subscriptions`, `subscription_tags` | a browser that may be sent to |
//! | `notifications`, `notification_outcomes` | something that was accepted by `POST /notify`, and how it went |
//! | `deliveries` | how it went for one subscription: failures, or all |
//! | `push_services` | a push service that is not sent to now, or whose rate is capped |
//! | `recipients` | a subscription that came with a notification |
//! | `batches` | a part of an audience that a job sends to |
//! | `idempotency_keys` | a promise to answer the same again |

mod batches;
mod notifications;
mod pacing;
mod services;
mod subscriptions;
mod tables;

use jiff::Timestamp;
use perennial_server::pool::sql::{self, Result, Tx};
use perennial_server::values;
use perennial_workers::{Job, Jobs, NewJob, queue};
use uuid::Uuid;

pub(crate) use batches::{Added, Batch, Checkpoint, Deferred, Delivery, Member, Part, Recorded, Rest};
pub(crate) use notifications::{
    Accepted, Change, DeliveryView, Idempotency, NewNotification, Notification, Plan, Recipient,
};
pub(crate) use pacing::{Reserved, Stage, Standing};
pub(crate) use services::Held;
pub(crate) use subscriptions::{Exported, Guest, NewSubscription, Proof, Replaced, Subscription, Upserted};
pub(crate) use tables::{POSTGRES, SQLITE};

/// The tables. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    sql: sql::Store,
    jobs: Jobs,
}

impl Store {
    pub(crate) fn new(sql: sql::Store, jobs: Jobs) -> Self {
        Self { sql, jobs }
    }

    /// Counts a job that is about to be stored with what it is about.
    pub(crate) fn admit(&self, job: &NewJob) -> queue::Result<()> {
        self.jobs.admission().admit(std::slice::from_ref(job))
    }

    /// Notes a VAPID key, and returns its id.
    pub(crate) async fn vapid_key(&self, site: i64, public_key: [u8; 65]) -> Result<i64> {
        let insert = "INSERT INTO vapid_keys (site, public_key, created_at) VALUES (?, ?, ?)
                      ON CONFLICT DO NOTHING";
        self.sql.execute(insert, values![site, public_key, now_ms()]).await?;
        let select = "SELECT id FROM vapid_keys WHERE site = ? AND public_key = ?";
        self.sql.value(select, values![site, public_key]).await
    }

    /// How many subscriptions of a site were made with other keys than these.
    pub(crate) async fn made_with_other_keys(&self, site: i64, keys: &[i64]) -> Result<u64> {
        let sql = "SELECT id FROM vapid_keys WHERE site = ?";
        let mut count = 0;
        for row in self.sql.query(sql, values![site]).await? {
            let id: i64 = row.get("id")?;
            if !keys.contains(&id) {
                let sql = "SELECT count(*) FROM subscriptions WHERE vapid_key = ?";
                count += self.sql.value::<u64>(sql, values![id]).await?;
            }
        }
        Ok(count)
    }
}

/// Whether a site has any subscription at all.
pub(crate) async fn has_subscriptions(store: &sql::Store, site: i64) -> Result<bool> {
    store.value("SELECT EXISTS (SELECT 1 FROM subscriptions WHERE site = ?)", values![site]).await
}

pub(crate) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or_default()
}

/// A job to be stored in a transaction of this store.
fn job<J: Job>(job: &J) -> Result<NewJob> {
    Ok(NewJob::new(job).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?)
}

/// Adds up a notification's outcomes.
async fn add_outcome<T: Tx>(tx: &T, notification: Uuid, outcome: &str, count: usize) -> Result<()> {
    let sql = "INSERT INTO notification_outcomes AS sums (notification, outcome, count) VALUES (?, ?, ?)
               ON CONFLICT (notification, outcome) DO UPDATE SET count = sums.count + excluded.count";
    tx.execute(sql, &values![notification, outcome, count]).await.map(drop)
}
