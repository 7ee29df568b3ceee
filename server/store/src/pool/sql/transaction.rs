//! Transactions as values: their code runs in the task of its caller, may borrow, wait for other things, and fail with
//! errors of its own type.
//!
//! On SQLite the writer waits for the statements of such a transaction, and every other write waits with it. So the code
//! of the engine uses [`transact!`](crate::transact), which runs in the writer's thread from beginning to end.

use std::fmt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    Connection, Dialect, Engine, Error, Result, Row, Store, Tx, Value, execute_sqlite, query_sqlite,
};
use crate::pool::postgres::PostgresTransaction;
use crate::pool::sqlite::{self, Accepted};

/// A transaction of [`Store::begin`]. It is rolled back when it drops without [`StoreTransaction::commit`].
pub struct StoreTransaction {
    inner: Inner,
    after_commit: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl fmt::Debug for StoreTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StoreTransaction").field(&self.inner).finish()
    }
}

#[derive(Debug)]
enum Inner {
    Sqlite { session: SqliteSession, written: Accepted<()> },
    Postgres(Box<PostgresTransaction>),
}

impl Store {
    /// Begins a transaction: all of it or nothing.
    ///
    /// On SQLite every other write waits until the transaction has ended. A write to the same store that is not made
    /// through the transaction, but awaited before its end, waits in vain: the transaction is rolled back after the time
    /// that a statement may take (`store.statement_timeout`).
    ///
    /// ```no_run
    /// use perennial_store::pool::sql::{Result, Store, Tx};
    /// use perennial_store::values;
    ///
    /// # async fn example(store: Store, names: &[&str]) -> Result<()> {
    /// let tx = store.begin().await?;
    /// for name in names {
    ///     tx.execute("INSERT INTO authors (name) VALUES ($1)", &values![*name]).await?;
    /// }
    /// tx.commit().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn begin(&self) -> Result<StoreTransaction> {
        let inner = match self {
            Self::Sqlite(sqlite) => {
                let (commands, asked) = mpsc::channel();
                let limit = sqlite.statement_timeout();
                let written =
                    sqlite.accept(limit, move |connection| serve(connection, &asked, limit)).await?;
                Inner::Sqlite { session: SqliteSession { commands }, written }
            }
            Self::Postgres(postgres) => {
                Inner::Postgres(Box::new(postgres.get().await?.into_transaction().await?))
            }
        };
        Ok(StoreTransaction { inner, after_commit: Mutex::default() })
    }
}

impl StoreTransaction {
    /// Commits the transaction.
    ///
    /// # Errors
    /// See [`Error`]. A transaction that Postgres has rolled back in favour of another one ([`Error::is_rollback`]) can
    /// be repeated.
    pub async fn commit(self) -> Result<()> {
        match self.inner {
            Inner::Sqlite { session, written } => {
                let _ = session.commands.send(Command::Commit);
                written.wait().await?;
            }
            Inner::Postgres(transaction) => transaction.commit().await?,
        }
        self.after_commit.into_inner().into_iter().for_each(|work| work());
        Ok(())
    }
}

impl Tx for StoreTransaction {
    fn dialect(&self) -> Dialect {
        match &self.inner {
            Inner::Sqlite { .. } => Dialect::Sqlite,
            Inner::Postgres(_) => Dialect::Postgres,
        }
    }

    async fn query(&self, sql: &str, parameters: &[Value]) -> Result<Vec<Row>> {
        match &self.inner {
            Inner::Sqlite { session, .. } => {
                let (sql, parameters) = (sql.to_owned(), parameters.to_vec());
                session.run(move |connection| query_sqlite(connection, &sql, &parameters)).await
            }
            Inner::Postgres(transaction) => super::query_postgres(&**transaction, sql, parameters).await,
        }
    }

    async fn execute(&self, sql: &str, parameters: &[Value]) -> Result<u64> {
        match &self.inner {
            Inner::Sqlite { session, .. } => {
                let (sql, parameters) = (sql.to_owned(), parameters.to_vec());
                session.run(move |connection| execute_sqlite(connection, &sql, &parameters)).await
            }
            Inner::Postgres(transaction) => super::execute_postgres(&**transaction, sql, parameters).await,
        }
    }

    async fn lock(&self, name: &[u8]) -> Result<()> {
        match &self.inner {
            Inner::Sqlite { .. } => Ok(()),
            Inner::Postgres(transaction) => super::lock_postgres(&**transaction, name).await,
        }
    }

    fn engine(&self) -> Engine<'_> {
        match &self.inner {
            Inner::Sqlite { session, .. } => Engine::SqliteSession(session),
            Inner::Postgres(transaction) => Engine::PostgresSession(transaction),
        }
    }

    fn after_commit(&self, work: impl FnOnce() + Send + 'static) {
        self.after_commit.lock().push(Box::new(work));
    }
}

/// What the writer is asked to do in a transaction.
enum Command {
    Run(Box<dyn FnOnce(&Connection) + Send>),
    Commit,
}

/// SQLite's writer, while it waits for the statements of one transaction. Without a commit, its end rolls back.
pub struct SqliteSession {
    commands: mpsc::Sender<Command>,
}

impl fmt::Debug for SqliteSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SqliteSession")
    }
}

impl SqliteSession {
    /// Runs `statement` on the writer's connection, within the transaction.
    ///
    /// # Errors
    /// The error of `statement`; [`Error::is_late`] is true when the time of the transaction is over.
    pub async fn run<T: Send + 'static>(
        &self,
        statement: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let run = Command::Run(Box::new(move |connection| {
            let _ = reply.send(statement(connection));
        }));
        // The reply of a command that is not run is dropped.
        let _ = self.commands.send(run);
        answer.await.unwrap_or_else(|_| Err(Error::from(sqlite::Error::Late)))
    }
}

/// Runs the statements of one transaction, in the writer's thread.
fn serve(connection: &Connection, asked: &mpsc::Receiver<Command>, limit: Duration) -> sqlite::Result<()> {
    let end = Instant::now() + limit;
    loop {
        match asked.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Command::Run(statement)) => {
                statement(connection);
                // Some errors (a full disk, an interrupt) make SQLite undo the whole transaction, and what came after
                // them would be kept by itself.
                if connection.is_autocommit() {
                    return Err(sqlite::Error::Lost("a statement has ended it".to_owned()));
                }
            }
            Ok(Command::Commit) => return Ok(()),
            Err(mpsc::RecvTimeoutError::Timeout) => return Err(sqlite::Error::Late),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(sqlite::Error::Caller("the transaction was given up".into()));
            }
        }
    }
}
