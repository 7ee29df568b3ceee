//! A Redis server, behind a pool of connections. Every wait has its end: for a free connection, for a new one, for
//! an answer.
//!
//! What is kept in Redis here must not vanish: a server that evicts keys is refused.

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
use super::url::Url;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Condition;

pub use ::redis as client;

/// The oldest server whose commands are enough.
const OLDEST: (u32, u32) = (7, 0);

/// How often the server is asked how it is, and connections are looked through.
const LOOK: Duration = Duration::from_secs(2);

/// Where the server is, and how long to wait for it.
#[derive(Clone, Debug)]
pub struct Config {
    /// `redis://user:password@host:6379/0`, `rediss://..` with TLS, or `redis+unix:///path`.
    pub url: Url,
    /// The authority that has signed the server's certificate, a PEM file, if the system does not know it.
    pub ca_file: Option<PathBuf>,
    /// The most connections.
    pub size: usize,
    /// How long a caller waits for a free one.
    pub wait: Duration,
    /// How long making one may take.
    pub connect_timeout: Duration,
    /// How long an answer may take.
    pub response_timeout: Duration,
    /// How old a connection may grow.
    pub max_age: Duration,
}

/// Why Redis did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL cannot be read.
    #[error("wanted redis://user:password@host:port/database")]
    Url,
    /// Nobody had time within the wait.
    #[error("no connection to Redis is free")]
    Busy,
    /// No connection can be made.
    #[error("Redis cannot be reached")]
    Away(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server is not fit to keep anything.
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
            // What the pool says of it is about the pool.
            PoolError::Backend(error) => Self::Away(error.into()),
            error => Self::Away(error.into()),
        }
    }
}

impl Error {
    /// Whether the same request may well succeed in a moment: nothing is wrong with what was asked.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Busy | Self::Away(_) => true,
            Self::Url | Self::Unfit(_) => false,
            Self::Redis(error) => is_passing(error),
        }
    }
}

/// Whether it is the primary no more.
fn is_read_only(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// Whether the server has no room in its memory, or cannot save.
fn takes_no_writes(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "MISCONF"))
}

fn is_passing(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, MasterDown, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Io => true,
        ErrorKind::Server(kind) => matches!(kind, BusyLoading | MasterDown | ReadOnly | TryAgain),
        // Full memory, a script that runs for too long, a disk that cannot be written to.
        _ => matches!(error.code(), Some("OOM" | "BUSY" | "MISCONF")),
    }
}

/// The result of a command.
pub type Result<T> = std::result::Result<T, Error>;

/// Whether a text is the URL of a Redis that this program understands.
pub fn is_url(text: &str) -> bool {
    text.into_connection_info().is_ok()
}

/// A pool of connections. A cheap handle.
#[derive(Clone)]
pub struct Redis(Arc<RedisInner>);

struct RedisInner {
    config: Config,
    reach: RwLock<Arc<Reach>>,
    /// Whether a write was refused, and none has been taken at a look since.
    cannot_write: AtomicBool,
}

/// The server as it is reached with the URL that holds now.
struct Reach {
    url: Url,
    client: Client,
    /// For scripts, which may take their time: one has a connection to itself.
    pool: Bounded<Manager, Connection>,
    /// For single commands: they share one connection, which is made again when it breaks,
    plain: RwLock<ConnectionManager>,
    /// and has a number, since it is not made again by itself when it only says nothing.
    number: AtomicU64,
}

impl Reach {
    fn new(config: &Config, url: Url) -> Result<Self> {
        let info = url.text.expose_secret().into_connection_info().map_err(|_| Error::Url)?;
        let connection = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            // The library's own is half a second, and one slow answer would end a connection.
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
        let pool = Bounded::new("redis", Pool::builder(manager), limits);
        let pool = pool.map_err(|error| Error::Away(error.into()))?;
        let plain = RwLock::new(plain(config, &client)?);
        Ok(Self { url, client, pool, plain, number: AtomicU64::new(0) })
    }

