//! Parts of audiences, each sent by a job, and how far it has come.
//!
//! Every change of a batch carries the epoch of the job's claim: one that comes from an earlier claim changes
//! nothing, and so an outcome is counted once, however often the message was sent.

use std::collections::BTreeMap;
use std::time::Duration;

use perennial_server::pool::sql::{self, Dialect, Result, Row, Tx, Value};
use perennial_server::{transact, values};
use perennial_workers::{Jobs, NewJob};
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
    /// The member that was sent to alone, after crashes.
    pub(crate) trying: Option<i64>,
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
    fn left_to_sql(&self, dialect: Dialect) -> (String, Vec<Value>) {
        let mut parameters = values![self.site, self.fanned_to, self.watermark].to_vec();
        let filter = self.audience.to_sql(dialect, self.site, &mut parameters);
        (format!("site = ? AND id > ? AND id <= ? AND {filter}"), parameters)
    }
}

impl Store {
    /// Takes a batch for the claim `epoch`, from any earlier one. None when there is nothing left to do.
    pub(crate) async fn open_batch(&self, id: Uuid, epoch: i64) -> Result<Option<Batch>> {
        transact!(&self.sql, tx => open_batch(tx, id, epoch))
    }

    /// The members of a batch whose outcomes are not recorded.
    pub(crate) async fn members(&self, batch: &Batch) -> Result<Vec<Member>> {
        let (sql, parameters) = members_to_sql(self.sql.dialect(), batch);
        let members: Vec<Member> =
            self.sql.query(sql, parameters).await?.iter().map(member).collect::<Result<_>>()?;
        Ok(members.into_iter().filter(|member| !batch.is_recorded(member.id)).collect())
    }

    /// Notes that a member is about to be sent to, alone: should the process crash, it was with that one.
    pub(crate) async fn note_trying(&self, batch: Uuid, epoch: i64, member: i64) -> Result<()> {
        let sql = "UPDATE batches SET trying = ? WHERE id = ? AND epoch = ?";
        self.sql.execute(sql, values![member, batch, epoch]).await.map(drop)
    }

    /// Records what a batch has done.
    pub(crate) async fn checkpoint(
        &self,
        batch: &Batch,
        epoch: i64,
        checkpoint: Checkpoint,
    ) -> Result<Recorded> {
        let (jobs, batch) = (self.jobs.clone(), (batch.id, batch.notification, batch.site));
        let woken: Vec<_> = checkpoint.deferred.iter().map(|deferred| deferred.job.queue.clone()).collect();
        let recorded = transact!(&self.sql, tx => record(tx, &jobs, batch, epoch, &checkpoint))?;
        if !woken.is_empty() {
            self.jobs.wake(woken.iter().map(|queue| &**queue));
        }
        Ok(recorded)
    }

    /// Takes the cutting of an audience for the claim `epoch`. None when it is done.
    pub(crate) async fn open_fan_out(&self, notification: Uuid, epoch: i64) -> Result<Option<FanOut>> {
        transact!(&self.sql, tx => open_fan_out(tx, notification, epoch))
    }

    /// The id at which the next `size` members end; none when there is nobody left.
    pub(crate) async fn next_page(&self, fan_out: &FanOut, size: usize) -> Result<Option<i64>> {
        let (left, mut parameters) = fan_out.left_to_sql(self.sql.dialect());
        parameters.push(size.into());
        let sql = format!(
            "SELECT max(id) FROM (SELECT id FROM subscriptions WHERE {left} ORDER BY id LIMIT ?) AS page"
        );
        self.sql.value(sql, parameters).await
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
        let jobs = self.jobs.clone();
        let added = transact!(&self.sql, tx => add_batch(tx, &jobs, notification, epoch, from, &next))?;
        self.jobs.wake(woken.as_deref());
        Ok(added)
    }

    /// Gives up cutting an audience: those who have no batch by now have failed.
    pub(crate) async fn give_up_fan_out(&self, notification: Uuid, epoch: i64, reason: String) -> Result<()> {
        let Some(fan_out) = self.open_fan_out(notification, epoch).await? else { return Ok(()) };
        let (left, parameters) = fan_out.left_to_sql(self.sql.dialect());
        let sql = format!("SELECT count(*) FROM subscriptions WHERE {left}");
        let left: usize = self.sql.value(sql, parameters).await?;
        transact!(&self.sql, tx => give_up_fan_out(tx, notification, epoch, left, &reason))
    }
}

