//! A Postgres server behind a pool of connections.
//!
//! Every wait is bounded: for a free connection, for a new one, for an answer. The server ends a statement that takes
//! too long (`statement_timeout`); a moment later it is given up here, together with its connection.
//!
//! Statements are parsed, bound and run in one round trip, have no names, and do not rely on the state of a session: so
//! they work through a PgBouncer that pools transactions. Only [`Postgres::listen`] needs a connection of its own.

use std::convert::Infallible;
use std::fmt;
use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, TimeoutType};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use secrecy::ExposeSecret;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, NoTls, Row, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{debug, info, warn};

pub use tokio_postgres::types::Type;

use super::bounded::{Bounded, BoundedLimits};
use super::causes::with_causes;
use super::holders::{HeldConnection, Holders};
use super::migrations::{MigrationStatus, Migrations, Newer};
use super::status::PoolStatus;
use super::tls;
use super::url::{Reloadable, Url};
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Condition;

/// Time that an answer may take beyond the server's own limit.
const GRACE: Duration = Duration::from_secs(1);
/// Time limit for each migration step.
const MIGRATION: Duration = Duration::from_secs(600);
/// Key of the lock on which parallel boots wait for each other during migrations.
const MIGRATION_LOCK: i64 = 0x7065_7265_6e6e_6961;
/// Difference of the clocks above which a warning is logged.
const SKEW: Duration = Duration::from_secs(30);
/// Interval at which the server and the connections are checked.
const LOOK: Duration = Duration::from_secs(2);
/// Settings that decide whether the statements are correct, and for which a role or a database may have other defaults.
/// They are pinned for each connection. PgBouncer does not pass them on, so they are also checked at the start.
const PINNED: [(&str, &str); 6] = [
    // Each statement sees all earlier commits. Consistency between statements comes from locks, or from compare and
    // swap.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    ("lock_timeout", "0"),
    ("standard_conforming_strings", "on"),
    ("transform_null_equals", "off"),
    ("bytea_output", "hex"),
];
/// An answered commit is on the disk. The options of a URL come later, and may ask for more than that.
const DURABLE: &str = "-c synchronous_commit=on";
/// Number of notifications that may wait for the listener.
const NOTIFICATIONS: usize = 1024;

/// Address of the server, and limits for its connections.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the pool in metrics, logs and `/pools`.
    pub name: &'static str,
    /// `postgres://user:password@host:5432/database`. `sslmode=require` means TLS with a check of the server's
    /// certificate and name, otherwise there is no TLS. With several hosts and `target_session_attrs=read-write`, the
    /// host that takes writes is used.
    pub url: Url,
    /// PEM file of the authority that has signed the server's certificate, if the system does not know that authority.
    pub ca_file: Option<PathBuf>,
    /// Maximum number of connections.
    pub size: usize,
    /// Time that a caller waits for a free connection.
    pub wait: Duration,
    /// Time limit for making a connection.
    pub connect_timeout: Duration,
    /// Time limit for one statement.
    pub statement_timeout: Duration,
    /// Maximum age of a connection.
    pub max_age: Duration,
    /// Whether a PgBouncer that pools transactions may be in between. If so, nothing is set for a session, and
    /// `statement_timeout` should be set on the role.
    pub pgbouncer: bool,
    /// Whether the server may be one that only reads, such as a hot standby.
    pub may_only_read: bool,
}

