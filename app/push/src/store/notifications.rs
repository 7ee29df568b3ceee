//! Notifications that were accepted by `POST /notify`, and their outcomes.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_store::pool::sql::{self, Dialect, Result, Row, StoreTransaction, Tx, Value};
use perennial_store::{transact, values};
use perennial_webpush::{HttpVersion, Keys};
use perennial_workers::queue::Due;
use perennial_workers::{Jobs, NewJob};
use uuid::Uuid;

use super::batches::insert_batch;
use super::deliveries::DeliveryView;
use super::{Page, Pager, PushStore, job, now_ms, timestamp};
use crate::model::audience::{Audience, Selection};
use crate::model::jobs::Close;
use crate::model::notification::{Notification, NotificationStatus, Stage};
use crate::model::queues::FAN_OUT_QUEUE;

/// How long counting an audience may take: the request waits for it, and the connection is shared.
const COUNTING: Duration = Duration::from_secs(2);
/// How long an idempotency key is kept, in milliseconds.
const IDEMPOTENCY_MS: i64 = 24 * 3600 * 1000;

/// A notification that is about to be accepted.
#[derive(Clone, Debug)]
pub(crate) struct NewNotification {
    pub(crate) id: Uuid,
    pub(crate) site: i64,
    pub(crate) audience: Audience,
    /// The subscriptions of [`Audience::Inline`].
    pub(crate) recipients: Vec<Recipient>,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: Duration,
    pub(crate) urgency: &'static str,
    pub(crate) topic: Option<String>,
    pub(crate) plan: SendPlan,
    /// Whether the payload has places for each subscription's own data.
    pub(crate) is_template: bool,
    pub(crate) estimate: u64,
    /// The highest id that a member may have.
    pub(crate) watermark: i64,
    /// The job that begins the notification: it sends to the whole audience, or it makes the batches.
    pub(crate) job: NewJob,
    /// Whether this job sends to the whole audience.
    pub(crate) direct: bool,
    pub(crate) idempotency: Option<Idempotency>,
}

/// How and when a notification is sent, and which webhook is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SendPlan {
    /// Sends per 1000 seconds.
    pub(crate) rate_milli: Option<i64>,
    /// How long it takes to reach the rate, in milliseconds.
    pub(crate) ramp_ms: i64,
    /// Time before which nothing is sent, in milliseconds since 1970.
    pub(crate) due_at: Option<i64>,
    /// Time after which nothing is sent, in milliseconds since 1970.
    pub(crate) expires_at: Option<i64>,
    pub(crate) webhook: Option<String>,
    /// Whether every delivery is logged, not only failures.
    pub(crate) logs_all: bool,
    pub(crate) http: HttpVersion,
    pub(crate) is_declarative: bool,
}

/// A change of a notification that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Pause,
    Resume,
    Cancel,
    /// A new rate, in sends per 1000 seconds; `None` for as fast as possible.
    Rate(Option<i64>),
}

/// A subscription that came with a notification.
#[derive(Clone, Debug)]
pub(crate) struct Recipient {
    pub(crate) endpoint: String,
    pub(crate) keys: Keys,
}

/// A promise to give a repeated request the same answer.
#[derive(Clone, Debug)]
pub(crate) struct Idempotency {
    pub(crate) api_key: String,
    pub(crate) key: String,
    pub(crate) fingerprint: [u8; 32],
}

/// The result of accepting a notification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// The notification is stored and will be sent.
    Now,
    /// The same request was accepted before, with this id, estimate and first state.
    Before(Uuid, u64, Stage),
    /// Another request was accepted with this idempotency key.
    Conflict,
}

impl PushStore {
    /// Returns the highest id among the subscriptions of a site: the members of an audience are those up to it. A
    /// browser that subscribes between this call and the acceptance was not there at the time of the request.
    pub(crate) async fn watermark(&self, site: i64) -> Result<i64> {
        let newest = "SELECT coalesce(max(id), 0) FROM subscriptions WHERE site = ?";
        self.sql.value(newest, values![site]).await
    }

    /// Counts the subscriptions of an audience. Returns `None` when that takes too long.
    pub(crate) async fn count(&self, site: i64, audience: &Audience, watermark: i64) -> Result<Option<u64>> {
        let Selection { from, condition, parameters, .. } =
            audience.select(self.sql.dialect(), site, 0, watermark);
        self.count_in_time(site, format!("SELECT count(*) FROM {from} WHERE {condition}"), parameters).await
    }

