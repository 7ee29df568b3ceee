//! Moves everything from the embedded store to a Postgres server, in one transaction, with the same numbers and keys.
//!
//! Tables have the same columns in both stores, so that any table is copied. Jobs are not copied: they are enqueued
//! again, in the store that the settings name for jobs, and begin anew under their old ids. Dead jobs, pauses of queues
//! and unique keys of jobs that have ended are left behind; where that store is Redis, pauses and the history of
//! schedules, too.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use jiff::Timestamp;
use perennial_store::pool::postgres::{Postgres, Session, Transaction, Type};
use perennial_workers::job::{Unique, UniqueUntil};
use perennial_workers::queue::Due;
use perennial_workers::store::JobStore;
use perennial_workers::{Jobs, NewJob};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};
use secrecy::ExposeSecret;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::access::{hex, secrets};

/// Tables that each store keeps for itself, and that are not copied.
const OWN: [&str; 8] = [
    "migrations",
    "migrations_served",
    "secrets",
    "jobs",
    "job_keys",
    "ended_jobs",
    "paused_queues",
    "outbox",
];
/// Tables that may have rows in the other store already, since every boot writes them.
const MADE_AT_BOOT: [&str; 3] = ["sites", "schedules", "schedule_runs"];
/// Tables of schedules, which are kept in the store of jobs.
const SCHEDULES: [&str; 2] = ["schedules", "schedule_runs"];
/// Number of rows that are moved at once.
const ROWS: usize = 500;

/// Result of a move.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Copied tables, each with the number of its rows.
    pub(crate) tables: Vec<(String, usize)>,
    pub(crate) jobs: usize,
    /// Schedules and queues that an operator had paused, and that are not paused in the other store.
    pub(crate) paused: Paused,
    /// Tables that do not belong to this program, and were left behind.
    pub(crate) unknown: Vec<String>,
}

/// Names of the queues and schedules that an operator had paused.
#[derive(Debug, Default)]
pub(crate) struct Paused {
    pub(crate) queues: Vec<String>,
    pub(crate) schedules: Vec<String>,
}

/// An embedded store that no process writes to.
pub(crate) struct AdoptSource(Connection);