/// Error of a statement or a connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL cannot be parsed.
    #[error("wanted postgres://user:password@host:port/database")]
    Url,
    /// No connection became free in time.
    #[error("no connection to Postgres is free")]
    Busy,
    /// No connection can be made.
    #[error("Postgres cannot be reached")]
    Away(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer did not come in time. A write may have happened.
    #[error("Postgres has not answered within the time allowed; a write may have happened")]
    Slow,
    /// The texts of the database are not UTF-8, so the rows of other programs could not be read.
    #[error(
        "the database has the encoding {0}, and UTF8 is wanted: CREATE DATABASE .. ENCODING 'UTF8' TEMPLATE template0"
    )]
    Encoding(String),
    /// A setting that decides whether statements are correct has another value and cannot be set from here.
    #[error("{setting} is {found}, and {wanted} is wanted: ALTER ROLE .. SET {setting} = '{wanted}'")]
    Setting {
        /// Name of the setting.
        setting: String,
        /// Its value.
        found: String,
        /// The wanted value.
        wanted: String,
    },
    /// The server refused, or the connection broke off.
    #[error("postgres")]
    Sql(#[from] tokio_postgres::Error),
    /// A statement of the transaction failed before its commit, which Postgres would answer like any other.
    #[error("a statement of the transaction has failed before, so all of it is undone")]
    Aborted,
    /// The store was written by a newer version of the program.
    #[error(transparent)]
    Newer(#[from] Newer),
}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Timeout(TimeoutType::Wait) => Self::Busy,
            // The cause says more than the error of the pool around it.
            PoolError::Backend(error) => Self::Away(error.into()),
            error => Self::Away(error.into()),
        }
    }
}

impl Error {
    /// Returns true when the server has rolled the transaction back in favour of another one: class 40, which includes
    /// deadlocks.
    pub fn is_rollback(&self) -> bool {
        matches!(self, Self::Sql(error) if error.code().is_some_and(|code| code.code().starts_with("40")))
    }

    /// True when the disk of the server is full.
    fn is_full(&self) -> bool {
        matches!(self, Self::Sql(error) if error.code() == Some(&SqlState::DISK_FULL))
    }

    /// Returns true when the server is read-only.
    fn is_read_only(&self) -> bool {
        matches!(self, Self::Sql(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION))
    }

    /// Returns true when the error is transient: the request is valid and may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Busy | Self::Away(_) | Self::Slow => true,
            Self::Sql(error) => match error.code() {
                // Without a code, the connection broke, or the answer has the wrong type and will have it every time.
                None => is_broken(error),
                Some(code) => is_passing(code),
            },
            Self::Url | Self::Newer(_) | Self::Encoding(_) | Self::Setting { .. } | Self::Aborted => false,
        }
    }
}

fn is_broken(error: &tokio_postgres::Error) -> bool {
    use std::error::Error;
    error.is_closed() || error.source().is_some_and(<dyn Error>::is::<std::io::Error>)
}

/// Returns true for the transient classes of errors (PostgreSQL, appendix A): 08 connection, 40 rollback, 53 resources,
/// 57 intervention (shutdown, timeout), 58 system; and for a server that is read-only because it is no longer the
/// primary.
fn is_passing(code: &SqlState) -> bool {
    let class = code.code().get(..2).unwrap_or_default();
    matches!(class, "08" | "40" | "53" | "57" | "58") || *code == SqlState::READ_ONLY_SQL_TRANSACTION
}

/// The result of a statement.
pub type Result<T> = std::result::Result<T, Error>;

/// A parameter and its type.
pub type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// A pool of connections. A cheap handle.
#[derive(Clone)]
pub struct Postgres(Arc<PostgresInner>);

struct PostgresInner {
    config: Config,
    reach: Reloadable<Reach>,
    holders: Arc<Holders>,
    /// Number of times that the URL of the server has changed.
    changed: watch::Sender<u64>,
    /// Number of migration steps that the store had at boot.
    steps: AtomicI64,
    /// Queue to the maintenance task, for connections on which an abandoned statement may still run.
    abandoned: Abandoned,
    to_be_cancelled: Mutex<mpsc::Receiver<Doomed>>,
    /// True after a write failed on a full disk, until a check finds that writes succeed again.
    is_full: Arc<AtomicBool>,
    /// True when encoding, settings and clock of the server have been checked.
    is_checked: AtomicBool,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("pool", &self.reach().pool).finish_non_exhaustive()
    }
}

/// The connections to the server with the current URL.
struct Reach {
    url: Url,
    pool: Bounded<Manager>,
    /// Configuration of connections outside the pool.
    dedicated: tokio_postgres::Config,
    tls: Option<MakeRustlsConnect>,
}

