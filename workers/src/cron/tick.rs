//! One steady beat from tokio-cron-scheduler, which wakes the timer and decides nothing.
//!
//! The jobs of that scheduler are lost, doubled or shifted when a process stalls, when there are several processes, or
//! when clocks change. A beat may be all of that: the timer also wakes by itself, and nothing depends on the beat.

use perennial_runtime::drain::Drain;
use tokio_cron_scheduler::{Job, JobScheduler};

use super::Crontab;

/// The beat comes every second; the scheduler itself looks twice as often.
const BEAT: &str = "* * * * * *";

/// Wakes the timer of `crontab` every second, until no more schedules are to be fired.
///
/// # Errors
/// When the scheduler cannot be started or stopped.
pub async fn run(crontab: Crontab, drain: Drain) -> anyhow::Result<()> {
    let mut scheduler = JobScheduler::new().await?;
    scheduler.add(Job::new(BEAT, move |_, _| crontab.beat())?).await?;
    scheduler.start().await?;
    drain.notice().await;
    scheduler.shutdown().await?;
    Ok(())
}
