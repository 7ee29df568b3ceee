//! What was accepted by `POST /notify`, and how it went.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use perennial_server::pool::sqlite::Result;
use perennial_webpush::Keys;
use perennial_workers::NewJob;
use perennial_workers::store::sqlite::insert_jobs;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};
use uuid::Uuid;

use super::batches::insert_batch;
use super::{Store, now_ms, timestamp};
use crate::push::audience::Audience;

/// For how long an idempotency key is kept, in milliseconds.
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
    pub(crate) estimate: u64,
    /// The highest id of a member.
    pub(crate) watermark: i64,
    /// The job that begins it: it sends to everybody, or it makes the batches.
    pub(crate) job: NewJob,
    /// Whether that job sends to everybody.
    pub(crate) direct: bool,
    pub(crate) idempotency: Option<Idempotency>,
}

/// A subscription that came with a notification.
#[derive(Clone, Debug)]
pub(crate) struct Recipient {
    pub(crate) endpoint: String,
    pub(crate) keys: Keys,
}

/// A promise to answer the same again.
#[derive(Clone, Debug)]
pub(crate) struct Idempotency {
    pub(crate) api_key: String,
    pub(crate) key: String,
    pub(crate) fingerprint: [u8; 32],
}

/// What came of accepting one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is stored, and will be sent.
    Now,
    /// The same was accepted before, under this id and with this estimate.
    Before(Uuid, u64),
    /// Another one was accepted with this idempotency key.
    Conflict,
}

/// A stored notification.
#[derive(Clone, Debug)]
pub(crate) struct Notification {
    pub(crate) id: Uuid,
    pub(crate) state: String,
    pub(crate) estimate: u64,
    pub(crate) outcomes: BTreeMap<String, u64>,
    /// How many wait to be tried again.
    pub(crate) again: u64,
    pub(crate) error: Option<String>,
    pub(crate) created_at: Timestamp,
    pub(crate) started_at: Option<Timestamp>,
    pub(crate) ended_at: Option<Timestamp>,
}

impl Store {
    /// How many subscriptions an audience has now, and the highest id among all of the site: members are those
    /// up to it. Whoever comes between this and the acceptance was not there when it was asked for.
    pub(crate) async fn estimate(&self, site: i64, audience: Audience) -> Result<(u64, i64)> {
        self.sqlite
            .read(move |tx| {
                let newest = "SELECT coalesce(max(id), 0) FROM subscriptions WHERE site = ?";
                let watermark = tx.prepare_cached(newest)?.query_row([site], |row| row.get(0))?;
                let mut parameters = vec![Value::Integer(site)];
                let filter = audience.to_sql(site, &mut parameters);
                let sql = format!("SELECT count(*) FROM subscriptions WHERE site = ? AND {filter}");
                let count =
                    tx.prepare_cached(&sql)?.query_row(params_from_iter(parameters), |row| row.get(0))?;
                Ok((count, watermark))
            })
            .await
    }

    /// What the same request was answered before.
    pub(crate) async fn accepted_before(&self, promise: Idempotency) -> Result<Option<Accepted>> {
        self.sqlite.read(move |tx| earlier(tx, &promise, now_ms())).await
    }

    /// Stores a notification and the job that begins it, in one transaction.
    pub(crate) async fn accept(&self, new: NewNotification) -> Result<Accepted> {
        let queue = new.job.queue.clone();
        let accepted = self.sqlite.write(move |tx| accept(tx, &new)).await?;
        self.jobs.wake([&*queue]);
        Ok(accepted)
    }

    pub(crate) async fn notification(&self, site: i64, id: Uuid) -> Result<Option<Notification>> {
        self.sqlite
            .read(move |tx| {
                let sql = format!("SELECT {COLUMNS} FROM notifications WHERE site = ? AND id = ?");
                tx.prepare_cached(&sql)?.query_row((site, id.as_bytes()), read).optional()
            })
            .await
    }