    /// Counts the subscriptions of an audience within a transaction, up to `most`. Returns the watermark, too.
    pub(crate) async fn count_in(
        &self,
        tx: &StoreTransaction,
        site: i64,
        audience: &Audience,
        most: u64,
    ) -> Result<(u64, i64)> {
        let one = async |sql: &str, parameters: &[Value]| {
            let row = sql::first(tx, sql, parameters).await?;
            row.as_ref().map_or(Ok(0), Row::first::<i64>)
        };
        let newest = "SELECT coalesce(max(id), 0) FROM subscriptions WHERE site = ?";
        let watermark = one(newest, &values![site]).await?;
        let Selection { from, condition, mut parameters, .. } =
            audience.select(self.sql.dialect(), site, 0, watermark);
        parameters.push(most.into());
        let some = format!("SELECT 1 FROM {from} WHERE {condition} LIMIT ?");
        let count = one(&format!("SELECT count(*) FROM ({some}) AS members"), &parameters).await?;
        Ok((u64::try_from(count).unwrap_or_default(), watermark))
    }

    async fn count_in_time(&self, site: i64, sql: String, parameters: Vec<Value>) -> Result<Option<u64>> {
        let _share = self.shares.take(site).await?;
        match self.sql.query_within(COUNTING, sql, parameters).await {
            Ok(rows) => rows.first().map(Row::first).transpose(),
            Err(error) if error.is_late() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Counts the subscriptions of an audience whose metadata has no value for one of these names. Returns `None` when
    /// that takes too long.
    pub(crate) async fn count_incomplete(
        &self,
        site: i64,
        audience: &Audience,
        watermark: i64,
        names: &[String],
    ) -> Result<Option<u64>> {
        let dialect = self.sql.dialect();
        let Selection { from, condition, mut parameters, .. } = audience.select(dialect, site, 0, watermark);
        let missing = names.iter().map(|name| match dialect {
            Dialect::Sqlite => {
                parameters.push(format!("$.\"{name}\"").into());
                "json_extract(metadata, ?) IS NULL"
            }
            Dialect::Postgres => {
                parameters.push(name.into());
                "(metadata::json ->> ?) IS NULL"
            }
        });
        let missing = missing.collect::<Vec<_>>().join(" OR ");
        let sql =
            format!("SELECT count(*) FROM {from} WHERE {condition} AND (metadata IS NULL OR {missing})");
        self.count_in_time(site, sql, parameters).await
    }

    /// Returns the answer that was given to the same request before.
    pub(crate) async fn accepted_before(&self, promise: Idempotency) -> Result<Option<Accepted>> {
        transact!(&self.sql, tx => earlier(tx, &promise, now_ms()))
    }

    /// Stores a notification and the job that begins it, in one transaction.
    pub(crate) async fn accept(&self, new: Arc<NewNotification>) -> Result<Accepted> {
        let queue = new.job.queue.clone();
        let jobs = self.jobs.clone();
        let accepted = transact!(&self.sql, tx => accept(tx, &jobs, &new))?;
        self.jobs.wake([&*queue]);
        Ok(accepted)
    }

    /// Like [`PushStore::accept`], within a transaction of the caller.
    pub(crate) async fn accept_in(&self, tx: &StoreTransaction, new: &NewNotification) -> Result<Accepted> {
        accept(tx, &self.jobs, new).await
    }

    pub(crate) async fn notification(&self, site: i64, id: Uuid) -> Result<Option<Notification>> {
        let columns = columns(self.sql.dialect());
        let sql = format!("SELECT {columns} FROM notifications WHERE site = ? AND id = ?");
        self.sql.first(sql, values![site, id]).await?.as_ref().map(read).transpose()
    }

    /// Returns notifications of any site by id. A notification that cannot be read is left out.
    pub(crate) async fn notifications_of(&self, ids: &[Uuid]) -> Result<Vec<Notification>> {
        let columns = columns(self.sql.dialect());
        let among = self.sql.dialect().is_among("id", "?");
        let sql = format!("SELECT {columns} FROM notifications WHERE {among}");
        let rows = self.sql.query(sql, values![sql::hex_list(ids)]).await?;
        Ok(sql::each(&rows, "notifications", "id", read))
    }

    /// Returns a notification of any site.
    pub(crate) async fn any_notification(&self, id: Uuid) -> Result<Option<Notification>> {
        let columns = columns(self.sql.dialect());
        let sql = format!("SELECT {columns} FROM notifications WHERE id = ?");
        self.sql.first(sql, values![id]).await?.as_ref().map(read).transpose()
    }

    /// Changes a notification and returns its new status. Returns `None` when there is no such notification, and the
    /// unchanged status when it has ended.
    pub(crate) async fn change(
        &self,
        site: i64,
        id: Uuid,
        change: Change,
    ) -> Result<Option<NotificationStatus>> {
        let jobs = self.jobs.clone();
        let changed = transact!(&self.sql, tx => apply(tx, &jobs, site, id, change))?;
        if change == Change::Cancel {
            self.jobs.wake([FAN_OUT_QUEUE]);
        }
        Ok(changed)
    }

    /// Returns the deliveries to subscriptions after `cursor`, in the order of their ids.
    pub(crate) async fn deliveries(
        &self,
        notification: Uuid,
        outcome: Option<String>,
        cursor: i64,
        limit: usize,
    ) -> Result<Page<DeliveryView>> {
        let sql = "SELECT subscription, outcome, status, detail, at FROM deliveries
                   WHERE notification = ?1 AND subscription > ?2 AND (?3 IS NULL OR outcome = ?3)
                   ORDER BY subscription LIMIT ?4";
        let mut pager = Pager::new(("deliveries", "subscription"), cursor, limit);
        loop {
            let (after, limit) = pager.part();
            let rows = self.sql.query(sql, values![notification, after, &outcome, limit]).await?;
            if let Some(page) = pager.take(&rows, DeliveryView::read) {
                return Ok(page);
            }
        }
    }

    /// Deletes some rows of notifications that ended before `before`, in milliseconds since 1970; returns the number of
    /// rows.
    pub(crate) async fn forget_notifications(&self, before: i64) -> Result<u64> {
        // The log of one notification may have a million lines, so each call deletes a slice.
        let sql = "DELETE FROM deliveries WHERE (notification, subscription) IN (
                       SELECT notification, subscription FROM deliveries JOIN notifications ON id = notification
                       WHERE ended_at < ? LIMIT 5000)";
        let lines = self.sql.execute(sql, values![before]).await?;
        if lines > 0 {
            return Ok(lines);
        }
        let sql = "DELETE FROM notifications WHERE id IN (
                       SELECT id FROM notifications WHERE ended_at < ? ORDER BY ended_at LIMIT 100)";
        self.sql.execute(sql, values![before]).await
    }