async fn open_fan_out<T: Tx>(tx: &T, notification: Uuid, epoch: i64) -> Result<Option<FanOut>> {
    let sql = "UPDATE notifications SET fanout_epoch = ?2 WHERE id = ?1 AND fanout_epoch <= ?2
               RETURNING site, audience, watermark, fanned_to, fanned_out,
                   (SELECT count(*) FROM batches
                    WHERE notification = notifications.id AND (ids IS NULL) = TRUE) AS ahead";
    let Some(row) = sql::first(tx, sql, &values![notification, epoch]).await? else { return Ok(None) };
    if row.get("fanned_out")? {
        return Ok(None);
    }
    Ok(Some(FanOut {
        site: row.get("site")?,
        audience: audience(&row)?,
        watermark: row.get("watermark")?,
        fanned_to: row.get("fanned_to")?,
        ahead: row.get("ahead")?,
    }))
}

async fn add_batch<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    notification: Uuid,
    epoch: i64,
    from: i64,
    next: &Option<(i64, NewJob)>,
) -> Result<Added> {
    let Some((upto, job)) = next else {
        let sql = "UPDATE notifications SET fanned_out = TRUE
                   WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out";
        let held = tx.execute(sql, &values![notification, epoch]).await?;
        let last = held == 1 && end_if_done(tx, notification).await?;
        return Ok(if last { Added::Last } else { Added::NoMore });
    };
    let sql = "UPDATE notifications SET fanned_to = ?, outstanding = outstanding + 1
               WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out";
    if tx.execute(sql, &values![*upto, notification, epoch]).await? == 0 {
        return Ok(Added::NoMore);
    }
    insert_batch(tx, job.id, notification, from, *upto).await?;
    jobs.insert(tx, std::slice::from_ref(job)).await?;
    Ok(Added::One)
}

async fn give_up_fan_out<T: Tx>(
    tx: &T,
    notification: Uuid,
    epoch: i64,
    left: usize,
    reason: &str,
) -> Result<()> {
    let sql = "UPDATE notifications SET fanned_out = TRUE, error = ?
               WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out";
    let changed = tx.execute(sql, &values![reason, notification, epoch]).await?;
    if changed == 1 && left > 0 {
        add_outcome(tx, notification, Outcome::Failed.as_str(), left).await?;
    }
    end_if_done(tx, notification).await.map(drop)
}

pub(super) async fn insert_batch<T: Tx>(
    tx: &T,
    id: Uuid,
    notification: Uuid,
    after: i64,
    upto: i64,
) -> Result<()> {
    let sql = "INSERT INTO batches (id, notification, after_id, upto_id, low_id) VALUES (?1, ?2, ?3, ?4, ?3)";
    tx.execute(sql, &values![id, notification, after, upto]).await.map(drop)
}

