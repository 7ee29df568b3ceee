//! Parts of audiences, each sent by a job, and how far it has come.
//!
//! Every change of a batch carries the epoch of the job's claim: one that comes from an earlier claim changes
//! nothing, and so an outcome is counted once, however often the message was sent.

use std::time::Duration;

use perennial_server::pool::sqlite::Result;
use perennial_workers::NewJob;
use perennial_workers::store::sqlite::insert_jobs;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};
use uuid::Uuid;

use super::subscriptions::endpoint_hash;
use super::{Store, add_outcome, now_ms};
use crate::push::audience::Audience;
use crate::push::outcome::Outcome;

/// A part of an audience, in the hands of a job.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) id: Uuid,
    pub(crate) notification: Uuid,
    pub(crate) part: Part,
    pub(crate) attempt: u32,
    /// When the notification was accepted, in milliseconds since 1970.
    pub(crate) created_at: i64,
    /// How many the notification is for, as far as was known when it was accepted.
    pub(crate) estimate: u64,
    /// The outcomes of members up to it are recorded,
    pub(crate) low_id: i64,
    /// and those of these.
    pub(crate) above: Vec<i64>,
    pub(crate) site: i64,
    pub(crate) audience: Audience,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: Duration,
    pub(crate) urgency: String,
    pub(crate) topic: Option<String>,
}

impl Batch {
    /// Whether the outcome of a member is recorded.
    pub(crate) fn is_recorded(&self, id: i64) -> bool {
        id <= self.low_id || self.above.binary_search(&id).is_ok()
    }
}

/// Which members.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// All up to this id.
    Range { upto: i64 },
    /// These, which are tried again.
    Ids(Vec<i64>),
}

/// One subscription to send to.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) id: i64,
    pub(crate) endpoint: String,
    pub(crate) p256dh: Vec<u8>,
    pub(crate) auth: Vec<u8>,
}

/// What a batch has done since the last one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoint {
    pub(crate) low_id: i64,
    pub(crate) above: Vec<i64>,
    pub(crate) outcomes: Vec<(Outcome, usize)>,
    /// Subscriptions that have ended, with the endpoint that was sent to.
    pub(crate) ended: Vec<(i64, String)>,
    /// Members to be tried again later.
    pub(crate) deferred: Vec<Deferred>,
    /// Whether this was the last.
    pub(crate) finished: bool,
}

/// What came of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    /// It is written.
    Kept,
    /// It is written, and it was the last of its notification.
    Last,
    /// The batch is in other hands by now: nothing has changed.
    TooLate,
}

/// Members to be tried again later, by a job of their own.
#[derive(Clone, Debug)]
pub(crate) struct Deferred {
    pub(crate) ids: Vec<i64>,
    pub(crate) job: NewJob,
    pub(crate) attempt: u32,
}

/// What came of adding a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// There may be more.
    One,
    /// There are no more, or the cutting is in other hands by now.
    NoMore,
    /// There are no more, and all batches have finished already.
    Last,
}

/// How far an audience has been cut into batches.
#[derive(Clone, Debug)]
pub(crate) struct FanOut {
    pub(crate) site: i64,
    pub(crate) audience: Audience,
    pub(crate) watermark: i64,
    pub(crate) fanned_to: i64,
    /// How many of its batches are not finished, besides those that are to be tried again.
    pub(crate) ahead: usize,
}

impl FanOut {
    /// A condition for those who are in no batch yet, and its parameters.
    fn left_to_sql(&self) -> (String, Vec<Value>) {
        let mut parameters = vec![self.site.into(), self.fanned_to.into(), self.watermark.into()];
        let filter = self.audience.to_sql(self.site, &mut parameters);
        (format!("site = ? AND id > ? AND id <= ? AND {filter}"), parameters)
    }
}

impl Store {
    /// Takes a batch for the claim `epoch`, from any earlier one. None when there is nothing left to do.
    pub(crate) async fn open_batch(&self, id: Uuid, epoch: i64) -> Result<Option<Batch>> {
        self.sqlite.write(move |tx| open_batch(tx, id, epoch)).await
    }

    /// The members of a batch whose outcomes are not recorded.
    pub(crate) async fn members(&self, batch: &Batch) -> Result<Vec<Member>> {
        let batch = batch.clone();
        self.sqlite.read(move |tx| members(tx, &batch)).await
    }

