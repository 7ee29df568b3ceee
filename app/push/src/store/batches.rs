//! Batches: the parts of an audience, each sent by a job, and their progress.
//!
//! Every change of a batch carries the epoch of the job's claim, a fencing token: a change of an earlier claim has no
//! effect, so an outcome is counted once, however often the message was sent.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use perennial_store::pool::set_apart;
use perennial_store::pool::sql::{self, Dialect, Result, Row, Tx, Value};
use perennial_store::{transact, values};
use perennial_workers::{Jobs, NewJob};
use uuid::Uuid;

use super::{PushStore, add_outcome, job, now_ms};
use crate::model::audience::{Audience, Selection};
use crate::model::endpoint::{endpoint_hash, origin};
use crate::model::jobs::{Pruned, Webhook, WebhookEvent};
use crate::model::notification::NotificationStatus;
use crate::model::outcome::Outcome;
use crate::model::refusals::{self, RefusalEvidence, RefusalRecord, SubscriptionRefusal};

/// A part of an audience that a job has taken.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    pub(crate) id: Uuid,
    pub(crate) notification: Uuid,
    pub(crate) part: BatchPart,
    pub(crate) attempt: u32,
    /// Time at which the notification was due, or accepted if it was due at once, in milliseconds since 1970.
    pub(crate) since: i64,
    pub(crate) standing: NotificationStatus,
    /// Estimated size of the audience when the notification was accepted.
    pub(crate) estimate: u64,
    /// The outcomes of members up to this id are recorded.
    pub(crate) low_id: i64,
    /// Members above `low_id` whose outcomes are recorded, in ascending order.
    pub(crate) above: Vec<i64>,
    /// The member that was sent to alone, in isolation mode after crashes.
    pub(crate) trying: Option<i64>,
    pub(crate) site: i64,
    pub(crate) audience: Audience,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: Duration,
    pub(crate) urgency: String,
    pub(crate) topic: Option<String>,
    pub(crate) http: String,
    pub(crate) is_declarative: bool,
    /// Whether the payload has places for each subscription's own data.
    pub(crate) is_template: bool,
    /// Whether every delivery is logged, not only failures.
    pub(crate) logs_all: bool,
    /// The webhook that is told about subscriptions that are deleted.
    pub(crate) webhook: Option<String>,
}

/// Number of batches waiting for a push service that are woken in one transaction.
const WOKEN: usize = 100;

impl Batch {
    /// Returns true when the outcome of a member is recorded.
    pub(crate) fn is_recorded(&self, id: i64) -> bool {
        id <= self.low_id || self.above.binary_search(&id).is_ok()
    }
}

/// The members of a batch.
#[derive(Clone, Debug)]
pub(crate) enum BatchPart {
    /// All members up to this id.
    Range { upto: i64 },
    /// Members that are tried again.
    Ids(Vec<i64>),
}

/// One subscription to send to.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) id: i64,
    pub(crate) endpoint: String,
    pub(crate) p256dh: Vec<u8>,
    pub(crate) auth: Vec<u8>,
    /// Id of the VAPID key that the subscription was made with; `None` when it came with the notification.
    pub(crate) vapid_key: Option<i64>,
    /// Whether a message was delivered to the subscription before.
    pub(crate) is_proven: bool,
    /// Whether the subscription was refused since its last delivery.
    pub(crate) is_refused: bool,
    /// Metadata as JSON; it is read only for templates.
    pub(crate) metadata: Option<String>,
}

/// Members of a batch that were read from the store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members {
    pub(crate) list: Vec<Member>,
    /// Ids of the members whose rows cannot be read, and the reasons.
    pub(crate) unreadable: Vec<(i64, String)>,
    /// Id after which the batch has more members, if it has: an audience may have grown since it was cut.
    pub(crate) rest_after: Option<i64>,
}

/// A delivery to one subscription, for the log.
#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    pub(crate) subscription: i64,
    pub(crate) outcome: Outcome,
    pub(crate) status: Option<u16>,
    pub(crate) detail: String,
}

