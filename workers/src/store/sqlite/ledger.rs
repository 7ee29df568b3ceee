//! The books of the embedded store.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, named_params};
use uuid::Uuid;

use super::{SqliteQueue, give_back};
use crate::ledger::{Cancelled, Filter, JobView, Ledger, STEP};
use crate::queue::Result;
use crate::state::State;
use crate::store::{from_json, now_ms, read_json, timestamp};

/// The columns of [`JobView`] but the payload, of jobs that have not ended and of those that have.
const LIVE: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, run_at, worker, progress, trace,
    created_at, NULL AS ended_at, cancelled AS reason, errors";
const ENDED: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, NULL AS run_at, NULL AS worker,
    NULL AS progress, trace, created_at, ended_at, reason, errors";

/// What [`Filter`] asks for, of a row with the columns of a [`JobView`].
const FITS: &str = "(:id IS NULL OR id = :id) AND (:kind IS NULL OR kind = :kind)
    AND (:queue IS NULL OR queue = :queue) AND (:state IS NULL OR state = :state)
    AND (:reason IS NULL OR instr(reason, :reason) > 0)";

impl Ledger for SqliteQueue {
    async fn list(&self, filter: Filter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        let list = move |tx: &Connection| {
            let sql = format!(
                "SELECT * FROM (SELECT {LIVE} FROM jobs UNION ALL SELECT {ENDED} FROM ended_jobs)
                 WHERE {FITS} AND (:cursor IS NULL OR id > :cursor) ORDER BY id LIMIT :limit"
            );
            let parameters = named_params! {
                ":id": filter.id.as_ref().map(Uuid::as_bytes), ":kind": filter.kind, ":queue": filter.queue,
                ":state": filter.state.map(State::as_str), ":reason": filter.reason,
                ":cursor": cursor.as_ref().map(Uuid::as_bytes), ":limit": limit,
            };
            tx.prepare_cached(&sql)?.query_map(parameters, view)?.collect()
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
                    let payload: String = row.get("payload")?;
                    Ok(JobView { payload: from_json(payload), ..view(row)? })
                })
                .optional()
        };
        Ok(self.store.read(show).await?)
    }

    async fn retry(&self, filter: Filter) -> Result<usize> {
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
            for id in &found {
                queues
                    .push(revive.query_row(named_params! { ":id": id, ":now": now }, |row| {
                        row.get::<_, String>(0)
                    })?);
            }
            delete(tx, &found)?;
            Ok(queues)
        };
        let queues = self.store.write(retry).await?;
        self.wake.queues(queues.iter().map(String::as_str));
        Ok(queues.len())
    }

    async fn discard(&self, filter: Filter) -> Result<usize> {
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
        let paused = |tx: &Connection| tx.prepare_cached(sql)?.query_map([], |row| row.get(0))?.collect();
        Ok(self.store.read(paused).await?)
    }

    async fn ended(&self) -> Result<Vec<(String, u64)>> {
        let sql = "SELECT queue, count(*) FROM ended_jobs GROUP BY queue ORDER BY queue";
        let ended = |tx: &Connection| {
            tx.prepare_cached(sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        };
        Ok(self.store.read(ended).await?)
    }

    async fn prune(&self, older: Duration) -> Result<usize> {
        let prune = move |tx: &Connection| {
            let now = now_ms();
            tx.prepare_cached("DELETE FROM job_keys WHERE until <= ?")?.execute([now])?;
            let before = now.saturating_sub(i64::try_from(older.as_millis()).unwrap_or(i64::MAX));
            tx.prepare_cached(
                "DELETE FROM ended_jobs WHERE id IN (SELECT id FROM ended_jobs WHERE ended_at <= ? LIMIT ?)",
            )?
            .execute((before, STEP))
        };
        Ok(self.store.write(prune).await?)
    }
}

/// Some jobs that have ended and fit.
fn ended(tx: &Connection, filter: &Filter) -> rusqlite::Result<Vec<[u8; 16]>> {
    let sql = format!("SELECT id FROM ended_jobs WHERE {FITS} LIMIT :limit");
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

fn view(row: &Row<'_>) -> rusqlite::Result<JobView> {
    let state: String = row.get("state")?;
    let moment =
        |column: &str| -> rusqlite::Result<_> { Ok(row.get::<_, Option<i64>>(column)?.map(timestamp)) };
    Ok(JobView {
        id: Uuid::from_bytes(row.get("id")?),
        kind: row.get("kind")?,
        queue: row.get("queue")?,
        state: state.parse().unwrap_or(State::Dead),
        priority: row.get("priority")?,
        epoch: row.get("epoch")?,
        failures: row.get("failures")?,
        recoveries: row.get("recoveries")?,
        run_at: moment("run_at")?,
        worker: row.get("worker")?,
        progress: read_json(row.get("progress")?),
        trace: row.get("trace")?,
        created_at: timestamp(row.get("created_at")?),
        ended_at: moment("ended_at")?,
        reason: row.get("reason")?,
        errors: read_json(row.get("errors")?),
        payload: None,
    })
}
