//! One API for both SQL stores, for code whose statements are the same on both.
//!
//! Statements have the placeholders `?` or `?1` (see `sql/placeholders.rs`). [`Dialect`] has the few expressions that
//! differ; code that needs more of one store uses [`sqlite`] or [`postgres`] itself.
//!
//! A transaction is an `async fn` over [`Tx`], run by [`transact!`](crate::transact): on Postgres it waits for the
//! server between two statements; on SQLite it runs to its end in the writer's thread, in a savepoint of the next
//! commit.

mod placeholders;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::params_from_iter;
use rusqlite::types::{ToSqlOutput, ValueRef};
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use super::migrations::Migrations;
use super::postgres::{self, Parameter, Postgres, Session, Transaction};
use super::sqlite::{self, Sqlite};
use super::status::PoolStatus;
use super::unreadable::set_apart;
use perennial_runtime::backoff::Backoff;

#[doc(hidden)]
pub use rusqlite::Connection;

/// Error of a statement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite.
    #[error(transparent)]
    Sqlite(sqlite::Error),
    /// Postgres.
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    /// A value cannot be stored.
    #[error("a value cannot be stored")]
    Unwritable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An `async fn` in a transaction on SQLite awaited something other than its statements, which would block the
    /// writer for all other callers. This is a mistake of the program.
    #[error("a transaction on SQLite awaited something else than its statements")]
    Awaited,
    /// A value of a row has the wrong type. Another program wrote it, or the disk is damaged.
    #[error("the column {column} is {found}, and {wanted} is wanted")]
    Unreadable {
        /// Name or number of the column.
        column: String,
        /// Description of the wanted type.
        wanted: &'static str,
        /// Description of the value.
        found: String,
    },
}

/// Pause between two attempts of a transaction.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(200));

impl Error {
    /// Returns true when the server has rolled the transaction back in favour of another one.
    pub fn is_rollback(&self) -> bool {
        matches!(self, Self::Postgres(error) if error.is_rollback())
    }

    /// Returns true when a statement was interrupted by its time limit.
    pub fn is_late(&self) -> bool {
        matches!(self, Self::Sqlite(sqlite::Error::Late) | Self::Postgres(postgres::Error::Slow))
    }

    /// Returns true when the error is transient: the request is valid and may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Sqlite(error) => error.is_passing(),
            Self::Postgres(error) => error.is_passing(),
            Self::Unreadable { .. } | Self::Unwritable(_) | Self::Awaited => false,
        }
    }

    /// Converts the error for a closure of the SQLite writer. [`Error::from`] converts it back.
    pub(super) fn into_sqlite(self) -> sqlite::Error {
        match self {
            Self::Sqlite(error) => error,
            other => sqlite::Error::Caller(Box::new(other)),
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error.into())
    }
}

impl From<sqlite::Error> for Error {
    fn from(error: sqlite::Error) -> Self {
        match error {
            // An error of this type, on its way out of a closure.
            sqlite::Error::Caller(inner) => match inner.downcast::<Self>() {
                Ok(own) => *own,
                Err(inner) => Self::Sqlite(sqlite::Error::Caller(inner)),
            },
            error => Self::Sqlite(error),
        }
    }
}

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
        if self == Self::Sqlite || !sql.contains('?') {
            return Cow::Borrowed(sql);
        }
        Cow::Owned(placeholders::numbered(sql))
    }
}

/// A parameter, or a value of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A whole number.
    Integer(Option<i64>),
    /// A text.
    Text(Option<String>),
    /// Bytes.
    Blob(Option<Vec<u8>>),
    /// True or false; a number on SQLite.
    Bool(Option<bool>),
    /// A value that no row of this program has: a text that is not UTF-8, or a value of a type that is not read.
    Foreign {
        /// Description of its type.
        kind: &'static str,
        /// Its bytes, as far as they are known.
        bytes: Vec<u8>,
    },
}

macro_rules! into_value {
    ($($from:ty => $variant:ident($convert:expr)),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from(value: $from) -> Self {
                let convert: fn($from) -> _ = $convert;
                Self::$variant(convert(value))
            }
        }
    )*};
}

