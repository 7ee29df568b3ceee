//! One SQLite file: one writer, a pool of readers.
//!
//! SQLite allows one writer at a time, so there is exactly one: a thread that owns its connection and takes closures
//! from a bounded queue. All closures that wait when it begins a transaction become part of it (group commit), each in
//! a savepoint of its own, and each caller is answered after the commit: with `synchronous=FULL`, an answered write is
//! on the disk.
//!
//! Readers are separate connections in a pool; in WAL mode they do not wait for the writer.

use std::convert::Infallible;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use deadpool::managed::{self, Metrics, PoolError, RecycleError, RecycleResult};
use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_blocking;
use tracing::info;

use super::bounded::{Bounded, BoundedLimits};
use super::migrations::{MigrationStatus, Migrations, Newer};
use super::status::PoolStatus;
use crate::metrics;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Condition;
use perennial_runtime::panics::panic_message;

/// Time limit for each migration step.
const MIGRATION: Duration = Duration::from_secs(600);
/// Pragma of a number in the file's header that the application may set. It is 0 in every store that is not a copy.
const USER_VERSION: &str = "user_version";
/// The value of [`USER_VERSION`] in a copy.
const COPY: i64 = 1;
/// Default time limit of a read, in milliseconds.
const STATEMENT_MS: u64 = 10_000;
/// Number of steps of SQLite's virtual machine between two checks of the time limit.
const STEPS: std::ffi::c_int = 4096;
/// Pause before a new attempt after a failed write.
const LOOK: Duration = Duration::from_secs(2);
/// Maximum number of writes in one commit. It bounds how long the first write waits for the last.
const GROUP: usize = 256;

/// Number of prepared statements that a connection keeps.
const STATEMENTS: usize = 128;

/// The location of the file, and limits for reads and writes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the pool of readers in metrics, logs and `/pools`.
    pub name: &'static str,
    /// The database file. It is created with mode 0600 when it is missing.
    pub path: PathBuf,
    /// Number of connections that read.
    pub readers: usize,
    /// Number of writes that may wait for the writer.
    pub write_queue: usize,
    /// Time that a caller waits for a reader, or for room in the write queue.
    pub wait: Duration,
    /// Time that a caller waits for the commit of an accepted write. A write that runs longer than this is interrupted.
    pub commit_wait: Duration,
}

/// Error of a read or a write.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or created.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file exists, but is not a store, or is damaged.
    #[error("{} cannot be used as a store; if it was damaged, restore a backup", .path.display())]
    NoStore {
        /// The file.
        path: PathBuf,
        /// Error of SQLite.
        source: rusqlite::Error,
    },
    /// No reader, or no room in the write queue, became free in time.
    #[error("the store is busy: no {0} within the time allowed")]
    Busy(&'static str),
    /// The commit did not come in time. The write may still happen.
    #[error("the store has not committed within the time allowed; the write may still happen")]
    Slow,
    /// A read or a write has not ended in time and was interrupted. Its changes are undone.
    #[error("a query of the store has not ended within the time allowed")]
    Late,
    /// SQLite returned an error. The changes of this closure are undone.
    #[error("sqlite")]
    Sql(#[from] rusqlite::Error),
    /// Another write of the same commit broke the transaction, or the commit failed. All its changes are undone.
    #[error("the transaction was lost: {0}")]
    Lost(String),
    /// The closure panicked. Its changes are undone.
    #[error("a statement's code panicked: {0}")]
    Panicked(String),
    /// The closure failed with an error of its own type. Its changes are undone.
    #[error(transparent)]
    Caller(Box<dyn std::error::Error + Send + Sync>),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// The store was written by a newer version of the program.
    #[error(transparent)]
    Newer(#[from] Newer),
}

impl Error {
    /// Returns true when the error is transient: the request is valid and may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked, DiskFull, SystemIoFailure};
        match self {
            Self::Busy(_) | Self::Slow | Self::Late | Self::Lost(_) | Self::Closed => true,
            Self::Sql(error) => matches!(
                error.sqlite_error_code(),
                Some(DatabaseBusy | DatabaseLocked | DiskFull | SystemIoFailure)
            ),
            _ => false,
        }
    }
}

/// The result of a read or a write.
pub type Result<T> = std::result::Result<T, Error>;

/// An open store. A cheap handle.
#[derive(Clone, Debug)]
pub struct Sqlite(Arc<SqliteInner>);

#[derive(Debug)]
struct SqliteInner {
    config: Config,
    writes: Mutex<Option<mpsc::Sender<Box<dyn Write>>>>,
    writer: Mutex<Option<thread::JoinHandle<()>>>,
    readers: Bounded<Readers>,
    /// Time limit of a read, in milliseconds.
    statement_timeout: AtomicU64,
    health: Arc<WriteHealth>,
    written: Arc<AtomicU64>,
}

/// A version of the content of a store, which can be compared with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of rows that this process has written.
    written: u64,
    /// Size of the write-ahead log, and the seconds and nanoseconds of the time when it was last written to.
    log: Option<(u64, i64, i64)>,
}

