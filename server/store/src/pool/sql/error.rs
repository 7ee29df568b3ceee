//! Errors of statements on both stores.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use rusqlite::ffi;
use tokio_postgres::error::SqlState;

use crate::pool::{postgres, sqlite};

/// Pause between two attempts of a transaction.
const AGAIN: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(200));
/// Maximum length of a statement in an error, in bytes.
const MAX_STATEMENT: usize = 400;

/// Error of a statement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite.
    #[error(transparent)]
    Sqlite(sqlite::Error),
    /// Postgres.
    #[error(transparent)]
    Postgres(#[from] postgres::Error),
    /// The store refuses a statement: it is wrong, or breaks a constraint. The same statement fails again.
    #[error("the store refuses the statement {statement}")]
    Refused {
        /// The statement.
        statement: Statement,
        /// Error of the store.
        source: Box<Self>,
    },
    /// A value cannot be stored.
    #[error("a value cannot be stored")]
    Unwritable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An `async fn` in a transaction on SQLite awaited something other than its statements, which would block the
    /// writer for all other callers. This is a mistake of the program.
    #[error("a transaction on SQLite awaited something else than its statements")]
    Awaited,
    /// A value of a row has the wrong type. Another program wrote it, or the disk is damaged.
    #[error("the column {column} is {found}, and {wanted} is wanted{}", read_by(.statement.as_ref()))]
    Unreadable {
        /// Name or number of the column.
        column: String,
        /// Description of the wanted type.
        wanted: &'static str,
        /// Description of the value.
        found: String,
        /// The statement that returned the row, if it is known.
        statement: Option<Statement>,
    },
}

fn read_by(statement: Option<&Statement>) -> String {
    statement.map(|statement| format!(", in {statement}")).unwrap_or_default()
}

/// The text of a statement, for errors. It is shown on one line and cut at 400 bytes; parameters are not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement(pub(super) Arc<str>);

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut = line.len() > MAX_STATEMENT;
        line.truncate(line.floor_char_boundary(MAX_STATEMENT));
        write!(f, "`{line}{}`", if cut { "..." } else { "" })
    }
}

impl Error {
    /// Returns true when the server has rolled the transaction back in favour of another one.
    pub fn is_rollback(&self) -> bool {
        matches!(self.cause(), Self::Postgres(error) if error.is_rollback())
    }

    /// Returns true when a statement was interrupted by its time limit.
    pub fn is_late(&self) -> bool {
        matches!(self.cause(), Self::Sqlite(sqlite::Error::Late) | Self::Postgres(postgres::Error::Slow))
    }

    /// Returns true when the error is transient: the request is valid and may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        match self.cause() {
            Self::Sqlite(error) => error.is_passing(),
            Self::Postgres(error) => error.is_passing(),
            Self::Unreadable { .. } | Self::Unwritable(_) | Self::Awaited | Self::Refused { .. } => false,
        }
    }

    /// Returns true when a row with the same unique value exists already.
    pub fn is_unique_violation(&self) -> bool {
        const UNIQUE: [i32; 3] =
            [ffi::SQLITE_CONSTRAINT_UNIQUE, ffi::SQLITE_CONSTRAINT_PRIMARYKEY, ffi::SQLITE_CONSTRAINT_ROWID];
        self.is_violation(&UNIQUE, &SqlState::UNIQUE_VIOLATION)
    }

    /// Returns true when the row that a foreign key names does not exist, or a row that is still named is deleted.
    pub fn is_foreign_key_violation(&self) -> bool {
        self.is_violation(&[ffi::SQLITE_CONSTRAINT_FOREIGNKEY], &SqlState::FOREIGN_KEY_VIOLATION)
    }

    fn is_violation(&self, of_sqlite: &[i32], of_postgres: &SqlState) -> bool {
        match self.cause() {
            Self::Sqlite(sqlite::Error::Sql(rusqlite::Error::SqliteFailure(error, _))) => {
                of_sqlite.contains(&error.extended_code)
            }
            Self::Postgres(postgres::Error::Sql(error)) => error.code() == Some(of_postgres),
            _ => false,
        }
    }

    /// The error of the store, without the statement around it.
    fn cause(&self) -> &Self {
        match self {
            Self::Refused { source, .. } => source.cause(),
            error => error,
        }
    }

    /// Adds the statement to an error that the statement itself causes.
    pub(super) fn of(self, statement: &str) -> Self {
        let is_refusal = match &self {
            Self::Sqlite(sqlite::Error::Sql(source))
                if source.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) =>
            {
                return Self::Sqlite(sqlite::Error::Late);
            }
            Self::Sqlite(error @ sqlite::Error::Sql(_)) => !error.is_passing(),
            Self::Postgres(error @ postgres::Error::Sql(_)) => !error.is_passing(),
            _ => false,
        };
        if !is_refusal {
            return self;
        }
        Self::Refused { statement: Statement(statement.into()), source: Box::new(self) }
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

/// Number of retries of a transaction that the server has rolled back in favour of another one.
#[doc(hidden)]
pub const ROLLBACKS: u32 = 5;

/// Waits before the next attempt of a transaction that was rolled back.
#[doc(hidden)]
pub async fn after_rollback(failures: u32) {
    tokio::time::sleep(AGAIN.jittered(failures)).await;
}