    /// Notifications before `cursor`, the newest first.
    pub(crate) async fn notifications(
        &self,
        site: i64,
        cursor: Uuid,
        limit: usize,
    ) -> Result<Vec<Notification>> {
        self.sqlite
            .read(move |tx| {
                let sql = format!(
                    "SELECT {COLUMNS} FROM notifications WHERE site = ? AND id < ? ORDER BY id DESC LIMIT ?"
                );
                tx.prepare_cached(&sql)?.query_map((site, cursor.as_bytes(), limit), read)?.collect()
            })
            .await
    }
}

fn accept(tx: &Connection, new: &NewNotification) -> rusqlite::Result<Accepted> {
    let now = now_ms();
    if let Some(promise) = &new.idempotency {
        tx.prepare_cached("DELETE FROM idempotency_keys WHERE created_at < ?")?
            .execute([now - IDEMPOTENCY_MS])?;
        if let Some(before) = earlier(tx, promise, now)? {
            return Ok(before);
        }
        tx.prepare_cached(
            "INSERT INTO idempotency_keys (api_key, key, fingerprint, notification, created_at)
             VALUES (?, ?, ?, ?, ?)",
        )?
        .execute((&promise.api_key, &promise.key, promise.fingerprint, new.id.as_bytes(), now))?;
    }
    let audience = serde_json::to_string(&new.audience).unwrap_or_default();
    tx.prepare_cached(
        "INSERT INTO notifications (id, site, state, audience, payload, ttl, urgency, topic, watermark, estimate,
                                    fanned_out, outstanding, created_at)
         VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute((
        new.id.as_bytes(),
        new.site,
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
    ))?;
    let sql = "INSERT INTO recipients (notification, id, endpoint, p256dh, auth) VALUES (?, ?, ?, ?, ?)";
    let mut insert = tx.prepare_cached(sql)?;
    for (id, recipient) in (1_i64..).zip(&new.recipients) {
        let keys = &recipient.keys;
        insert.execute((new.id.as_bytes(), id, &recipient.endpoint, keys.p256dh(), keys.auth()))?;
    }
    if new.direct {
        insert_batch(tx, new.job.id, new.id, 0, new.watermark)?;
    }
    insert_jobs(tx, std::slice::from_ref(&new.job))?;
    Ok(Accepted::Now)
}

fn earlier(tx: &Connection, promise: &Idempotency, now: i64) -> rusqlite::Result<Option<Accepted>> {
    let sql = "SELECT fingerprint, notification, estimate
               FROM idempotency_keys JOIN notifications ON notifications.id = notification
               WHERE api_key = ? AND key = ? AND idempotency_keys.created_at >= ?";
    tx.prepare_cached(sql)?
        .query_row((&promise.api_key, &promise.key, now - IDEMPOTENCY_MS), |row| {
            let fingerprint: [u8; 32] = row.get(0)?;
            if fingerprint != promise.fingerprint {
                return Ok(Accepted::Conflict);
            }
            Ok(Accepted::Before(Uuid::from_bytes(row.get(1)?), row.get(2)?))
        })
        .optional()
}

const COLUMNS: &str = "id, state, estimate, error, created_at, started_at, ended_at,
    (SELECT coalesce(sum(again), 0) FROM batches WHERE notification = notifications.id AND (ids IS NULL) = FALSE)
        AS again,
    (SELECT json_group_object(outcome, count) FROM notification_outcomes WHERE notification = notifications.id)
        AS outcomes";

fn read(row: &Row<'_>) -> rusqlite::Result<Notification> {
    let outcomes: String = row.get("outcomes")?;
    Ok(Notification {
        id: Uuid::from_bytes(row.get("id")?),
        state: row.get("state")?,
        estimate: row.get("estimate")?,
        outcomes: serde_json::from_str(&outcomes).unwrap_or_default(),
        again: row.get("again")?,
        error: row.get("error")?,
        created_at: timestamp(row.get("created_at")?),
        started_at: row.get::<_, Option<i64>>("started_at")?.map(timestamp),
        ended_at: row.get::<_, Option<i64>>("ended_at")?.map(timestamp),
    })
}