impl Reach {
    fn new(config: &Config, url: Url) -> Result<Self> {
        // TLS is always verified, so `verify-full` and `require` mean the same.
        let text = url.text.expose_secret().replace("sslmode=verify-full", "sslmode=require");
        let mut wanted = tokio_postgres::Config::from_str(&text).map_err(|_| Error::Url)?;
        let tls = match wanted.get_ssl_mode() {
            SslMode::Require => {
                let tls = tls::client(config.ca_file.as_deref()).map_err(Error::Away)?;
                Some(MakeRustlsConnect::new(tls))
            }
            _ => {
                wanted.ssl_mode(SslMode::Disable);
                None
            }
        };
        wanted
            .application_name("perennial")
            .connect_timeout(config.connect_timeout)
            // A connection also ends when its packets are silently lost.
            .tcp_user_timeout(config.statement_timeout + GRACE)
            .keepalives_idle(Duration::from_secs(30));
        if !config.pgbouncer {
            // A process that is stopped in the middle of a transaction must not keep its locks.
            let milliseconds = config.statement_timeout.as_millis();
            let mut options = format!(
                "-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={milliseconds}"
            );
            for (setting, value) in PINNED {
                // A backslash keeps a space within a value.
                options.push_str(&format!(" -c {setting}={}", value.replace(' ', "\\ ")));
            }
            let given = wanted.get_options().unwrap_or_default().to_owned();
            wanted.options(format!("{DURABLE} {given} {options}"));
        }
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = match &tls {
            Some(tls) => Manager::from_config(wanted.clone(), tls.clone(), recycling),
            None => Manager::from_config(wanted.clone(), NoTls, recycling),
        };
        let limits = BoundedLimits {
            size: config.size,
            wait: config.wait,
            connect_timeout: config.connect_timeout,
            max_age: config.max_age,
        };
        let pool = Bounded::new(config.name, Pool::builder(manager), limits);
        let pool = pool.map_err(|error| Error::Away(error.into()))?;
        Ok(Self { url, pool, dedicated: wanted, tls })
    }
}

impl Postgres {
    /// Connects, so that an unusable server is noticed here.
    ///
    /// # Errors
    /// When the URL cannot be parsed, when the server cannot be reached, and when its encoding or a setting is wrong.
    pub async fn open(config: Config) -> Result<Self> {
        let postgres = Self::new(config)?;
        postgres.connect().await?;
        Ok(postgres)
    }

    /// Makes the pool without a connection: [`Postgres::tend`] checks the server when it can be reached.
    ///
    /// # Errors
    /// When the URL cannot be parsed.
    pub fn new(config: Config) -> Result<Self> {
        let reach = Reloadable::new(Reach::new(&config, config.url.clone())?);
        let (abandoned, to_be_cancelled) = mpsc::channel(config.size);
        let abandoned = Abandoned { connections: abandoned, is_tended: Arc::default() };
        let to_be_cancelled = Mutex::new(to_be_cancelled);
        let holders = Holders::new(config.name);
        let steps = AtomicI64::new(0);
        let changed = watch::Sender::new(0);
        let shared = PostgresInner {
            config,
            reach,
            holders,
            changed,
            steps,
            abandoned,
            to_be_cancelled,
            is_full: Arc::default(),
            is_checked: AtomicBool::new(false),
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Makes the first connections, and checks the server.
    ///
    /// # Errors
    /// When the server cannot be reached, and when its encoding or a setting is wrong.
    pub async fn connect(&self) -> Result<()> {
        self.check().await?;
        self.reach().pool.warm().await?;
        self.0.is_checked.store(true, Ordering::Release);
        Ok(())
    }

    fn reach(&self) -> Arc<Reach> {
        self.0.reach.get()
    }

    /// The name of the pool.
    pub fn name(&self) -> &'static str {
        self.0.config.name
    }

    /// The status of the pool.
    pub fn status(&self) -> PoolStatus {
        self.reach().pool.status()
    }

    /// Maintains the connections until the soft phase of the drain: closes dead and old ones, has the server cancel
    /// abandoned statements, and reports in `condition` whether the server is reachable and takes writes.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn tend(self, condition: Condition, drain: Drain) -> std::result::Result<(), Infallible> {
        let mut to_be_cancelled = self.0.to_be_cancelled.lock().await;
        self.0.abandoned.is_tended.store(true, Ordering::Release);
        tokio::select! {
            never = self.keep_looking(&condition) => match never {},
            never = self.keep_cancelling(&mut to_be_cancelled) => match never {},
            () = drain.soft() => {}
        }
        // From now on an abandoned connection is closed when it drops.
        to_be_cancelled.close();
        while to_be_cancelled.try_recv().is_ok() {}
        Ok(())
    }

