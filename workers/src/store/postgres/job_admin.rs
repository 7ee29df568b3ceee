//! The job admin of Postgres.

use std::time::Duration;

use perennial_store::pool::postgres::{Parameter, Session};
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::{PostgresQueue, give_back};
use crate::encoding::{from_json, read_json};
use crate::job_admin::{Cancelled, JobAdmin, JobFilter, JobView, STEP};
use crate::queue::Result;
use crate::state::State;

/// The columns of a [`JobView`] without the payload, of jobs that have not ended.
const LIVE: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, run_at, worker, progress, trace,
    created_at, NULL::timestamptz AS ended_at, cancelled AS reason, errors";
/// The same columns of jobs that have ended.
const ENDED: &str =
    "id, kind, queue, state, priority, epoch, failures, recoveries, NULL::timestamptz AS run_at,
    NULL AS worker, NULL AS progress, trace, created_at, ended_at, reason, errors";

/// Condition for rows that match a [`JobFilter`].
const FITS: &str = "($1::uuid IS NULL OR id = $1) AND ($2::text IS NULL OR kind = $2)
    AND ($3::text IS NULL OR queue = $3) AND ($4::text IS NULL OR state = $4)
    AND ($5::text IS NULL OR strpos(reason, $5) > 0)";

const STEP_ROWS: i64 = STEP as i64;

impl JobAdmin for PostgresQueue {
    async fn list(&self, filter: JobFilter, cursor: Option<Uuid>, limit: usize) -> Result<Vec<JobView>> {
        // Each half is read by its own index, and never has more rows than the limit.
        let half = |columns: &str, table: &str, reason: &str| {
            let fits = FITS.replace("reason", reason);
            format!(
                "(SELECT {columns} FROM {table} WHERE {fits} AND ($6::uuid IS NULL OR id > $6) ORDER BY id LIMIT $7)"
            )
        };
        let (live, ended) = (half(LIVE, "jobs", "cancelled"), half(ENDED, "ended_jobs", "reason"));
        let sql = format!("{live} UNION ALL {ended} ORDER BY id LIMIT $7");
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let state = filter.state.map(State::as_str);
        let parameters: [Parameter<'_>; 7] = [
            (&filter.id, Type::UUID),
            (&filter.kind, Type::TEXT),
            (&filter.queue, Type::TEXT),
            (&state, Type::TEXT),
            (&filter.reason, Type::TEXT),
            (&cursor, Type::UUID),
            (&limit, Type::INT8),
        ];
        Ok(self.postgres.query(&sql, &parameters).await?.iter().map(view).collect())
    }

    async fn show(&self, id: Uuid) -> Result<Option<JobView>> {
        let sql = format!(
            "SELECT {LIVE}, payload::text AS payload FROM jobs WHERE id = $1
             UNION ALL SELECT {ENDED}, payload::text AS payload FROM ended_jobs WHERE id = $1"
        );
        let rows = self.postgres.query(&sql, &[(&id, Type::UUID)]).await?;
        Ok(rows.first().map(|row| JobView { payload: from_json(row.get("payload")), ..view(row) }))
    }