/// The progress of a batch since the last checkpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoint {
    pub(crate) low_id: i64,
    pub(crate) above: Vec<i64>,
    pub(crate) outcomes: Vec<(Outcome, usize)>,
    /// Subscriptions that have ended, with the endpoint that was sent to.
    pub(crate) ended: Vec<(i64, String)>,
    /// Subscriptions that were refused, with the endpoint that was sent to.
    pub(crate) refused: Vec<(i64, String, SubscriptionRefusal)>,
    /// Subscriptions that had been refused and were delivered to now.
    pub(crate) cleared: Vec<i64>,
    /// Subscriptions that were delivered to for the first time.
    pub(crate) proven: Vec<i64>,
    pub(crate) deliveries: Vec<Delivery>,
    /// Members to be tried again later.
    pub(crate) deferred: Vec<Deferred>,
    /// The rest of the batch's range that this run has not read, when the batch is finished all the same.
    pub(crate) rest: Option<RestOfBatch>,
    /// The webhook that is told which subscriptions are deleted.
    pub(crate) tell: Option<String>,
    /// Number of members that are neither recorded nor deferred.
    pub(crate) left: usize,
    /// Whether this is the last checkpoint of the batch.
    pub(crate) finished: bool,
}

/// The result of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    /// The checkpoint is written.
    Kept,
    /// The checkpoint is written, and the notification has ended with it.
    Last,
    /// A later claim has the batch: nothing has changed.
    TooLate,
}

/// Members that are tried again later, by a job of their own.
#[derive(Clone, Debug)]
pub(crate) struct Deferred {
    pub(crate) ids: Vec<i64>,
    pub(crate) job: NewJob,
    pub(crate) attempt: u32,
    /// Origin of the held push service that the members wait for, if they wait for one.
    pub(crate) waits_for: Option<String>,
}

/// A batch that waits for a push service.
#[derive(Clone, Debug)]
pub(crate) struct WaitingBatch {
    pub(crate) batch: Uuid,
    pub(crate) notification: Uuid,
    pub(crate) urgency: String,
    pub(crate) estimate: u64,
    /// Whether its notification has a pace.
    pub(crate) is_paced: bool,
}

/// The rest of a batch's range: the audience has grown since the range was cut.
#[derive(Clone, Debug)]
pub(crate) struct RestOfBatch {
    /// Id after which the rest begins.
    pub(crate) after: i64,
    pub(crate) job: NewJob,
}

/// The result of adding batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AddedBatches {
    /// More batches may follow.
    Some,
    /// No more batches follow, or a later claim has the fan-out.
    NoMore,
    /// No more batches follow, and all batches have finished already.
    Last,
}

/// The progress of cutting an audience into batches.
#[derive(Clone, Debug)]
pub(crate) struct OpenFanOut {
    pub(crate) site: i64,
    pub(crate) audience: Audience,
    pub(crate) watermark: i64,
    pub(crate) fanned_to: i64,
    pub(crate) standing: NotificationStatus,
    /// Number of unfinished batches, without those of retries.
    pub(crate) ahead: usize,
}

impl OpenFanOut {
    /// Selects the members that are in no batch yet.
    fn left(&self, dialect: Dialect) -> Selection {
        self.audience.select(dialect, self.site, self.fanned_to, self.watermark)
    }
}

impl PushStore {
    /// Takes a batch for the claim `epoch` from any earlier claim. Returns `None` when nothing is left to do: the batch
    /// is finished, or a later claim has it.
    pub(crate) async fn open_batch(&self, id: Uuid, epoch: i64) -> Result<Option<Batch>> {
        transact!(&self.sql, tx => open_batch(tx, id, epoch))
    }

    /// Returns the members whose outcomes are not recorded, among the first `most` members of the batch.
    pub(crate) async fn members(&self, batch: &Batch, most: usize) -> Result<Members> {
        let (mut sql, mut parameters) = members_to_sql(self.sql.dialect(), batch);
        let one_more = most.saturating_add(1);
        let is_range = matches!(batch.part, BatchPart::Range { .. });
        if is_range {
            sql.push_str(" LIMIT ?");
            parameters.push(one_more.into());
        }
        let stored = batch.audience != Audience::Inline;
        let mut rows = self.sql.query(sql, parameters).await?;
        let mut members = Members::default();
        if is_range && rows.len() == one_more {
            rows.truncate(most);
            members.rest_after = rows.last().map(|row| row.get("id")).transpose()?;
        }
        for row in &rows {
            let id = row.get("id")?;
            if batch.is_recorded(id) {
                continue;
            }
            match member(row, stored, batch.is_template && stored) {
                Ok(member) => members.list.push(member),
                // An unreadable member is counted like all others, and delays none of them.
                Err(error) => {
                    set_apart(if stored { "subscriptions" } else { "recipients" }, &row.name("id"), &error);
                    members.unreadable.push((id, error.to_string()));
                }
            }
        }
        Ok(members)
    }

