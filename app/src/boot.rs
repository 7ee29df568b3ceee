//! Boot, top to bottom: everything that serves is made here, by hand.

mod start;

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use http::HeaderValue;
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Health;
use perennial_runtime::tasks::Tasks;
use perennial_server::http::Server;
use perennial_server::net::{BindError, Connections, Sockets};
use perennial_store::cache::{Bus, Caches};
use perennial_store::pool::redis::Redis;
use perennial_store::pool::sql::{self, Tables};
use perennial_store::pool::sqlite::{self, Sqlite};
use perennial_store::pool::{self, Url, postgres::Postgres, with_causes};
use perennial_workers::admission::Admission;
use perennial_workers::cron::Crontab;
use perennial_workers::job::DEFAULT_QUEUE;
use perennial_workers::limits::Limits;
use perennial_workers::outbox::{self, Outbox};
use perennial_workers::store::postgres::PostgresQueue;
use perennial_workers::store::redis::RedisQueue;
use perennial_workers::store::sqlite::SqliteQueue;
use perennial_workers::worker::{self, Worker};
use perennial_workers::{Jobs, Registry, store};
use secrecy::SecretString;
use tracing::{info, warn};
use utoipa_axum::router::OpenApiRouter;

use crate::access::{self, Access, first};
use crate::addresses::{Addresses, url};
use crate::admin::jobs::Books;
use crate::admin::keys::Keyring;
use crate::backup;
use crate::config::{self, Config};
use crate::data_dir::{self, DataDir};
use crate::maintenance;
use crate::module::{Closer, Configured, Host, StatusFn};
use crate::openapi;
use crate::pause::{self, Pause, Why};
use crate::sites::Sites;
use crate::succession::Inheritance;

/// How many writes may wait for the store's writer.
const WRITE_QUEUE: usize = 4096;
/// How long a caller waits for a commit: a disk that takes longer is out of order.
const COMMIT_WAIT: Duration = Duration::from_secs(60);
/// How long closing one thing may take at the very end.
const CLOSE: Duration = Duration::from_secs(5);
/// How long a predecessor may take, besides its drain, until it has closed everything.
const CLOSING: Duration = Duration::from_secs(30);

