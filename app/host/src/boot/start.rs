//! The tasks that run beside the public listener, after all parts are made. Each has a name, an owner, and a stated
//! death: a critical task ends the process, a contained task is started again.

use std::sync::Arc;
use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::health::{Condition, Health, ReadinessPolicy};
use perennial_runtime::tasks::Tasks;
use perennial_workers::cron::{Crontab, tick, timer::Timer};
use perennial_workers::outbox::Outbox;
use perennial_workers::worker::Worker;
use perennial_workers::{Jobs, Queue as _, Registry, store, upkeep};
use tracing::warn;

use super::base::Base;
use super::engine::{Engine, take_over};
use super::mount::Mounted;
use crate::admin::jobs::JobAdminState;
use crate::config::Config;
use crate::pause::Pause;
use crate::pools::OpenPool;

/// The parts that the tasks work with.
pub(super) struct TaskParts<'a> {
    pub(super) config: &'a Config,
    pub(super) base: &'a Base,
    pub(super) tasks: &'a Tasks,
    pub(super) health: &'a Health,
    pub(super) drain: &'a Drain,
}

impl TaskParts<'_> {
    /// Starts all tasks, and returns the pools for operators.
    pub(super) fn start(&self, engine: Engine, mounted: &Mounted) -> Vec<OpenPool> {
        let pools = self.start_pools();
        self.start_caches();
        let Self { config, tasks, health, drain, .. } = self;
        let pressure = config.server.net.pressure.clone();
        pressure.tell(health.dependency("memory", ReadinessPolicy::Required));
        tasks.critical("memory", pressure.watch(config.cgroup.clone(), config.shed_at, (*drain).clone()));
        let work = self.work(engine, &mounted.registry);
        if let Some(why) = mounted.pause.why() {
            warn!("{}", why.reason());
            let condition = health.dependency("jobs", ReadinessPolicy::Degraded);
            condition.unmet(&why.reason());
            tasks.critical("pause", work.start_after(mounted.pause.clone(), condition));
        } else {
            work.start();
        }
        pools
    }

    /// Makes the tasks that run jobs and schedules, without starting them.
    fn work(&self, engine: Engine, registry: &Arc<Registry>) -> JobTasks {
        let Engine { worker, books: JobAdminState { crontab, .. } } = engine;
        let Self { config, base, tasks, drain, .. } = *self;
        JobTasks {
            lease: config.worker.lease,
            upkeep: config.upkeep,
            timer: Timer::new(crontab.clone(), config.cron.poll, worker.status(), drain.clone()),
            ticked: config.cron.tick.then_some(crontab),
            tasks: tasks.clone(),
            drain: drain.clone(),
            jobs: base.jobs.clone(),
            outbox: base.outbox.clone(),
            registry: Arc::clone(registry),
            worker,
        }
    }

    /// Starts the tasks that maintain connections, and returns the pools for operators.
    fn start_pools(&self) -> Vec<OpenPool> {
        let Self { config, base, tasks, health, drain } = *self;
        let mut pools = vec![OpenPool::sql(base.store.clone(), config.store_policy)];
        pools.extend(base.replica.clone().map(OpenPool::of_replica));
        if let store::JobStore::Redis(queue) = base.jobs.store() {
            pools.push(OpenPool::redis(queue.redis().clone(), config.queue_policy));
        }
        pools.extend(base.pools.named());
        for pool in &pools {
            pool.start(tasks, health, drain);
        }
        pools
    }

    /// Starts the tasks that maintain the caches and the API keys.
    fn start_caches(&self) {
        let Self { tasks, drain, base: Base { caches, access, .. }, .. } = *self;
        tasks.contained("API keys", {
            let (access, drain) = (access.clone(), drain.clone());
            move || access.clone().tend(drain.clone())
        });
        tasks.critical("caches", caches.clone().tidy(drain.clone()));
        if caches.is_shared() {
            let (caches, drain) = (caches.clone(), drain.clone());
            tasks.contained("cache bus", move || caches.clone().listen(drain.clone()));
        }
    }
}

/// The tasks that run jobs and schedules, and thereby send.
struct JobTasks {
    lease: Duration,
    upkeep: upkeep::Config,
    timer: Timer,
    /// Handle with which the tick wakes the timer, if the tick is on.
    ticked: Option<Crontab>,
    tasks: Tasks,
    drain: Drain,
    jobs: Jobs,
    outbox: Option<Outbox>,
    registry: Arc<Registry>,
    worker: Worker<store::JobStore>,
}

impl JobTasks {
    /// Starts all of them when the pause has ended.
    async fn start_after(self, pause: Pause, condition: Condition) -> anyhow::Result<()> {
        let drain = self.drain.clone();
        tokio::select! {
            () = pause.ended() => {
                take_over(self.jobs.store(), &self.registry, self.lease).await?;
                self.start();
                condition.met();
                drain.soft().await;
            }
            () = drain.soft() => {}
        }
        Ok(())
    }

    fn start(self) {
        let Self { upkeep, timer, ticked, tasks, drain, jobs, outbox, registry, worker, .. } = self;
        let queue = jobs.store().clone();
        tasks.critical("workers", worker.run(drain.clone()));
        let upkeep = upkeep::run(queue.clone(), registry, jobs.admission().clone(), upkeep, drain.clone());
        tasks.critical("upkeep of jobs", upkeep);
        tasks.contained("wake-ups", {
            let (queue, drain) = (queue.clone(), drain.clone());
            move || {
                let (queue, drain) = (queue.clone(), drain.clone());
                async move { queue.listen(drain).await }
            }
        });
        if let (Some(outbox), store::JobStore::Redis(queue)) = (outbox, queue) {
            let drain = drain.clone();
            tasks.contained("outbox relay", move || outbox.clone().relay(queue.clone(), drain.clone()));
        }
        if let Some(crontab) = ticked {
            tasks.contained("cron tick", move || tick::run(crontab.clone(), drain.clone()));
        }
        tasks.critical("cron", timer.run());
    }
}