    /// Returns the ids of the members whose outcomes are not recorded, and the id after which there are more, if there
    /// are. In a batch of retries, the ids include subscriptions that do not exist any more.
    pub(crate) async fn left(&self, batch: &Batch, most: usize) -> Result<(Vec<i64>, Option<i64>)> {
        if let BatchPart::Ids(ids) = &batch.part {
            return Ok((ids.iter().copied().filter(|id| !batch.is_recorded(*id)).collect(), None));
        }
        let Members { list, unreadable, rest_after } = self.members(batch, most).await?;
        let readable = list.iter().map(|member| member.id);
        Ok((readable.chain(unreadable.iter().map(|(id, _)| *id)).collect(), rest_after))
    }

    /// Gives up a batch that cannot be read: its notification goes on without the batch, and its `error` says so.
    /// Returns true when the notification has ended with this.
    pub(crate) async fn abandon_batch(&self, id: Uuid, epoch: i64, why: String) -> Result<bool> {
        let jobs = self.jobs.clone();
        transact!(&self.sql, tx => abandon_batch(tx, &jobs, id, epoch, &why))
    }

    /// Records the member that is about to be sent to alone: if the process crashes, this member was in flight.
    pub(crate) async fn note_trying(&self, batch: Uuid, epoch: i64, member: i64) -> Result<()> {
        let sql = "UPDATE batches SET trying = ? WHERE id = ? AND epoch = ?";
        self.sql.execute(sql, values![member, batch, epoch]).await.map(drop)
    }

    /// Records the progress of a batch.
    pub(crate) async fn checkpoint(
        &self,
        batch: &Batch,
        epoch: i64,
        checkpoint: Checkpoint,
    ) -> Result<Recorded> {
        let (jobs, batch) = (self.jobs.clone(), (batch.id, batch.notification, batch.site));
        let deferred = checkpoint.deferred.iter().map(|deferred| &deferred.job);
        let jobs_of = deferred.chain(checkpoint.rest.iter().map(|rest| &rest.job));
        let woken: Vec<_> = jobs_of.map(|job| job.queue.clone()).collect();
        let recorded = transact!(&self.sql, tx => record(tx, &jobs, batch, epoch, &checkpoint))?;
        if !woken.is_empty() {
            self.jobs.wake(woken.iter().map(|queue| &**queue));
        }
        Ok(recorded)
    }

    /// Gives the batches that wait for a push service to new jobs, which `new_job` makes, and returns their number.
    /// Their former jobs will find nothing to do.
    pub(crate) async fn wake_batches(
        &self,
        origin: &str,
        new_job: impl Fn(&WaitingBatch) -> Result<NewJob>,
    ) -> Result<usize> {
        let sql = "SELECT batches.id AS id, notification, urgency, estimate, rate_milli
                   FROM batches JOIN notifications ON notifications.id = notification
                   WHERE waits_for = ? AND epoch = 0 LIMIT ?";
        let mut count = 0;
        loop {
            let rows = self.sql.query(sql, values![origin, WOKEN]).await?;
            let waiting = sql::each(&rows, "batches", "id", |row: &Row| {
                Ok(WaitingBatch {
                    batch: row.get("id")?,
                    notification: row.get("notification")?,
                    urgency: row.get("urgency")?,
                    estimate: row.get("estimate")?,
                    is_paced: row.get::<Option<i64>>("rate_milli")?.is_some(),
                })
            });
            let moves = waiting.iter().map(|waiting| Ok((waiting.batch, new_job(waiting)?)));
            let moves: Vec<(Uuid, NewJob)> = moves.collect::<Result<_>>()?;
            let queues: Vec<_> = moves.iter().map(|(_, job)| job.queue.clone()).collect();
            let jobs = self.jobs.clone();
            let woken = transact!(&self.sql, tx => wake_batches(tx, &jobs, &moves))?;
            self.jobs.wake(queues.iter().map(|queue| &**queue));
            count += woken;
            if woken == 0 || rows.len() < WOKEN {
                return Ok(count);
            }
        }
    }

    /// Returns the ids of up to 1000 unfinished batches of a notification.
    pub(crate) async fn batches_of(&self, notification: Uuid) -> Result<Vec<Uuid>> {
        let sql = "SELECT id FROM batches WHERE notification = ? LIMIT 1000";
        let rows = self.sql.query(sql, values![notification]).await?;
        Ok(sql::each(&rows, "batches", "id", Row::first))
    }

    /// Takes the fan-out of a notification for the claim `epoch`. Returns `None` when it is done, or a later claim has
    /// it.
    pub(crate) async fn open_fan_out(&self, notification: Uuid, epoch: i64) -> Result<Option<OpenFanOut>> {
        transact!(&self.sql, tx => open_fan_out(tx, notification, epoch))
    }

