//! Schedules in SQLite and Postgres, beside the jobs, by statements that are the same on both.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use perennial_store::pool::sql::{self, Dialect, Row, Tx};
use perennial_store::{transact, values};
use uuid::Uuid;

use super::{JobStore, insert_jobs, stands_for};
use crate::cron::{Ending, Run, RunCause, Schedule, ScheduleClaim, ScheduleState, ScheduleStates, TakeOver};
use crate::encoding::{json, millis, read_json, timestamp};
use crate::queue::Result;
use crate::schedules::{FORGOTTEN, KEPT_RUNS, KEPT_UNFINISHED};

/// The schedules of a store, for one call.
pub(super) struct SqlSchedules<'a> {
    jobs: &'a JobStore,
    sql: sql::Store,
}

/// One schedule as it is stored.
struct Definition {
    name: String,
    json: String,
    timing: String,
    paused: bool,
}

impl<'a> SqlSchedules<'a> {
    pub(super) fn new(jobs: &'a JobStore, sql: sql::Store) -> Self {
        Self { jobs, sql }
    }

    pub(super) async fn sync(&self, schedules: Vec<Arc<Schedule>>, take_over: TakeOver) -> Result<()> {
        let definitions = schedules.iter().map(|schedule| Definition {
            name: schedule.name.clone(),
            json: schedule.definition(),
            timing: schedule.expression.to_string(),
            paused: schedule.paused,
        });
        let mut definitions: Vec<Definition> = definitions.collect();
        // The order lets two processes that sync at once never deadlock.
        definitions.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(transact!(&self.sql, tx => define(tx, &definitions, take_over))?)
    }

    pub(super) async fn due(&self) -> Result<ScheduleStates> {
        let now = now_ms(self.sql.dialect());
        let sql = format!("SELECT schedules.*, {now} AS now_ms FROM schedules ORDER BY name");
        let rows = self.sql.query(sql, values![]).await?;
        let now = rows.first().map(|row| row.get("now_ms")).transpose()?;
        let all: Vec<ScheduleState> = sql::each(&rows, "schedules", "name", standing);
        let mut unreadable = Vec::new();
        if all.len() < rows.len() {
            unreadable = rows.iter().map(|row| row.name("name")).collect();
            unreadable.retain(|name| !all.iter().any(|standing| standing.name == *name));
        }
        Ok(ScheduleStates { now: now.map_or_else(Timestamp::now, timestamp), all, unreadable })
    }

    pub(super) async fn fire(&self, claim: ScheduleClaim) -> Result<bool> {
        let queues: BTreeSet<String> = claim.jobs.iter().map(|job| job.queue.to_string()).collect();
        let fired = transact!(&self.sql, tx => fire(tx, &claim))?;
        if fired && !queues.is_empty() {
            self.jobs.committed(&queues.iter().map(String::as_str).collect());
        }
        Ok(fired)
    }

    pub(super) async fn set(&self, schedule: String, paused: bool) -> Result<bool> {
        let now = now_ms(self.sql.dialect());
        let sql = format!(
            "UPDATE schedules SET held = CASE WHEN ?1 = paused THEN NULL ELSE ?1 END, version = version + 1,
                    last_fire = CASE WHEN coalesce(held, paused) AND NOT ?1 THEN {now} ELSE last_fire END
             WHERE name = ?2"
        );
        Ok(self.sql.execute(sql, values![paused, schedule]).await? == 1)
    }

    pub(super) async fn unfinished(&self, schedule: &str, _queue: &str) -> Result<Vec<Uuid>> {
        let is_there = match self.sql.dialect() {
            Dialect::Sqlite => "jobs.id = schedule_runs.id",
            // Statements for both stores write UUIDs as bytes; the table of jobs has the type uuid.
            Dialect::Postgres => {
                "jobs.id = CASE WHEN octet_length(schedule_runs.id) = 16
                                THEN encode(schedule_runs.id, 'hex')::uuid END"
            }
        };
        let sql = format!(
            "SELECT id FROM schedule_runs
             WHERE schedule = ? AND has_job AND EXISTS (SELECT 1 FROM jobs WHERE {is_there}) ORDER BY claimed_at"
        );
        let rows = self.sql.query(sql, values![schedule]).await?;
        Ok(sql::each(&rows, "schedule_runs", "id", Row::first))
    }

    pub(super) async fn runs(&self, schedule: &str, limit: usize) -> Result<Vec<Run>> {
        let sql = "SELECT * FROM schedule_runs WHERE schedule = ? ORDER BY claimed_at DESC, occurrence DESC LIMIT ?";
        let rows = self.sql.query(sql, values![schedule, limit]).await?;
        Ok(sql::each(&rows, "schedule_runs", "id", run))
    }

    pub(super) async fn record_endings(&self, endings: Vec<(String, Uuid, Ending)>) -> Result<()> {
        Ok(transact!(&self.sql, tx => end(tx, &endings))?)
    }
}

