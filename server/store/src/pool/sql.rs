//! One API for both SQL stores, for code whose statements are the same on both.
//!
//! Statements have the placeholders `?` or `?1` (see `sql/placeholders.rs`). [`Dialect`] has the few expressions that
//! differ; code that needs more of one store uses [`sqlite`] or [`postgres`] itself.
//!
//! A transaction is an `async fn` over [`Tx`], run by [`transact!`](crate::transact): on Postgres it waits for the
//! server between two statements; on SQLite it runs to its end in the writer's thread, in a savepoint of the next
//! commit.

mod error;
mod placeholders;
mod row;
mod stream;
mod transaction;
mod value;

use std::borrow::Cow;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::params_from_iter;
use rusqlite::types::ValueRef;
use serde_json::Value as Json;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::migrations::Migrations;
use super::postgres::{self, Parameter, Postgres, PostgresTransaction, Session, Transaction};
use super::sqlite::{self, Sqlite};
use super::status::PoolStatus;
use row::Columns;

pub use error::{Error, Statement};
#[doc(hidden)]
pub use error::{ROLLBACKS, after_rollback};
pub use perennial_store_derive::FromRow;
pub use row::{FromRow, FromValue, Row, each};
#[doc(hidden)]
pub use rusqlite::Connection;
pub use rust_decimal::Decimal;
pub use stream::RowStream;
pub use transaction::{SqliteSession, StoreTransaction};
pub use value::{ArrayElement, AsJson, Bind, Element, Value};

/// The result of a statement.
pub type Result<T> = std::result::Result<T, Error>;

/// One of the two SQL stores. A cheap handle.
#[derive(Clone, Debug)]
pub enum Store {
    /// A local file.
    Sqlite(Sqlite),
    /// A server, shared with other processes.
    Postgres(Postgres),
}

/// The migration steps of one module, for both stores.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    /// Name of the module.
    pub module: &'static str,
    /// Steps for SQLite, the oldest first. A released step is never changed.
    pub sqlite: &'static [&'static str],
    /// Steps for Postgres, by the same rules.
    pub postgres: &'static [&'static str],
}

/// The SQL dialect of a store, for expressions that differ between the stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// SQLite.
    Sqlite,
    /// Postgres.
    Postgres,
}

impl Dialect {
    /// The store's clock, in microseconds since 1970.
    pub fn now_us(self) -> &'static str {
        match self {
            Self::Sqlite => "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
            Self::Postgres => "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
        }
    }

    /// The numbers in a JSON list, as a subquery.
    pub fn numbers_in(self, list: &str) -> String {
        match self {
            Self::Sqlite => format!("SELECT value FROM json_each({list})"),
            Self::Postgres => format!("SELECT json_array_elements_text({list}::json)::bigint"),
        }
    }

    /// The texts in a JSON list, as a subquery.
    pub fn texts_in(self, list: &str) -> String {
        match self {
            Self::Sqlite => format!("SELECT value FROM json_each({list})"),
            Self::Postgres => format!("SELECT json_array_elements_text({list}::json)"),
        }
    }

    /// A condition that the bytes of a column are in a JSON list of hexadecimal texts. It can use an index on the
    /// column.
    pub fn is_among(self, column: &str, list: &str) -> String {
        match self {
            Self::Sqlite => format!("{column} IN (SELECT unhex(value) FROM json_each({list}))"),
            Self::Postgres => {
                format!(
                    "{column} = ANY (ARRAY(SELECT decode(json_array_elements_text({list}::json), 'hex')))"
                )
            }
        }
    }

    /// A sorted JSON list of a column's values in a group.
    pub fn list_of(self, column: &str) -> String {
        match self {
            Self::Sqlite => format!("json_group_array({column} ORDER BY {column})"),
            Self::Postgres => format!("coalesce(json_agg({column} ORDER BY {column}), '[]')::text"),
        }
    }

    /// A JSON object of two columns' values in a group.
    pub fn object_of(self, name: &str, value: &str) -> String {
        match self {
            Self::Sqlite => format!("json_group_object({name}, {value})"),
            Self::Postgres => format!("coalesce(json_object_agg({name}, {value}), '{{}}')::text"),
        }
    }

    /// The statement with placeholders in the notation of the store.
    fn statement(self, sql: &str) -> Cow<'_, str> {
        let (others, own) = match self {
            Self::Sqlite => ('$', '?'),
            Self::Postgres => ('?', '$'),
        };
        if !sql.contains(others) {
            return Cow::Borrowed(sql);
        }
        Cow::Owned(placeholders::numbered(sql, own))
    }
}