    /// Returns the highest id of the next `size` members; `None` when no members are left.
    pub(crate) async fn next_page(&self, fan_out: &OpenFanOut, size: usize) -> Result<Option<i64>> {
        let Selection { from, condition, id, mut parameters } = fan_out.left(self.sql.dialect());
        parameters.push(size.into());
        let sql = format!(
            "SELECT max(id) FROM (SELECT {id} AS id FROM {from} WHERE {condition} ORDER BY {id} LIMIT ?) AS page"
        );
        self.sql.value(sql, parameters).await
    }

    /// Adds batches, each with its highest id and the job that sends it. `last` says that no more batches follow.
    pub(crate) async fn add_batches(
        &self,
        notification: Uuid,
        epoch: i64,
        from: i64,
        batches: Vec<(i64, NewJob)>,
        last: bool,
    ) -> Result<AddedBatches> {
        let woken: Vec<_> = batches.iter().map(|(_, job)| job.queue.clone()).collect();
        let jobs = self.jobs.clone();
        let added =
            transact!(&self.sql, tx => add_batches(tx, &jobs, (notification, epoch), from, &batches, last))?;
        self.jobs.wake(woken.iter().map(|queue| &**queue));
        Ok(added)
    }

    /// Gives up cutting an audience: members that have no batch by now are counted with `outcome`, which is failed
    /// unless the notification was cancelled or has expired. Returns true when the notification has ended with this.
    pub(crate) async fn give_up_fan_out(
        &self,
        notification: Uuid,
        epoch: i64,
        outcome: Outcome,
        reason: Option<String>,
    ) -> Result<bool> {
        let Some(fan_out) = self.open_fan_out(notification, epoch).await? else { return Ok(false) };
        let Selection { from, condition, parameters, .. } = fan_out.left(self.sql.dialect());
        let sql = format!("SELECT count(*) FROM {from} WHERE {condition}");
        let left: usize = self.sql.value(sql, parameters).await?;
        let jobs = self.jobs.clone();
        transact!(&self.sql, tx => give_up_fan_out(tx, &jobs, notification, epoch, (outcome, left), &reason))
    }
}

async fn abandon_batch<T: Tx>(tx: &T, jobs: &Jobs, id: Uuid, epoch: i64, why: &str) -> Result<bool> {
    let sql = "DELETE FROM batches WHERE id = ? AND epoch <= ? RETURNING notification";
    let Some(row) = sql::first(tx, sql, &values![id, epoch]).await? else { return Ok(false) };
    let notification: Uuid = row.first()?;
    let sql = "UPDATE notifications SET outstanding = outstanding - 1, error = ? WHERE id = ?";
    tx.execute(sql, &values![format!("a batch of it cannot be read: {why}"), notification]).await?;
    end_if_done(tx, jobs, notification).await
}

async fn open_fan_out<T: Tx>(tx: &T, notification: Uuid, epoch: i64) -> Result<Option<OpenFanOut>> {
    let sql = "UPDATE notifications SET fanout_epoch = ?2 WHERE id = ?1 AND fanout_epoch <= ?2
               RETURNING site, audience, watermark, fanned_to, fanned_out, state, rate_milli, ramp_ms, expires_at,
                   (SELECT count(*) FROM batches
                    WHERE notification = notifications.id AND (ids IS NULL) = TRUE) AS ahead";
    let Some(row) = sql::first(tx, sql, &values![notification, epoch]).await? else { return Ok(None) };
    if row.get("fanned_out")? {
        return Ok(None);
    }
    Ok(Some(OpenFanOut {
        site: row.get("site")?,
        audience: audience(&row)?,
        watermark: row.get("watermark")?,
        fanned_to: row.get("fanned_to")?,
        standing: NotificationStatus::read(&row)?,
        ahead: row.get("ahead")?,
    }))
}

async fn add_batches<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    (notification, epoch): (Uuid, i64),
    from: i64,
    batches: &[(i64, NewJob)],
    last: bool,
) -> Result<AddedBatches> {
    let upto = batches.last().map_or(from, |(upto, _)| *upto);
    let sql = "UPDATE notifications SET fanned_to = ?, fanned_out = ?, outstanding = outstanding + ?
               WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out";
    if tx.execute(sql, &values![upto, last, batches.len(), notification, epoch]).await? == 0 {
        return Ok(AddedBatches::NoMore);
    }
    let mut after = from;
    for (upto, job) in batches {
        insert_batch(tx, job.id, notification, after, *upto).await?;
        jobs.insert(tx, std::slice::from_ref(job)).await?;
        after = *upto;
    }
    if !last {
        return Ok(AddedBatches::Some);
    }
    Ok(if end_if_done(tx, jobs, notification).await? { AddedBatches::Last } else { AddedBatches::NoMore })
}