into_value! {
    i64 => Integer(Some),
    u32 => Integer(|value| Some(i64::from(value))),
    u64 => Integer(|value| Some(i64::try_from(value).unwrap_or(i64::MAX))),
    usize => Integer(|value| Some(i64::try_from(value).unwrap_or(i64::MAX))),
    Option<i64> => Integer(|value| value),
    bool => Bool(Some),
    &str => Text(|value| Some(value.to_owned())),
    &String => Text(|value| Some(value.clone())),
    String => Text(Some),
    Option<String> => Text(|value| value),
    &Option<String> => Text(Option::clone),
    &[u8] => Blob(|value| Some(value.to_vec())),
    Vec<u8> => Blob(Some),
    &Vec<u8> => Blob(|value| Some(value.clone())),
    Uuid => Blob(|value| Some(value.as_bytes().to_vec())),
}

impl<const N: usize> From<[u8; N]> for Value {
    fn from(value: [u8; N]) -> Self {
        Self::Blob(Some(value.to_vec()))
    }
}

impl<const N: usize> From<&[u8; N]> for Value {
    fn from(value: &[u8; N]) -> Self {
        Self::Blob(Some(value.to_vec()))
    }
}

impl rusqlite::ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Integer(Some(value)) => ValueRef::Integer(*value),
            Self::Bool(Some(value)) => ValueRef::Integer(i64::from(*value)),
            Self::Text(Some(value)) => ValueRef::Text(value.as_bytes()),
            Self::Blob(Some(value)) | Self::Foreign { bytes: value, .. } => ValueRef::Blob(value),
            _ => ValueRef::Null,
        }))
    }
}

impl Value {
    fn parameter(&self) -> Parameter<'_> {
        let (value, kind): (&(dyn ToSql + Sync), Type) = match self {
            Self::Integer(value) => (value, Type::INT8),
            Self::Bool(value) => (value, Type::BOOL),
            Self::Text(value) => (value, Type::TEXT),
            Self::Blob(value) => (value, Type::BYTEA),
            Self::Foreign { bytes, .. } => (bytes, Type::BYTEA),
        };
        (value, kind)
    }
}

/// A type that a value of a row can be read as.
pub trait FromValue: Sized {
    /// Description of the type, for errors.
    const WANTED: &'static str;

    /// Converts the value; `None` when it is of another type.
    fn from_value(value: &Value) -> Option<Self>;
}

macro_rules! from_value {
    ($($to:ty, $wanted:literal: $pattern:pat => $value:expr),* $(,)?) => {$(
        impl FromValue for $to {
            const WANTED: &'static str = $wanted;

            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    $pattern => $value,
                    _ => None,
                }
            }
        }
    )*};
}

from_value! {
    i64, "a whole number": Value::Integer(Some(value)) => Some(*value),
    u64, "a whole number from 0": Value::Integer(Some(value)) => u64::try_from(*value).ok(),
    u32, "a whole number from 0 to 4294967295": Value::Integer(Some(value)) => u32::try_from(*value).ok(),
    usize, "a whole number from 0": Value::Integer(Some(value)) => usize::try_from(*value).ok(),
    String, "a text in UTF-8": Value::Text(Some(value)) => Some(value.clone()),
    Vec<u8>, "bytes": Value::Blob(Some(value)) => Some(value.clone()),
    Uuid, "16 bytes": Value::Blob(Some(value)) => Uuid::from_slice(value).ok(),
}

impl FromValue for bool {
    const WANTED: &'static str = "true or false";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(Some(value)) => Some(*value),
            Value::Integer(Some(value)) => Some(*value != 0),
            _ => None,
        }
    }
}

impl<const N: usize> FromValue for [u8; N] {
    const WANTED: &'static str = "bytes of a certain length";

    fn from_value(value: &Value) -> Option<Self> {
        Vec::from_value(value)?.try_into().ok()
    }
}

impl<T: FromValue> FromValue for Option<T> {
    const WANTED: &'static str = T::WANTED;

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Integer(None) | Value::Text(None) | Value::Blob(None) | Value::Bool(None) => Some(None),
            value => T::from_value(value).map(Some),
        }
    }
}

/// A row that a statement returned.
#[derive(Clone, Debug)]
pub struct Row {
    /// Names of the columns, shared by all rows.
    names: Arc<[String]>,
    values: Vec<Value>,
}

impl Row {
    /// The value of a column.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when there is no such column, or its value is of another kind.
    pub fn get<T: FromValue>(&self, column: &str) -> Result<T> {
        self.read(column, self.value(column))
    }

