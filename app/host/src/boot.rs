//! Boot, from top to bottom: everything that serves is made here, by hand, in stages.
//!
//! ```text
//! Plan      plan.rs    what was read: settings, modules, the sockets of a predecessor
//! Base      base.rs    the data directory, the store, the keys
//! Mounted   mount.rs   the modules have joined
//! Engine    engine.rs  the worker and the schedules
//! App       start.rs   the tasks run, the public listener is open
//! ```

mod base;
mod engine;
mod mount;
pub(crate) mod open;
mod plan;
mod start;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use http::HeaderValue;
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Health;
use perennial_runtime::tasks::Tasks;
use perennial_server::net::Sockets;
#[cfg(feature = "testing")]
use perennial_store::cache::Caches;
use perennial_store::pool::sql;
use perennial_workers::limits::Limits;
use perennial_workers::worker;
use tracing::info;

use crate::addresses::{Addresses, url};
use crate::admin::Booted;
use crate::data_dir::{self, DataDir};
use crate::dev::DevLink;
use crate::module::{Announcement, Closer, Configured};
use crate::openapi;
use crate::pools::OpenPool;
use crate::sites::Sites;
use base::Base;
use engine::Engine;
use mount::Mounted;
use plan::OpenServers;
pub(crate) use plan::{BootPlan, not_opened};

/// Time limit for closing one part at the end of the process.
const CLOSE: Duration = Duration::from_secs(5);

/// The running application, with the parts that are needed to stop it.
pub(crate) struct App {
    pub(crate) tasks: Tasks,
    pub(crate) workers: worker::Status,
    pub(crate) limits: Limits,
    /// Sockets of the listeners of visitors.
    pub(crate) sockets: Vec<Sockets>,
    /// Addresses of all listeners.
    pub(crate) addresses: Addresses,
    /// Lines for a person who started the program on a terminal.
    pub(crate) announcements: Vec<String>,
    closers: Vec<Closer>,
    /// Pools that modules name.
    pools: Vec<OpenPool>,
    store: sql::Store,
    #[cfg(feature = "testing")]
    caches: Caches,
    data_dir: Arc<DataDir>,
}

/// Makes all parts and opens the public listener. It runs on the serving runtime.
pub(crate) async fn boot(
    mut plan: BootPlan,
    modules: Vec<Configured>,
    health: Health,
    drain: Drain,
) -> anyhow::Result<(App, Booted)> {
    // The listener is opened first, so that a predecessor is asked to leave (in `Base::open`) only when no setting can
    // turn out to be wrong any more.
    let early = if plan.inheritance.succeeds() { Some(plan.listen().await?) } else { None };
    let base = Base::open(&plan).await?;
    let tasks = Tasks::new(drain.clone());
    let cpu = Cpu::start(plan.config.cpu).context("the threads for the processor cannot be started")?;
    let host = mount::host(&plan, &base, &cpu, &tasks, &health, &drain);
    let mut mounted = Mounted::mount(host, modules, &mut plan, &base).await?;
    let servers = match early {
        Some(servers) => servers,
        None => plan.listen().await?,
    };
    plan.inheritance.warn_of_the_rest();
    let engine = Engine::prepare(&plan.config, &base, &mut mounted).await?;
    let (connections, sockets) = (servers.connections(), servers.sockets());
    let OpenServers { public: server, named } = servers;
    let addresses = Addresses {
        server: server.addresses(),
        admin: plan.admin_addresses.clone(),
        listeners: named.iter().map(|open| (open.name.to_owned(), open.addresses())).collect(),
    };
    let listeners = std::mem::take(&mut mounted.listeners).join(named)?;
    let written = format!("{}\n", serde_json::to_string(&addresses)?);
    base.data_dir.write(data_dir::ADDRESSES, &written)?;

    // Nothing below can fail, so a boot that fails never cuts off a job that has begun.
    let (workers, books) = (engine.worker.status(), engine.books.clone());
    let routes = openapi::with_description(std::mem::take(&mut mounted.routes));
    let routes = match DevLink::of_environment() {
        Some(dev) => dev.around(routes, drain.clone()),
        None => routes,
    };
    let parts =
        start::TaskParts { config: &plan.config, base: &base, tasks: &tasks, health: &health, drain: &drain };
    let pools = parts.start(engine, &mounted);
    let server = server.errors_readable_by(readers(&base.sites));
    for (name, serve) in listeners {
        tasks.critical(name, serve(drain.clone()));
    }
    tasks.critical("http", server.run(routes, Some(cpu), drain));
    for (listener, addresses) in &addresses.listeners {
        info!(listener, addresses = addresses.join(", "), "listening");
    }
    info!(server = addresses.server.join(", "), admin = addresses.admin.join(", "), "ready");

    let booted = Booted {
        access: base.access.clone(),
        workers: workers.clone(),
        status: mounted.status,
        pools,
        clients: base.clients.clone(),
        connections,
        books,
        keyring: base.keyring(&plan),
        admin_read: mounted.admin_read,
        admin_write: mounted.admin_write,
    };
    let app = App {
        tasks,
        workers,
        limits: plan.config.limits,
        sockets,
        announcements: announcements(&mounted.announcements, &addresses.server),
        addresses,
        closers: mounted.closers,
        pools: base.pools.named().into_iter().chain(base.replica.map(OpenPool::of_replica)).collect(),
        store: base.store,
        #[cfg(feature = "testing")]
        caches: base.caches,
        data_dir: base.data_dir,
    };
    Ok((app, booted))
}

/// Lines for a person at the terminal; none when the server listens on Unix sockets alone.
fn announcements(lines: &[Announcement], addresses: &[String]) -> Vec<String> {
    url(addresses).map(|base| lines.iter().map(|line| line(&base)).collect()).unwrap_or_default()
}

/// Makes the check of which origins may read why a request was refused before it was routed: the origins of all sites.
fn readers(sites: &Sites) -> Arc<dyn Fn(&HeaderValue) -> bool + Send + Sync> {
    let sites = sites.clone();
    Arc::new(move |origin: &HeaderValue| {
        origin.to_str().is_ok_and(|origin| sites.of_origin(origin).is_some())
    })
}

impl App {
    /// The caches.
    #[cfg(feature = "testing")]
    pub(crate) fn caches(&self) -> &Caches {
        &self.caches
    }

    /// The store.
    #[cfg(feature = "testing")]
    pub(crate) fn store(&self) -> &sql::Store {
        &self.store
    }

    /// Closes the remaining parts, and returns true when all of them closed in time. They do not when every thread of
    /// the serving runtime is blocked.
    pub(crate) async fn close(self) -> bool {
        self.data_dir.remove(data_dir::ADDRESSES);
        let mut in_time = true;
        for close in self.closers {
            in_time &= tokio::time::timeout(CLOSE, close()).await.is_ok();
        }
        for pool in self.pools {
            in_time &= tokio::time::timeout(CLOSE, pool.close()).await.is_ok();
        }
        in_time & tokio::time::timeout(CLOSE, self.store.close()).await.is_ok()
    }
}
