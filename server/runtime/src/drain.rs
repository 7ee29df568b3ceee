//! The stop signal, as a value that every component receives as an argument.
//!
//! A drain has phases that only go forward. What they mean to a component:
//!
//! ```text
//! Running ──► Notice ──► Soft ──► Hard
//!    │          │          │        └─ stop now: hand back what is not done; after `drain.hard` comes abort
//!    │          │          └─ take nothing new at all, tell the peers, finish what runs
//!    │          └─ not ready any more, claim no new work; HTTP goes on as before
//!    └─ business as usual
//! ```
//!
//! "Done" is not part of it: a component has stopped when its `run` returns, which its owner awaits
//! (see [`crate::tasks`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// How long a connection is idle before it is closed in a drain, unless the trigger says.
const LINGER: Duration = Duration::from_millis(500);

/// How far the stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Business as usual.
    Running,
    /// The process is about to leave: not ready, no new claims; requests are served as before.
    Notice,
    /// Nothing new is taken; what runs may finish.
    Soft,
    /// What still runs is cancelled and hands back its work.
    Hard,
}

/// The side that says when: one per process, held by whoever stops it.
#[derive(Debug)]
pub struct Trigger {
    phase: watch::Sender<Phase>,
    linger_ms: Arc<AtomicU64>,
}

/// The side that listens. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
    linger_ms: Arc<AtomicU64>,
}

/// A trigger and its first listener.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(Phase::Running);
    let linger_ms = Arc::new(AtomicU64::new(milliseconds(LINGER)));
    (Trigger { phase: sender, linger_ms: Arc::clone(&linger_ms) }, Drain { phase: receiver, linger_ms })
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Trigger {
    /// Moves on to `phase`. Going back is not possible: an earlier phase changes nothing.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let forward = phase > *current;
            if forward {
                *current = phase;
            }
            forward
        });
    }

    /// How long connections without a request are kept in the soft phase: their clients do not know yet, and a request may be
    /// on its way. 500 ms unless it is said, before that phase.
    pub fn linger(&self, linger: Duration) {
        self.linger_ms.store(milliseconds(linger), Ordering::Release);
    }

    /// A new listener.
    pub fn listen(&self) -> Drain {
        Drain { phase: self.phase.subscribe(), linger_ms: Arc::clone(&self.linger_ms) }
    }
}

impl Drain {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// How long connections without a request are kept in the soft phase.
    pub fn linger(&self) -> Duration {
        Duration::from_millis(self.linger_ms.load(Ordering::Acquire))
    }

    /// Waits until `phase` or a later one is reached. A trigger that was dropped counts as [`Phase::Hard`].
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.phase.clone();
        // The error says that the trigger is gone, and with it whoever could have said "go on".
        let _ = receiver.wait_for(|current| *current >= phase).await;
    }

    /// Waits until the process is about to leave: claim no new work.
    pub async fn notice(&self) {
        self.reached(Phase::Notice).await;
    }

    /// Waits until nothing new may be taken.
    pub async fn soft(&self) {
        self.reached(Phase::Soft).await;
    }

    /// Waits until what still runs must hand back and end.
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