    /// The value of the first column.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when it is of another kind.
    pub fn first<T: FromValue>(&self) -> Result<T> {
        self.read("1", self.values.first())
    }

    fn read<T: FromValue>(&self, column: &str, value: Option<&Value>) -> Result<T> {
        value.and_then(T::from_value).ok_or_else(|| Error::Unreadable {
            column: column.to_owned(),
            wanted: T::WANTED,
            found: value.map_or_else(|| "not there".to_owned(), Value::describe),
        })
    }

    /// The value of a column as it is; `None` when there is no such column.
    pub fn value(&self, column: &str) -> Option<&Value> {
        self.values.get(self.names.iter().position(|name| name == column)?)
    }

    /// The name of the row in the log: the value of its column `id`, in printable form.
    pub fn name(&self, id: &str) -> String {
        match self.value(id) {
            Some(Value::Integer(Some(number))) => number.to_string(),
            Some(Value::Text(Some(text))) => text.clone(),
            Some(Value::Blob(Some(bytes)) | Value::Foreign { bytes, .. }) => {
                bytes.iter().take(16).fold(String::new(), |mut hex, byte| {
                    let _ = write!(hex, "{byte:02x}");
                    hex
                })
            }
            _ => "?".to_owned(),
        }
    }

    /// Approximate size of the values, in bytes.
    pub fn bytes(&self) -> usize {
        let of = |value: &Value| match value {
            Value::Text(Some(text)) => text.len(),
            Value::Blob(Some(bytes)) | Value::Foreign { bytes, .. } => bytes.len(),
            _ => size_of::<i64>(),
        };
        self.values.iter().map(of).sum()
    }
}

impl Value {
    /// Description of the value, for errors.
    fn describe(&self) -> String {
        match self {
            Self::Integer(None) | Self::Text(None) | Self::Blob(None) | Self::Bool(None) => "NULL".to_owned(),
            Self::Integer(Some(number)) => format!("the whole number {number}"),
            Self::Text(Some(text)) => format!("a text of {} bytes", text.len()),
            Self::Blob(Some(bytes)) => format!("{} bytes", bytes.len()),
            Self::Bool(Some(value)) => value.to_string(),
            Self::Foreign { kind, .. } => (*kind).to_owned(),
        }
    }
}

/// Returns ids as a JSON list of hexadecimal texts, for [`Dialect::is_among`].
pub fn hex_list(ids: &[Uuid]) -> String {
    let texts: Vec<String> = ids.iter().map(|id| id.simple().to_string()).collect();
    serde_json::Value::from(texts).to_string()
}

