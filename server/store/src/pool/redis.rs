//! A Redis server behind a pool of connections. Every wait is bounded: for a free connection, for a new one, for an
//! answer.
//!
//! The data in Redis must not vanish: a server that evicts keys is refused, unless it is a cache.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ::redis::aio::{ConnectionManager, ConnectionManagerConfig, PubSub};
use ::redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, RedisError, RedisResult};
use ::redis::{IntoConnectionInfo, ScriptInvocation, ServerErrorKind, TlsCertificates};
use deadpool_redis::{Connection, Manager, Pool, PoolError, TimeoutType};
use parking_lot::RwLock;
use secrecy::ExposeSecret;
use tracing::{info, warn};

use super::bounded::{Bounded, BoundedLimits};
use super::causes::with_causes;
use super::status::PoolStatus;
use super::url::{Reloadable, Url};
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Condition;

pub use ::redis as client;

/// The oldest version of Redis that has all the commands in use.
const OLDEST: (u32, u32) = (7, 0);

/// Interval at which the server and the connections are checked.
const LOOK: Duration = Duration::from_secs(2);

/// Address of the server, and limits for its connections.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the pool in metrics, logs and `/pools`.
    pub name: &'static str,
    /// Whether the server may evict keys: what is in it is a cache.
    pub may_evict: bool,
    /// `redis://user:password@host:6379/0`, `rediss://..` with TLS, or `redis+unix:///path`.
    pub url: Url,
    /// PEM file of the authority that has signed the server's certificate, if the system does not know that authority.
    pub ca_file: Option<PathBuf>,
    /// Maximum number of connections.
    pub size: usize,
    /// Time that a caller waits for a free connection.
    pub wait: Duration,
    /// Time limit for making a connection.
    pub connect_timeout: Duration,
    /// Time limit for an answer.
    pub response_timeout: Duration,
    /// Maximum age of a connection.
    pub max_age: Duration,
}

/// Error of a request to Redis.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL cannot be parsed.
    #[error("wanted redis://user:password@host:port/database")]
    Url,
    /// No connection became free in time.
    #[error("no connection to Redis is free")]
    Busy,
    /// No connection can be made.
    #[error("Redis cannot be reached")]
    Away(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server is not fit to keep data.
    #[error("this Redis cannot be used: {0}")]
    Unfit(String),
    /// The server refused, or the connection broke off. A write may have happened.
    #[error("Redis: {0}")]
    Redis(RedisError),
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        Self::Redis(error)
    }
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
    /// Returns true when the error is transient: the request is valid and may succeed in a moment.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Busy | Self::Away(_) => true,
            Self::Url | Self::Unfit(_) => false,
            Self::Redis(error) => is_passing(error),
        }
    }
}

/// Returns true when the server is no longer the primary.
fn is_read_only(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// Returns true when the server has no room in its memory, or cannot save.
fn takes_no_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "MISCONF"))
}

fn is_passing(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, MasterDown, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Io => true,
        ErrorKind::Server(kind) => matches!(kind, BusyLoading | MasterDown | ReadOnly | TryAgain),
        // The memory is full, a script runs for too long, or the disk cannot be written to.
        _ => matches!(error.code(), Some("OOM" | "BUSY" | "MISCONF")),
    }
}

/// The result of a command.
pub type Result<T> = std::result::Result<T, Error>;

/// Returns true when `text` is a Redis URL that this program understands.
pub fn is_url(text: &str) -> bool {
    text.into_connection_info().is_ok()
}

/// A pool of connections. A cheap handle.
#[derive(Clone)]
pub struct Redis(Arc<RedisInner>);

struct RedisInner {
    config: Config,
    reach: Reloadable<Reach>,
    /// True after a refused write, until a check finds that the server takes writes again.
    cannot_write: AtomicBool,
    /// True when version, mode and settings of the server have been checked.
    is_checked: AtomicBool,
}

/// The connections to the server with the current URL.
struct Reach {
    url: Url,
    client: Client,
    /// Connections for scripts. A script may take long, so each has a connection to itself.
    pool: Bounded<Manager, Connection>,
    /// The connection that single commands share. It is made again when it breaks.
    plain: RwLock<ConnectionManager>,
    /// Number of the shared connection. A connection that only stops answering is not made again by itself:
    /// `replace_plain` replaces the one with this number.
    number: AtomicU64,
}

