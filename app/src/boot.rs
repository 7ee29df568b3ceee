//! Boot, top to bottom: everything that serves is made here, by hand.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::header;
use perennial_server::drain::Drain;
use perennial_server::health::Health;
use perennial_server::http::Server;
use perennial_server::pool::sqlite::{self, Migrations, Sqlite};
use perennial_server::tasks::Tasks;
use perennial_workers::store::sqlite::SqliteQueue;
use perennial_workers::worker::{self, Worker};
use perennial_workers::{Registry, rescue, store};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tracing::info;
use utoipa::openapi::{Info, OpenApi};
use utoipa_axum::router::OpenApiRouter;

use crate::access::{self, Access};
use crate::config::Config;
use crate::data_dir::{self, DataDir};
use crate::module::{Announcement, Closer, Configured, Host, StatusFn};

/// How many writes may wait for the store's writer.
const WRITE_QUEUE: usize = 4096;
/// How long a caller waits for a commit: a disk that takes longer is out of order.
const COMMIT_WAIT: Duration = Duration::from_secs(60);
/// How often lapsed leases are looked for.
const RESCUE_EVERY: Duration = Duration::from_secs(3);

/// What serves, and what is needed to stop it.
pub(crate) struct App {
    pub(crate) tasks: Tasks,
    pub(crate) access: Access,
    pub(crate) workers: worker::Status,
    pub(crate) status: Vec<(&'static str, StatusFn)>,
    /// Lines for whoever started the program on a terminal.
    pub(crate) announcements: Vec<String>,
    closers: Vec<Closer>,
    store: Sqlite,
    data_dir: Arc<DataDir>,
}

/// Makes everything and opens the public listener. Runs on the runtime that serves.
pub(crate) async fn boot(
    config: Config,
    modules: Vec<Configured>,
    migrations: Vec<Migrations>,
    admin_addresses: Vec<String>,
    health: Health,
    drain: Drain,
) -> anyhow::Result<App> {
    let data_dir = Arc::new(DataDir::lock(&config.data_dir)?);
    let store = open_store(&data_dir, &config).await?;
    store.migrate(&migrations).await.context("the store cannot be brought up to date")?;
    let admin_token = first_keys(&data_dir, &store).await?;
    let access = Access::open(&store, admin_token).await.context("the API keys cannot be read")?;

    let tasks = Tasks::new(drain.clone());
    let queue = SqliteQueue::new(store.clone());
    let mut host = Host {
        store: store.clone(),
        queue: queue.clone(),
        access: access.clone(),
        data_dir: Arc::clone(&data_dir),
        drain: drain.clone(),
        health: health.clone(),
        tasks: tasks.clone(),
        routes: OpenApiRouter::new(),
        registry: Registry::new(),
        status: Vec::new(),
        announcements: Vec::new(),
        closers: Vec::new(),
    };
    for module in modules {
        let name = module.name;
        (module.mount)(&mut host).await.with_context(|| format!("the module {name} cannot be mounted"))?;
        info!(module = name, "mounted");
    }
    let Host { routes, registry, status, announcements, closers, .. } = host;

    // The lock says that no other process works on this store: what was running, was running in one that died.
    let registry = Arc::new(registry);
    let rescued =
        queue.rescue_all(&registry).await.context("the jobs of the last process cannot be taken over")?;
    if rescued > 0 {
        info!(jobs = rescued, "taken over from a process that did not stop in order");
    }
    let worker = Worker::new(queue.clone(), Arc::clone(&registry), config.worker)?;
    let workers = worker.status();
    tasks.critical("workers", worker.run(drain.clone()));
    tasks.critical("rescue", rescue::run(queue, registry, RESCUE_EVERY, drain.clone()));

    let server = Server::bind(config.server).await.context("the public listener cannot be opened")?;
    let addresses = server.addresses();
    let listed = json!({ "server": addresses, "admin": admin_addresses });
    data_dir.write(data_dir::ADDRESSES, &format!("{listed}\n"))?;
    tasks.critical("http", server.run(public(routes), drain));
    health.started();
    info!(server = addresses.join(", "), admin = admin_addresses.join(", "), "ready");

    let announcements = announce(&announcements, &addresses);
    Ok(App { tasks, access, workers, status, announcements, closers, store, data_dir })
}

impl App {
    /// Closes what serves nobody any more.
    pub(crate) async fn close(self) {
        self.data_dir.remove(data_dir::ADDRESSES);
        for close in self.closers {
            close().await;
        }
        self.store.close().await;
    }
}

/// The tables of everything: those of the host, then those of each module.
pub(crate) fn migrations(modules: impl Iterator<Item = Migrations>) -> Vec<Migrations> {
    [access::MIGRATIONS, store::sqlite::MIGRATIONS].into_iter().chain(modules).collect()
}

/// Opens the embedded store.
pub(crate) async fn open_store(data_dir: &DataDir, config: &Config) -> anyhow::Result<Sqlite> {
    let store = sqlite::Config {
        path: data_dir.join(&config.store.file),
        readers: config.store.readers,
        write_queue: WRITE_QUEUE,
        wait: config.store.wait,
        commit_wait: COMMIT_WAIT,
    };
    Sqlite::open(store).await.context("the store cannot be opened")
}

/// Makes the keys that a first boot needs, and returns the admin token. Says once where they are.
pub(crate) async fn first_keys(data_dir: &DataDir, store: &Sqlite) -> anyhow::Result<SecretString> {
    let random = || access::random_key().expose_secret().to_owned();
    let (token, made) = data_dir.secret(data_dir::ADMIN_TOKEN, random)?;
    if made {
        info!(file = %data_dir.join(data_dir::ADMIN_TOKEN).display(), "made the admin token");
    }
    if !store.read(access::has_keys).await? {
        let (key, made) = data_dir.secret(data_dir::API_KEY, random)?;
        store.write(move |tx| access::insert_key(tx, "first", &key)).await?;
        if made {
            info!(file = %data_dir.join(data_dir::API_KEY).display(), "made the first API key");
        }
    }
    Ok(token.into())
}

/// The modules' routes, and what all of them share.
fn public(routes: OpenApiRouter) -> Router {
    let (router, mut openapi): (Router, OpenApi) = routes.split_for_parts();
    openapi.info = Info::new("Perennial", env!("CARGO_PKG_VERSION"));
    let openapi = Bytes::from(openapi.to_json().unwrap_or_default());
    let openapi = move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], openapi.clone()));
    router.route("/openapi.json", get(openapi))
}

fn announce(announcements: &[Announcement], addresses: &[String]) -> Vec<String> {
    let Some(address) = addresses.iter().find(|address| !address.starts_with("unix:")) else {
        return Vec::new();
    };
    let base = if address.contains("://") { address.clone() } else { format!("http://{address}") };
    // Nobody can open "any address"; on this machine it is this one.
    let base = base.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:");
    announcements.iter().map(|line| line(&base)).collect()
}
