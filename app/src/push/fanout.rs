//! The job that cuts a big audience into batches: ranges of ids, not lists, so that the audience may be of
//! any size. It stays a few batches ahead of those that send, and no further: another notification's batches
//! get their turn in between.

use std::time::Duration;

use perennial_server::backoff::Backoff;
use perennial_workers::state::Budget;
use perennial_workers::{Context, Fate, Job, Options};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Tools;
use super::deliver::Deliver;
use super::store::Added;

/// How many batches of one notification may wait or run, for each that can run at once.
const AHEAD: usize = 4;
/// How soon to look again when that many do.
const PAUSE: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FanOut {
    pub(crate) notification: Uuid,
    /// Of its batches.
    pub(crate) priority: i16,
}

impl Job for FanOut {
    const KIND: &'static str = "push.fan_out";
    type Tools = Tools;

    fn options() -> Options {
        Options {
            queue: super::FAN_OUT_QUEUE,
            timeout: Duration::from_secs(60),
            budget: BUDGET,
            ..Options::default()
        }
    }

    fn subject(&self) -> Option<String> {
        Some(format!("notification {}", self.notification))
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<Fate> {
        let store = &tools.store;
        let Some(mut fan_out) = store.open_fan_out(self.notification, context.epoch).await? else {
            return Ok(Fate::Done);
        };
        let ahead = AHEAD * tools.config.batches;
        while fan_out.ahead < ahead {
            context.check()?;
            let page = store.next_page(&fan_out, tools.config.batch).await?;
            let next = match page {
                Some(upto) => {
                    Some((upto, Deliver::job(self.notification, super::BULK_QUEUE, self.priority)?))
                }
                None => None,
            };
            match store.add_batch(self.notification, context.epoch, fan_out.fanned_to, next).await? {
                Added::One => {}
                Added::NoMore => return Ok(Fate::Done),
                Added::Last => {
                    tools.ended(self.notification, fan_out.site).await;
                    return Ok(Fate::Done);
                }
            }
            fan_out.fanned_to = page.unwrap_or(fan_out.fanned_to);
            fan_out.ahead += 1;
        }
        context.advanced();
        Ok(Fate::Snooze(PAUSE))
    }

    async fn give_up(&self, context: Context, tools: Tools, reason: String) -> anyhow::Result<()> {
        Ok(tools.store.give_up_fan_out(self.notification, context.epoch, reason).await?)
    }
}

/// What goes wrong here is the store, and that comes back.
pub(super) const BUDGET: Budget = Budget {
    failures: 50,
    recoveries: 4,
    window: Duration::from_secs(72 * 3600),
    backoff: Backoff::new(Duration::from_millis(500), Duration::from_secs(60)),
};