/// A write in the queue.
#[derive(Debug)]
pub(super) struct Accepted<T> {
    answer: oneshot::Receiver<Result<T>>,
    asked: Instant,
    commit_wait: Duration,
}

impl<T> Accepted<T> {
    /// Waits for the commit.
    pub(super) async fn wait(self) -> Result<T> {
        let answer = tokio::time::timeout(self.commit_wait, self.answer).await.map_err(|_| Error::Slow)?;
        metrics::sqlite_write_took(self.asked.elapsed());
        answer.map_err(|_| Error::Closed)?
    }
}

/// Whether writes reach the disk, by the result of the last one.
#[derive(Debug, Default)]
struct WriteHealth {
    failure: Mutex<Option<String>>,
    changed: Notify,
}

impl WriteHealth {
    fn set(&self, failure: Option<String>) {
        let mut known = self.failure.lock();
        if known.is_some() != failure.is_some() {
            self.changed.notify_one();
        }
        *known = failure;
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }
}

impl Sqlite {
    /// Opens or creates the file, and starts the writer. One reader is opened too, so that a store that cannot be read
    /// fails here.
    ///
    /// # Errors
    /// When the file cannot be opened or is not a database.
    pub async fn open(config: Config) -> Result<Self> {
        let path = config.path.clone();
        let deadline = Deadline::default();
        let asked = deadline.clone();
        let connection = blocking(move || open_writer(&path, asked)).await;
        let connection = connection.map_err(|error| match error {
            Error::Sql(source) => Error::NoStore { path: config.path.clone(), source },
            other => other,
        })?;
        let (sender, receiver) = mpsc::channel(config.write_queue);
        let health = Arc::new(WriteHealth::default());
        let (watched, written) = (Arc::clone(&health), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&written);
        let writer = thread::Builder::new()
            .name("sqlite-writer".to_owned())
            .spawn(move || write_loop(connection, &deadline, receiver, &watched, &counted))
            .map_err(|source| Error::Open { path: config.path.clone(), source })?;
        let readers = managed::Pool::builder(Readers { path: config.path.clone() });
        let limits = BoundedLimits {
            size: config.readers,
            wait: config.wait,
            connect_timeout: config.wait,
            max_age: Duration::MAX,
        };
        let readers = Bounded::new(config.name, readers, limits);
        let readers = readers.map_err(|_| Error::Busy("runtime"))?;
        let shared = SqliteInner {
            config,
            writes: Mutex::new(Some(sender)),
            writer: Mutex::new(Some(writer)),
            readers,
            statement_timeout: AtomicU64::new(STATEMENT_MS),
            health,
            written,
        };
        let sqlite = Self(Arc::new(shared));
        sqlite.read(|connection| connection.query_row("SELECT 1", [], |_| Ok(()))).await?;
        Ok(sqlite)
    }