impl AdoptSource {
    /// Opens the file of the store, for reading only.
    pub(crate) fn open(file: &Path) -> anyhow::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(file, flags);
        Ok(Self(connection.with_context(|| format!("{} cannot be opened", file.display()))?))
    }

    /// Moves everything into an empty store, and stores `keys` there, each under its name. `step` is called with the
    /// name of a table and the number of rows that were moved.
    pub(crate) async fn move_to(
        &self,
        postgres: &Postgres,
        jobs: &Jobs,
        keys: &[(String, String)],
        step: impl Fn(&str, usize),
    ) -> anyhow::Result<Moved> {
        let mut connection = postgres.get().await?;
        let transaction = connection.begin().await?;
        let mut moved = Moved::default();
        share(&transaction, keys).await?;
        let known = known_tables(&transaction).await?;
        let (tables, unknown): (Vec<_>, Vec<_>) =
            self.tables()?.into_iter().partition(|table| known.contains(table));
        moved.unknown = unknown;
        for table in tables.iter().filter(|table| !MADE_AT_BOOT.contains(&table.as_str())) {
            let sql = format!("SELECT EXISTS (SELECT 1 FROM {})", quoted(table));
            let rows = transaction.query(&sql, &[]).await.with_context(|| format!("table {table}"))?;
            ensure!(
                !rows.first().is_some_and(|row| row.get(0)),
                "wanted a store with nothing in it, before `keys generate` and the first server: {table} has rows"
            );
        }
        for table in MADE_AT_BOOT.iter().rev() {
            transaction.execute(&format!("DELETE FROM {table}"), &[]).await?;
        }
        // Where jobs are in Redis, schedules are there, too: each begins anew.
        let is_elsewhere = matches!(jobs.store(), JobStore::Redis(_));
        let is_of_schedules = |table: &String| SCHEDULES.contains(&table.as_str());
        for table in tables.into_iter().filter(|table| !(is_elsewhere && is_of_schedules(table))) {
            let rows =
                self.copy(&transaction, &table, &step).await.with_context(|| format!("table {table}"))?;
            moved.tables.push((table, rows));
        }
        // Epochs are counted by the store of jobs, and the other store begins anew.
        for sql in ["UPDATE batches SET epoch = 0", "UPDATE notifications SET fanout_epoch = 0"] {
            if moved.tables.iter().any(|(table, _)| sql.contains(&format!(" {table} "))) {
                transaction.execute(sql, &[]).await?;
            }
        }
        let waiting = self.jobs()?;
        for some in waiting.chunks(ROWS) {
            jobs.insert(&transaction, some).await?;
            step("jobs", some.len());
        }
        moved.jobs = waiting.len();
        moved.paused.queues = self.texts("SELECT queue FROM paused_queues ORDER BY queue", [])?;
        if is_elsewhere {
            moved.paused.schedules =
                self.texts("SELECT name FROM schedules WHERE held = 1 ORDER BY name", [])?;
        }
        transaction.commit().await?;
        Ok(moved)
    }

    /// Number of rows to move, jobs included.
    pub(crate) fn rows(&self) -> anyhow::Result<u64> {
        let count = |table: &str| {
            let sql = format!("SELECT count(*) FROM {}", quoted(table));
            self.0.query_row(&sql, [], |row| row.get::<_, u64>(0))
        };
        let tables = self.tables()?;
        Ok(tables.iter().map(String::as_str).chain(["jobs"]).map(count).sum::<Result<u64, _>>()?)
    }

    /// Names of the tables to copy, each after the tables that it refers to.
    fn tables(&self) -> anyhow::Result<Vec<String>> {
        let sql =
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name";
        let mut left = self.texts(sql, [])?;
        left.retain(|table| !OWN.contains(&table.as_str()));
        let mut ordered = Vec::new();
        while !left.is_empty() {
            let refers = |table: &String| -> anyhow::Result<bool> {
                let others = self.texts("SELECT \"table\" FROM pragma_foreign_key_list(?)", [table])?;
                Ok(others.iter().any(|other| other != table && left.contains(other)))
            };
            let mut next = None;
            for table in &left {
                if !refers(table)? {
                    next = Some(table.clone());
                    break;
                }
            }
            let next = next.context("tables refer to each other in a circle")?;
            left.retain(|table| *table != next);
            ordered.push(next);
        }
        Ok(ordered)
    }

    fn texts(&self, sql: &str, parameters: impl rusqlite::Params) -> anyhow::Result<Vec<String>> {
        let mut statement = self.0.prepare(sql)?;
        let texts = statement.query_map(parameters, text)?;
        Ok(texts.collect::<Result<_, _>>()?)
    }

    async fn copy(
        &self,
        transaction: &Transaction<'_>,
        table: &str,
        step: &impl Fn(&str, usize),
    ) -> anyhow::Result<usize> {
        let columns = columns(transaction, table).await?;
        ensure!(!columns.is_empty(), "the other store has no such table: does its module not know Postgres?");
        let here = self.texts("SELECT name FROM pragma_table_info(?) ORDER BY name", [table])?;
        let there: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        ensure!(here == there, "its columns differ: {here:?} here, {there:?} there");

        let names: Vec<String> = columns.iter().map(|column| quoted(&column.name)).collect();
        let names = names.join(", ");
        let name = table;
        let table = quoted(table);
        let insert = format!(
            "INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, $1::text::json)"
        );
        let mut statement = self.0.prepare(&format!("SELECT {names} FROM {table}"))?;
        let mut rows = statement.query([])?;
        let (mut batch, mut count) = (Vec::with_capacity(ROWS), 0);
        loop {
            let row = rows.next()?;
            let is_last = row.is_none();
            if let Some(row) = row {
                batch.push(object(row, &columns)?);
            }
            if batch.len() == ROWS || (is_last && !batch.is_empty()) {
                let text = serde_json::to_string(&batch)?;
                transaction.execute(&insert, &[(&text, Type::TEXT)]).await?;
                step(name, batch.len());
                count += batch.len();
                batch.clear();
            }
            if is_last {
                break;
            }
        }
        for column in columns.iter().filter(|column| column.counts) {
            self.go_on_counting(transaction, name, &column.name).await?;
        }
        Ok(count)
    }

    /// Sets the sequence of a column, so that its next number was never given to a row, not even to a deleted one.
    async fn go_on_counting(
        &self,
        transaction: &Transaction<'_>,
        table: &str,
        column: &str,
    ) -> anyhow::Result<()> {
        let highest: i64 = self.0.query_row(
            &format!("SELECT coalesce(max({}), 0) FROM {}", quoted(column), quoted(table)),
            [],
            |row| row.get(0),
        )?;
        let given =
            self.0.query_row("SELECT seq FROM sqlite_sequence WHERE name = ?", [table], |row| row.get(0));
        let highest = highest.max(given.unwrap_or(0));
        if highest > 0 {
            let sql = "SELECT setval(pg_get_serial_sequence(quote_ident($2), $3), $1)";
            let parameters =
                [(&highest as _, Type::INT8), (&table as _, Type::TEXT), (&column as _, Type::TEXT)];
            transaction.query(sql, &parameters).await?;
        }
        Ok(())
    }

    /// Reads the jobs that have not ended. Jobs that were running when the server was killed are due again.
    fn jobs(&self) -> anyhow::Result<Vec<NewJob>> {
        let sql = "SELECT id, kind, queue, priority, payload, state, run_at, recoveries, trace, key, scope, until
                   FROM jobs LEFT JOIN job_keys ON job_keys.job = jobs.id WHERE cancelled IS NULL ORDER BY id";
        let mut statement = self.0.prepare(sql)?;
        let jobs = statement.query_map([], job)?;
        Ok(jobs.collect::<Result<_, _>>()?)
    }
}