async fn give_up_fan_out<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    notification: Uuid,
    epoch: i64,
    (outcome, left): (Outcome, usize),
    reason: &Option<String>,
) -> Result<bool> {
    let sql = "UPDATE notifications SET fanned_out = TRUE, error = coalesce(?, error)
               WHERE id = ? AND fanout_epoch = ? AND NOT fanned_out";
    let changed = tx.execute(sql, &values![reason, notification, epoch]).await?;
    if changed == 1 && left > 0 {
        add_outcome(tx, notification, outcome.as_str(), left).await?;
    }
    end_if_done(tx, jobs, notification).await
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
                 WHERE id = (SELECT notification FROM batches WHERE id = ?1) AND state IN ('queued', 'scheduled')";
    tx.execute(begun, &values![id, now_ms()]).await?;
    let sql = "SELECT batches.*, site, audience, payload, ttl, urgency, topic, estimate, webhook, log, http,
                      coalesce(due_at, created_at) AS since, state, rate_milli, ramp_ms, expires_at,
                      is_declarative, is_template
               FROM batches JOIN notifications ON notifications.id = notification WHERE batches.id = ?";
    sql::first(tx, sql, &values![id]).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<Batch> {
    let ids: Option<String> = row.get("ids")?;
    let part = match ids {
        Some(ids) => BatchPart::Ids(serde_json::from_str(&ids).map_err(unreadable("ids"))?),
        None => BatchPart::Range { upto: row.get("upto_id")? },
    };
    let above: String = row.get("above")?;
    Ok(Batch {
        id: row.get("id")?,
        notification: row.get("notification")?,
        part,
        attempt: row.get("attempt")?,
        since: row.get("since")?,
        standing: NotificationStatus::read(row)?,
        estimate: row.get("estimate")?,
        low_id: row.get("low_id")?,
        above: serde_json::from_str(&above).map_err(unreadable("above"))?,
        trying: row.get("trying")?,
        site: row.get("site")?,
        audience: audience(row)?,
        payload: row.get("payload")?,
        ttl: Duration::from_secs(row.get("ttl")?),
        urgency: row.get("urgency")?,
        topic: row.get("topic")?,
        http: row.get("http")?,
        is_declarative: row.get("is_declarative")?,
        is_template: row.get("is_template")?,
        logs_all: row.get::<String>("log")? == "all",
        webhook: row.get("webhook")?,
    })
}

fn audience(row: &Row) -> Result<Audience> {
    let text: String = row.get("audience")?;
    serde_json::from_str(&text).map_err(unreadable("audience"))
}

/// Makes the error for a column whose JSON cannot be read.
fn unreadable(column: &str) -> impl Fn(serde_json::Error) -> sql::Error {
    move |error| sql::Error::Unreadable {
        column: column.to_owned(),
        wanted: "JSON as this program writes it",
        found: error.to_string(),
        statement: None,
    }
}

fn members_to_sql(dialect: Dialect, batch: &Batch) -> (String, Vec<Value>) {
    let (site, low) = (batch.site, batch.low_id);
    let keys = "id, endpoint, p256dh, auth";
    let stored = format!(
        "{keys}, vapid_key, delivered_at, refused_since{}",
        if batch.is_template { ", metadata" } else { "" }
    );
    match (&batch.part, batch.audience == Audience::Inline) {
        (BatchPart::Range { upto }, true) => {
            let sql = format!(
                "SELECT {keys} FROM recipients WHERE notification = ? AND id > ? AND id <= ? ORDER BY id"
            );
            (sql, values![batch.notification, low, *upto].to_vec())
        }
        (BatchPart::Range { upto }, false) => {
            let Selection { from, condition, id, parameters } =
                batch.audience.select(dialect, site, low, *upto);
            (format!("SELECT {stored} FROM {from} WHERE {condition} ORDER BY {id}"), parameters)
        }
        // Retries are selected by id alone: they were members at their first attempt.
        (BatchPart::Ids(ids), is_inline) => {
            let ids = serde_json::to_string(ids).unwrap_or_default();
            let among = dialect.numbers_in("?");
            let (columns, table, owner): (_, _, Value) = if is_inline {
                (keys, "recipients WHERE notification", batch.notification.into())
            } else {
                (&*stored, "subscriptions WHERE site", site.into())
            };
            let sql = format!("SELECT {columns} FROM {table} = ? AND id > ? AND id IN ({among}) ORDER BY id");
            (sql, vec![owner, low.into(), ids.into()])
        }
    }
}

fn member(row: &Row, stored: bool, with_metadata: bool) -> Result<Member> {
    Ok(Member {
        id: row.get("id")?,
        endpoint: row.get("endpoint")?,
        p256dh: row.get("p256dh")?,
        auth: row.get("auth")?,
        vapid_key: if stored { Some(row.get("vapid_key")?) } else { None },
        is_proven: stored && row.get::<Option<i64>>("delivered_at")?.is_some(),
        is_refused: stored && row.get::<Option<i64>>("refused_since")?.is_some(),
        metadata: if with_metadata { row.get("metadata")? } else { None },
    })
}

/// Records refusals and clears them, deletes subscriptions that have ended or are given up, and returns the ids of the
/// deleted ones. Rows are changed in the order of their ids, as everywhere, so that two checkpoints never wait for each
/// other.
async fn judge<T: Tx>(tx: &T, site: i64, checkpoint: &Checkpoint) -> Result<Vec<i64>> {
    enum BatchChange<'a> {
        End(&'a str),
        Refuse(&'a str, &'a SubscriptionRefusal),
        Clear,
    }
    let ended = checkpoint.ended.iter().map(|(id, endpoint)| (*id, BatchChange::End(endpoint)));
    let refused = checkpoint.refused.iter();
    let refused = refused.map(|(id, endpoint, refusal)| (*id, BatchChange::Refuse(endpoint, refusal)));
    let cleared = checkpoint.cleared.iter().map(|id| (*id, BatchChange::Clear));
    let changes: BTreeMap<i64, BatchChange<'_>> = ended.chain(refused).chain(cleared).collect();
    let (mut known, mut deleted) = (KnownRow::default(), Vec::new());
    for (id, change) in changes {
        // The hash protects a row that the browser has kept by subscribing anew in the meantime.
        let gone = match change {
            BatchChange::End(endpoint) => {
                let sql = "DELETE FROM subscriptions WHERE site = ? AND id = ? AND endpoint_hash = ?";
                tx.execute(sql, &values![site, id, endpoint_hash(endpoint)]).await?
            }
            BatchChange::Refuse(endpoint, refusal) => {
                let evidence = known.of(tx, endpoint, refusal.signer).await?;
                refuse(tx, site, id, endpoint, refusal, evidence).await?
            }
            BatchChange::Clear => {
                let sql = "UPDATE subscriptions SET strikes = 0, struck_at = NULL, refused_since = NULL,
                                  refused_with = NULL WHERE site = ? AND id = ?";
                tx.execute(sql, &values![site, id]).await?;
                0
            }
        };
        if gone == 1 {
            deleted.push(id);
        }
    }
    Ok(deleted)
}

/// Records that a subscription was refused; returns the number of deleted rows, which is 1 when it is given up.
async fn refuse<T: Tx>(
    tx: &T,
    site: i64,
    id: i64,
    endpoint: &str,
    refusal: &SubscriptionRefusal,
    evidence: RefusalEvidence,
) -> Result<u64> {
    let sql = "SELECT strikes, struck_at, refused_since, refused_with FROM subscriptions
               WHERE site = ? AND id = ? AND endpoint_hash = ?";
    let Some(row) = sql::first(tx, sql, &values![site, id, endpoint_hash(endpoint)]).await? else {
        return Ok(0);
    };
    let before = RefusalRecord {
        strikes: row.get("strikes")?,
        struck_at: row.get("struck_at")?,
        refused_since: row.get("refused_since")?,
        refused_with: row.get("refused_with")?,
    };
    let (after, is_over) = refusals::refuse(before, refusal, evidence, now_ms());
    if is_over {
        let sql = "DELETE FROM subscriptions WHERE site = ? AND id = ?";
        return tx.execute(sql, &values![site, id]).await;
    }
    if after != before {
        let sql = "UPDATE subscriptions SET strikes = ?, struck_at = ?, refused_since = ?, refused_with = ?
                   WHERE site = ? AND id = ?";
        let RefusalRecord { strikes, struck_at, refused_since, refused_with } = after;
        tx.execute(sql, &values![strikes, struck_at, refused_since, refused_with, site, id]).await?;
    }
    Ok(0)
}

/// The acceptances of services that were looked up in this transaction.
#[derive(Debug, Default)]
struct KnownRow(HashMap<(String, i64), RefusalEvidence>);

impl KnownRow {
    async fn of<T: Tx>(&mut self, tx: &T, endpoint: &str, signer: i64) -> Result<RefusalEvidence> {
        let key = (origin(endpoint).to_owned(), signer);
        if let Some(evidence) = self.0.get(&key) {
            return Ok(*evidence);
        }
        let sql =
            "SELECT (SELECT accepted_at FROM push_acceptances WHERE origin = ?1 AND signer = ?2) AS same,
                          (SELECT max(accepted_at) FROM push_acceptances WHERE origin = ?1) AS service,
                          (SELECT max(accepted_at) FROM push_acceptances) AS anywhere";
        let row = sql::first(tx, sql, &values![&key.0, signer]).await?;
        let evidence = match row {
            Some(row) => RefusalEvidence {
                same: row.get("same")?,
                service: row.get("service")?,
                any: row.get("anywhere")?,
            },
            None => RefusalEvidence::default(),
        };
        self.0.insert(key, evidence);
        Ok(evidence)
    }
}

/// Records first deliveries. Other transactions may do the same: on Postgres, locked rows are skipped instead of waited
/// for, since the next delivery records the same.
async fn prove<T: Tx>(tx: &T, site: i64, proven: &[i64]) -> Result<()> {
    if proven.is_empty() {
        return Ok(());
    }
    let dialect = tx.dialect();
    let skip = match dialect {
        Dialect::Sqlite => "",
        Dialect::Postgres => "ORDER BY id FOR UPDATE SKIP LOCKED",
    };
    let ids = serde_json::to_string(proven).unwrap_or_default();
    let among = dialect.numbers_in("?3");
    let sql = format!(
        "UPDATE subscriptions SET delivered_at = ?2 WHERE id IN (
             SELECT id FROM subscriptions WHERE site = ?1 AND delivered_at IS NULL AND id IN ({among}) {skip})"
    );
    tx.execute(&sql, &values![site, now_ms(), &ids]).await?;
    let sql = format!("DELETE FROM guests WHERE subscription IN ({})", dialect.numbers_in("?"));
    tx.execute(&sql, &values![ids]).await.map(drop)
}

