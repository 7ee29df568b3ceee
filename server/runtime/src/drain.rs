//! The stop signal, as a value that every component receives as an argument.
//!
//! A drain has phases that only go forward. They have this meaning for a component:
//!
//! ```text
//! Running ──► Notice ──► Soft ──► Hard
//!    │          │          │        └─ stop now: hand back unfinished work; tasks are aborted after `drain.hard`
//!    │          │          └─ take no new work at all, tell the peers, finish running work
//!    │          └─ not ready, claim no new work; HTTP goes on as before
//!    └─ normal operation
//! ```
//!
//! There is no phase for "done": a component has stopped when its `run` returns, which its owner awaits (see
//! [`crate::tasks`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// Default of [`Trigger::linger`].
const LINGER: Duration = Duration::from_millis(500);

/// The phases of a drain, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Normal operation.
    Running,
    /// The process is about to stop: it is not ready and claims no new work, but serves requests as before.
    Notice,
    /// No new work is taken; running work may finish.
    Soft,
    /// Running work is cancelled and handed back.
    Hard,
}

/// The sending side of a drain. A process has one, held by the code that stops it.
#[derive(Debug)]
pub struct Trigger {
    phase: watch::Sender<Phase>,
    linger_ms: Arc<AtomicU64>,
}

/// The receiving side of a drain. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
    linger_ms: Arc<AtomicU64>,
}

/// Creates a trigger and its first listener.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(Phase::Running);
    let linger_ms = Arc::new(AtomicU64::new(milliseconds(LINGER)));
    (Trigger { phase: sender, linger_ms: Arc::clone(&linger_ms) }, Drain { phase: receiver, linger_ms })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Trigger {
    /// Moves on to `phase`. An earlier phase than the current one has no effect.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let forward = phase > *current;
            if forward {
                *current = phase;
            }
            forward
        });
    }

    /// Sets how long connections without a request stay open in the soft phase, since a request may be on its way from
    /// a client that does not know of the stop yet. The default is 500 ms. Call this before that phase.
    pub fn linger(&self, linger: Duration) {
        self.linger_ms.store(milliseconds(linger), Ordering::Release);
    }

    /// Creates another listener.
    pub fn listen(&self) -> Drain {
        Drain { phase: self.phase.subscribe(), linger_ms: Arc::clone(&self.linger_ms) }
    }
}

impl Drain {
    /// The current phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Time for which connections without a request stay open in the soft phase.
    pub fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms.load(Ordering::Acquire))
    }

    /// Waits until `phase` or a later one is reached. A trigger that was dropped counts as [`Phase::Hard`].
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.phase.clone();
        // An error means that the trigger was dropped, which counts as the last phase.
        let _ = receiver.wait_for(|current| *current >= phase).await;
    }

    /// Waits for [`Phase::Notice`], after which no new work is claimed.
    pub async fn notice(&self) {
        self.reached(Phase::Notice).await;
    }

    /// Waits for [`Phase::Soft`], after which no new work is taken.
    pub async fn soft(&self) {
        self.reached(Phase::Soft).await;
    }

    /// Waits for [`Phase::Hard`], after which running work is handed back and ends.
    pub async fn hard(&self) {
        self.reached(Phase::Hard).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward() {
        let (trigger, drain) = channel();
        trigger.advance(Phase::Soft);
        trigger.advance(Phase::Notice);
        assert_eq!(drain.phase(), Phase::Soft);
        drain.notice().await;
        drain.soft().await;
    }

    #[tokio::test]
    async fn a_dropped_trigger_stops_everything() {
        let (trigger, drain) = channel();
        drop(trigger);
        drain.hard().await;
    }
}
