//! The third stage: what runs jobs and schedules, not started yet.

use std::sync::Arc;

use anyhow::Context as _;
use perennial_workers::cron::Crontab;
use perennial_workers::store;
use perennial_workers::worker::Worker;

use super::base::Base;
use super::mount::Mounted;
use super::start;
use crate::admin::jobs::Books;
use crate::config::Config;

/// What runs jobs and schedules.
pub(super) struct Engine {
    pub(super) worker: Worker<store::Store>,
    pub(super) crontab: Crontab,
    /// What operators are shown of it.
    pub(super) books: Books,
}

impl Engine {
    /// Takes over the jobs of a process that died, and writes the schedules down.
    pub(super) async fn prepare(config: &Config, base: &Base, mounted: &mut Mounted) -> anyhow::Result<Self> {
        let registry = &mounted.registry;
        if mounted.pause.why().is_none() {
            start::take_over(&base.queue, registry, config.worker.lease)
                .await
                .context("the jobs of the last process cannot be taken over")?;
        }
        let worker = Worker::new(base.jobs.store().clone(), Arc::clone(registry), config.worker.clone())?;
        let schedules = config.cron.schedules(std::mem::take(&mut mounted.schedules), registry)?;
        let crontab = Crontab::new(base.queue.clone(), base.admission.clone(), schedules);
        crontab.define().await.context("the schedules cannot be written down")?;
        let books = Books {
            jobs: base.jobs.clone(),
            registry: Arc::clone(registry),
            worker: Some(worker.status()),
            crontab: crontab.clone(),
        };
        Ok(Self { worker, crontab, books })
    }
}