    /// The name of the pool of readers.
    pub fn name(&self) -> &'static str {
        self.0.config.name
    }

    /// Runs `work` in the next transaction and returns after its commit. When `work` fails, only its own changes are
    /// undone.
    ///
    /// An accepted write goes on when its caller goes away.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn write<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.transact(move |connection| Ok(work(connection)?)).await
    }

    /// Like [`Sqlite::write`], for `work` that may fail with errors of other types.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn transact<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        self.write_within(self.0.config.commit_wait, work).await
    }

    async fn write_within<T, F>(&self, commit_wait: Duration, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let accepted = self.accept(commit_wait, work).await?;
        Accepted { commit_wait, ..accepted }.wait().await
    }

    /// Puts `work` into the write queue. It is interrupted after `timeout`, and its answer comes after the commit.
    pub(super) async fn accept<T, F>(&self, timeout: Duration, work: F) -> Result<Accepted<T>>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let asked = Instant::now();
        let write = Box::new(Pending { work: Some(work), timeout, result: None, reply });
        let sender = self.0.writes.lock().clone();
        match sender.ok_or(Error::Closed)?.send_timeout(write, self.0.config.wait).await {
            Ok(()) => Ok(Accepted { answer, asked, commit_wait: timeout.max(self.0.config.commit_wait) }),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(Error::Busy("room in the write queue")),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Error::Closed),
        }
    }

    /// Runs `query` on a reader.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read<T, F>(&self, query: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let query = move |connection: &Connection| Ok(query(connection)?);
        self.read_within(self.statement_timeout(), query).await
    }

    /// Time limit of a read that sets no other limit.
    pub(super) fn statement_timeout(&self) -> Duration {
        Duration::from_millis(self.0.statement_timeout.load(Ordering::Relaxed))
    }

    /// Like [`Sqlite::read`], for a query that is interrupted when it runs longer than `timeout`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read_within<T, F>(&self, timeout: Duration, query: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        self.read_renewing(timeout, move |connection, _| query(connection)).await
    }

    /// Like [`Sqlite::read_within`], for a query that may renew its time limit.
    pub(super) async fn read_renewing<T, F>(&self, timeout: Duration, query: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection, &Deadline) -> Result<T> + Send + 'static,
    {
        let mut reader = match self.0.readers.get().await {
            Ok(reader) => reader,
            Err(PoolError::Timeout(_)) => return Err(Error::Busy("free reader")),
            Err(PoolError::Backend(error)) => return Err(error),
            Err(_) => return Err(Error::Closed),
        };
        blocking(move || {
            // The query must end even when its caller has gone, since all requests share the readers.
            let deadline = Deadline::default();
            deadline.renew(timeout);
            let handler = deadline.clone();
            reader.progress_handler(STEPS, Some(move || handler.is_over()))?;
            let found = query(&reader, &deadline);
            reader.progress_handler(0, None::<fn() -> bool>)?;
            found.map_err(interrupted_is_late)
        })
        .await
    }

    /// Sets the time limit of reads from now on.
    #[must_use]
    pub fn with_statement_timeout(self, timeout: Duration) -> Self {
        let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.0.statement_timeout.store(milliseconds, Ordering::Relaxed);
        self
    }

    /// Applies the missing migration steps of each module, each step in a transaction of its own.
    ///
    /// # Errors
    /// When a step fails, or the store is newer than the program.
    pub async fn migrate(&self, all: &[Migrations]) -> Result<()> {
        self.write(|connection| {
            connection.execute_batch(
                "CREATE TABLE IF NOT EXISTS migrations (
                     module     TEXT NOT NULL,
                     version    INTEGER NOT NULL,
                     applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
                     PRIMARY KEY (module, version)
                 ) WITHOUT ROWID;
                 CREATE TABLE IF NOT EXISTS migrations_served (
                     module TEXT PRIMARY KEY,
                     oldest INTEGER NOT NULL
                 ) WITHOUT ROWID;",
            )
        })
        .await?;
        for migrations in all {
            self.migrate_module(*migrations).await?;
        }
        Ok(())
    }

    async fn migrate_module(&self, migrations: Migrations) -> Result<()> {
        let module = migrations.module;
        let standing = self
            .read(move |connection| {
                let sql = "SELECT coalesce(max(version), 0), (SELECT oldest FROM migrations_served WHERE module = ?1)
                           FROM migrations WHERE module = ?1";
                connection.query_row(sql, [module], |row| {
                    Ok(MigrationStatus { version: row.get(0)?, serves: row.get(1)? })
                })
            })
            .await?;
        let (missing, serves) = migrations.missing(standing)?;
        for (version, step) in missing {
            self.write_within(MIGRATION, move |connection| {
                connection.execute_batch(step)?;
                let sql = "INSERT INTO migrations (module, version) VALUES (?, ?)";
                connection.execute(sql, (module, version))?;
                let sql = "INSERT INTO migrations_served (module, oldest) VALUES (?1, ?2)
                           ON CONFLICT (module) DO UPDATE SET oldest = ?2";
                connection.execute(sql, (module, serves))?;
                Ok(())
            })
            .await?;
            info!(module, version, "migrated");
        }
        Ok(())
    }

    /// Reports in `condition` whether writes reach the disk, until the soft phase of the drain. While they do not, a
    /// write is tried again and again, since nothing else shows whether there is room.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn tend(self, condition: Condition, drain: Drain) -> std::result::Result<(), Infallible> {
        let keep = async {
            loop {
                match self.0.health.failure() {
                    None => {
                        condition.met();
                        self.0.health.changed.notified().await;
                    }
                    Some(failure) => {
                        condition.unmet(&format!("it cannot write: {failure}"));
                        tokio::time::sleep(LOOK).await;
                        let _ = self.write(|tx| tx.execute(super::migrations::WRITE_PROBE, [])).await;
                    }
                }
            }
        };
        tokio::select! {
            never = keep => never,
            () = drain.soft() => Ok(()),
        }
    }

    /// The current version of the content: an answer that was read after this call is valid while the stamp stays the
    /// same. A write of another process shows in the write-ahead log, except within the resolution of file times, which
    /// is a few milliseconds.
    pub fn stamp(&self) -> Stamp {
        let mut log = self.0.config.path.clone().into_os_string();
        log.push("-wal");
        // The kernel has these metadata in memory, so this does not read the disk.
        let log = std::fs::metadata(log).ok().map(|log| (log.len(), log.mtime(), log.mtime_nsec()));
        Stamp { written: self.0.written.load(Ordering::Acquire), log }
    }

    /// Returns true when [`copy`] made the store, and [`Sqlite::end_copy`] was not called since.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn is_copy(&self) -> Result<bool> {
        self.read(|connection| connection.pragma_query_value(None, USER_VERSION, |row| row.get::<_, i64>(0)))
            .await
            .map(|version| version == COPY)
    }

    /// Removes the mark of a copy, which takes the place of its original from now on. Returns false when the store is
    /// not a copy.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn end_copy(&self) -> Result<bool> {
        let was_copy = self.is_copy().await?;
        if was_copy {
            self.write(|tx| tx.pragma_update(None, USER_VERSION, 0)).await?;
        }
        Ok(was_copy)
    }

    /// Publishes and returns the status of the pool of readers.
    pub fn status(&self) -> PoolStatus {
        self.0.readers.publish();
        self.0.readers.status()
    }

    /// Refuses new writes, commits the accepted ones, and closes every connection.
    pub async fn close(&self) {
        drop(self.0.writes.lock().take());
        let writer = self.0.writer.lock().take();
        self.0.readers.close();
        if let Some(writer) = writer {
            let _ = spawn_blocking(move || writer.join()).await;
        }
    }
}