async fn define<T: Tx>(tx: &T, definitions: &[Definition], take_over: TakeOver) -> sql::Result<()> {
    let now = now_ms(tx.dialect());
    let sql = format!(
        "INSERT INTO schedules AS known (name, definition, timing, last_fire, paused, version, seen_at)
         VALUES (?1, ?2, ?3, {now}, ?4, 0, {now})
         ON CONFLICT (name) DO UPDATE
         SET definition = excluded.definition, timing = excluded.timing, paused = excluded.paused,
             seen_at = excluded.seen_at,
             version = CASE WHEN known.definition = excluded.definition THEN known.version ELSE known.version + 1 END,
             queued = CASE WHEN known.timing = excluded.timing THEN known.queued END,
             last_fire = CASE WHEN known.timing <> excluded.timing
                                OR (coalesce(known.held, known.paused) AND NOT coalesce(known.held, excluded.paused))
                              THEN excluded.last_fire ELSE known.last_fire END
         WHERE known.definition = excluded.definition OR known.seen_at <= excluded.seen_at - ?5"
    );
    let stands_for = stands_for(take_over);
    for Definition { name, json, timing, paused } in definitions {
        tx.execute(&sql, &values![name, json, timing, *paused, stands_for]).await?;
    }
    if take_over == TakeOver::Always {
        let sql = format!("DELETE FROM schedules WHERE seen_at < {now} - ?");
        if tx.execute(&sql, &values![millis(FORGOTTEN)]).await? > 0 {
            let sql = "DELETE FROM schedule_runs WHERE schedule NOT IN (SELECT name FROM schedules)";
            tx.execute(sql, &values![]).await?;
        }
    }
    Ok(())
}

async fn fire<T: Tx>(tx: &T, claim: &ScheduleClaim) -> sql::Result<bool> {
    let sql = "UPDATE schedules SET last_fire = ?, queued = ?, version = version + 1 WHERE name = ? AND version = ?";
    let queued = claim.queued.map(Timestamp::as_millisecond);
    let last_fire = claim.last_fire.as_millisecond();
    if tx.execute(sql, &values![last_fire, queued, &claim.schedule, claim.version]).await? == 0 {
        return Ok(false);
    }
    insert_jobs(tx, &claim.jobs).await?;
    // An occurrence that was claimed before the clock was set back may come again.
    let sql = "
        INSERT INTO schedule_runs (id, schedule, has_job, occurrence, claimed_at, cause, passed, ending)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET claimed_at = excluded.claimed_at, cause = excluded.cause,
                                       passed = excluded.passed, ending = excluded.ending";
    for run in &claim.runs {
        let (occurrence, claimed_at) = (run.occurrence.as_millisecond(), run.claimed_at.as_millisecond());
        let parameters = values![
            run.id,
            &claim.schedule,
            run.has_job,
            occurrence,
            claimed_at,
            json(&run.cause),
            run.passed,
            run.ending.as_ref().map(json),
        ];
        tx.execute(sql, &parameters).await?;
    }
    if !claim.runs.is_empty() {
        // Runs that have not ended are kept for longer, since overlaps are found by them.
        let sql = "
            DELETE FROM schedule_runs WHERE schedule = ?1 AND (
                claimed_at < (SELECT claimed_at FROM schedule_runs WHERE schedule = ?1
                              ORDER BY claimed_at DESC LIMIT 1 OFFSET ?3)
                OR (ending IS NOT NULL
                    AND claimed_at < (SELECT claimed_at FROM schedule_runs WHERE schedule = ?1
                                      ORDER BY claimed_at DESC LIMIT 1 OFFSET ?2)))";
        tx.execute(sql, &values![&claim.schedule, KEPT_RUNS - 1, KEPT_UNFINISHED - 1]).await?;
    }
    Ok(true)
}

async fn end<T: Tx>(tx: &T, endings: &[(String, Uuid, Ending)]) -> sql::Result<()> {
    for (_, job, ending) in endings {
        let sql = "UPDATE schedule_runs SET ending = ? WHERE id = ?";
        tx.execute(sql, &values![json(ending), *job]).await?;
    }
    Ok(())
}

/// Returns SQL for the time of the store's clock, in milliseconds since 1970.
fn now_ms(dialect: Dialect) -> String {
    format!("{} / 1000", dialect.now_us())
}

fn standing(row: &Row) -> sql::Result<ScheduleState> {
    Ok(ScheduleState {
        name: row.get("name")?,
        definition: row.get("definition")?,
        timing: row.get("timing")?,
        last_fire: timestamp(row.get("last_fire")?),
        queued: row.get::<Option<i64>>("queued")?.map(timestamp),
        paused: row.get("paused")?,
        held: row.get("held")?,
        version: row.get("version")?,
        seen_at: timestamp(row.get("seen_at")?),
    })
}

fn run(row: &Row) -> sql::Result<Run> {
    let cause: Option<RunCause> = read_json(row.get("cause")?);
    Ok(Run {
        id: row.get("id")?,
        has_job: row.get("has_job")?,
        occurrence: timestamp(row.get("occurrence")?),
        claimed_at: timestamp(row.get("claimed_at")?),
        cause: cause.unwrap_or(RunCause::Due),
        passed: row.get("passed")?,
        ending: read_json(row.get("ending")?),
    })
}