impl Reach {
    fn new(config: &Config, url: Url) -> Result<Self> {
        let info = url.text.expose_secret().into_connection_info().map_err(|_| Error::Url)?;
        let connection = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            // The default of the library is half a second, and one slow answer would end a connection.
            .set_response_timeout(Some(config.response_timeout));
        let client = match &config.ca_file {
            Some(file) => {
                let root_cert = std::fs::read(file).map_err(|error| Error::Away(error.into()))?;
                let certificates = TlsCertificates { client_tls: None, root_cert: Some(root_cert) };
                Client::build_with_tls(info, certificates)?
            }
            None => Client::open(info)?,
        };
        let manager = Manager::new_with_config(client.get_connection_info().clone(), connection)?;
        let limits = BoundedLimits {
            size: config.size,
            wait: config.wait,
            connect_timeout: config.connect_timeout,
            max_age: config.max_age,
        };
        let pool = Bounded::new(config.name, Pool::builder(manager), limits);
        let pool = pool.map_err(|error| Error::Away(error.into()))?;
        let plain = RwLock::new(plain(config, &client)?);
        Ok(Self { url, client, pool, plain, number: AtomicU64::new(0) })
    }

    /// Checks version, mode, role and settings of the server, to find problems before they cause failures.
    async fn check(&self, config: &Config) -> Result<()> {
        let info: String = match self.ask(::redis::cmd("INFO").arg("everything")).await {
            Err(Error::Redis(error)) if error.code() == Some("NOPERM") => {
                warn!(
                    "Redis does not let this user ask INFO: its version, role and eviction policy are not checked"
                );
                return Ok(());
            }
            asked => asked?,
        };
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        let version = field("redis_version");
        let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
        if (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default()) < OLDEST {
            return Err(Error::Unfit(format!(
                "it is version {version}, wanted {}.{} or newer",
                OLDEST.0, OLDEST.1
            )));
        }
        match field("redis_mode").as_str() {
            "cluster" => {
                let reason = "it is a cluster, wanted a single server or a primary with replicas";
                return Err(Error::Unfit(reason.into()));
            }
            "sentinel" => {
                let reason = "it is a Sentinel, which keeps nothing: wanted a name that leads to the primary";
                return Err(Error::Unfit(reason.into()));
            }
            _ => {}
        }
        if field("role") == "slave" {
            return Err(Error::Unfit("it is a replica, wanted the primary".into()));
        }
        if config.may_evict {
            return Ok(());
        }
        let policy = field("maxmemory_policy");
        if policy != "noeviction" {
            let reason = format!("maxmemory-policy is {policy}, wanted noeviction: it would throw jobs away");
            return Err(Error::Unfit(reason));
        }
        let durable = field("aof_enabled") == "1" && self.fsyncs_always().await;
        if !durable {
            warn!("Redis may lose the last writes in a crash: wanted appendonly yes and appendfsync always");
        }
        info!(version, durable, "Redis is fit");
        Ok(())
    }

    /// Returns true when every write is on the disk before it is answered. The answer is false for a server that does
    /// not tell.
    async fn fsyncs_always(&self) -> bool {
        let asked = self.ask::<Vec<String>>(::redis::cmd("CONFIG").arg("GET").arg("appendfsync")).await;
        asked.is_ok_and(|answer| answer.get(1).is_some_and(|policy| policy == "always"))
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        command.query_async(&mut self.plain().0).await.map_err(on_plain)
    }

    /// The shared connection and its number.
    fn plain(&self) -> (ConnectionManager, u64) {
        let plain = self.plain.read();
        (plain.clone(), self.number.load(Ordering::Acquire))
    }