fn interrupted_is_late(error: Error) -> Error {
    match error {
        Error::Sql(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted) => {
            Error::Late
        }
        error => error,
    }
}

async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => {
            Err(Error::Panicked(panic_message(&*error.into_panic()).to_owned()))
        }
        Err(_) => Err(Error::Closed),
    }
}

/// Copies a store as it is at one moment into a new file, also while another process uses the store. Deleted data takes
/// no room in the copy. A copy that is marked knows that it is one: see [`Sqlite::is_copy`].
///
/// # Errors
/// When `from` cannot be read, or `to` exists or cannot be written.
pub fn copy(from: &Path, to: &Path, is_marked: bool) -> Result<()> {
    let at = |source| Error::Open { path: to.to_owned(), source };
    let file = OpenOptions::new().create_new(true).append(true).mode(0o600).open(to).map_err(at)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(from, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // The target exists already and is empty, so that it has mode 0600.
    connection.execute("VACUUM INTO ?", [to.to_string_lossy()])?;
    if is_marked {
        Connection::open(to)?.pragma_update(None, USER_VERSION, COPY)?;
    }
    file.sync_all().map_err(at)
}

fn open_writer(path: &Path, deadline: Deadline) -> Result<Connection> {
    // SQLite would make the file readable by others. The -wal and -shm files take over the mode of this file.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| Error::Open { path: path.to_owned(), source })?;
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.progress_handler(STEPS, Some(move || deadline.is_over()))?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    // A write-ahead log that grew in a burst is truncated when it next starts from the beginning.
    connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
    Ok(connection)
}

/// The time at which the statement of a connection is interrupted. SQLite checks it while a statement runs.
#[derive(Clone, Debug, Default)]
pub(super) struct Deadline(Arc<Mutex<Option<Instant>>>);

impl Deadline {
    /// Sets the deadline to `timeout` from now.
    pub(super) fn renew(&self, timeout: Duration) {
        self.set(Some(Instant::now() + timeout));
    }

    fn set(&self, deadline: Option<Instant>) {
        *self.0.lock() = deadline;
    }

    fn is_over(&self) -> bool {
        let deadline = *self.0.lock();
        deadline.is_some_and(|deadline| Instant::now() > deadline)
    }
}

/// One queued write: applied in a savepoint, answered after the commit.
trait Write: Send {
    /// Runs the closure. Returns false when its changes must be undone.
    fn apply(&mut self, connection: &Connection, deadline: &Deadline) -> bool;
    /// The error that kept the write from the disk, if the disk caused it.
    fn disk_failure(&self) -> Option<String>;
    /// Answers the caller. `lost` is the reason if the whole transaction was lost.
    fn answer(self: Box<Self>, lost: Option<&str>);
}

struct Pending<F, T> {
    work: Option<F>,
    /// Time limit of the closure, since every other write waits for it.
    timeout: Duration,
    result: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<F, T> Write for Pending<F, T>
where
    T: Send,
    F: FnOnce(&Connection) -> Result<T> + Send,
{
    fn apply(&mut self, connection: &Connection, deadline: &Deadline) -> bool {
        let Some(work) = self.work.take() else { return false };
        deadline.renew(self.timeout);
        let result = catch_unwind(AssertUnwindSafe(|| work(connection)));
        deadline.set(None);
        let result = match result {
            Ok(result) => result.map_err(interrupted_is_late),
            Err(panic) => Err(Error::Panicked(panic_message(&*panic).to_owned())),
        };
        self.result.insert(result).is_ok()
    }

    fn disk_failure(&self) -> Option<String> {
        match &self.result {
            Some(Err(Error::Sql(error))) if is_disk_failure(error) => Some(error.to_string()),
            _ => None,
        }
    }

    fn answer(self: Box<Self>, lost: Option<&str>) {
        let result = match (self.result, lost) {
            // The error of the closure says more than the error of its transaction.
            (Some(Err(own)), _) => Err(own),
            (Some(result), None) => result,
            (_, lost) => Err(Error::Lost(lost.unwrap_or("it was never begun").to_owned())),
        };
        // A caller that has gone away needs no answer.
        let _ = self.reply.send(result);
    }
}

/// Returns true when the disk is full, broken or read-only.
fn is_disk_failure(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{CannotOpen, DatabaseCorrupt, DiskFull, ReadOnly, SystemIoFailure};
    matches!(
        error.sqlite_error_code(),
        Some(CannotOpen | DatabaseCorrupt | DiskFull | ReadOnly | SystemIoFailure)
    )
}

fn write_loop(
    mut connection: Connection,
    deadline: &Deadline,
    mut writes: mpsc::Receiver<Box<dyn Write>>,
    health: &WriteHealth,
    written: &AtomicU64,
) {
    while let Some(first) = writes.blocking_recv() {
        let mut group = vec![first];
        let lost = commit(&mut connection, deadline, &mut writes, &mut group).err();
        // This comes before the answers, so that a caller finds the new count.
        written.store(connection.total_changes(), Ordering::Release);
        let own = group.iter().find_map(|write| write.disk_failure());
        health.set(lost.clone().filter(|_| own.is_none()).or(own));
        if lost.is_some() {
            // The answer to each caller has the reason.
            metrics::sqlite_lost();
        }
        for write in group {
            write.answer(lost.as_deref());
        }
    }
}

/// Applies `group`, and the writes that join it meanwhile, in one transaction.
fn commit(
    connection: &mut Connection,
    deadline: &Deadline,
    writes: &mut mpsc::Receiver<Box<dyn Write>>,
    group: &mut Vec<Box<dyn Write>>,
) -> std::result::Result<(), String> {
    let transaction = connection
        .transaction_with_behavior(TransactionBehavior::Immediate)
        .map_err(|error| error.to_string())?;
    let execute = |sql| transaction.prepare_cached(sql)?.execute([]).map(drop);
    let mut applied = 0;
    while let Some(write) = group.get_mut(applied) {
        execute("SAVEPOINT one_write").map_err(|error| error.to_string())?;
        let kept = write.apply(&transaction, deadline);
        applied += 1;
        // Some errors (a full disk) make SQLite undo the whole transaction, not just one statement.
        if transaction.is_autocommit() {
            return Err("another write of the same commit broke it".to_owned());
        }
        if !kept {
            execute("ROLLBACK TO one_write").map_err(|error| error.to_string())?;
        }
        execute("RELEASE one_write").map_err(|error| error.to_string())?;
        if applied == group.len() && applied < GROUP {
            group.extend(writes.try_recv());
        }
    }
    transaction.commit().map_err(|error| error.to_string())?;
    metrics::sqlite_committed(applied);
    Ok(())
}

/// The manager of the pool of readers, which opens read-only connections.
#[derive(Debug)]
struct Readers {
    path: PathBuf,
}

impl managed::Manager for Readers {
    type Type = Connection;
    type Error = Error;

    async fn create(&self) -> Result<Connection> {
        let path = self.path.clone();
        blocking(move || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(path, flags)?;
            connection.busy_timeout(Duration::from_secs(5))?;
            connection.set_prepared_statement_cache_capacity(STATEMENTS);
            Ok(connection)
        })
        .await
    }

    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Error> {
        if connection.is_autocommit() {
            return Ok(());
        }
        // An open snapshot would keep the write-ahead log from ever being truncated.
        Err(RecycleError::message("a read left its transaction open"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store(directory: &tempfile::TempDir) -> Sqlite {
        let config = Config {
            name: "sqlite",
            path: directory.path().join("test.db"),
            readers: 2,
            write_queue: 64,
            wait: Duration::from_secs(5),
            commit_wait: Duration::from_secs(5),
        };
        let store = Sqlite::open(config).await.unwrap();
        store.write(|tx| tx.execute_batch("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")).await.unwrap();
        store
    }

    async fn count(store: &Sqlite) -> i64 {
        store.read(|tx| tx.query_row("SELECT count(*) FROM numbers", [], |row| row.get(0))).await.unwrap()
    }

    fn insert(n: i64) -> impl FnOnce(&Connection) -> rusqlite::Result<()> + Send {
        move |tx| tx.execute("INSERT INTO numbers VALUES (?)", [n]).map(drop)
    }

    #[tokio::test]
    async fn a_failed_write_undoes_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let half = store.write(|tx| insert(2)(tx).and_then(|()| insert(1)(tx)).and_then(|()| insert(1)(tx)));
        let (one, half, two) = tokio::join!(store.write(insert(0)), half, store.write(insert(2)));
        assert!(one.is_ok() && two.is_ok());
        assert!(matches!(half, Err(Error::Sql(_))), "{half:?}");
        assert_eq!(count(&store).await, 2);
    }

    #[tokio::test]
    async fn a_panicking_write_is_an_error_of_its_caller() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let panicked = store.write(|tx| insert(1)(tx).map(|()| panic!("bad row"))).await;
        assert!(matches!(&panicked, Err::<(), _>(Error::Panicked(why)) if why == "bad row"), "{panicked:?}");
        store.write(insert(1)).await.unwrap();
        assert_eq!(count(&store).await, 1);
    }

    #[tokio::test]
    async fn a_write_without_end_is_broken_off_and_the_next_one_happens() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let endless = |tx: &Connection| {
            tx.execute(
                "WITH RECURSIVE every (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM every) INSERT INTO numbers SELECT n FROM every",
                [],
            )?;
            Ok(())
        };
        let broken_off = store.write_within(Duration::from_millis(50), endless).await;
        assert!(matches!(broken_off, Err(Error::Late | Error::Slow)), "{broken_off:?}");
        store.write(insert(-1)).await.unwrap();
        assert_eq!(count(&store).await, 1);
    }

    #[tokio::test]
    async fn a_lost_transaction_answers_everybody_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        let (started, gate) = std::sync::mpsc::channel();
        let blocker = store.write(move |_| gate.recv().map_err(|_| rusqlite::Error::InvalidQuery));
        // The explicit ROLLBACK has the effect of a full disk, on which SQLite rolls back by itself.
        let lose = store.write(|tx| tx.execute_batch("ROLLBACK"));
        let open = async {
            tokio::task::yield_now().await;
            started.send(()).unwrap();
        };
        let (blocker, lose, after, ()) = tokio::join!(blocker, lose, store.write(insert(1)), open);
        assert!(matches!(blocker, Err(Error::Lost(_))), "{blocker:?}");
        assert!(matches!(lose, Err(Error::Lost(_))), "{lose:?}");
        assert!(after.is_ok() || matches!(after, Err(Error::Lost(_))), "{after:?}");
        assert_eq!(count(&store).await, i64::from(after.is_ok()));
    }

    #[tokio::test]
    async fn a_closed_store_keeps_what_it_took() {
        let directory = tempfile::tempdir().unwrap();
        let first = store(&directory).await;
        let writes = futures_util::future::join_all((0..50).map(|n| first.write(insert(n))));
        let (written, ()) = tokio::join!(writes, first.close());
        let kept = written.iter().filter(|result| result.is_ok()).count();
        assert!(matches!(first.write(insert(99)).await, Err(Error::Closed)));
        let config = first.0.config.clone();
        let again = Sqlite::open(config).await.unwrap();
        assert_eq!(usize::try_from(count(&again).await).unwrap(), kept);
    }

    #[tokio::test]
    async fn migrations_run_once_and_a_newer_store_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(&directory).await;
        const ONE: Migrations = Migrations { module: "zoo", steps: &["CREATE TABLE lions (id INTEGER)"] };
        const TWO: Migrations =
            Migrations { module: "zoo", steps: &[ONE.steps[0], "ALTER TABLE lions ADD COLUMN name TEXT"] };
        store.migrate(&[ONE]).await.unwrap();
        store.migrate(&[TWO]).await.unwrap();
        store.migrate(&[TWO]).await.unwrap();
        store.write(|tx| tx.execute("INSERT INTO lions VALUES (1, 'Leo')", [])).await.unwrap();
        store.migrate(&[ONE]).await.unwrap();
        const THREE: Migrations = Migrations {
            module: "zoo",
            steps: &[TWO.steps[0], TWO.steps[1], "-- serves 2\nALTER TABLE lions DROP COLUMN id"],
        };
        store.migrate(&[THREE]).await.unwrap();
        store.migrate(&[TWO]).await.unwrap();
        let older = store.migrate(&[ONE]).await;
        let newer = Newer { module: "zoo", found: 3, serves: 2, known: 1 };
        assert!(matches!(older, Err(Error::Newer(found)) if found == newer), "{older:?}");
    }
}
