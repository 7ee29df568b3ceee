//! One steady beat from tokio-cron-scheduler, which wakes the timer and decides nothing.
//!
//! Its own jobs are lost, doubled or shifted when a process stalls, when there are several, or when clocks change; a
//! beat may be all of that. The timer also wakes by itself, and nothing depends on this one.

use perennial_runtime::drain::Drain;
use tokio_cron_scheduler::{Job, JobScheduler};

use super::Crontab;

/// Every second: its scheduler looks twice as often.
const BEAT: &str = "* * * * * *";

/// Wakes the timer of `crontab` every second, until nothing more is to be fired.
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