    /// Returns the notifications before `cursor`, the newest first.
    pub(crate) async fn notifications(
        &self,
        site: i64,
        cursor: Uuid,
        limit: usize,
    ) -> Result<Vec<Notification>> {
        let columns = columns(self.sql.dialect());
        let sql =
            format!("SELECT {columns} FROM notifications WHERE site = ? AND id < ? ORDER BY id DESC LIMIT ?");
        let rows = self.sql.query(sql, values![site, cursor, limit]).await?;
        Ok(sql::each(&rows, "notifications", "id", read))
    }
}

async fn accept<T: Tx>(tx: &T, jobs: &Jobs, new: &NewNotification) -> Result<Accepted> {
    let now = now_ms();
    if let Some(promise) = &new.idempotency {
        tx.lock(promise.key.as_bytes()).await?;
        let forget = "DELETE FROM idempotency_keys WHERE created_at < ?";
        tx.execute(forget, &values![now - IDEMPOTENCY_MS]).await?;
        if let Some(before) = earlier(tx, promise, now).await? {
            return Ok(before);
        }
        let sql = "INSERT INTO idempotency_keys (api_key, key, fingerprint, notification, created_at)
                   VALUES (?, ?, ?, ?, ?)";
        let parameters = values![&promise.api_key, &promise.key, promise.fingerprint, new.id, now];
        tx.execute(sql, &parameters).await?;
    }
    let audience = serde_json::to_string(&new.audience).unwrap_or_default();
    let sql = "
        INSERT INTO notifications (id, site, state, audience, payload, ttl, urgency, topic, watermark, estimate,
                                   fanned_out, outstanding, created_at, rate_milli, ramp_ms, due_at, expires_at,
                                   webhook, log, http, is_declarative, is_template)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
    let plan = &new.plan;
    let state = Stage::first(plan.due_at);
    let parameters = values![
        new.id,
        new.site,
        state.as_str(),
        audience,
        &new.payload,
        new.ttl.as_secs(),
        new.urgency,
        &new.topic,
        new.watermark,
        new.estimate,
        new.direct,
        i64::from(new.direct),
        now,
        plan.rate_milli,
        plan.ramp_ms,
        plan.due_at,
        plan.expires_at,
        &plan.webhook,
        if plan.logs_all { "all" } else { "failures" },
        plan.http.as_str(),
        plan.is_declarative,
        new.is_template,
    ];
    tx.execute(sql, &parameters).await?;
    let sql = "INSERT INTO recipients (notification, id, endpoint, p256dh, auth) VALUES (?, ?, ?, ?, ?)";
    for (id, recipient) in (1_i64..).zip(&new.recipients) {
        let keys = &recipient.keys;
        tx.execute(sql, &values![new.id, id, &recipient.endpoint, keys.p256dh(), keys.auth()]).await?;
    }
    if new.direct {
        insert_batch(tx, new.job.id, new.id, 0, new.watermark).await?;
    }
    jobs.insert(tx, std::slice::from_ref(&new.job)).await?;
    if let Some(at) = plan.expires_at {
        let due = Due::At(Timestamp::from_millisecond(at + 1000).unwrap_or_default());
        let close = Close { notification: new.id, since: at };
        jobs.insert(tx, &[job(&close)?.due(due)]).await?;
    }
    Ok(Accepted::Now)
}