/// A transaction on either store.
pub trait Tx {
    /// The SQL dialect of the store.
    fn dialect(&self) -> Dialect;

    /// Runs a statement and returns its rows.
    fn query(&self, sql: &str, parameters: &[Value]) -> impl Future<Output = Result<Vec<Row>>>;

    /// Runs a statement and returns the number of rows that it affects.
    fn execute(&self, sql: &str, parameters: &[Value]) -> impl Future<Output = Result<u64>>;

    /// Blocks other transactions that lock the same name until this one has ended. SQLite needs no lock, since it has
    /// one writer at a time.
    fn lock(&self, name: &[u8]) -> impl Future<Output = Result<()>>;

    /// The transaction as its store has it, for statements that only one store can run.
    fn engine(&self) -> Engine<'_>;

    /// Runs `work` after the commit, if the transaction is one of [`Store::begin`]. Callers of
    /// [`transact!`](crate::transact) do that themselves.
    fn after_commit(&self, _work: impl FnOnce() + Send + 'static) {}
}

/// A transaction as its store has it.
#[derive(Clone, Copy, Debug)]
pub enum Engine<'a> {
    /// The connection of SQLite's writer.
    Sqlite(&'a Connection),
    /// SQLite's writer, to which statements are sent one by one.
    SqliteSession(&'a SqliteSession),
    /// A transaction on Postgres.
    Postgres(&'a Transaction<'a>),
    /// A transaction on Postgres that owns its connection.
    PostgresSession(&'a PostgresTransaction),
}

/// Runs a statement and returns its first row, if there is one.
///
/// # Errors
/// See [`Error`].
pub async fn first<T: Tx>(tx: &T, sql: &str, parameters: &[Value]) -> Result<Option<Row>> {
    Ok(tx.query(sql, parameters).await?.into_iter().next())
}

/// A transaction on SQLite. Nothing in it ever waits.
#[derive(Debug)]
pub struct SqliteTx<'a>(pub &'a Connection);

impl Tx for SqliteTx<'_> {
    fn dialect(&self) -> Dialect {
        Dialect::Sqlite
    }

    async fn query(&self, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
        query_sqlite(self.0, sql, parameters)
    }

    async fn execute(&self, sql: &str, parameters: &[Value]) -> Result<u64> {
        execute_sqlite(self.0, sql, parameters)
    }

    async fn lock(&self, _name: &[u8]) -> Result<()> {
        Ok(())
    }

    fn engine(&self) -> Engine<'_> {
        Engine::Sqlite(self.0)
    }
}

impl Tx for Transaction<'_> {
    fn dialect(&self) -> Dialect {
        Dialect::Postgres
    }

    async fn query(&self, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
        query_postgres(self, sql, parameters).await
    }

    async fn execute(&self, sql: &str, parameters: &[Value]) -> Result<u64> {
        execute_postgres(self, sql, parameters).await
    }

    async fn lock(&self, name: &[u8]) -> Result<()> {
        lock_postgres(self, name).await
    }

    fn engine(&self) -> Engine<'_> {
        Engine::Postgres(self)
    }
}

/// Creates the closure that runs a statement on a reader of SQLite.
fn rows_of(
    sql: Cow<'static, str>,
    parameters: Vec<Value>,
) -> impl FnOnce(&Connection) -> sqlite::Result<Vec<Row>> {
    move |connection| query_sqlite(connection, &sql, &parameters).map_err(Error::into_sqlite)
}

fn query_sqlite(connection: &Connection, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    each_of_sqlite(connection, sql, parameters, |row| {
        all.push(row);
        Ok(())
    })?;
    Ok(all)
}

/// Runs a statement and hands on its rows one by one.
fn each_of_sqlite(
    connection: &Connection,
    sql: &str,
    parameters: &[Value],
    mut take: impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let refused = |error: rusqlite::Error| Error::from(error).of(sql);
    let mut statement = connection.prepare_cached(&Dialect::Sqlite.statement(sql)).map_err(refused)?;
    let names = statement.column_names().map(str::to_owned).collect();
    let columns = Arc::new(Columns { names, statement: Statement(sql.into()) });
    let mut rows = statement.query(params_from_iter(parameters)).map_err(refused)?;
    while let Some(row) = rows.next().map_err(refused)? {
        let value = |index| Ok(read_sqlite(row.get_ref(index)?));
        let values = (0..columns.names.len()).map(value).collect::<rusqlite::Result<_>>().map_err(refused)?;
        take(Row { columns: Arc::clone(&columns), values })?;
    }
    Ok(())
}

