//! The tables of web push, and every statement on them.
//!
//! | table | content of a row |
//! |---|---|
//! | `vapid_keys` | a key that subscriptions were made with |
//! | `subscriptions`, `subscription_tags` | a browser that may be sent to |
//! | `notifications`, `notification_outcomes` | a notification that `POST /notify` has accepted, and its outcomes |
//! | `deliveries` | the outcome for one subscription: of failures, or of all |
//! | `push_services` | a push service that is held, or whose rate is capped |
//! | `recipients` | a subscription that came with a notification |
//! | `batches` | a part of an audience that a job sends to |
//! | `idempotency_keys` | a promise to answer the same again |

mod batches;
mod deliveries;
mod notifications;
mod pacing;
mod services;
mod shares;
mod subscriptions;
mod tables;

use jiff::Timestamp;
use perennial_store::pool::sql::{self, Result, Tx};
use perennial_store::values;
use perennial_workers::{Job, Jobs, NewJob, queue};
use uuid::Uuid;

use shares::Shares;

pub(crate) use batches::{
    AddedBatches, Batch, BatchPart, Checkpoint, Deferred, Delivery, Member, Members, Recorded, RestOfBatch,
    WaitingBatch,
};
pub(crate) use deliveries::DeliveryView;
pub(crate) use notifications::{Accepted, Change, Idempotency, NewNotification, Recipient, SendPlan};
pub(crate) use pacing::Reserved;
pub(crate) use services::HeldService;
pub(crate) use subscriptions::{Exported, Guest, NewSubscription, Proof, Replaced, Subscription, Upserted};
pub(crate) use tables::{POSTGRES, SQLITE};

/// The tables. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct PushStore {
    sql: sql::Store,
    jobs: Jobs,
    shares: Shares,
}

impl PushStore {
    pub(crate) fn new(sql: sql::Store, jobs: Jobs) -> Self {
        let shares = Shares::of(sql.pool().1.max, sql.dialect());
        Self { sql, jobs, shares }
    }

    /// Returns true when other processes may work on the store.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.sql, sql::Store::Postgres(_))
    }

    /// Counts a job for the admission before it is stored in one transaction with its data.
    pub(crate) fn admit(&self, job: &NewJob) -> queue::Result<()> {
        self.jobs.admission().admit(std::slice::from_ref(job))
    }

    /// Stores a VAPID public key unless it is stored, and returns its id.
    pub(crate) async fn vapid_key(&self, site: i64, public_key: [u8; 65]) -> Result<i64> {
        let insert = "INSERT INTO vapid_keys (site, public_key, created_at) VALUES (?, ?, ?)
                      ON CONFLICT DO NOTHING";
        self.sql.execute(insert, values![site, public_key, now_ms()]).await?;
        let select = "SELECT id FROM vapid_keys WHERE site = ? AND public_key = ?";
        self.sql.value(select, values![site, public_key]).await
    }

    /// Number of subscriptions of a site that were made with other keys than these.
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

/// Approximate size of the rows of one answer, in bytes, and the number of rows that are read at once: rows may
/// have 10 KB each.
const PAGE_BYTES: usize = 256 << 10;
const PART: usize = 64;

/// A page, and the id after which the next one begins, if there may be one.
pub(crate) type Page<T> = (Vec<T>, Option<i64>);

/// Reads rows in parts, in the order of the numbers in their column `id`, until there are as many as asked for, or
/// as many bytes as one answer may have. Unreadable rows are set apart.
struct Pager<T> {
    what: &'static str,
    id: &'static str,
    limit: usize,
    rows: usize,
    bytes: usize,
    after: i64,
    found: Vec<T>,
}

impl<T> Pager<T> {
    fn new((what, id): (&'static str, &'static str), after: i64, limit: usize) -> Self {
        Self { what, id, limit, rows: 0, bytes: 0, after, found: Vec::new() }
    }

    /// The id after which the next part begins, and the number of its rows.
    fn part(&self) -> (i64, usize) {
        (self.after, PART.min(self.limit - self.rows))
    }

    /// Takes a part; returns the page when this was its last part.
    fn take(&mut self, rows: &[sql::Row], read: impl Fn(&sql::Row) -> Result<T>) -> Option<Page<T>> {
        let is_end = rows.len() < self.part().1;
        self.rows += rows.len();
        self.bytes += rows.iter().map(sql::Row::bytes).sum::<usize>();
        self.after = rows.iter().rev().find_map(|row| row.get(self.id).ok()).unwrap_or(self.after);
        self.found.extend(sql::each(rows, self.what, self.id, read));
        let is_full = self.rows >= self.limit || self.bytes >= PAGE_BYTES;
        (is_end || is_full).then(|| (std::mem::take(&mut self.found), (!is_end).then_some(self.after)))
    }
}

/// Returns true when a site has any subscription.
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
pub(crate) fn job<J: Job>(job: &J) -> Result<NewJob> {
    NewJob::new(job).map_err(|error| sql::Error::Unwritable(Box::new(error)))
}

/// Adds `count` to one of a notification's outcomes.
async fn add_outcome<T: Tx>(tx: &T, notification: Uuid, outcome: &str, count: usize) -> Result<()> {
    let sql = "INSERT INTO notification_outcomes AS sums (notification, outcome, count) VALUES (?, ?, ?)
               ON CONFLICT (notification, outcome) DO UPDATE SET count = sums.count + excluded.count";
    tx.execute(sql, &values![notification, outcome, count]).await.map(drop)
}
