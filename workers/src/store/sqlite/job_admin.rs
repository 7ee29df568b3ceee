//! The job admin of the embedded store.

use std::time::Duration;

use perennial_store::pool::set_apart;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, named_params};
use uuid::Uuid;

use super::{SqliteQueue, give_back, lossy};
use crate::encoding::{from_json, millis, now_ms, read_json, timestamp};
use crate::job_admin::{Cancelled, JobAdmin, JobFilter, JobView, STEP};
use crate::queue::Result;
use crate::state::State;

/// The columns of a [`JobView`] without the payload, of jobs that have not ended.
const LIVE: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, run_at, worker, progress, trace,
    created_at, NULL AS ended_at, cancelled AS reason, errors";
/// The same columns of jobs that have ended.
const ENDED: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, NULL AS run_at, NULL AS worker,
    NULL AS progress, trace, created_at, ended_at, reason, errors";

/// Condition for rows with the columns of a [`JobView`] that match a [`JobFilter`].
const FITS: &str = "(:id IS NULL OR id = :id) AND (:kind IS NULL OR kind = :kind)
    AND (:queue IS NULL OR queue = :queue) AND (:state IS NULL OR state = :state)
    AND (:reason IS NULL OR instr(reason, :reason) > 0)";

impl JobAdmin for SqliteQueue {
    async fn list(&self, filter: JobFilter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        let list = move |tx: &Connection| {
            let sql = format!(
                "SELECT * FROM (SELECT {LIVE} FROM jobs UNION ALL SELECT {ENDED} FROM ended_jobs)
                 WHERE {FITS} AND typeof(id) = 'blob' AND length(id) = 16 AND (:cursor IS NULL OR id > :cursor) ORDER BY id LIMIT :limit"
            );
            let parameters = named_params! {
                ":id": filter.id.as_ref().map(Uuid::as_bytes), ":kind": filter.kind, ":queue": filter.queue,
                ":state": filter.state.map(State::as_str), ":reason": filter.reason,
                ":cursor": cursor.as_ref().map(Uuid::as_bytes), ":limit": limit,
            };
            let mut statement = tx.prepare_cached(&sql)?;
            let mut rows = statement.query(parameters)?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                match view(row) {
                    Ok(job) => found.push(job),
                    Err(error) => {
                        let id = row.get("id").map(Uuid::from_bytes).unwrap_or_default();
                        set_apart("jobs", &id.to_string(), &error);
                    }
                }
            }
            Ok(found)
        };
        Ok(self.store.read(list).await?)
    }

    async fn show(&self, id: Uuid) -> Result<Option<JobView>> {
        let show = move |tx: &Connection| {
            let sql = format!(
                "SELECT {LIVE}, payload FROM jobs WHERE id = ?1
                 UNION ALL SELECT {ENDED}, payload FROM ended_jobs WHERE id = ?1"
            );
            tx.prepare_cached(&sql)?
                .query_row([id.as_bytes()], |row| {
                    let payload = lossy(row, "payload")?.unwrap_or_default();
                    Ok(JobView { payload: from_json(payload), ..view(row)? })
                })
                .optional()
        };
        Ok(self.store.read(show).await?)
    }

    async fn retry(&self, filter: JobFilter) -> Result<usize> {
        let retry = move |tx: &Connection| {
            let found = ended(tx, &filter)?;
            let now = now_ms();
            let mut revive = tx.prepare_cached(
                "INSERT INTO jobs (id, kind, queue, priority, payload, run_at, epoch, errors, checkpoint, trace,
                                   created_at)
                 SELECT id, kind, queue, priority, payload, :now, epoch, errors, checkpoint, trace, created_at
                 FROM ended_jobs WHERE id = :id ON CONFLICT (id) DO UPDATE SET id = id RETURNING queue",
            )?;
            let mut queues = Vec::with_capacity(found.len());
            let mut revived = Vec::with_capacity(found.len());
            for id in found {
                let queue =
                    revive.query_row(named_params! { ":id": id, ":now": now }, |row| lossy(row, "queue"));
                match queue {
                    Ok(queue) => {
                        revived.push(id);
                        queues.push(queue.unwrap_or_default());
                    }
                    // A job that breaks a constraint of live jobs stays dead, and does not block the others.
                    Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                        set_apart("ended_jobs", &Uuid::from_bytes(id).to_string(), &error);
                    }
                    Err(error) => return Err(error),
                }
            }
            delete(tx, &revived)?;
            Ok(queues)
        };
        let queues = self.store.write(retry).await?;
        self.wake.queues(queues.iter().map(String::as_str));
        Ok(queues.len())
    }

    async fn discard(&self, filter: JobFilter) -> Result<usize> {
        let discard = move |tx: &Connection| {
            let found = ended(tx, &filter)?;
            delete(tx, &found)
        };
        Ok(self.store.write(discard).await?)
    }

    async fn cancel(&self, id: Uuid, reason: String) -> Result<Cancelled> {
        let cancel = move |tx: &Connection| {
            let mark =
                "UPDATE jobs SET cancelled = coalesce(cancelled, ?2) WHERE id = ?1 AND state = 'running'";
            if tx.prepare_cached(mark)?.execute((id.as_bytes(), &reason))? == 1 {
                return Ok(Cancelled::Soon);
            }
            let moved = tx
                .prepare_cached(
                    "INSERT OR REPLACE INTO ended_jobs (id, kind, queue, priority, state, payload, epoch, failures, recoveries,
                                             errors, checkpoint, trace, reason, created_at, ended_at)
                     SELECT id, kind, queue, priority, 'cancelled', payload, epoch, failures, recoveries,
                            errors, checkpoint, trace, ?2, created_at, ?3
                     FROM jobs WHERE id = ?1",
                )?
                .execute((id.as_bytes(), &reason, now_ms()))?;
            if moved == 0 {
                return Ok(Cancelled::Never);
            }
            let delete = "DELETE FROM jobs WHERE id = ? RETURNING unique_key";
            let key: Option<String> =
                tx.prepare_cached(delete)?.query_row([id.as_bytes()], |row| row.get(0))?;
            if let Some(key) = key {
                give_back(tx, &key, id)?;
            }
            Ok(Cancelled::Now)
        };
        Ok(self.store.write(cancel).await?)
    }

    async fn pause(&self, queue: String, paused: bool) -> Result<()> {
        let woken = queue.clone();
        let pause = move |tx: &Connection| {
            let sql = if paused {
                "INSERT INTO paused_queues (queue) VALUES (?) ON CONFLICT DO NOTHING"
            } else {
                "DELETE FROM paused_queues WHERE queue = ?"
            };
            tx.execute(sql, [queue]).map(drop)
        };
        self.store.write(pause).await?;
        self.wake.queues([woken.as_str()]);
        Ok(())
    }

    async fn paused(&self) -> Result<Vec<String>> {
        let sql = "SELECT queue FROM paused_queues ORDER BY queue";
        let paused = |tx: &Connection| {
            let queue = |row: &Row<'_>| Ok(lossy(row, "queue")?.unwrap_or_default());
            tx.prepare_cached(sql)?.query_map([], queue)?.collect()
        };
        Ok(self.store.read(paused).await?)
    }

    async fn ended(&self) -> Result<Vec<(String, u64)>> {
        let sql = "SELECT queue, count(*) FROM ended_jobs GROUP BY queue ORDER BY queue";
        let ended = |tx: &Connection| {
            let count = |row: &Row<'_>| Ok((lossy(row, "queue")?.unwrap_or_default(), row.get(1)?));
            tx.prepare_cached(sql)?.query_map([], count)?.collect()
        };
        let stamp = self.store.stamp();
        match self.ended.get(stamp) {
            Some(ended) => Ok(ended),
            None => Ok(self.ended.set(stamp, self.store.read(ended).await?)),
        }
    }

    async fn prune(&self, older: Duration) -> Result<usize> {
        let prune = move |tx: &Connection| {
            let now = now_ms();
            tx.prepare_cached("DELETE FROM job_keys WHERE until <= ?")?.execute([now])?;
            let before = now.saturating_sub(millis(older));
            tx.prepare_cached(
                "DELETE FROM ended_jobs WHERE id IN (SELECT id FROM ended_jobs WHERE ended_at <= ? LIMIT ?)",
            )?
            .execute((before, STEP))
        };
        Ok(self.store.write(prune).await?)
    }
}