fn read_sqlite(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Integer(None),
        ValueRef::Integer(value) => Value::Integer(Some(value)),
        ValueRef::Real(value) => Value::Real(Some(value)),
        ValueRef::Text(value) => match std::str::from_utf8(value) {
            Ok(text) => Value::Text(Some(text.to_owned())),
            Err(_) => Value::Foreign { kind: "a text that is no UTF-8", bytes: value.to_vec() },
        },
        ValueRef::Blob(value) => Value::Blob(Some(value.to_vec())),
    }
}

fn execute_sqlite(connection: &Connection, sql: &str, parameters: &[Value]) -> Result<u64> {
    let execute = || {
        let mut statement = connection.prepare_cached(&Dialect::Sqlite.statement(sql))?;
        statement.execute(params_from_iter(parameters))
    };
    Ok(execute().map_err(|error: rusqlite::Error| Error::from(error).of(sql))? as u64)
}

async fn query_postgres<S: Session>(session: &S, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
    let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
    let rows = session.query(&Dialect::Postgres.statement(sql), &parameters).await;
    read_rows(&rows.map_err(|error| Error::from(error).of(sql))?, sql)
}

/// Reads the rows of an answer of Postgres to a statement.
fn read_rows(rows: &[tokio_postgres::Row], sql: &str) -> Result<Vec<Row>> {
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let names = row.columns().iter().map(|column| column.name().to_owned()).collect();
    let columns = Arc::new(Columns { names, statement: Statement(sql.into()) });
    let read = |row| Ok(Row { columns: Arc::clone(&columns), values: read_postgres(row)? });
    let rows: std::result::Result<_, tokio_postgres::Error> = rows.iter().map(read).collect();
    Ok(rows.map_err(postgres::Error::from)?)
}

async fn lock_postgres<S: Session>(session: &S, name: &[u8]) -> Result<()> {
    // Two names with the same hash wait for each other without need, which does no other harm.
    let sql = "SELECT pg_advisory_xact_lock(hashtextextended(encode($1, 'hex'), 0))";
    session.query(sql, &[(&name, Type::BYTEA)]).await?;
    Ok(())
}

async fn execute_postgres<S: Session>(session: &S, sql: &str, parameters: &[Value]) -> Result<u64> {
    let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
    let done = session.execute(&Dialect::Postgres.statement(sql), &parameters).await;
    done.map_err(|error| Error::from(error).of(sql))
}

fn read_postgres(row: &tokio_postgres::Row) -> std::result::Result<Vec<Value>, tokio_postgres::Error> {
    row.columns().iter().enumerate().map(|(index, column)| read_column(row, index, column.type_())).collect()
}

fn read_column(
    row: &tokio_postgres::Row,
    index: usize,
    kind: &Type,
) -> std::result::Result<Value, tokio_postgres::Error> {
    Ok(match *kind {
        Type::BOOL => Value::Bool(row.try_get(index)?),
        Type::BYTEA => Value::Blob(row.try_get(index)?),
        Type::INT2 => Value::Integer(row.try_get::<_, Option<i16>>(index)?.map(i64::from)),
        Type::INT4 => Value::Integer(row.try_get::<_, Option<i32>>(index)?.map(i64::from)),
        Type::INT8 => Value::Integer(row.try_get(index)?),
        Type::FLOAT4 => Value::Real(row.try_get::<_, Option<f32>>(index)?.map(f64::from)),
        Type::FLOAT8 => Value::Real(row.try_get(index)?),
        // A number that is out of the range of a decimal, or none: NaN, infinity.
        Type::NUMERIC => match row.try_get(index) {
            Ok(value) => Value::Decimal(value),
            Err(_) => {
                Value::Foreign { kind: "a numeric of more than 28 digits (cast it)", bytes: Vec::new() }
            }
        },
        Type::UUID => Value::Uuid(row.try_get(index)?),
        Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::UNKNOWN => {
            Value::Text(row.try_get(index)?)
        }
        Type::JSON | Type::JSONB => Value::Json(row.try_get::<_, Option<Json>>(index)?),
        // An infinite time, or one beyond the year 9999.
        Type::TIMESTAMPTZ => match row.try_get(index) {
            Ok(value) => Value::Timestamp(value),
            Err(_) => Value::Foreign { kind: "a time that is out of range", bytes: Vec::new() },
        },
        Type::TIMESTAMP => match row.try_get(index) {
            Ok(value) => Value::DateTime(value),
            Err(_) => Value::Foreign { kind: "a time that is out of range", bytes: Vec::new() },
        },
        Type::DATE => match row.try_get(index) {
            Ok(value) => Value::Date(value),
            Err(_) => Value::Foreign { kind: "a date that is out of range", bytes: Vec::new() },
        },
        Type::INT2_ARRAY => array(Element::Integer, row.try_get::<_, Option<Vec<Option<i16>>>>(index)?),
        Type::INT4_ARRAY => array(Element::Integer, row.try_get::<_, Option<Vec<Option<i32>>>>(index)?),
        Type::INT8_ARRAY => array(Element::Integer, row.try_get::<_, Option<Vec<Option<i64>>>>(index)?),
        Type::FLOAT4_ARRAY => array(Element::Real, row.try_get::<_, Option<Vec<Option<f32>>>>(index)?),
        Type::FLOAT8_ARRAY => array(Element::Real, row.try_get::<_, Option<Vec<Option<f64>>>>(index)?),
        Type::NUMERIC_ARRAY => {
            array(Element::Decimal, row.try_get::<_, Option<Vec<Option<Decimal>>>>(index)?)
        }
        Type::BOOL_ARRAY => array(Element::Bool, row.try_get::<_, Option<Vec<Option<bool>>>>(index)?),
        Type::TEXT_ARRAY | Type::VARCHAR_ARRAY => {
            array(Element::Text, row.try_get::<_, Option<Vec<Option<String>>>>(index)?)
        }
        Type::UUID_ARRAY => array(Element::Uuid, row.try_get::<_, Option<Vec<Option<Uuid>>>>(index)?),
        Type::TIMESTAMPTZ_ARRAY => {
            array(Element::Timestamp, row.try_get::<_, Option<Vec<Option<jiff::Timestamp>>>>(index)?)
        }
        Type::DATE_ARRAY => {
            array(Element::Date, row.try_get::<_, Option<Vec<Option<jiff::civil::Date>>>>(index)?)
        }
        _ => Value::Foreign { kind: "of a type that is not read (cast it to text)", bytes: Vec::new() },
    })
}