    /// Replaces the shared connection with the number `silent`, which has not answered.
    fn replace_plain(&self, config: &Config, silent: u64) {
        let mut current = self.plain.write();
        if self.number.load(Ordering::Acquire) != silent {
            return;
        }
        if let Ok(plain) = plain(config, &self.client) {
            *current = plain;
            self.number.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// A request on the shared connection.
#[derive(Clone, Copy)]
enum Ask<'a> {
    Command(&'a Cmd),
    Script(&'a ScriptInvocation<'a>),
}

impl Ask<'_> {
    async fn of<T: FromRedisValue>(
        self,
        connection: &mut ConnectionManager,
    ) -> std::result::Result<T, RedisError> {
        match self {
            Self::Command(command) => command.query_async(connection).await,
            Self::Script(script) => script.invoke_async(connection).await,
        }
    }
}

/// Converts an error of the shared connection. It is made on first use, so an I/O error means that it cannot be made.
fn on_plain(error: RedisError) -> Error {
    if error.is_io_error() { Error::Away(error.into()) } else { Error::Redis(error) }
}

/// Creates a connection that is made on first use.
fn plain(config: &Config, client: &Client) -> Result<ConnectionManager> {
    let plain = ConnectionManagerConfig::new()
        // The caller has no time for retries.
        .set_number_of_retries(0)
        .set_connection_timeout(Some(config.connect_timeout))
        .set_response_timeout(Some(config.response_timeout));
    Ok(ConnectionManager::new_lazy_with_config(client.clone(), plain)?)
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("pool", &self.reach().pool).finish_non_exhaustive()
    }
}

impl Redis {
    /// Connects, and refuses a server that would lose data.
    ///
    /// # Errors
    /// When the URL cannot be parsed, when the server cannot be reached, and when it is not fit.
    pub async fn open(config: Config) -> Result<Self> {
        let redis = Self::new(config)?;
        redis.connect().await?;
        Ok(redis)
    }

    /// Makes the pool without a connection: [`Redis::tend`] checks the server when it can be reached.
    ///
    /// # Errors
    /// When the URL cannot be parsed.
    pub fn new(config: Config) -> Result<Self> {
        let reach = Reloadable::new(Reach::new(&config, config.url.clone())?);
        let (cannot_write, is_checked) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self(Arc::new(RedisInner { config, reach, cannot_write, is_checked })))
    }

    /// Makes the first connections, and checks the server.
    ///
    /// # Errors
    /// When the server cannot be reached, and when it is not fit.
    pub async fn connect(&self) -> Result<()> {
        self.reach().check(&self.0.config).await?;
        self.reach().pool.warm().await?;
        self.0.is_checked.store(true, Ordering::Release);
        Ok(())
    }