async fn log<T: Tx>(tx: &T, notification: Uuid, deliveries: &[Delivery]) -> Result<()> {
    if deliveries.is_empty() {
        return Ok(());
    }
    let line = |delivery: &Delivery| {
        serde_json::json!([
            delivery.subscription,
            delivery.outcome.as_str(),
            delivery.status,
            delivery.detail
        ])
    };
    let lines: Vec<_> = deliveries.iter().map(line).collect();
    let lines = serde_json::to_string(&lines).unwrap_or_default();
    let rows = match tx.dialect() {
        Dialect::Sqlite => {
            "SELECT ?1, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
                    json_extract(value, '$[3]'), ?3 FROM json_each(?2) WHERE TRUE"
        }
        Dialect::Postgres => {
            "SELECT ?1, (value->>0)::bigint, value->>1, (value->>2)::bigint, value->>3, ?3
             FROM json_array_elements(?2::json) AS value"
        }
    };
    let sql = format!(
        "INSERT INTO deliveries (notification, subscription, outcome, status, detail, at) {rows} ON CONFLICT DO NOTHING"
    );
    tx.execute(&sql, &values![notification, lines, now_ms()]).await.map(drop)
}

async fn record<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    (id, notification, site): (Uuid, Uuid, i64),
    epoch: i64,
    checkpoint: &Checkpoint,
) -> Result<Recorded> {
    let above = serde_json::to_string(&checkpoint.above).unwrap_or_default();
    // Each retry is counted once: a deferred member is counted by another batch from now on.
    let held = "UPDATE batches SET low_id = ?, above = ?, again = CASE WHEN ids IS NULL THEN 0 ELSE ? END
                WHERE id = ? AND epoch = ?";
    if tx.execute(held, &values![checkpoint.low_id, above, checkpoint.left, id, epoch]).await? == 0 {
        return Ok(Recorded::TooLate);
    }
    let deleted = judge(tx, site, checkpoint).await?;
    prove(tx, site, &checkpoint.proven).await?;
    log(tx, notification, &checkpoint.deliveries).await?;
    if let Some(webhook) = checkpoint.tell.clone().filter(|_| !deleted.is_empty()) {
        let subscriptions = deleted.into_iter().map(|id| Pruned { id }).collect();
        let event = WebhookEvent::Pruned { notification, subscriptions };
        jobs.insert(tx, &[job(&Webhook { site, webhook, event })?]).await?;
    }
    for deferred in &checkpoint.deferred {
        insert_deferred(tx, jobs, notification, deferred).await?;
    }
    if let Some(rest) = &checkpoint.rest {
        insert_rest(tx, jobs, id, notification, rest).await?;
    }
    if checkpoint.finished {
        tx.execute("DELETE FROM batches WHERE id = ?", &values![id]).await?;
        let sql = "UPDATE notifications SET outstanding = outstanding - 1 WHERE id = ?";
        tx.execute(sql, &values![notification]).await?;
    }
    // The outcomes come last, after the notification's own row, since all batches of the notification change these
    // rows.
    for (outcome, count) in &checkpoint.outcomes {
        add_outcome(tx, notification, outcome.as_str(), *count).await?;
    }
    let is_last = checkpoint.finished && end_if_done(tx, jobs, notification).await?;
    Ok(if is_last { Recorded::Last } else { Recorded::Kept })
}