/// A pool as it stands when somebody looks.
pub(crate) type PoolFn = Arc<dyn Fn() -> (&'static str, pool::Status) + Send + Sync>;

/// What serves, and what is needed to stop it.
pub(crate) struct App {
    pub(crate) tasks: Tasks,
    pub(crate) access: Access,
    pub(crate) workers: worker::Status,
    pub(crate) books: Books,
    pub(crate) limits: Limits,
    pub(crate) connections: Connections,
    pub(crate) sockets: Sockets,
    pub(crate) status: Vec<(&'static str, StatusFn)>,
    pub(crate) pools: Vec<PoolFn>,
    pub(crate) keyring: Keyring,
    /// Where the public listens.
    pub(crate) addresses: Vec<String>,
    /// Lines for whoever started the program on a terminal.
    pub(crate) announcements: Vec<String>,
    closers: Vec<Closer>,
    /// The modules' routes on the admin listener.
    pub(crate) admin_read: Router,
    pub(crate) admin_write: Router,
    store: sql::Store,
    data_dir: Arc<DataDir>,
}

/// Makes everything and opens the public listener. Runs on the runtime that serves.
pub(crate) async fn boot(
    config: Config,
    inheritance: Inheritance,
    modules: Vec<Configured>,
    tables: Vec<Tables>,
    admin_addresses: Vec<String>,
    health: Health,
    drain: Drain,
) -> anyhow::Result<App> {
    // A predecessor is asked to leave only when there is nothing left that the settings could have wrong.
    let open = async || {
        Server::bind(config.server.clone(), &inheritance.sockets).await.map_err(|error| {
            // One that is not taken over may be why.
            inheritance.warn_of_the_rest();
            not_opened(error, "server.listen")
        })
    };
    let early = if inheritance.succeeds() { Some(open().await?) } else { None };
    let patience = config.phases.succession + config.phases.hard + CLOSING;
    let data_dir = Arc::new(inheritance.lock(&config.data_dir, patience).await?);
    let store = open_store(&data_dir, &config.store).await?;
    store.migrate(&tables).await.context("the store cannot be brought up to date")?;
    let tasks = Tasks::new(drain.clone());
    let (queue, outbox) = open_queue(&config, &store).await?;
    let caches = caches(&queue, &config);
    let admin_token = first::make(&data_dir, &store, !config.key_files.is_empty()).await?;
    let sites = config.sites.clone().open(&store).await.context("the sites cannot be written down")?;
    let access = open_access(&config, &store, &queue, &sites, &caches, admin_token);
    if let Some(key) = data_dir.read(data_dir::API_KEY)
        && access.caller(&key, None).await.is_ok_and(|caller| caller.is_none())
    {
        let file = data_dir.join(data_dir::API_KEY);
        warn!(file = %file.display(), "this API key is not in the store, and opens nothing");
    }

    let admission = Admission::new(config.bounds);
    let jobs = Jobs::new(queue.clone(), admission.clone());
    let mut registry = Registry::new();
    registry.serve(DEFAULT_QUEUE, config.slots);
    let mut host = Host {
        store: store.clone(),
        jobs: jobs.clone(),
        access: access.clone(),
        sites: sites.clone(),
        caches: caches.clone(),
        data_dir: Arc::clone(&data_dir),
        drain: drain.clone(),
        health: health.clone(),
        tasks: tasks.clone(),
        routes: OpenApiRouter::new(),
        registry,
        schedules: Vec::new(),
        status: Vec::new(),
        announcements: Vec::new(),
        backed_up: Vec::new(),
        closers: Vec::new(),
        admin_read: Router::new(),
        admin_write: Router::new(),
    };
    maintenance::mount(&mut host, config.retention)?;
    for module in modules {
        let name = module.name;
        (module.mount)(&mut host).await.with_context(|| format!("the module {name} cannot be mounted"))?;
        info!(module = name, "mounted");
    }
    let source =
        backup::Source::of(&config.data_dir, &config.store, std::mem::take(&mut host.backed_up)).ok();
    host.admin_write(backup::admin_write(source));
    let why = if config.paused { Some(Why::Asked) } else { store.is_copy().await?.then_some(Why::Copy) };
    let pause = Pause::new(why);
    host.admin_write(pause::admin_write(pause.clone(), store.clone()));
    if let Some(why) = pause.why() {
        host.announce(move |_| why.reason().to_owned());
    }
    let Host { routes, registry, schedules, status, announcements, closers, admin_read, admin_write, .. } =
        host;
    let kinds = Arc::new(OnceLock::new());
    let routes = routes.merge(crate::jobs::routes(jobs.clone(), access.clone(), Arc::clone(&kinds)));

    let cpu = Cpu::start(config.cpu).context("the threads for the processor cannot be started")?;
    let server = match early {
        Some(server) => server,
        None => open().await?,
    };
    inheritance.warn_of_the_rest();
    let (connections, sockets) = (server.connections(), server.sockets());
    registry.check()?;
    let registry = Arc::new(registry);
    if pause.why().is_none() {
        start::take_over(&queue, &registry, config.worker.lease)
            .await
            .context("the jobs of the last process cannot be taken over")?;
    }
    let worker = Worker::new(jobs.store().clone(), Arc::clone(&registry), config.worker.clone())?;
    let workers = worker.status();
    let _ = kinds.set(Arc::clone(&registry));
    let schedules = config.cron.schedules(schedules, &registry)?;
    let crontab = Crontab::new(queue.clone(), admission.clone(), schedules);
    crontab.define().await.context("the schedules cannot be written down")?;
    let books = Books {
        jobs: jobs.clone(),
        registry: Arc::clone(&registry),
        worker: Some(workers.clone()),
        crontab: crontab.clone(),
    };
    let addresses = Addresses { server: server.addresses(), admin: admin_addresses };
    data_dir.write(data_dir::ADDRESSES, &format!("{}\n", serde_json::to_string(&addresses)?))?;

    // Nothing below can fail: a job that is begun is not cut off by a boot that is not finished.
    let pools = start::Parts {
        config: &config,
        tasks: &tasks,
        health: &health,
        drain: &drain,
        store: &store,
        queue: &queue,
        outbox,
        registry: &registry,
        admission,
        worker,
        access: &access,
        caches: &caches,
        crontab,
        pause: &pause,
    }
    .start();
    let readers = {
        let sites = access.sites().clone();
        Arc::new(move |origin: &HeaderValue| {
            origin.to_str().is_ok_and(|origin| sites.of_origin(origin).is_some())
        })
    };
    let server = server.errors_readable_by(readers);
    let routes = openapi::with_description(routes);
    tasks.critical("http", server.run(routes, Some(cpu), drain));
    info!(server = addresses.server.join(", "), admin = addresses.admin.join(", "), "ready");

    let announcements = match url(&addresses.server) {
        Some(base) => announcements.iter().map(|line| line(&base)).collect(),
        None => Vec::new(),
    };
    Ok(App {
        tasks,
        access,
        workers,
        books,
        limits: config.limits,
        connections,
        sockets,
        status,
        pools,
        keyring: Keyring { store: store.clone(), sites, caches },
        addresses: addresses.server,
        announcements,
        closers,
        admin_read,
        admin_write,
        store,
        data_dir,
    })
}

/// Why a listener could not be opened, with the setting that says where it is to be.
pub(crate) fn not_opened(error: BindError, setting: &'static str) -> anyhow::Error {
    let is_taken =
        matches!(&error, BindError::Address { source, .. } if source.kind() == io::ErrorKind::AddrInUse);
    let remedy = match is_taken {
        true => format!(
            "{setting}: another program listens there (or a socket that was inherited for another address, which a warning names); stop it, or choose another address (--set {setting}=127.0.0.1:PORT)"
        ),
        false => format!("{setting}: the listener cannot be opened"),
    };
    anyhow::Error::from(error).context(remedy)
}

impl App {
    /// Closes what serves nobody any more, and says whether it closed in time. It does not if every thread of
    /// the serving runtime is blocked.
    pub(crate) async fn close(self) -> bool {
        self.data_dir.remove(data_dir::ADDRESSES);
        let mut in_time = true;
        for close in self.closers {
            in_time &= tokio::time::timeout(CLOSE, close()).await.is_ok();
        }
        in_time & tokio::time::timeout(CLOSE, self.store.close()).await.is_ok()
    }
}

/// The tables of everything: those of the host, then those of each module.
pub(crate) fn tables(modules: impl Iterator<Item = Tables>) -> Vec<Tables> {
    [access::keys::TABLES, store::TABLES, outbox::TABLES].into_iter().chain(modules).collect()
}

/// Opens the store.
pub(crate) async fn open_store(data_dir: &DataDir, store: &config::Store) -> anyhow::Result<sql::Store> {
    let opened = match store {
        config::Store::Sqlite { file, readers, wait, statement_timeout } => {
            let path = data_dir.join(file);
            data_dir.lock_store(&path)?;
            let config = sqlite::Config {
                path,
                readers: *readers,
                write_queue: WRITE_QUEUE,
                wait: *wait,
                commit_wait: COMMIT_WAIT,
            };
            let opened =
                Sqlite::open(config).await.map(|store| store.with_statement_timeout(*statement_timeout));
            opened.map(sql::Store::Sqlite).map_err(sql::Error::from)
        }
        config::Store::Postgres(config) => {
            let opened = Postgres::open(config.clone()).await.map(sql::Store::Postgres);
            return opened.map_err(|error| not_usable("store.url: Postgres", &config.url, &error));
        }
    };
    opened.context("the store cannot be opened")
}

/// Why a server cannot be used: one sentence that says which, where and why.
fn not_usable(server: &str, url: &Url, error: &(dyn std::error::Error + 'static)) -> anyhow::Error {
    anyhow::anyhow!("{server} at {} cannot be used: {}", url.place(), with_causes(error))
}

/// Opens the store of jobs; and the outbox, if that is another one than the store.
pub(crate) async fn open_queue(
    config: &Config,
    store: &sql::Store,
) -> anyhow::Result<(store::Store, Option<Outbox>)> {
    if let Some(config::RedisQueue { redis, prefix }) = &config.queue {
        let opened = Redis::open(redis.clone()).await;
        let redis = opened.map_err(|error| not_usable("queue.url: Redis", &redis.url, &error))?;
        let outbox = Outbox::new(store.clone());
        let queue = RedisQueue::with_outbox(redis, prefix, outbox.clone());
        return Ok((store::Store::Redis(queue), Some(outbox)));
    }
    let queue = match store {
        sql::Store::Sqlite(sqlite) => store::Store::Sqlite(SqliteQueue::new(sqlite.clone())),
        sql::Store::Postgres(postgres) => store::Store::Postgres(PostgresQueue::new(postgres.clone())),
    };
    Ok((queue, None))
}

/// The caches, which replicas forget together where they share a Redis.
pub(crate) fn caches(queue: &store::Store, config: &Config) -> Caches {
    Caches::new(shared_redis(queue, config).map(|(redis, prefix)| Bus::new(redis, &prefix)))
}

fn open_access(
    config: &Config,
    store: &sql::Store,
    queue: &store::Store,
    sites: &Sites,
    caches: &Caches,
    admin_token: SecretString,
) -> Access {
    let files = config.key_files.clone();
    Access::new(store.clone(), sites.clone(), caches, files, shared_redis(queue, config), admin_token)
}

/// The Redis that replicas share, if they do, and what its keys begin with.
fn shared_redis(queue: &store::Store, config: &Config) -> Option<(Redis, String)> {
    match (queue, &config.queue) {
        (store::Store::Redis(queue), Some(shared)) => Some((queue.redis().clone(), shared.prefix.clone())),
        _ => None,
    }
}