    /// Looks at the server for what would go wrong later.
    async fn check(&self) -> Result<()> {
        let info: String = match self.ask(::redis::cmd("INFO").arg("everything")).await {
            Err(Error::Redis(error)) if error.code() == Some("NOPERM") => {
                warn!(
                    "Redis does not let this user ask INFO: nobody knows whether it evicts keys, is a replica, or is too old"
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

    /// Whether every write is on the disk before it is answered. Servers that do not say are believed not to.
    async fn fsyncs_always(&self) -> bool {
        let asked = self.ask::<Vec<String>>(::redis::cmd("CONFIG").arg("GET").arg("appendfsync")).await;
        asked.is_ok_and(|answer| answer.get(1).is_some_and(|policy| policy == "always"))
    }

    async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        command.query_async(&mut self.plain().0).await.map_err(on_plain)
    }

    /// The shared connection, and its number.
    fn plain(&self) -> (ConnectionManager, u64) {
        let plain = self.plain.read();
        (plain.clone(), self.number.load(Ordering::Acquire))
    }

    /// Makes another in the place of the shared connection with this number, which has not answered.
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

/// What is asked of the shared connection.
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

/// The shared connection is made when somebody asks: that it cannot be is found out then.
fn on_plain(error: RedisError) -> Error {
    if error.is_io_error() { Error::Away(error.into()) } else { Error::Redis(error) }
}

/// A connection that is made when it is needed.
fn plain(config: &Config, client: &Client) -> Result<ConnectionManager> {
    let plain = ConnectionManagerConfig::new()
        // Whoever asks has no time for more.
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
    /// Connects once, and refuses a server that would lose what it keeps.
    ///
    /// # Errors
    /// When the URL cannot be read, when the server cannot be reached, and when it is not fit.
    pub async fn open(config: Config) -> Result<Self> {
        let reach = RwLock::new(Arc::new(Reach::new(&config, config.url.clone())?));
        let redis = Self(Arc::new(RedisInner { config, reach, cannot_write: AtomicBool::new(false) }));
        redis.reach().check().await?;
        redis.reach().pool.warm().await?;
        Ok(redis)
    }

    fn reach(&self) -> Arc<Reach> {
        Arc::clone(&self.0.reach.read())
    }

    /// How its pool stands.
    pub fn status(&self) -> PoolStatus {
        self.reach().pool.status()
    }

    /// Looks after connections until nothing new is taken: retires those that are old, and says in `condition` whether the
    /// server is there and takes writes.
    ///
    /// # Errors
    /// Never: the type is that of a task.
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

    /// Connects with another URL from now on, if the file has another. The connections that there are end when the last
    /// who uses the old pool, or waits for it, is done.
    async fn follow_url(&self) {
        let Some(candidate) = self.reach().url.changed() else { return };
        let reached = match Reach::new(&self.0.config, candidate.url.clone()) {
            Ok(reach) => reach.check().await.map(|()| reach),
            Err(error) => Err(error),
        };
        if let Some(reach) = candidate.judge("Redis", reached) {
            *self.0.reach.write() = Arc::new(reach);
        }
    }

    async fn look(&self, condition: &Condition) {
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
            // That says something about us.
            Err(Error::Busy) => {}
            Err(error) => {
                // Connections to a server that has gone without a word are found out one by one, each after its time.
                self.reach().pool.retire(|_| true);
                condition.unmet(&with_causes(&error));
            }
        }
    }

    /// Why a write failed lately, if one would fail now: its memory is full, or it cannot save.
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

    /// Notes what a command says about writes.
    fn note<T>(&self, answer: &RedisResult<T>) {
        if answer.as_ref().is_err_and(takes_no_writes) {
            self.0.cannot_write.store(true, Ordering::Release);
        }
    }

    /// Runs one command that takes no time, beside those of others on one connection. It may run twice, when that
    /// connection breaks off.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T> {
        self.share(Ask::Command(command)).await
    }

    /// Runs a script that takes no time in the same way: it may run twice.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn invoke_beside<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        self.share(Ask::Script(script)).await
    }

    async fn share<T: FromRedisValue>(&self, ask: Ask<'_>) -> Result<T> {
        let reach = self.reach();
        let (mut plain, number) = reach.plain();
        let mut answer = ask.of(&mut plain).await;
        if answer.as_ref().is_err_and(RedisError::is_connection_dropped) {
            // Nobody looks at it while it rests: that the server closed it is found out by whoever asks next, and by that
            // it is made again.
            answer = ask.of(&mut plain).await;
        }
        if answer.as_ref().is_err_and(|error| error.is_timeout() || is_read_only(error)) {
            reach.replace_plain(&self.0.config, number);
        }
        self.note(&answer);
        answer.map_err(on_plain)
    }

    /// Runs a script, which the server may have to be told first.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn invoke<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        let mut connection = self.reach().pool.get().await?;
        let answer = script.invoke_async(&mut connection).await;
        self.note(&answer);
        if answer.as_ref().is_err_and(is_read_only) {
            // It leads to what is the primary no more: the next one may find that which is.
            drop(Connection::take(connection));
        }
        Ok(answer?)
    }

    /// A connection of its own that listens on a channel.
    ///
    /// # Errors
    /// When it cannot be made in time.
    pub async fn subscribe(&self, channel: &str) -> Result<PubSub> {
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

    /// Takes no more callers, and closes every connection when it comes back.
    pub fn close(&self) {
        self.reach().pool.close();
    }
}
