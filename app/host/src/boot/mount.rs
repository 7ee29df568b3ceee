//! The second stage: the modules join.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use futures_util::FutureExt;
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::{self, Drain, Phase};
use perennial_runtime::health::Health;
use perennial_runtime::panics::panic_message;
use perennial_runtime::tasks::Tasks;
use perennial_store::pool::sql::Store;
use perennial_workers::job::DEFAULT_QUEUE;
use perennial_workers::{Registry, Schedule};
use tokio::task::JoinSet;
use tracing::info;
use utoipa_axum::router::OpenApiRouter;

use super::base::Base;
use super::plan::BootPlan;
use crate::listeners::ListenerHandlers;
use crate::locks::Locks;
use crate::module::{Announcement, Closer, Configured, Host, StatusFn};
use crate::pause::{self, Pause, Why};
use crate::{backup, jobs, maintenance};

/// The parts that the modules have handed in.
pub(super) struct Mounted {
    /// Routes of the public listener.
    pub(super) routes: OpenApiRouter,
    pub(super) registry: Arc<Registry>,
    pub(super) schedules: Vec<Schedule>,
    pub(super) status: Vec<(&'static str, StatusFn)>,
    pub(super) announcements: Vec<Announcement>,
    pub(super) closers: Vec<Closer>,
    pub(super) admin_read: Router,
    pub(super) admin_write: Router,
    pub(super) pause: Pause,
    pub(super) listeners: ListenerHandlers,
}

impl Mounted {
    /// Lets each module hand in its parts, and adds the parts of the host.
    pub(super) async fn mount(
        mut host: Host,
        modules: Vec<Configured>,
        plan: &mut BootPlan,
        base: &Base,
    ) -> anyhow::Result<Self> {
        maintenance::mount(&mut host, plan.config.retention)?;
        let mut routes = Routes::default();
        for Configured { name, prefix, mount } in modules {
            host.prefix = prefix;
            // axum panics when a route is added twice, and so may the code of a module.
            let mounted = AssertUnwindSafe(mount(&mut host)).catch_unwind().await;
            mounted
                .unwrap_or_else(|panic| Err(anyhow::Error::msg(panic_message(&*panic).to_owned())))
                .and_then(|()| routes.add(name, prefix, std::mem::take(&mut host.routes)))
                .with_context(|| format!("the module {name} cannot be mounted"))?;
            info!(module = name, prefix, "mounted");
        }
        let files = std::mem::take(&mut plan.files);
        let directories = std::mem::take(&mut plan.directories);
        let source = backup::BackupSource::of(&plan.config, files, directories).ok();
        host.admin_write(backup::admin_write(source));
        let pause = pause(plan, base, &mut host).await?;
        host.registry.check()?;
        let registry = Arc::new(std::mem::take(&mut host.registry));
        let own = jobs::routes(base.jobs.clone(), base.access.clone(), Arc::clone(&registry));
        routes.add("host", "", own)?;
        Ok(Self {
            routes: routes.all,
            registry,
            schedules: host.schedules,
            status: host.status,
            announcements: host.announcements,
            closers: host.closers,
            admin_read: host.admin_read,
            admin_write: host.admin_write,
            pause,
            listeners: host.listeners,
        })
    }
}

/// The routes of all modules.
#[derive(Default)]
struct Routes {
    all: OpenApiRouter,
    /// The routes of each module, to find the one that a later module clashes with.
    by_module: Vec<(&'static str, OpenApiRouter)>,
}

impl Routes {
    /// Adds the routes of a module below its prefix. The error names the route, and the module that has it already.
    fn add(&mut self, name: &'static str, prefix: &str, routes: OpenApiRouter) -> anyhow::Result<()> {
        let routes = if prefix.is_empty() { routes } else { OpenApiRouter::new().nest(prefix, routes) };
        let with = |other: OpenApiRouter| {
            let merged = catch_unwind(AssertUnwindSafe(|| other.merge(routes.clone())));
            merged.map_err(|panic| panic_message(&*panic).to_owned())
        };
        match with(self.all.clone()) {
            Ok(all) => self.all = all,
            Err(reason) => {
                let other = self.by_module.iter().find(|(_, other)| with(other.clone()).is_err());
                let other = other.map_or("another module", |(name, _)| name);
                anyhow::bail!(
                    "{reason}; the module {other} has this route, too: host one of them at a prefix, with .host_at::<..>(\"/..\")"
                );
            }
        }
        self.by_module.push((name, routes));
        Ok(())
    }
}

/// Makes the host as modules see it, without any parts of modules yet.
pub(super) fn host(
    plan: &BootPlan,
    base: &Base,
    cpu: &Cpu,
    tasks: &Tasks,
    health: &Health,
    drain: &Drain,
) -> Host {
    let mut registry = Registry::new();
    registry.serve(DEFAULT_QUEUE, plan.config.slots);
    let (locks, released) = locks(&base.store);
    Host {
        store: base.store.clone(),
        replica: base.replica.as_ref().unwrap_or(&base.store).clone(),
        pools: base.pools.clone(),
        clients: base.clients.clone(),
        listeners: ListenerHandlers::default(),
        jobs: base.jobs.clone(),
        access: base.access.clone(),
        sites: base.sites.clone(),
        caches: base.caches.clone(),
        cpu: cpu.clone(),
        locks,
        data_dir: Arc::clone(&base.data_dir),
        drain: drain.clone(),
        prefix: "",
        handles: HashMap::new(),
        has_sessions: false,
        health: health.clone(),
        tasks: tasks.clone(),
        routes: OpenApiRouter::new(),
        registry,
        schedules: Vec::new(),
        status: Vec::new(),
        announcements: Vec::new(),
        closers: vec![released],
        admin_read: Router::new(),
        admin_write: Router::new(),
    }
}

/// Makes the locks, and what releases them at the very end: jobs and requests hold locks until they have ended.
fn locks(store: &Store) -> (Locks, Closer) {
    let locks = Locks::new(store.clone());
    let (trigger, drain) = drain::channel();
    let mut renewing = JoinSet::new();
    renewing.spawn(locks.clone().run(drain));
    let released = async move {
        trigger.advance(Phase::Hard);
        while renewing.join_next().await.is_some() {}
    };
    (locks, Box::new(move || Box::pin(released)))
}

/// Makes the pause of jobs and schedules, and adds the route that ends it.
async fn pause(plan: &BootPlan, base: &Base, host: &mut Host) -> anyhow::Result<Pause> {
    let why =
        if plan.config.paused { Some(Why::Asked) } else { base.store.is_copy().await?.then_some(Why::Copy) };
    let pause = Pause::new(why);
    host.admin_write(pause::admin_write(pause.clone(), base.store.clone()));
    if let Some(why) = pause.why() {
        host.announce(move |_| why.reason());
    }
    Ok(pause)
}