    async fn keep_looking(&self, condition: &Condition) -> Infallible {
        loop {
            self.look(condition).await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Cancels statements in parallel, since a server that is slow to answer has many of them.
    async fn keep_cancelling(&self, to_be_cancelled: &mut mpsc::Receiver<Doomed>) -> Infallible {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(connection) = to_be_cancelled.recv() => under_way.push(self.cancel(connection)),
                Some(()) = under_way.next() => {}
            }
        }
    }

    async fn follow_url(&self) {
        let open = async |url| {
            let reach = Reach::new(&self.0.config, url)?;
            self.is_same_store(&reach).await?;
            Ok::<_, Error>(reach)
        };
        if self.0.reach.follow("Postgres", |reach| &reach.url, open).await {
            // Listeners on the old server must listen on the new one.
            self.0.changed.send_modify(|changes| *changes += 1);
        }
    }

    /// Checks that the server has at least as many migration steps as the store had at boot.
    async fn is_same_store(&self, reach: &Reach) -> Result<()> {
        let object = reach.pool.get().await?;
        let timeout = self.0.config.statement_timeout + GRACE;
        let wanted = self.0.steps.load(Ordering::Relaxed);
        // A database of others has no table of migrations.
        let sql = if wanted > 0 { "SELECT count(*) FROM migrations" } else { "SELECT 0::int8" };
        let rows = within(timeout, object.query_typed(sql, &[])).await?;
        let steps = rows.first().map_or(0, |row| row.get::<_, i64>(0));
        if steps < wanted {
            return Err(Error::Away("its tables are not those of this store".into()));
        }
        Ok(())
    }

    async fn look(&self, condition: &Condition) {
        self.follow_url().await;
        self.reach().pool.retire(|connection| connection.is_closed());
        if !self.0.is_checked.load(Ordering::Acquire)
            && let Err(error) = self.connect().await
        {
            return condition.unmet(&with_causes(&error));
        }
        let sql = "SELECT current_setting('transaction_read_only') = 'on'";
        let asked = self.query(sql, &[]).await;
        match asked.map(|rows| rows.first().is_some_and(|row| row.get(0))) {
            Ok(false) => match self.write_failure().await {
                None => condition.met(),
                Some(failure) => condition.unmet(&format!("it takes no writes: {}", with_causes(&failure))),
            },
            Ok(true) if self.0.config.may_only_read => condition.met(),
            Ok(true) => {
                // The server is no longer the primary: the next connection finds the new one, if the URL names several
                // hosts.
                self.reach().pool.retire(|_| true);
                condition.unmet("it only reads");
            }
            // A busy pool says nothing about the server.
            Err(Error::Busy) => {}
            Err(error) => condition.unmet(&with_causes(&error)),
        }
    }

    /// Returns the error of a test write, if a write has failed lately on a full disk and still fails. Even a write
    /// that changes nothing needs room in the write-ahead log.
    async fn write_failure(&self) -> Option<Error> {
        self.0.is_full.load(Ordering::Acquire).then_some(())?;
        match self.execute(super::migrations::WRITE_PROBE, &[]).await {
            Err(error) if error.is_full() => Some(error),
            _ => {
                self.0.is_full.store(false, Ordering::Release);
                None
            }
        }
    }

    /// Cancels the statement on a connection and then closes the connection, so that the cancellation cannot hit a
    /// later caller. The connection keeps its place in the pool until then, so that the server never runs more
    /// statements than the pool has places.
    async fn cancel(&self, connection: Doomed) {
        let Some(token) = connection.0.as_ref().map(|object| object.cancel_token()) else { return };
        let cancel = async {
            match &self.reach().tls {
                Some(tls) => token.cancel_query(tls.clone()).await,
                None => token.cancel_query(NoTls).await,
            }
        };
        if let Ok(Err(error)) = tokio::time::timeout(self.0.config.connect_timeout, cancel).await {
            debug!(%error, "an abandoned statement cannot be cancelled");
        }
        drop(connection);
    }