/// Quotes a name for both stores, whatever characters it has.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Reads the first column as text, in which invalid UTF-8 is replaced.
fn text(row: &Row<'_>) -> rusqlite::Result<String> {
    Ok(row.get_ref(0)?.as_bytes_or_null()?.map(String::from_utf8_lossy).unwrap_or_default().into_owned())
}

/// Names of the tables that this program has made in the other store. Other tables of the file are not moved.
async fn known_tables(transaction: &Transaction<'_>) -> anyhow::Result<Vec<String>> {
    let sql = "SELECT table_name::text FROM information_schema.tables
               WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'";
    Ok(transaction.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Stores the VAPID keys in the table of secrets, where all processes that use the store find them.
async fn share(transaction: &Transaction<'_>, keys: &[(String, String)]) -> anyhow::Result<()> {
    for (name, pem) in keys {
        let kept = secrets::share_in(transaction, name, pem).await?;
        let is_it = kept.expose_secret().trim_end() == pem.trim_end();
        ensure!(
            is_it,
            "the store has another {name}, and subscriptions were made with the one beside the embedded store"
        );
    }
    Ok(())
}

/// A column of the other store.
struct Column {
    name: String,
    kind: String,
    /// Whether the column numbers rows by itself.
    counts: bool,
}

async fn columns(transaction: &Transaction<'_>, table: &str) -> anyhow::Result<Vec<Column>> {
    let sql = "SELECT column_name::text, data_type::text, is_identity = 'YES' FROM information_schema.columns
               WHERE table_schema = current_schema() AND table_name = $1 ORDER BY column_name";
    let rows = transaction.query(sql, &[(&table, Type::TEXT)]).await?;
    Ok(rows.iter().map(|row| Column { name: row.get(0), kind: row.get(1), counts: row.get(2) }).collect())
}

/// Converts a row into the JSON that Postgres reads.
fn object(row: &Row<'_>, columns: &[Column]) -> anyhow::Result<Value> {
    let mut object = Map::with_capacity(columns.len());
    for (index, Column { name, kind, .. }) in columns.iter().enumerate() {
        let value = match (row.get_ref(index)?, kind.as_str()) {
            (ValueRef::Null, _) => Value::Null,
            (ValueRef::Integer(number), "boolean") => Value::Bool(number != 0),
            (ValueRef::Integer(number), _) => number.into(),
            (ValueRef::Real(number), _) => number.into(),
            // A time without a zone is in UTC.
            (ValueRef::Text(text), kind) if kind.starts_with("timestamp") => {
                format!("{}Z", std::str::from_utf8(text)?).into()
            }
            // Text in a column of bytes is written as bytes, too.
            (ValueRef::Text(bytes) | ValueRef::Blob(bytes), "bytea") => format!("\\x{}", hex(bytes)).into(),
            (ValueRef::Text(text), _) => std::str::from_utf8(text)?.into(),
            (ValueRef::Blob(_), kind) => bail!("{name} has bytes, and wants {kind}"),
        };
        object.insert(name.clone(), value);
    }
    Ok(object.into())
}

fn job(row: &Row<'_>) -> rusqlite::Result<NewJob> {
    let id: [u8; 16] = row.get("id")?;
    let at = |ms: i64| Timestamp::from_millisecond(ms).unwrap_or_default();
    let due = match row.get::<_, String>("state")?.as_str() {
        "scheduled" => Due::At(at(row.get("run_at")?)),
        _ => Due::Now,
    };
    let unique = match (row.get::<_, Option<String>>("key")?, row.get::<_, Option<String>>("scope")?) {
        (Some(key), Some(scope)) => Some(Unique {
            key,
            until: match scope.as_str() {
                "started" => UniqueUntil::Started,
                "window" => {
                    let left = at(row.get::<_, Option<i64>>("until")?.unwrap_or_default())
                        .duration_since(Timestamp::now());
                    UniqueUntil::Window(left.try_into().unwrap_or_default())
                }
                _ => UniqueUntil::Ended,
            },
        }),
        _ => None,
    };
    Ok(NewJob {
        id: Uuid::from_bytes(id),
        kind: row.get::<_, String>("kind")?.into(),
        queue: row.get::<_, String>("queue")?.into(),
        priority: row.get("priority")?,
        payload: row.get("payload")?,
        due,
        unique,
        trace: row.get("trace")?,
        recoveries: row.get("recoveries")?,
    })
}