    /// Records what a batch has done.
    pub(crate) async fn checkpoint(
        &self,
        batch: &Batch,
        epoch: i64,
        checkpoint: Checkpoint,
    ) -> Result<Recorded> {
        let (id, notification, site) = (batch.id, batch.notification, batch.site);
        let woken: Vec<_> = checkpoint.deferred.iter().map(|deferred| deferred.job.queue.clone()).collect();
        let recorded =
            self.sqlite.write(move |tx| record(tx, id, notification, site, epoch, &checkpoint)).await?;
        if !woken.is_empty() {
            self.jobs.wake(woken.iter().map(|queue| &**queue));
        }
        Ok(recorded)
    }

    /// Takes the cutting of an audience for the claim `epoch`. None when it is done.
    pub(crate) async fn open_fan_out(&self, notification: Uuid, epoch: i64) -> Result<Option<FanOut>> {
        self.sqlite
            .write(move |tx| {
                tx.prepare_cached(
                    "UPDATE notifications SET fanout_epoch = ?2 WHERE id = ?1 AND fanout_epoch <= ?2
                     RETURNING site, audience, watermark, fanned_to, fanned_out,
                         (SELECT count(*) FROM batches
                          WHERE notification = notifications.id AND (ids IS NULL) = TRUE) AS ahead",
                )?
                .query_row((notification.as_bytes(), epoch), |row| {
                    let fanned_out: bool = row.get("fanned_out")?;
                    let fan_out = FanOut {
                        site: row.get("site")?,
                        audience: audience(row)?,
                        watermark: row.get("watermark")?,
                        fanned_to: row.get("fanned_to")?,
                        ahead: row.get("ahead")?,
                    };
                    Ok((!fanned_out).then_some(fan_out))
                })
                .optional()
                .map(Option::flatten)
            })
            .await
    }

    /// The id at which the next `size` members end; none when there is nobody left.
    pub(crate) async fn next_page(&self, fan_out: &FanOut, size: usize) -> Result<Option<i64>> {
        let fan_out = fan_out.clone();
        self.sqlite
            .read(move |tx| {
                let (left, mut parameters) = fan_out.left_to_sql();
                parameters.push(i64::try_from(size).unwrap_or(i64::MAX).into());
                let sql = format!(
                    "SELECT max(id) FROM (SELECT id FROM subscriptions
                     WHERE {left} ORDER BY id LIMIT ?)"
                );
                tx.prepare_cached(&sql)?.query_row(params_from_iter(parameters), |row| row.get(0))
            })
            .await
    }

    /// Adds the next batch, which ends at an id, and the job that sends it; none when there is nobody left.
    pub(crate) async fn add_batch(
        &self,
        notification: Uuid,
        epoch: i64,
        from: i64,
        next: Option<(i64, NewJob)>,
    ) -> Result<Added> {
        let woken = next.as_ref().map(|(_, job)| job.queue.clone());
        let add = move |tx: &Connection| {
            let Some((upto, job)) = next else {
                let held = tx
                    .prepare_cached(
                        "UPDATE notifications SET fanned_out = TRUE
                         WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out",
                    )?
                    .execute((notification.as_bytes(), epoch))?;
                let last = held == 1 && end_if_done(tx, notification)?;
                return Ok(if last { Added::Last } else { Added::NoMore });
            };
            let held = tx
                .prepare_cached(
                    "UPDATE notifications SET fanned_to = ?, outstanding = outstanding + 1
                     WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out",
                )?
                .execute((upto, notification.as_bytes(), epoch))?;
            if held == 0 {
                return Ok(Added::NoMore);
            }
            insert_batch(tx, job.id, notification, from, upto)?;
            insert_jobs(tx, &[job])?;
            Ok(Added::One)
        };
        let added = self.sqlite.write(add).await?;
        self.jobs.wake(woken.as_deref());
        Ok(added)
    }

    /// Gives up cutting an audience: those who have no batch by now have failed.
    pub(crate) async fn give_up_fan_out(&self, notification: Uuid, epoch: i64, reason: String) -> Result<()> {
        let Some(fan_out) = self.open_fan_out(notification, epoch).await? else { return Ok(()) };
        let left = self.count_left(&fan_out).await?;
        self.sqlite
            .write(move |tx| {
                let changed = tx
                    .prepare_cached(
                        "UPDATE notifications SET fanned_out = TRUE, error = ?
                         WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out",
                    )?
                    .execute((reason, notification.as_bytes(), epoch))?;
                if changed == 1 && left > 0 {
                    add_outcome(tx, notification, Outcome::Failed.as_str(), left)?;
                }
                end_if_done(tx, notification).map(drop)
            })
            .await
    }

    async fn count_left(&self, fan_out: &FanOut) -> Result<usize> {
        let fan_out = fan_out.clone();
        self.sqlite
            .read(move |tx| {
                let (left, parameters) = fan_out.left_to_sql();
                let sql = format!("SELECT count(*) FROM subscriptions WHERE {left}");
                tx.prepare_cached(&sql)?.query_row(params_from_iter(parameters), |row| row.get(0))
            })
            .await
    }
}

