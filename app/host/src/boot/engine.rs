//! The third stage: the worker and the schedules are made, but not started yet.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use perennial_workers::cron::Crontab;
use perennial_workers::worker::Worker;
use perennial_workers::{Registry, store, upkeep};
use tracing::info;

use super::base::Base;
use super::mount::Mounted;
use crate::admin::jobs::JobAdminState;
use crate::config::Config;

/// The worker, and the state that it shares with operators.
pub(super) struct Engine {
    pub(super) worker: Worker<store::JobStore>,
    /// State of the routes for operators, with the schedules.
    pub(super) books: JobAdminState,
}

impl Engine {
    /// Takes over the jobs of a process that died, and stores the schedules.
    pub(super) async fn prepare(config: &Config, base: &Base, mounted: &mut Mounted) -> anyhow::Result<Self> {
        let registry = &mounted.registry;
        if mounted.pause.why().is_none() {
            take_over(base.jobs.store(), registry, config.worker.lease)
                .await
                .context("the jobs of the last process cannot be taken over")?;
        }
        let worker = Worker::new(base.jobs.store().clone(), Arc::clone(registry), config.worker.clone())?;
        let schedules = config.cron.schedules(std::mem::take(&mut mounted.schedules), registry)?;
        let crontab = Crontab::new(base.jobs.store().clone(), base.jobs.admission().clone(), schedules);
        crontab.define().await.context("the schedules cannot be written down")?;
        let books = JobAdminState {
            jobs: base.jobs.clone(),
            registry: Arc::clone(registry),
            worker: Some(worker.status()),
            crontab,
        };
        Ok(Self { worker, books })
    }
}

/// Takes over the jobs that a dead process was running. This is done for the embedded store only: its lock proves that
/// no other process works on it, so a running job belongs to a process that died.
pub(super) async fn take_over(
    queue: &store::JobStore,
    registry: &Registry,
    lease: Duration,
) -> anyhow::Result<()> {
    let store::JobStore::Sqlite(sqlite) = queue else { return Ok(()) };
    if sqlite.end_leases().await? > 0 {
        info!("the last process did not stop in order: taking over its jobs");
        upkeep::rescue(queue, registry, lease).await?;
    }
    Ok(())
}