/// Reads rows one by one. A row that cannot be read is left out and reported under its `id`.
pub fn each<T>(rows: &[Row], what: &'static str, id: &str, read: impl Fn(&Row) -> Result<T>) -> Vec<T> {
    let read = |row: &Row| read(row).inspect_err(|error| set_apart(what, &row.name(id), error)).ok();
    rows.iter().filter_map(read).collect()
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

    /// The connection of SQLite, if the store is SQLite.
    fn sqlite(&self) -> Option<&Connection>;

    /// The transaction of Postgres, if the store is Postgres.
    fn postgres(&self) -> Option<&Transaction<'_>>;
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
        Ok(self.0.prepare_cached(sql)?.execute(params_from_iter(parameters))? as u64)
    }

    async fn lock(&self, _name: &[u8]) -> Result<()> {
        Ok(())
    }

    fn sqlite(&self) -> Option<&Connection> {
        Some(self.0)
    }

    fn postgres(&self) -> Option<&Transaction<'_>> {
        None
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
        let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
        Ok(Session::execute(self, &Dialect::Postgres.statement(sql), &parameters).await?)
    }

    async fn lock(&self, name: &[u8]) -> Result<()> {
        // Two names with the same hash wait for each other without need, which does no other harm.
        let sql = "SELECT pg_advisory_xact_lock(hashtextextended(encode($1, 'hex'), 0))";
        Session::query(self, sql, &[(&name, Type::BYTEA)]).await?;
        Ok(())
    }

    fn sqlite(&self) -> Option<&Connection> {
        None
    }

    fn postgres(&self) -> Option<&Transaction<'_>> {
        Some(self)
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
    let mut statement = connection.prepare_cached(sql)?;
    let names: Arc<[String]> = statement.column_names().map(str::to_owned).collect();
    let rows = statement.query_map(params_from_iter(parameters), |row| {
        let value = |index| -> rusqlite::Result<Value> {
            Ok(match row.get_ref(index)? {
                ValueRef::Null => Value::Integer(None),
                ValueRef::Integer(value) => Value::Integer(Some(value)),
                // No table of this program has such a value.
                ValueRef::Real(value) => {
                    Value::Foreign { kind: "a number with a fraction", bytes: value.to_string().into_bytes() }
                }
                ValueRef::Text(value) => match std::str::from_utf8(value) {
                    Ok(text) => Value::Text(Some(text.to_owned())),
                    Err(_) => Value::Foreign { kind: "a text that is no UTF-8", bytes: value.to_vec() },
                },
                ValueRef::Blob(value) => Value::Blob(Some(value.to_vec())),
            })
        };
        let values = (0..names.len()).map(value).collect::<rusqlite::Result<_>>()?;
        Ok(Row { names: Arc::clone(&names), values })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

async fn query_postgres<S: Session>(session: &S, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
    let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
    let rows = session.query(&Dialect::Postgres.statement(sql), &parameters).await?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let names: Arc<[String]> = row.columns().iter().map(|column| column.name().to_owned()).collect();
    let read = |row| Ok(Row { names: Arc::clone(&names), values: read_postgres(row)? });
    let rows: std::result::Result<_, tokio_postgres::Error> = rows.iter().map(read).collect();
    Ok(rows.map_err(postgres::Error::from)?)
}

fn read_postgres(row: &tokio_postgres::Row) -> std::result::Result<Vec<Value>, tokio_postgres::Error> {
    let value = |index: usize, kind: &Type| -> std::result::Result<Value, tokio_postgres::Error> {
        Ok(match *kind {
            Type::BOOL => Value::Bool(row.try_get(index)?),
            Type::BYTEA => Value::Blob(row.try_get(index)?),
            Type::INT2 => Value::Integer(row.try_get::<_, Option<i16>>(index)?.map(i64::from)),
            Type::INT4 => Value::Integer(row.try_get::<_, Option<i32>>(index)?.map(i64::from)),
            Type::INT8 => Value::Integer(row.try_get(index)?),
            Type::UUID => {
                Value::Blob(row.try_get::<_, Option<Uuid>>(index)?.map(|id| id.as_bytes().to_vec()))
            }
            Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::UNKNOWN => {
                Value::Text(row.try_get(index)?)
            }
            _ => foreign(kind),
        })
    };
    row.columns().iter().enumerate().map(|(index, column)| value(index, column.type_())).collect()
}

/// A value of a type that is not read: the statement can cast it.
fn foreign(kind: &Type) -> Value {
    let kind = match *kind {
        Type::FLOAT4 | Type::FLOAT8 => "a floating-point number (cast it)",
        Type::NUMERIC => "numeric (cast it to bigint or text)",
        Type::JSON | Type::JSONB => "json (cast it to text)",
        Type::TIMESTAMP | Type::TIMESTAMPTZ | Type::DATE => "a time (cast it to text, or extract its epoch)",
        _ => "of a type that is not read (cast it to text)",
    };
    Value::Foreign { kind, bytes: Vec::new() }
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
            Self::Sqlite(sqlite) => ("sqlite", sqlite.status()),
            Self::Postgres(postgres) => ("postgres", postgres.status()),
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
                    connection.prepare_cached(&sql)?.execute(params_from_iter(&parameters))
                };
                Ok(sqlite.write(execute).await? as u64)
            }
            Self::Postgres(postgres) => {
                let parameters: Vec<Parameter<'_>> = parameters.iter().map(Value::parameter).collect();
                Ok(postgres.execute(&Dialect::Postgres.statement(&sql), &parameters).await?)
            }
        }
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

/// Number of retries of a transaction that the server has rolled back in favour of another one.
#[doc(hidden)]
pub const ROLLBACKS: u32 = 5;

/// Waits before the next attempt of a transaction that was rolled back.
#[doc(hidden)]
pub async fn after_rollback(failures: u32) {
    tokio::time::sleep(AGAIN.jittered(failures)).await;
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