    /// Checks encoding, settings and clock of the server, to find problems before they cause failures.
    async fn check(&self) -> Result<()> {
        let connection = self.take().await?;
        let sql =
            "SELECT now(), current_setting('statement_timeout') <> '0', current_setting('server_encoding')";
        let row = connection.query(sql, &[]).await?;
        let Some(row) = row.first() else { return Ok(()) };
        let (now, has_timeout, encoding): (Timestamp, bool, String) = (row.get(0), row.get(1), row.get(2));
        if encoding != "UTF8" {
            return Err(Error::Encoding(encoding));
        }
        self.check_pinned(&connection).await?;
        let durable = connection.query("SELECT current_setting('synchronous_commit') <> 'off'", &[]).await?;
        if !durable.first().is_some_and(|row| row.get(0)) {
            warn!("synchronous_commit is off: answered writes may be lost when the server crashes");
        }
        let skew = now.duration_since(Timestamp::now()).unsigned_abs();
        if skew > SKEW {
            warn!(
                ?skew,
                "the clocks of Postgres and of this machine differ; due times are by that of Postgres"
            );
        }
        if !has_timeout {
            warn!(
                "statements have no timeout: ALTER ROLE .. SET statement_timeout, since PgBouncer keeps none"
            );
        }
        Ok(())
    }

    /// Warns of settings that could not be pinned to their values. A wrong isolation level is an error.
    async fn check_pinned(&self, connection: &PostgresConnection) -> Result<()> {
        let (names, wanted): (Vec<&str>, Vec<&str>) = PINNED.into_iter().unzip();
        let sql = "SELECT name, current_setting(name), wanted FROM unnest($1::text[], $2::text[]) AS pinned (name, wanted)
                   WHERE current_setting(name) <> wanted";
        let rows = connection.query(sql, &[(&names, Type::TEXT_ARRAY), (&wanted, Type::TEXT_ARRAY)]).await?;
        for row in rows {
            let (setting, found, wanted): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            // With another isolation level, transactions would be rolled back without need.
            if setting == "default_transaction_isolation" {
                return Err(Error::Setting { setting, found, wanted });
            }
            warn!(
                setting,
                found,
                wanted,
                "a setting of the database or the role is not as it should be: ALTER ROLE .. SET"
            );
        }
        Ok(())
    }

    /// Time limit for one statement.
    pub(super) fn statement_timeout(&self) -> Duration {
        self.0.config.statement_timeout
    }

    /// Returns true when only features that work through a PgBouncer may be used.
    pub fn is_behind_pgbouncer(&self) -> bool {
        self.0.config.pgbouncer
    }

    /// Returns a connection from the pool.
    ///
    /// # Errors
    /// [`Error::Busy`] when none is free in time, [`Error::Away`] when none can be made.
    pub async fn get(&self) -> Result<PostgresConnection> {
        if !self.0.is_checked.load(Ordering::Acquire) {
            return Err(Error::Away("it has not been checked yet".into()));
        }
        self.take().await
    }

    /// Returns a connection from the pool, also of a server that has not been checked.
    async fn take(&self) -> Result<PostgresConnection> {
        self.0.holders.asked();
        Ok(PostgresConnection {
            object: Some(self.reach().pool.get().await?),
            _held: self.0.holders.hold(),
            answers: Answers {
                missing: AtomicUsize::new(0),
                is_full: Arc::clone(&self.0.is_full),
                is_aborted: AtomicBool::new(false),
            },
            timeout: self.0.config.statement_timeout + GRACE,
            abandoned: self.0.abandoned.clone(),
        })
    }