async fn apply<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    site: i64,
    id: Uuid,
    change: Change,
) -> Result<Option<NotificationStatus>> {
    // A pause or a new rate begins the schedule anew.
    let (set, from): (&str, &str) = match change {
        Change::Pause => ("state = 'paused'", "'scheduled', 'queued', 'sending'"),
        Change::Resume => (
            "pace_from = NULL, pace_next = NULL, state = CASE WHEN started_at IS NOT NULL THEN 'sending'
                WHEN due_at > ?3 THEN 'scheduled' ELSE 'queued' END",
            "'paused'",
        ),
        Change::Cancel => ("state = 'cancelled'", "'scheduled', 'queued', 'sending', 'paused'"),
        Change::Rate(_) => (
            "rate_milli = ?4, ramp_ms = 0, pace_from = NULL, pace_next = NULL",
            "'scheduled', 'queued', 'sending', 'paused'",
        ),
    };
    let rate = if let Change::Rate(rate) = change { rate } else { None };
    // Each of the statements uses every parameter, because Postgres must know the type of each.
    let sql = format!(
        "UPDATE notifications SET {set} WHERE site = ?1 AND id = ?2 AND ended_at IS NULL AND state IN ({from})
         AND ?3 = ?3 AND coalesce(?4, 0) = coalesce(?4, 0)"
    );
    let now = now_ms();
    let changed = tx.execute(&sql, &values![site, id, now, rate]).await?;
    if changed == 1 && change == Change::Cancel {
        jobs.insert(tx, &[job(&Close { notification: id, since: now })?]).await?;
    }
    let sql = format!("SELECT {} FROM notifications WHERE site = ? AND id = ?", NotificationStatus::COLUMNS);
    sql::first(tx, &sql, &values![site, id]).await?.as_ref().map(NotificationStatus::read).transpose()
}

async fn earlier<T: Tx>(tx: &T, promise: &Idempotency, now: i64) -> Result<Option<Accepted>> {
    let sql = "SELECT fingerprint, notification, estimate, due_at
               FROM idempotency_keys JOIN notifications ON notifications.id = notification
               WHERE api_key = ? AND key = ? AND idempotency_keys.created_at >= ?";
    let parameters = values![&promise.api_key, &promise.key, now - IDEMPOTENCY_MS];
    let Some(row) = sql::first(tx, sql, &parameters).await? else { return Ok(None) };
    let fingerprint: [u8; 32] = row.get("fingerprint")?;
    if fingerprint != promise.fingerprint {
        return Ok(Some(Accepted::Conflict));
    }
    let stage = Stage::first(row.get("due_at")?);
    Ok(Some(Accepted::Before(row.get("notification")?, row.get("estimate")?, stage)))
}

/// The columns of [`Notification`].
fn columns(dialect: Dialect) -> String {
    let outcomes = dialect.object_of("outcome", "count");
    format!(
        "id, site, state, estimate, error, created_at, started_at, ended_at, rate_milli, due_at, expires_at,
         (SELECT CAST(coalesce(sum(again), 0) AS bigint) FROM batches
          WHERE notification = notifications.id AND (ids IS NULL) = FALSE) AS again,
         (SELECT {outcomes} FROM notification_outcomes WHERE notification = notifications.id) AS outcomes"
    )
}

fn read(row: &Row) -> Result<Notification> {
    let outcomes: String = row.get("outcomes")?;
    Ok(Notification {
        id: row.get("id")?,
        site: row.get("site")?,
        state: row.get("state")?,
        estimate: row.get("estimate")?,
        outcomes: serde_json::from_str(&outcomes).unwrap_or_default(),
        again: row.get("again")?,
        error: row.get("error")?,
        rate_milli: row.get("rate_milli")?,
        due_at: row.get::<Option<i64>>("due_at")?.map(timestamp),
        expires_at: row.get::<Option<i64>>("expires_at")?.map(timestamp),
        created_at: timestamp(row.get("created_at")?),
        started_at: row.get::<Option<i64>>("started_at")?.map(timestamp),
        ended_at: row.get::<Option<i64>>("ended_at")?.map(timestamp),
    })
}
