//! Boot, top to bottom: everything that serves is made here, by hand.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::header;
use perennial_server::cache::{Bus, Caches};
use perennial_server::cpu::Cpu;
use perennial_server::drain::Drain;
use perennial_server::health::Health;
use perennial_server::http::Server;
use perennial_server::http::problem::{FieldError, MEDIA_TYPE, Problem};
use perennial_server::net::{Connections, Sockets};
use perennial_server::pool::redis::Redis;
use perennial_server::pool::sql::{self, Tables};
use perennial_server::pool::sqlite::{self, Sqlite};
use perennial_server::pool::{self, postgres::Postgres};
use perennial_server::tasks::Tasks;
use perennial_workers::admission::Admission;
use perennial_workers::cron::{Crontab, tick, timer::Timer};
use perennial_workers::job::DEFAULT_QUEUE;
use perennial_workers::limits::Limits;
use perennial_workers::outbox::{self, Outbox};
use perennial_workers::store::postgres::PostgresQueue;
use perennial_workers::store::redis::RedisQueue;
use perennial_workers::store::sqlite::SqliteQueue;
use perennial_workers::worker::{self, Worker};
use perennial_workers::{Jobs, Queue as _, Registry, store, upkeep};
use secrecy::{ExposeSecret, SecretString};
use tracing::{info, warn};
use utoipa::PartialSchema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Info, OpenApi, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;

use crate::access::keys::Grant;
use crate::access::{self, Access, Scope};
use crate::addresses::{Addresses, url};
use crate::admin::jobs::Books;
use crate::admin::keys::Keyring;
use crate::backup;
use crate::config::{self, Config};
use crate::data_dir::{self, DataDir};
use crate::maintenance;
use crate::module::{Closer, Configured, Host, StatusFn};
use crate::sites::{SiteId, Sites};
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
    /// Lines for whoever started the program on a terminal.
    pub(crate) announcements: Vec<String>,
    closers: Vec<Closer>,
    /// The modules' routes on the admin listener.
    pub(crate) looking: Router,
    pub(crate) acting: Router,
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
        Server::bind(config.server.clone(), &inheritance.sockets)
            .await
            .context("the public listener cannot be opened")
    };
    let early = if inheritance.succeeds() { Some(open().await?) } else { None };
    let patience = config.phases.succession + config.phases.hard + CLOSING;
    let data_dir = Arc::new(inheritance.lock(&config.data_dir, patience).await?);
    let store = open_store(&data_dir, &config.store).await?;
    store.migrate(&tables).await.context("the store cannot be brought up to date")?;
    let tasks = Tasks::new(drain.clone());
    let (queue, outbox) = open_queue(&config, &store).await?;
    let caches = caches(&queue, &config);
    let admin_token = first_keys(&data_dir, &store, !config.key_files.is_empty()).await?;
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
        looking: Router::new(),
        acting: Router::new(),
    };
    maintenance::mount(&mut host, config.retention)?;
    for module in modules {
        let name = module.name;
        (module.mount)(&mut host).await.with_context(|| format!("the module {name} cannot be mounted"))?;
        info!(module = name, "mounted");
    }
    let source =
        backup::Source::of(&config.data_dir, &config.store, std::mem::take(&mut host.backed_up)).ok();
    host.acting(backup::acting(source));
    let Host { routes, registry, schedules, status, announcements, closers, looking, acting, .. } = host;
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
    take_over(&queue, &registry, &config)
        .await
        .context("the jobs of the last process cannot be taken over")?;
    let worker = Worker::new(jobs.store().clone(), Arc::clone(&registry), config.worker)?;
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
    tasks.critical("workers", worker.run(drain.clone()));
    let upkeep =
        upkeep::run(jobs.store().clone(), Arc::clone(&registry), admission, config.upkeep, drain.clone());
    tasks.critical("upkeep of jobs", upkeep);
    tasks.contained("wake-ups", {
        let (store, drain) = (jobs.store().clone(), drain.clone());
        move || {
            let (store, drain) = (store.clone(), drain.clone());
            async move { store.listen(drain).await }
        }
    });
    let pressure = config.server.pressure.clone();
    tasks.contained("API keys", {
        let (access, drain) = (access.clone(), drain.clone());
        move || access.clone().tend(drain.clone())
    });
    tasks.critical("caches", caches.clone().tidy(drain.clone()));
    if caches.is_shared() {
        let (caches, drain) = (caches.clone(), drain.clone());
        tasks.contained("cache bus", move || caches.clone().listen(drain.clone()));
    }
    tasks.critical("memory", pressure.watch(config.cgroup.clone(), config.shed_at, drain.clone()));
    let mut pools: Vec<PoolFn> = vec![Arc::new({
        let store = store.clone();
        move || store.pool()
    })];
    match &store {
        sql::Store::Sqlite(sqlite) => {
            let (sqlite, drain) = (sqlite.clone(), drain.clone());
            tasks.contained("sqlite", move || sqlite.clone().tend(drain.clone()));
        }
        sql::Store::Postgres(postgres) => {
            let (postgres, drain) = (postgres.clone(), drain.clone());
            let condition = health.dependency("postgres", config.store_policy);
            tasks.contained("postgres", move || postgres.clone().tend(condition.clone(), drain.clone()));
        }
    }
    if let store::Store::Redis(queue) = &queue {
        let (redis, drain) = (queue.redis().clone(), drain.clone());
        let condition = health.dependency("redis", config.queue_policy);
        let watched = redis.clone();
        pools.push(Arc::new(move || ("redis", watched.status())));
        tasks.contained("redis", move || redis.clone().tend(condition.clone(), drain.clone()));
    }
    if let (Some(outbox), store::Store::Redis(queue)) = (outbox, queue) {
        let drain = drain.clone();
        tasks.contained("outbox relay", move || outbox.clone().relay(queue.clone(), drain.clone()));
    }
    if config.cron.tick {
        let (crontab, drain) = (crontab.clone(), drain.clone());
        tasks.contained("cron tick", move || tick::run(crontab.clone(), drain.clone()));
    }
    let timer = Timer::new(crontab, config.cron.poll, workers.clone(), drain.clone());
    tasks.critical("cron", timer.run());
    tasks.critical("http", server.run(public(routes), Some(cpu), drain));
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
        announcements,
        closers,
        looking,
        acting,
        store,
        data_dir,
    })
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
        config::Store::Sqlite { file, readers, wait } => {
            let config = sqlite::Config {
                path: data_dir.join(file),
                readers: *readers,
                write_queue: WRITE_QUEUE,
                wait: *wait,
                commit_wait: COMMIT_WAIT,
            };
            Sqlite::open(config).await.map(sql::Store::Sqlite).map_err(sql::Error::from)
        }
        config::Store::Postgres(config) => {
            Postgres::open(config.clone()).await.map(sql::Store::Postgres).map_err(sql::Error::from)
        }
    };
    opened.context("the store cannot be opened")
}

