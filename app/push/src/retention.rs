//! Scheduled jobs that delete old notifications and expired subscriptions.

use std::time::Duration;

use perennial_workers::cron::Overlap;
use perennial_workers::{Context, Job, JobOutcome, Options, Schedule};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::store::{PushStore, now_ms};
use perennial_host::maintenance::{self, until_none};
use perennial_host::module::Host;

/// Registers the jobs and their schedules.
pub(crate) fn mount(host: &mut Host, store: &PushStore, retention: Duration) -> anyhow::Result<()> {
    host.job::<ForgetNotifications>((store.clone(), retention));
    host.job::<ForgetExpired>(store.clone());
    let notifications = Schedule::new("push.retention", "*/10 * * * *", &ForgetNotifications {})?;
    host.schedule(notifications.overlap(Overlap::Skip));
    let expired = Schedule::new("push.expired", "25 * * * *", &ForgetExpired {})?;
    host.schedule(expired.overlap(Overlap::Skip));
    Ok(())
}

/// Deletes notifications that ended long ago, with their payloads and logs, and push services and acceptances whose
/// rows are of no use any more.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForgetNotifications {}

impl Job for ForgetNotifications {
    const KIND: &'static str = "push.retention";
    type Tools = (PushStore, Duration);

    fn options() -> Options {
        maintenance::options()
    }

    async fn run(&self, context: Context, (store, retention): Self::Tools) -> anyhow::Result<JobOutcome> {
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        let before = now_ms().saturating_sub(retention);
        let rows = until_none(&context, || async { Ok(store.forget_notifications(before).await?) }).await?;
        if rows > 0 {
            info!(rows, "deleted notifications that ended long ago");
        }
        store.forget_services().await?;
        store.forget_acceptances().await?;
        Ok(JobOutcome::Done)
    }
}

/// Deletes subscriptions that have expired by the time that their browsers gave (Push API, `expirationTime`).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ForgetExpired {}

impl Job for ForgetExpired {
    const KIND: &'static str = "push.expired";
    type Tools = PushStore;

    fn options() -> Options {
        maintenance::options()
    }

    async fn run(&self, context: Context, store: PushStore) -> anyhow::Result<JobOutcome> {
        let now = now_ms();
        let subscriptions = until_none(&context, || async { Ok(store.forget_expired(now).await?) }).await?;
        if subscriptions > 0 {
            info!(subscriptions, "deleted subscriptions that had expired");
        }
        Ok(JobOutcome::Done)
    }
}