pub(super) fn insert_batch(
    tx: &Connection,
    id: Uuid,
    notification: Uuid,
    after: i64,
    upto: i64,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO batches (id, notification, after_id, upto_id, low_id) VALUES (?1, ?2, ?3, ?4, ?3)";
    tx.prepare_cached(sql)?.execute((id.as_bytes(), notification.as_bytes(), after, upto)).map(drop)
}

fn open_batch(tx: &Connection, id: Uuid, epoch: i64) -> rusqlite::Result<Option<Batch>> {
    let now = now_ms();
    let taken = tx
        .prepare_cached("UPDATE batches SET epoch = ?2 WHERE id = ?1 AND epoch <= ?2")?
        .execute((id.as_bytes(), epoch))?;
    if taken == 0 {
        return Ok(None);
    }
    tx.prepare_cached(
        "UPDATE notifications SET state = 'sending', started_at = coalesce(started_at, ?2)
         WHERE id = (SELECT notification FROM batches WHERE id = ?1) AND state = 'queued'",
    )?
    .execute((id.as_bytes(), now))?;
    let sql = "SELECT batches.*, site, audience, payload, ttl, urgency, topic, created_at, estimate
               FROM batches JOIN notifications ON notifications.id = notification WHERE batches.id = ?";
    tx.prepare_cached(sql)?.query_row([id.as_bytes()], read).optional()
}

fn read(row: &Row<'_>) -> rusqlite::Result<Batch> {
    let ids: Option<String> = row.get("ids")?;
    let part = match ids {
        Some(ids) => Part::Ids(serde_json::from_str(&ids).unwrap_or_default()),
        None => Part::Range { upto: row.get("upto_id")? },
    };
    let above: String = row.get("above")?;
    Ok(Batch {
        id: Uuid::from_bytes(row.get("id")?),
        notification: Uuid::from_bytes(row.get("notification")?),
        part,
        attempt: row.get("attempt")?,
        created_at: row.get("created_at")?,
        estimate: row.get("estimate")?,
        low_id: row.get("low_id")?,
        above: serde_json::from_str(&above).unwrap_or_default(),
        site: row.get("site")?,
        audience: audience(row)?,
        payload: row.get("payload")?,
        ttl: Duration::from_secs(row.get("ttl")?),
        urgency: row.get("urgency")?,
        topic: row.get("topic")?,
    })
}

fn audience(row: &Row<'_>) -> rusqlite::Result<Audience> {
    let text: String = row.get("audience")?;
    serde_json::from_str(&text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(error))
    })
}