    async fn retry(&self, filter: JobFilter) -> Result<usize> {
        let sql = format!(
            "WITH gone AS (
                 DELETE FROM ended_jobs WHERE id = ANY (ARRAY(
                     SELECT id FROM ended_jobs WHERE {FITS} LIMIT $6 FOR UPDATE SKIP LOCKED))
                 RETURNING *
             )
             INSERT INTO jobs (id, kind, queue, priority, payload, epoch, errors, checkpoint, trace, created_at)
             SELECT id, kind, queue, priority, payload, epoch, errors, checkpoint, trace, created_at FROM gone
             ON CONFLICT (id) DO NOTHING RETURNING queue"
        );
        let rows = self.of_ended(&sql, &filter).await?;
        let queues: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        self.woken(queues.iter().copied());
        Ok(rows.len())
    }

    async fn discard(&self, filter: JobFilter) -> Result<usize> {
        let sql = format!(
            "DELETE FROM ended_jobs WHERE id = ANY (ARRAY(
                 SELECT id FROM ended_jobs WHERE {FITS} LIMIT $6 FOR UPDATE SKIP LOCKED))
             RETURNING id"
        );
        Ok(self.of_ended(&sql, &filter).await?.len())
    }

    async fn cancel(&self, id: Uuid, reason: String) -> Result<Cancelled> {
        let connection = self.postgres.get().await?;
        let parameters: [Parameter<'_>; 2] = [(&id, Type::UUID), (&reason, Type::TEXT)];
        let mark = "UPDATE jobs SET cancelled = coalesce(cancelled, $2) WHERE id = $1 AND state = 'running'";
        if connection.execute(mark, &parameters).await? == 1 {
            return Ok(Cancelled::Soon);
        }
        let sql = "
            WITH gone AS (DELETE FROM jobs WHERE id = $1 AND state <> 'running' RETURNING *),
                 ended AS (
                INSERT INTO ended_jobs (id, kind, queue, priority, state, payload, epoch, failures, recoveries, errors,
                                        checkpoint, trace, reason, created_at)
                SELECT id, kind, queue, priority, 'cancelled', payload, epoch, failures, recoveries, errors,
                       checkpoint, trace, $2, created_at FROM gone
                ON CONFLICT (id) DO UPDATE SET state = excluded.state, reason = excluded.reason, ended_at = now()
             )
             SELECT unique_key FROM gone";
        let gone = connection.query(sql, &parameters).await?;
        let Some(row) = gone.first() else {
            // The job may have been claimed between the two queries.
            let marked = connection.execute(mark, &parameters).await? == 1;
            return Ok(if marked { Cancelled::Soon } else { Cancelled::Never });
        };
        let key = row.get::<_, Option<&str>>(0).map(|key| (key, id));
        give_back(&connection, key.into_iter(), super::WHEN_ENDED).await?;
        Ok(Cancelled::Now)
    }

    async fn pause(&self, queue: String, paused: bool) -> Result<()> {
        let sql = if paused {
            "INSERT INTO paused_queues (queue) VALUES ($1) ON CONFLICT DO NOTHING"
        } else {
            "DELETE FROM paused_queues WHERE queue = $1"
        };
        self.postgres.execute(sql, &[(&queue, Type::TEXT)]).await?;
        self.woken([queue.as_str()]);
        Ok(())
    }

    async fn paused(&self) -> Result<Vec<String>> {
        let rows = self.postgres.query("SELECT queue FROM paused_queues ORDER BY queue", &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn ended(&self) -> Result<Vec<(String, u64)>> {
        let sql = "SELECT queue, count(*) FROM ended_jobs GROUP BY queue ORDER BY queue";
        let rows = self.postgres.query(sql, &[]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get::<_, i64>(1).unsigned_abs())).collect())
    }

    async fn prune(&self, older: Duration) -> Result<usize> {
        let connection = self.postgres.get().await?;
        let keys = "DELETE FROM job_keys WHERE key = ANY (ARRAY(
                        SELECT key FROM job_keys WHERE until <= now() LIMIT $1 FOR UPDATE SKIP LOCKED))";
        connection.execute(keys, &[(&STEP_ROWS, Type::INT8)]).await?;
        let sql = "DELETE FROM ended_jobs WHERE id = ANY (ARRAY(
                       SELECT id FROM ended_jobs WHERE ended_at <= now() - make_interval(secs => $1)
                       LIMIT $2 FOR UPDATE SKIP LOCKED))";
        let parameters: [Parameter<'_>; 2] =
            [(&super::seconds(older), Type::FLOAT8), (&STEP_ROWS, Type::INT8)];
        let pruned = connection.execute(sql, &parameters).await?;
        Ok(usize::try_from(pruned).unwrap_or(usize::MAX))
    }
}

impl PostgresQueue {
    /// Runs a statement on some ended jobs that match the filter.
    async fn of_ended(&self, sql: &str, filter: &JobFilter) -> Result<Vec<Row>> {
        let state = filter.state.map(State::as_str);
        let parameters: [Parameter<'_>; 6] = [
            (&filter.id, Type::UUID),
            (&filter.kind, Type::TEXT),
            (&filter.queue, Type::TEXT),
            (&state, Type::TEXT),
            (&filter.reason, Type::TEXT),
            (&STEP_ROWS, Type::INT8),
        ];
        Ok(self.postgres.query(sql, &parameters).await?)
    }
}

fn view(row: &Row) -> JobView {
    let unsigned = |column: &str| row.get::<_, i32>(column).unsigned_abs();
    JobView {
        id: row.get("id"),
        kind: row.get("kind"),
        queue: row.get("queue"),
        state: row.get::<_, &str>("state").parse().unwrap_or(State::Dead),
        priority: row.get("priority"),
        epoch: row.get("epoch"),
        failures: unsigned("failures"),
        recoveries: unsigned("recoveries"),
        run_at: row.get("run_at"),
        worker: row.get("worker"),
        progress: read_json(row.get("progress")),
        trace: row.get("trace"),
        created_at: row.get("created_at"),
        ended_at: row.get("ended_at"),
        reason: row.get("reason"),
        errors: read_json(row.get("errors")),
        payload: None,
    }
}