async fn open_batch<T: Tx>(tx: &T, id: Uuid, epoch: i64) -> Result<Option<Batch>> {
    let taken = "UPDATE batches SET epoch = ?2 WHERE id = ?1 AND epoch <= ?2";
    if tx.execute(taken, &values![id, epoch]).await? == 0 {
        return Ok(None);
    }
    let begun = "UPDATE notifications SET state = 'sending', started_at = coalesce(started_at, ?2)
                 WHERE id = (SELECT notification FROM batches WHERE id = ?1) AND state = 'queued'";
    tx.execute(begun, &values![id, now_ms()]).await?;
    let sql = "SELECT batches.*, site, audience, payload, ttl, urgency, topic, created_at, estimate
               FROM batches JOIN notifications ON notifications.id = notification WHERE batches.id = ?";
    sql::first(tx, sql, &values![id]).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<Batch> {
    let ids: Option<String> = row.get("ids")?;
    let part = match ids {
        Some(ids) => Part::Ids(serde_json::from_str(&ids).unwrap_or_default()),
        None => Part::Range { upto: row.get("upto_id")? },
    };
    let above: String = row.get("above")?;
    Ok(Batch {
        id: row.get("id")?,
        notification: row.get("notification")?,
        part,
        attempt: row.get("attempt")?,
        created_at: row.get("created_at")?,
        estimate: row.get("estimate")?,
        low_id: row.get("low_id")?,
        above: serde_json::from_str(&above).unwrap_or_default(),
        trying: row.get("trying")?,
        site: row.get("site")?,
        audience: audience(row)?,
        payload: row.get("payload")?,
        ttl: Duration::from_secs(row.get("ttl")?),
        urgency: row.get("urgency")?,
        topic: row.get("topic")?,
    })
}

fn audience(row: &Row) -> Result<Audience> {
    let text: String = row.get("audience")?;
    let unreadable = |error| rusqlite::Error::ToSqlConversionFailure(Box::new(error));
    Ok(serde_json::from_str(&text).map_err(unreadable)?)
}

fn members_to_sql(dialect: Dialect, batch: &Batch) -> (String, Vec<Value>) {
    let (mut sql, mut parameters) = if batch.audience == Audience::Inline {
        let sql = "SELECT id, endpoint, p256dh, auth FROM recipients WHERE notification = ?";
        (sql.to_owned(), values![batch.notification].to_vec())
    } else {
        let sql = "SELECT id, endpoint, p256dh, auth FROM subscriptions WHERE site = ?";
        (sql.to_owned(), values![batch.site].to_vec())
    };
    sql.push_str(" AND id > ?");
    parameters.push(batch.low_id.into());
    match &batch.part {
        Part::Range { upto } => {
            sql.push_str(" AND id <= ?");
            parameters.push((*upto).into());
            if batch.audience != Audience::Inline {
                sql.push_str(" AND ");
                sql.push_str(&batch.audience.to_sql(dialect, batch.site, &mut parameters));
            }
        }
        // They were members when they were tried first.
        Part::Ids(ids) => {
            sql.push_str(&format!(" AND id IN ({})", dialect.numbers_in("?")));
            parameters.push(serde_json::to_string(ids).unwrap_or_default().into());
        }
    }
    sql.push_str(" ORDER BY id");
    (sql, parameters)
}

fn member(row: &Row) -> Result<Member> {
    Ok(Member {
        id: row.get("id")?,
        endpoint: row.get("endpoint")?,
        p256dh: row.get("p256dh")?,
        auth: row.get("auth")?,
    })
}

async fn record<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    (id, notification, site): (Uuid, Uuid, i64),
    epoch: i64,
    checkpoint: &Checkpoint,
) -> Result<Recorded> {
    let above = serde_json::to_string(&checkpoint.above).unwrap_or_default();
    let held = "UPDATE batches SET low_id = ?, above = ? WHERE id = ? AND epoch = ?";
    if tx.execute(held, &values![checkpoint.low_id, above, id, epoch]).await? == 0 {
        return Ok(Recorded::TooLate);
    }
    for (outcome, count) in &checkpoint.outcomes {
        add_outcome(tx, notification, outcome.as_str(), *count).await?;
    }
    // In the order of their ids, as everybody deletes them: two checkpoints never wait for each other.
    let ended: BTreeMap<i64, &String> =
        checkpoint.ended.iter().map(|(id, endpoint)| (*id, endpoint)).collect();
    for (id, endpoint) in ended {
        // Not if the browser has subscribed anew meanwhile and kept the row.
        let sql = "DELETE FROM subscriptions WHERE site = ? AND id = ? AND endpoint_hash = ?";
        tx.execute(sql, &values![site, id, endpoint_hash(endpoint)]).await?;
    }
    for deferred in &checkpoint.deferred {
        insert_deferred(tx, jobs, notification, deferred).await?;
    }
    if checkpoint.finished {
        tx.execute("DELETE FROM batches WHERE id = ?", &values![id]).await?;
        let sql = "UPDATE notifications SET outstanding = outstanding - 1 WHERE id = ?";
        tx.execute(sql, &values![notification]).await?;
        if end_if_done(tx, notification).await? {
            return Ok(Recorded::Last);
        }
    }
    Ok(Recorded::Kept)
}

async fn insert_deferred<T: Tx>(tx: &T, jobs: &Jobs, notification: Uuid, deferred: &Deferred) -> Result<()> {
    let ids = serde_json::to_string(&deferred.ids).unwrap_or_default();
    let sql = "INSERT INTO batches (id, notification, after_id, upto_id, ids, again, attempt, low_id)
               VALUES (?, ?, 0, 0, ?, ?, ?, 0)";
    let parameters = values![deferred.job.id, notification, ids, deferred.ids.len(), deferred.attempt];
    tx.execute(sql, &parameters).await?;
    let sql = "UPDATE notifications SET outstanding = outstanding + 1 WHERE id = ?";
    tx.execute(sql, &values![notification]).await?;
    jobs.insert(tx, std::slice::from_ref(&deferred.job)).await
}

/// A notification whose last batch has finished is done, and its own recipients are not needed any more.
async fn end_if_done<T: Tx>(tx: &T, notification: Uuid) -> Result<bool> {
    let sql = "UPDATE notifications SET state = 'done', ended_at = ?
               WHERE id = ? AND fanned_out AND outstanding = 0 AND state <> 'done'";
    let ended = tx.execute(sql, &values![now_ms(), notification]).await? == 1;
    if ended {
        tx.execute("DELETE FROM recipients WHERE notification = ?", &values![notification]).await?;
    }
    Ok(ended)
}