    /// Runs one statement on a connection of the pool.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.get().await?.query(sql, parameters).await
    }

    /// Runs one statement on a connection of the pool and returns the number of rows that it affects.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<u64> {
        self.get().await?.execute(sql, parameters).await
    }

    /// Applies the missing migration steps of each module, all in one transaction. Parallel boots wait for it.
    ///
    /// # Errors
    /// When a step fails, or the store is newer than the program. Nothing has changed then.
    pub async fn migrate(&self, all: &[Migrations]) -> Result<()> {
        let mut connection = self.get().await?;
        connection.timeout = MIGRATION;
        let transaction = connection.begin().await?;
        transaction.batch(&format!("SET LOCAL statement_timeout = {}", MIGRATION.as_millis())).await?;
        transaction.query("SELECT pg_advisory_xact_lock($1)", &[(&MIGRATION_LOCK, Type::INT8)]).await?;
        transaction
            .batch(
                "CREATE TABLE IF NOT EXISTS migrations (
                     module     text NOT NULL,
                     version    bigint NOT NULL,
                     applied_at timestamptz NOT NULL DEFAULT now(),
                     PRIMARY KEY (module, version)
                 );
                 CREATE TABLE IF NOT EXISTS migrations_served (
                     module text PRIMARY KEY,
                     oldest bigint NOT NULL
                 );",
            )
            .await?;
        for migrations in all {
            let module = &migrations.module;
            let sql =
                "SELECT coalesce(max(version), 0), (SELECT oldest FROM migrations_served WHERE module = $1)
                       FROM migrations WHERE module = $1";
            let found = transaction.query(sql, &[(module, Type::TEXT)]).await?;
            let standing = found.first().map_or_else(MigrationStatus::default, |row| {
                let number = |number: i64| usize::try_from(number).unwrap_or_default();
                MigrationStatus {
                    version: number(row.get(0)),
                    serves: row.get::<_, Option<i64>>(1).map(number),
                }
            });
            let (missing, serves) = migrations.missing(standing)?;
            let serves = i64::try_from(serves).unwrap_or(i64::MAX);
            for (version, step) in missing {
                transaction.batch(step).await?;
                let sql = "INSERT INTO migrations (module, version) VALUES ($1, $2)";
                transaction.query(sql, &[(module, Type::TEXT), (&version, Type::INT8)]).await?;
                let sql = "INSERT INTO migrations_served (module, oldest) VALUES ($1, $2)
                           ON CONFLICT (module) DO UPDATE SET oldest = $2";
                transaction.query(sql, &[(module, Type::TEXT), (&serves, Type::INT8)]).await?;
                info!(module, version, "migrated");
            }
        }
        let steps = transaction.query("SELECT count(*) FROM migrations", &[]).await?;
        transaction.commit().await?;
        self.0.steps.store(steps.first().map_or(0, |row| row.get(0)), Ordering::Relaxed);
        Ok(())
    }

    /// Opens a separate connection that listens on a channel.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn listen(&self, channel: &'static str) -> Result<NotifyListener> {
        let patience = self.0.config.connect_timeout + GRACE;
        let (sender, notifications) = mpsc::channel(NOTIFICATIONS);
        let changed = self.0.changed.subscribe();
        let Reach { dedicated, tls, .. } = &*self.reach();
        let (client, driven): (_, Pin<Box<dyn Future<Output = ()> + Send>>) = match tls {
            Some(tls) => {
                let connected = within(patience, dedicated.connect(tls.clone())).await?;
                (connected.0, Box::pin(drive(connected.1, sender)))
            }
            None => {
                let connected = within(patience, dedicated.connect(NoTls)).await?;
                (connected.0, Box::pin(drive(connected.1, sender)))
            }
        };
        let mut driver = JoinSet::new();
        driver.spawn(driven);
        let timeout = self.0.config.statement_timeout + GRACE;
        let listener = NotifyListener { client, notifications, channel, timeout, changed, _driver: driver };
        within(timeout, listener.client.batch_execute(&format!("LISTEN {channel}"))).await?;
        Ok(listener)
    }

    /// Refuses new callers, and closes every connection when it comes back.
    pub fn close(&self) {
        self.reach().pool.close();
    }
}

/// Passes on notifications until the connection ends or the listener is dropped.
async fn drive<S>(mut connection: tokio_postgres::Connection<Socket, S>, sender: mpsc::Sender<String>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
        if let AsyncMessage::Notification(notification) = message
            && sender.send(notification.payload().to_owned()).await.is_err()
        {
            return;
        }
    }
}