fn members(tx: &Connection, batch: &Batch) -> rusqlite::Result<Vec<Member>> {
    let mut parameters: Vec<Value> = Vec::new();
    let mut sql = if batch.audience == Audience::Inline {
        parameters.push(Value::Blob(batch.notification.as_bytes().to_vec()));
        "SELECT id, endpoint, p256dh, auth FROM recipients WHERE notification = ?".to_owned()
    } else {
        parameters.push(batch.site.into());
        "SELECT id, endpoint, p256dh, auth FROM subscriptions WHERE site = ?".to_owned()
    };
    sql.push_str(" AND id > ?");
    parameters.push(batch.low_id.into());
    match &batch.part {
        Part::Range { upto } => {
            sql.push_str(" AND id <= ?");
            parameters.push((*upto).into());
            if batch.audience != Audience::Inline {
                sql.push_str(" AND ");
                sql.push_str(&batch.audience.to_sql(batch.site, &mut parameters));
            }
        }
        // They were members when they were tried first.
        Part::Ids(ids) => {
            sql.push_str(" AND id IN (SELECT value FROM json_each(?))");
            parameters.push(Value::Text(serde_json::to_string(ids).unwrap_or_default()));
        }
    }
    sql.push_str(" ORDER BY id");
    let mut select = tx.prepare_cached(&sql)?;
    let members = select.query_map(params_from_iter(parameters), |row| {
        Ok(Member {
            id: row.get("id")?,
            endpoint: row.get("endpoint")?,
            p256dh: row.get("p256dh")?,
            auth: row.get("auth")?,
        })
    })?;
    let members: Vec<Member> = members.collect::<rusqlite::Result<_>>()?;
    Ok(members.into_iter().filter(|member| !batch.is_recorded(member.id)).collect())
}

fn record(
    tx: &Connection,
    id: Uuid,
    notification: Uuid,
    site: i64,
    epoch: i64,
    checkpoint: &Checkpoint,
) -> rusqlite::Result<Recorded> {
    let above = serde_json::to_string(&checkpoint.above).unwrap_or_default();
    let held = tx
        .prepare_cached("UPDATE batches SET low_id = ?, above = ? WHERE id = ? AND epoch = ?")?
        .execute((checkpoint.low_id, above, id.as_bytes(), epoch))?;
    if held == 0 {
        return Ok(Recorded::TooLate);
    }
    for (outcome, count) in &checkpoint.outcomes {
        add_outcome(tx, notification, outcome.as_str(), *count)?;
    }
    for (id, endpoint) in &checkpoint.ended {
        // Not if the browser has subscribed anew meanwhile and kept the row.
        tx.prepare_cached("DELETE FROM subscriptions WHERE site = ? AND id = ? AND endpoint_hash = ?")?
            .execute((site, id, endpoint_hash(endpoint)))?;
    }
    for deferred in &checkpoint.deferred {
        insert_deferred(tx, notification, deferred)?;
    }
    if checkpoint.finished {
        tx.prepare_cached("DELETE FROM batches WHERE id = ?")?.execute([id.as_bytes()])?;
        tx.prepare_cached("UPDATE notifications SET outstanding = outstanding - 1 WHERE id = ?")?
            .execute([notification.as_bytes()])?;
        if end_if_done(tx, notification)? {
            return Ok(Recorded::Last);
        }
    }
    Ok(Recorded::Kept)
}

fn insert_deferred(tx: &Connection, notification: Uuid, deferred: &Deferred) -> rusqlite::Result<()> {
    let ids = serde_json::to_string(&deferred.ids).unwrap_or_default();
    tx.prepare_cached(
        "INSERT INTO batches (id, notification, after_id, upto_id, ids, again, attempt, low_id)
         VALUES (?, ?, 0, 0, ?, ?, ?, 0)",
    )?
    .execute((
        deferred.job.id.as_bytes(),
        notification.as_bytes(),
        ids,
        deferred.ids.len(),
        deferred.attempt,
    ))?;
    tx.prepare_cached("UPDATE notifications SET outstanding = outstanding + 1 WHERE id = ?")?
        .execute([notification.as_bytes()])?;
    insert_jobs(tx, std::slice::from_ref(&deferred.job)).map(drop)
}

/// A notification whose last batch has finished is done, and its own recipients are not needed any more.
fn end_if_done(tx: &Connection, notification: Uuid) -> rusqlite::Result<bool> {
    let ended = tx
        .prepare_cached(
            "UPDATE notifications SET state = 'done', ended_at = ?
             WHERE id = ? AND fanned_out AND outstanding = 0 AND state <> 'done'",
        )?
        .execute((now_ms(), notification.as_bytes()))?;
    if ended == 1 {
        tx.prepare_cached("DELETE FROM recipients WHERE notification = ?")?
            .execute([notification.as_bytes()])?;
    }
    Ok(ended == 1)
}