fn array<T: Bind>(element: Element, values: Option<Vec<Option<T>>>) -> Value {
    Value::Array(element, values.map(|values| values.into_iter().map(Value::from).collect()))
}

/// Returns ids as a JSON list of hexadecimal texts, for [`Dialect::is_among`].
pub fn hex_list(ids: &[Uuid]) -> String {
    let texts: Vec<String> = ids.iter().map(|id| id.simple().to_string()).collect();
    Json::from(texts).to_string()
}

impl Store {
    /// The SQL dialect of the store.
    pub fn dialect(&self) -> Dialect {
        match self {
            Self::Sqlite(_) => Dialect::Sqlite,
            Self::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Returns true when the store is marked as a copy of another store. Copies of a Postgres server cannot be told
    /// from the original, so the answer is false for Postgres.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn is_copy(&self) -> Result<bool> {
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.is_copy().await?),
            Self::Postgres(_) => Ok(false),
        }
    }

    /// Removes the mark of a copy, which takes the place of its original from now on. Returns false when the store is
    /// not a copy.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn end_copy(&self) -> Result<bool> {
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.end_copy().await?),
            Self::Postgres(_) => Ok(false),
        }
    }

    /// The name and the status of the pool. For SQLite it is the pool of readers.
    pub fn pool(&self) -> (&'static str, PoolStatus) {
        match self {
            Self::Sqlite(sqlite) => (sqlite.name(), sqlite.status()),
            Self::Postgres(postgres) => (postgres.name(), postgres.status()),
        }
    }

    /// Runs a read-only statement and returns its rows.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn query(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Vec<Row>> {
        let (sql, parameters) = (sql.into(), parameters.into());
        match self {
            Self::Sqlite(sqlite) => {
                Ok(sqlite.read_within(sqlite.statement_timeout(), rows_of(sql, parameters)).await?)
            }
            Self::Postgres(postgres) => query_postgres(&postgres.get().await?, &sql, &parameters).await,
        }
    }

    /// Like [`Store::query`], for a statement that is interrupted after `timeout`.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::is_late`] is true when the statement was interrupted.
    pub async fn query_within(
        &self,
        timeout: Duration,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Vec<Row>> {
        let (sql, parameters) = (sql.into(), parameters.into());
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.read_within(timeout, rows_of(sql, parameters)).await?),
            Self::Postgres(postgres) => {
                let connection = postgres.get().await?;
                // A query that is dropped is cancelled on the server.
                let query = query_postgres(&connection, &sql, &parameters);
                tokio::time::timeout(timeout, query).await.unwrap_or(Err(postgres::Error::Slow.into()))
            }
        }
    }

    /// Like [`Store::query`], for the first row only.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn first(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Option<Row>> {
        Ok(self.query(sql, parameters).await?.into_iter().next())
    }

    /// Like [`Store::query`], for the first value of the first row, or the default value without a row.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn value<T: FromValue + Default>(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<T> {
        self.first(sql, parameters).await?.map_or_else(|| Ok(T::default()), |row| row.first())
    }

    /// Runs a statement in a transaction of its own and returns the number of rows that it affects.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<u64> {
        let (sql, parameters) = (sql.into(), parameters.into());
        match self {
            Self::Sqlite(sqlite) => {
                let execute = move |connection: &Connection| {
                    execute_sqlite(connection, &sql, &parameters).map_err(Error::into_sqlite)
                };
                Ok(sqlite.transact(execute).await?)
            }
            Self::Postgres(postgres) => execute_postgres(&postgres.get().await?, &sql, &parameters).await,
        }
    }

    /// Runs a statement that writes, in a transaction of its own, and returns the rows of its `RETURNING`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute_returning(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Vec<Row>> {
        let (sql, parameters) = (sql.into(), parameters.into());
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.transact(rows_of(sql, parameters)).await?),
            Self::Postgres(postgres) => query_postgres(&postgres.get().await?, &sql, &parameters).await,
        }
    }

    /// Like [`Store::query`], with each row read as a type. An unreadable row is an error: [`each`] sets such rows
    /// apart instead.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn query_as<T: FromRow>(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Vec<T>> {
        self.query(sql, parameters).await?.iter().map(T::from_row).collect()
    }

    /// Like [`Store::first`], with the row read as a type.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn first_as<T: FromRow>(
        &self,
        sql: impl Into<Cow<'static, str>>,
        parameters: impl Into<Vec<Value>>,
    ) -> Result<Option<T>> {
        self.first(sql, parameters).await?.as_ref().map(T::from_row).transpose()
    }

    /// Applies the missing migration steps of each module.
    ///
    /// # Errors
    /// When a step fails, or the store is newer than the program.
    pub async fn migrate(&self, all: &[Tables]) -> Result<()> {
        let steps = |tables: &Tables| match self {
            Self::Sqlite(_) => Migrations { module: tables.module, steps: tables.sqlite },
            Self::Postgres(_) => Migrations { module: tables.module, steps: tables.postgres },
        };
        let all: Vec<Migrations> = all.iter().map(steps).collect();
        match self {
            Self::Sqlite(sqlite) => sqlite.migrate(&all).await?,
            Self::Postgres(postgres) => postgres.migrate(&all).await?,
        }
        Ok(())
    }

    /// Closes every connection, after the accepted work is done.
    pub async fn close(&self) {
        match self {
            Self::Sqlite(sqlite) => sqlite.close().await,
            Self::Postgres(postgres) => postgres.close(),
        }
    }
}