    /// The name of the pool.
    pub fn name(&self) -> &'static str {
        self.0.config.name
    }

    fn reach(&self) -> Arc<Reach> {
        self.0.reach.get()
    }

    /// The status of the pool.
    pub fn status(&self) -> PoolStatus {
        self.reach().pool.status()
    }

    /// Maintains the connections until the soft phase of the drain: closes old ones, and reports in `condition` whether
    /// the server is reachable and takes writes.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn tend(self, condition: Condition, drain: Drain) -> std::result::Result<(), Infallible> {
        let keep = async {
            loop {
                self.follow_url().await;
                self.reach().pool.retire(|_| false);
                self.look(&condition).await;
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            never = keep => never,
            () = drain.soft() => Ok(()),
        }
    }

    async fn follow_url(&self) {
        let open = async |url| {
            let reach = Reach::new(&self.0.config, url)?;
            reach.check(&self.0.config).await?;
            Ok::<_, Error>(reach)
        };
        self.0.reach.follow("Redis", |reach| &reach.url, open).await;
    }

    async fn look(&self, condition: &Condition) {
        if !self.is_checked()
            && let Err(error) = self.connect().await
        {
            // The next connection may find another server behind the same name.
            let reach = self.reach();
            reach.pool.retire(|_| true);
            reach.replace_plain(&self.0.config, reach.plain().1);
            return condition.unmet(&with_causes(&error));
        }
        let master = ::redis::Value::BulkString(b"master".to_vec());
        match self.query::<Vec<::redis::Value>>(&::redis::cmd("ROLE")).await {
            Ok(role) if role.first() == Some(&master) => match self.write_failure().await {
                None => condition.met(),
                Some(failure) => condition.unmet(&format!("it takes no writes: {failure}")),
            },
            Ok(_) => {
                // The next connection may find a new primary behind the same name.
                let reach = self.reach();
                reach.pool.retire(|_| true);
                reach.replace_plain(&self.0.config, reach.plain().1);
                condition.unmet("it is a replica");
            }
            // A busy pool says nothing about the server.
            Err(Error::Busy) => {}
            Err(error) => {
                // Without this, connections to a server that is gone are detected one by one, each after a timeout.
                self.reach().pool.retire(|_| true);
                condition.unmet(&with_causes(&error));
            }
        }
    }

    /// Returns the reason why a write has failed lately, if writes still fail: the memory is full, or the server cannot
    /// save.
    async fn write_failure(&self) -> Option<String> {
        self.0.cannot_write.load(Ordering::Acquire).then_some(())?;
        let mut probe = ::redis::cmd("SET");
        probe.arg("perennial:probe").arg(1).arg("PX").arg(1000);
        match self.query::<()>(&probe).await {
            Err(Error::Redis(error)) if takes_no_writes(&error) => {
                Some(error.detail().unwrap_or("out of memory, or out of disk").to_owned())
            }
            _ => {
                self.0.cannot_write.store(false, Ordering::Release);
                None
            }
        }
    }

    /// Records when an answer shows that the server takes no writes.
    fn note<T>(&self, answer: &RedisResult<T>) {
        if answer.as_ref().is_err_and(takes_no_writes) {
            self.0.cannot_write.store(true, Ordering::Release);
        }
    }

    /// Runs one quick command on the shared connection. The command may run twice when that connection breaks.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        self.share(Ask::Command(command)).await
    }

    /// Runs a quick script on the shared connection. The script may run twice when that connection breaks.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn invoke_beside<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        self.share(Ask::Script(script)).await
    }

    fn is_checked(&self) -> bool {
        self.0.is_checked.load(Ordering::Acquire)
    }

    /// Refuses requests to a server that was away at the start, until it is known to be fit.
    fn must_be_checked(&self) -> Result<()> {
        if self.is_checked() { Ok(()) } else { Err(Error::Away("it has not been checked yet".into())) }
    }

    async fn share<T: FromRedisValue>(&self, ask: Ask<'_>) -> Result<T> {
        self.must_be_checked()?;
        let reach = self.reach();
        let (mut plain, number) = reach.plain();
        let mut answer = ask.of(&mut plain).await;
        if answer.as_ref().is_err_and(RedisError::is_connection_dropped) {
            // An idle connection is not polled: the next request finds that the server has closed it, and so causes it
            // to be made again.
            answer = ask.of(&mut plain).await;
        }
        if answer.as_ref().is_err_and(|error| error.is_timeout() || is_read_only(error)) {
            reach.replace_plain(&self.0.config, number);
        }
        self.note(&answer);
        answer.map_err(on_plain)
    }

    /// Runs a script on a connection of the pool, and loads it into the server first if necessary.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn invoke<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        self.must_be_checked()?;
        let mut connection = self.reach().pool.get().await?;
        let answer = script.invoke_async(&mut connection).await;
        self.note(&answer);
        if answer.as_ref().is_err_and(is_read_only) {
            // The connection leads to a server that is no longer the primary: the next one may find the primary.
            drop(Connection::take(connection));
        }
        Ok(answer?)
    }

    /// Opens a separate connection that listens on a channel.
    ///
    /// # Errors
    /// When it cannot be made in time.
    pub async fn subscribe(&self, channel: &str) -> Result<PubSub> {
        self.must_be_checked()?;
        let subscribe = async {
            let mut pubsub = self.reach().client.get_async_pubsub().await?;
            pubsub.subscribe(channel).await?;
            Ok::<_, RedisError>(pubsub)
        };
        let timeout = self.0.config.connect_timeout + self.0.config.response_timeout;
        match tokio::time::timeout(timeout, subscribe).await {
            Ok(subscribed) => Ok(subscribed?),
            Err(elapsed) => Err(Error::Away(elapsed.into())),
        }
    }

    /// Refuses new callers, and closes every connection when it comes back.
    pub fn close(&self) {
        self.reach().pool.close();
    }
}