async fn insert_deferred<T: Tx>(tx: &T, jobs: &Jobs, notification: Uuid, deferred: &Deferred) -> Result<()> {
    let ids = serde_json::to_string(&deferred.ids).unwrap_or_default();
    let sql =
        "INSERT INTO batches (id, notification, after_id, upto_id, ids, again, attempt, low_id, waits_for)
               VALUES (?, ?, 0, 0, ?, ?, ?, 0, ?)";
    let Deferred { ids: members, job: NewJob { id, .. }, attempt, waits_for } = deferred;
    let parameters = values![*id, notification, ids, members.len(), *attempt, waits_for];
    tx.execute(sql, &parameters).await?;
    one_more(tx, jobs, notification, &deferred.job).await
}

/// Gives batches to other jobs, except batches that were taken in the meantime.
async fn wake_batches<T: Tx>(tx: &T, jobs: &Jobs, moves: &[(Uuid, NewJob)]) -> Result<usize> {
    let mut woken = 0;
    for (batch, job) in moves {
        let sql = "UPDATE batches SET id = ?, waits_for = NULL WHERE id = ? AND epoch = 0";
        if tx.execute(sql, &values![job.id, *batch]).await? == 1 {
            jobs.insert(tx, std::slice::from_ref(job)).await?;
            woken += 1;
        }
    }
    Ok(woken)
}