async fn within<T>(
    timeout: Duration,
    answer: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    Ok(tokio::time::timeout(timeout, answer).await.map_err(|_| Error::Slow)??)
}

/// A connection from the pool. It goes back when this drops, unless a statement on it was not answered.
pub struct PostgresConnection {
    object: Option<Object>,
    _held: HeldConnection,
    answers: Answers,
    timeout: Duration,
    abandoned: Abandoned,
}

impl fmt::Debug for PostgresConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

/// A session that runs statements: a connection runs each by itself, a transaction all or none.
pub trait Session {
    /// Runs a statement.
    fn query(&self, sql: &str, parameters: &[Parameter<'_>])
    -> impl Future<Output = Result<Vec<Row>>> + Send;

    /// Runs a statement and returns the number of rows that it affects.
    fn execute(&self, sql: &str, parameters: &[Parameter<'_>]) -> impl Future<Output = Result<u64>> + Send;
}

/// Runs one statement, and counts it as unanswered until its answer has come. If the caller goes away before that, the
/// count stays, and the connection is not used again.
async fn asked<T>(
    answers: &Answers,
    timeout: Duration,
    answer: impl Future<Output = std::result::Result<T, tokio_postgres::Error>>,
) -> Result<T> {
    answers.missing.fetch_add(1, Ordering::Relaxed);
    let answered = within(timeout, answer).await;
    // A connection to a server that is no longer the primary is not used again either.
    if !answered.as_ref().is_err_and(|error| matches!(error, Error::Slow) || error.is_read_only()) {
        answers.missing.fetch_sub(1, Ordering::Relaxed);
    }
    if answered.is_err() {
        answers.is_aborted.store(true, Ordering::Relaxed);
    }
    if answered.as_ref().is_err_and(Error::is_full) {
        answers.is_full.store(true, Ordering::Release);
    }
    answered
}

/// Facts from the answers on a connection.
struct Answers {
    /// Number of unanswered statements.
    missing: AtomicUsize,
    /// True when the disk of the server is full.
    is_full: Arc<AtomicBool>,
    /// True when a statement has failed since the last transaction began.
    is_aborted: AtomicBool,
}

impl Answers {
    /// Checks before a commit that every statement of the transaction was successful.
    fn check_commit(&self) -> Result<()> {
        if self.is_aborted.load(Ordering::Relaxed) { Err(Error::Aborted) } else { Ok(()) }
    }
}

impl PostgresConnection {
    /// Begins a transaction, which is rolled back unless it is committed.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn begin(&mut self) -> Result<Transaction<'_>> {
        let Self { object, answers, timeout, .. } = self;
        let Some(object) = object else { return Err(Error::Busy) };
        let inner = asked(answers, *timeout, object.transaction()).await?;
        answers.is_aborted.store(false, Ordering::Relaxed);
        Ok(Transaction { inner, answers, timeout: *timeout })
    }

    /// Begins a transaction that owns the connection.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn into_transaction(self) -> Result<PostgresTransaction> {
        let begin = self.client()?.batch_execute("BEGIN");
        asked(&self.answers, self.timeout, begin).await?;
        self.answers.is_aborted.store(false, Ordering::Relaxed);
        Ok(PostgresTransaction { connection: self, is_open: true })
    }

    fn client(&self) -> Result<&deadpool_postgres::ClientWrapper> {
        self.object.as_deref().ok_or(Error::Busy)
    }
}

impl Session for PostgresConnection {
    async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        asked(&self.answers, self.timeout, self.client()?.query_typed(sql, parameters)).await
    }

    async fn execute(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<u64> {
        asked(&self.answers, self.timeout, self.client()?.execute_typed(sql, parameters)).await
    }
}

/// A transaction that owns its connection. It is rolled back when it drops without [`PostgresTransaction::commit`].
#[derive(Debug)]
pub struct PostgresTransaction {
    connection: PostgresConnection,
    is_open: bool,
}

impl PostgresTransaction {
    /// Commits the transaction.
    ///
    /// # Errors
    /// See [`Error`]. Whether it was committed is not known after [`Error::Slow`] or a broken connection.
    pub async fn commit(mut self) -> Result<()> {
        self.connection.answers.check_commit()?;
        self.is_open = false;
        let commit = self.connection.client()?.batch_execute("COMMIT");
        asked(&self.connection.answers, self.connection.timeout, commit).await
    }
}

impl Session for PostgresTransaction {
    async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        Session::query(&self.connection, sql, parameters).await
    }

    async fn execute(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<u64> {
        Session::execute(&self.connection, sql, parameters).await
    }
}

impl Drop for PostgresTransaction {
    fn drop(&mut self) {
        if self.is_open
            && let Ok(client) = self.connection.client()
        {
            // The first poll puts the statement into the queue of the connection, before that of the next caller.
            let mut rollback = pin!(client.batch_execute("ROLLBACK"));
            let _ = rollback.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
    }
}

impl Drop for PostgresConnection {
    fn drop(&mut self) {
        if self.answers.missing.load(Ordering::Relaxed) > 0
            && let Some(object) = self.object.take()
        {
            self.abandoned.hand_over(object);
        }
    }
}

/// The queue of connections with abandoned statements, which the maintenance task cancels.
#[derive(Clone)]
struct Abandoned {
    connections: mpsc::Sender<Doomed>,
    is_tended: Arc<AtomicBool>,
}

impl Abandoned {
    fn hand_over(&self, connection: Object) {
        let connection = Doomed(Some(connection));
        // Without a maintenance task, the server ends the statement by its own time limit.
        if self.is_tended.load(Ordering::Acquire) {
            let _ = self.connections.try_send(connection);
        }
    }
}

/// A connection that is not used again. It is closed when this drops, and keeps its place in the pool until then.
struct Doomed(Option<Object>);

impl Drop for Doomed {
    fn drop(&mut self) {
        drop(self.0.take().map(Object::take));
    }
}

/// A transaction on a connection. It is rolled back when it drops without [`Transaction::commit`].
pub struct Transaction<'a> {
    inner: deadpool_postgres::Transaction<'a>,
    answers: &'a Answers,
    timeout: Duration,
}

impl fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transaction")
    }
}