/// Returns some ended jobs that match the filter.
fn ended(tx: &Connection, filter: &JobFilter) -> rusqlite::Result<Vec<[u8; 16]>> {
    let sql = format!(
        "SELECT id FROM ended_jobs WHERE {FITS} AND typeof(id) = 'blob' AND length(id) = 16 LIMIT :limit"
    );
    let parameters = named_params! {
        ":id": filter.id.as_ref().map(Uuid::as_bytes), ":kind": filter.kind, ":queue": filter.queue,
        ":state": filter.state.map(State::as_str), ":reason": filter.reason, ":limit": STEP,
    };
    tx.prepare_cached(&sql)?.query_map(parameters, |row| row.get(0))?.collect()
}

fn delete(tx: &Connection, ids: &[[u8; 16]]) -> rusqlite::Result<usize> {
    let mut delete = tx.prepare_cached("DELETE FROM ended_jobs WHERE id = ?")?;
    for id in ids {
        delete.execute([id])?;
    }
    Ok(ids.len())
}

/// Reads a row as a [`JobView`]. Texts that are no UTF-8 are shown, too.
fn view(row: &Row<'_>) -> rusqlite::Result<JobView> {
    let text = |column: &str| -> rusqlite::Result<_> { Ok(lossy(row, column)?.unwrap_or_default()) };
    let moment =
        |column: &str| -> rusqlite::Result<_> { Ok(row.get::<_, Option<i64>>(column)?.map(timestamp)) };
    Ok(JobView {
        id: Uuid::from_bytes(row.get("id")?),
        kind: text("kind")?,
        queue: text("queue")?,
        state: text("state")?.parse().unwrap_or(State::Dead),
        priority: row.get("priority")?,
        epoch: row.get("epoch")?,
        failures: row.get("failures")?,
        recoveries: row.get("recoveries")?,
        run_at: moment("run_at")?,
        worker: lossy(row, "worker")?,
        progress: read_json(lossy(row, "progress")?),
        trace: lossy(row, "trace")?,
        created_at: timestamp(row.get("created_at")?),
        ended_at: moment("ended_at")?,
        reason: lossy(row, "reason")?,
        errors: read_json(lossy(row, "errors")?),
        payload: None,
    })
}