/// Runs `$work`, an `async fn` over a [`Tx`] called `$tx`, in a transaction on `$store`: all of
/// it or nothing.
#[macro_export]
macro_rules! transact {
    ($store:expr, $tx:ident => $work:expr) => {
        match $store {
            $crate::pool::sql::Store::Sqlite(sqlite) => {
                let work = move |connection: &$crate::pool::sql::Connection| {
                    let $tx = &$crate::pool::sql::SqliteTx(connection);
                    $crate::pool::sql::at_once($work)
                };
                sqlite.transact(work).await.map_err($crate::pool::sql::Error::from)
            }
            $crate::pool::sql::Store::Postgres(postgres) => {
                let mut failures = 0;
                loop {
                    let done = async {
                        let mut connection = postgres.get().await?;
                        let transaction = connection.begin().await?;
                        let $tx = &transaction;
                        let done = $work.await?;
                        transaction.commit().await?;
                        Ok::<_, $crate::pool::sql::Error>(done)
                    }
                    .await;
                    // The server has rolled all of it back in favour of another transaction: it can be done again.
                    match done {
                        Err(error) if error.is_rollback() && failures < $crate::pool::sql::ROLLBACKS => {
                            failures += 1;
                            $crate::pool::sql::after_rollback(failures).await;
                        }
                        done => break done,
                    }
                }
            }
        }
    };
}

/// Runs a future that never waits, which is done after the first poll.
#[doc(hidden)]
pub fn at_once<T>(work: impl Future<Output = Result<T>>) -> sqlite::Result<T> {
    let mut work = std::pin::pin!(work);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match work.as_mut().poll(&mut context) {
        std::task::Poll::Ready(result) => result.map_err(Error::into_sqlite),
        std::task::Poll::Pending => Err(Error::Awaited.into_sqlite()),
    }
}

/// The parameters of a statement.
#[macro_export]
macro_rules! values {
    ($($value:expr),* $(,)?) => { [$($crate::pool::sql::Value::from($value)),*] };
}