/// Makes a batch of the rest of the range of the batch `of`.
async fn insert_rest<T: Tx>(
    tx: &T,
    jobs: &Jobs,
    of: Uuid,
    notification: Uuid,
    rest: &RestOfBatch,
) -> Result<()> {
    let sql = "INSERT INTO batches (id, notification, after_id, upto_id, low_id)
               SELECT ?1, notification, ?3, upto_id, ?3 FROM batches WHERE id = ?2";
    tx.execute(sql, &values![rest.job.id, of, rest.after]).await?;
    one_more(tx, jobs, notification, &rest.job).await
}

/// Counts one more batch of a notification, and enqueues its job.
async fn one_more<T: Tx>(tx: &T, jobs: &Jobs, notification: Uuid, job: &NewJob) -> Result<()> {
    let sql = "UPDATE notifications SET outstanding = outstanding + 1 WHERE id = ?";
    tx.execute(sql, &values![notification]).await?;
    jobs.insert(tx, std::slice::from_ref(job)).await
}

/// Ends a notification whose last batch has finished: its own recipients are deleted, and its webhook is told. Returns
/// true when the notification has ended with this.
pub(super) async fn end_if_done<T: Tx>(tx: &T, jobs: &Jobs, notification: Uuid) -> Result<bool> {
    let sql = "UPDATE notifications SET ended_at = ?2, state = CASE
                   WHEN state = 'cancelled' THEN 'cancelled'
                   WHEN expires_at <= ?2 AND EXISTS (SELECT 1 FROM notification_outcomes
                        WHERE notification = ?1 AND outcome = 'expired') THEN 'expired'
                   ELSE 'done' END
               WHERE id = ?1 AND fanned_out AND outstanding = 0 AND ended_at IS NULL RETURNING site, webhook";
    let Some(row) = sql::first(tx, sql, &values![notification, now_ms()]).await? else { return Ok(false) };
    tx.execute("DELETE FROM recipients WHERE notification = ?", &values![notification]).await?;
    if let Some(webhook) = row.get::<Option<String>>("webhook")? {
        let webhook =
            Webhook { site: row.get("site")?, webhook, event: WebhookEvent::Ended { notification } };
        jobs.insert(tx, &[job(&webhook)?]).await?;
    }
    Ok(true)
}