/// Opens the store of jobs; and the outbox, if that is another one than the store.
pub(crate) async fn open_queue(
    config: &Config,
    store: &sql::Store,
) -> anyhow::Result<(store::Store, Option<Outbox>)> {
    if let Some(config::RedisQueue { redis, prefix }) = &config.queue {
        let redis = Redis::open(redis.clone()).await.context("the store of jobs cannot be opened")?;
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

/// In a store of our own, the lock says that no other process works on it: what was running, was running in one
/// that died.
async fn take_over(queue: &store::Store, registry: &Registry, config: &Config) -> anyhow::Result<()> {
    let store::Store::Sqlite(sqlite) = queue else { return Ok(()) };
    if sqlite.end_leases().await? > 0 {
        info!("the last process did not stop in order: taking over its jobs");
        upkeep::rescue(queue, registry, config.worker.lease).await?;
    }
    Ok(())
}

/// Makes the keys that a first boot needs, and returns the admin token. Says once where they are. No API key is needed
/// where there are others.
pub(crate) async fn first_keys(
    data_dir: &DataDir,
    store: &sql::Store,
    has_others: bool,
) -> anyhow::Result<SecretString> {
    let random = || access::random_key().expose_secret().to_owned();
    let (token, made) = data_dir.secret(data_dir::ADMIN_TOKEN, random)?;
    if made {
        info!(file = %data_dir.join(data_dir::ADMIN_TOKEN).display(), "made the admin token");
    }
    if !has_others && !access::keys::exist(store).await? {
        if store.dialect() == sql::Dialect::Postgres {
            anyhow::bail!(
                "there is no API key in the store: make the keys once, with `perennial keys generate`"
            );
        }
        make_api_key(data_dir, store).await?;
    }
    Ok(token.into())
}

/// Makes an API key with every scope, or takes the one whose file is there already.
pub(crate) async fn make_api_key(data_dir: &DataDir, store: &sql::Store) -> anyhow::Result<()> {
    let (key, made) =
        data_dir.secret(data_dir::API_KEY, || access::random_key().expose_secret().to_owned())?;
    let grant = Grant {
        site: SiteId::DEFAULT,
        name: data_dir::API_KEY.to_owned(),
        scopes: Scope::ALL.into(),
        per_minute: None,
        ends_at: None,
    };
    access::keys::insert(store, &grant, &key).await?;
    if made {
        info!(file = %data_dir.join(data_dir::API_KEY).display(), "made an API key");
    }
    Ok(())
}

/// The modules' routes, and what all of them share.
fn public(routes: OpenApiRouter) -> Router {
    let (router, openapi) = routes.split_for_parts();
    let openapi = described(openapi);
    let openapi = Bytes::from(openapi.to_json().unwrap_or_default());
    let openapi = move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], openapi.clone()));
    router.route("/openapi.json", get(openapi))
}

/// What every description of the interface says: who may call, and what an error looks like.
fn described(mut openapi: OpenApi) -> OpenApi {
    openapi.info = Info::new("Perennial", env!("CARGO_PKG_VERSION"));
    let components = openapi.components.get_or_insert_default();
    components.add_security_scheme("key", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    for (name, schema) in [("Problem", Problem::schema()), ("FieldError", FieldError::schema())] {
        components.schemas.insert(name.to_owned(), schema);
    }
    let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    let error = ResponseBuilder::new().description("What was wrong").content(MEDIA_TYPE, problem).build();
    for item in openapi.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".to_owned(), error.clone().into());
            let key = SecurityRequirement::new("key", std::iter::empty::<String>());
            operation.security.get_or_insert_default().push(key);
        }
    }
    openapi
}