impl Transaction<'_> {
    /// Commits the transaction.
    ///
    /// # Errors
    /// See [`Error`]. Whether it was committed is not known after [`Error::Slow`] or a broken connection.
    pub async fn commit(self) -> Result<()> {
        self.answers.check_commit()?;
        asked(self.answers, self.timeout, self.inner.commit()).await
    }

    /// Runs several statements without parameters.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn batch(&self, sql: &str) -> Result<()> {
        asked(self.answers, self.timeout, self.inner.batch_execute(sql)).await
    }
}

impl Session for Transaction<'_> {
    async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        asked(self.answers, self.timeout, self.inner.query_typed(sql, parameters)).await
    }

    async fn execute(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<u64> {
        asked(self.answers, self.timeout, self.inner.execute_typed(sql, parameters)).await
    }
}

/// A connection that listens on a channel. It ends when this drops.
pub struct NotifyListener {
    client: tokio_postgres::Client,
    notifications: mpsc::Receiver<String>,
    channel: &'static str,
    timeout: Duration,
    /// Changes when the URL of the server changes.
    changed: watch::Receiver<u64>,
    _driver: JoinSet<()>,
}

impl fmt::Debug for NotifyListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("channel", &self.channel).finish_non_exhaustive()
    }
}

impl NotifyListener {
    /// Waits for the next notification. Returns `None` when the connection has ended or must be replaced.
    pub async fn next(&mut self) -> Option<String> {
        tokio::select! {
            notification = self.notifications.recv() => notification,
            _ = self.changed.changed() => None,
        }
    }

    /// Sends the payloads to all listeners on the channel, including this one.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn notify(&self, payloads: &[String]) -> Result<()> {
        let sql = "SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload";
        let parameters: [Parameter<'_>; 2] = [(&self.channel, Type::TEXT), (&payloads, Type::TEXT_ARRAY)];
        within(self.timeout, self.client.query_typed(sql, &parameters)).await.map(drop)
    }
}
