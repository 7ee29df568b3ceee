//! The active notifications of this process: whether they may go on, and how fast.
//!
//! One task reads their status from the store twice a second, since another replica may have been told to pause
//! one. It also reserves the slices of paced notifications.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use perennial_runtime::drain::{Drain, Phase};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tracing::warn;
use uuid::Uuid;

use crate::model::notification::{NotificationStatus, Stage};
use crate::model::schedule::RateSchedule;
use crate::pacing::pace::{Pace, Slice};
use crate::store::{PushStore, Reserved};

/// Time between two reads of the status of notifications.
const LOOK: Duration = Duration::from_millis(500);
/// Number of paces of origins from which on unused ones are removed.
const MAX_ORIGINS: usize = 1024;
/// Shortest wait before another try for a slice that other replicas hold.
const SOON: Duration = Duration::from_millis(5);
/// Wait after a reservation that failed.
const AGAIN: Duration = Duration::from_millis(100);

/// An active notification: one that this process sends.
#[derive(Debug)]
pub(crate) struct Flow {
    id: Uuid,
    standing: watch::Sender<NotificationStatus>,
    pace: Pace,
    /// The batches that have members left, the oldest first.
    line: Mutex<BTreeSet<Uuid>>,
}

impl Flow {
    /// Its status, with notice of each change.
    pub(crate) fn standing(&self) -> watch::Receiver<NotificationStatus> {
        self.standing.subscribe()
    }

    /// Puts a batch into the line of the batches that send.
    pub(crate) fn stand_in_line(self: &Arc<Self>, batch: Uuid) -> PlaceInLine {
        self.line.lock().insert(batch);
        PlaceInLine { flow: Arc::clone(self), batch }
    }

    /// Its pace; `None` when it has no rate.
    pub(crate) fn pace(&self) -> Option<&Pace> {
        self.standing.borrow().rate.is_some().then_some(&self.pace)
    }

    /// Sets the status. The pace begins anew when the rate changes or a pause ends.
    pub(crate) fn set(&self, new: NotificationStatus) {
        let mut repaced = false;
        self.standing.send_if_modified(|standing| {
            // The schedule begins anew after a pause, too.
            repaced =
                standing.rate != new.rate || (standing.state, new.state) == (Stage::Paused, Stage::Sending);
            std::mem::replace(standing, new) != new
        });
        if repaced {
            self.pace.reset();
        }
    }
}

/// A batch's place in the line of its notification. The first batch takes the sends that are due, and the others
/// take the rest, so that batches end one after the other, and not all at once before there are new ones.
#[derive(Debug)]
pub(crate) struct PlaceInLine {
    flow: Arc<Flow>,
    batch: Uuid,
}

impl PlaceInLine {
    /// Number of batches before it.
    pub(crate) fn rank(&self) -> u32 {
        u32::try_from(self.flow.line.lock().range(..self.batch).count()).unwrap_or(u32::MAX)
    }
}

impl Drop for PlaceInLine {
    fn drop(&mut self) {
        self.flow.line.lock().remove(&self.batch);
    }
}

/// All active notifications of this process; a cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Flows {
    store: PushStore,
    /// Each notification is here as long as this process runs one of its batches.
    notifications: Arc<Mutex<HashMap<Uuid, Weak<Flow>>>>,
    /// Paces are kept while no message waits, so that reserved slices are not lost.
    origins: Arc<Mutex<HashMap<String, Arc<Pace>>>>,
    /// Messages per second to one origin, by all notifications together.
    origin_rate: Option<f64>,
    wake: Arc<Notify>,
    clock: Arc<Mutex<Option<StoreClock>>>,
}

impl Flows {
    pub(crate) fn new(store: PushStore, origin_rate: Option<f64>) -> Self {
        Self {
            store,
            notifications: Arc::default(),
            origins: Arc::default(),
            origin_rate,
            wake: Arc::default(),
            clock: Arc::default(),
        }
    }

    /// The active notification with this id, which is added when it is new. Its status is set.
    pub(crate) fn flow(&self, id: Uuid, standing: NotificationStatus) -> Arc<Flow> {
        let mut flows = self.notifications.lock();
        if let Some(flow) = flows.get(&id).and_then(Weak::upgrade) {
            flow.set(standing);
            return flow;
        }
        let (standing, pace) = (watch::Sender::new(standing), Pace::new(Arc::clone(&self.wake)));
        let flow = Arc::new(Flow { id, standing, pace, line: Mutex::default() });
        flows.insert(id, Arc::downgrade(&flow));
        drop(flows);
        self.wake.notify_one();
        flow
    }

    /// The notifications that are sent now.
    fn flows(&self) -> Vec<Arc<Flow>> {
        let mut flows = self.notifications.lock();
        flows.retain(|_, flow| flow.strong_count() > 0);
        flows.values().filter_map(Weak::upgrade).collect()
    }

    /// The pace of an origin; `None` when origins have no rate.
    pub(crate) fn origin(&self, origin: &str) -> Option<Arc<Pace>> {
        self.origin_rate?;
        let mut origins = self.origins.lock();
        if let Some(pace) = origins.get(origin) {
            return Some(Arc::clone(pace));
        }
        if origins.len() >= MAX_ORIGINS {
            origins.retain(|_, pace| Arc::strong_count(pace) > 1);
        }
        let pace = Arc::new(Pace::new(Arc::clone(&self.wake)));
        origins.insert(origin.to_owned(), Arc::clone(&pace));
        Some(pace)
    }

    /// Sets the status of a notification that was changed through this process.
    pub(crate) fn changed(&self, id: Uuid, standing: NotificationStatus) {
        let flow = self.notifications.lock().get(&id).and_then(Weak::upgrade);
        if let Some(flow) = flow {
            flow.set(standing);
        }
    }

    /// Reads the status and reserves slices, until nothing is sent any more.
    pub(crate) async fn run(self, drain: Drain) -> anyhow::Result<()> {
        let mut look = Instant::now() + LOOK;
        let mut reserve = look;
        loop {
            // Batches that run when the process stops keep their pace to the end.
            if drain.phase() >= Phase::Soft && self.flows().is_empty() {
                return Ok(());
            }
            let is_idle = self.flows().is_empty() && self.paces().is_empty();
            tokio::select! {
                () = drain.hard() => return Ok(()),
                () = drain.soft(), if drain.phase() < Phase::Soft => {}
                () = self.wake.notified() => reserve = Instant::now(),
                () = sleep_until(look.min(reserve)), if !is_idle => {}
            }
            let now = Instant::now();
            if now >= look {
                look = now + LOOK;
                if let Err(error) = self.look().await {
                    warn!(error = format!("{error:#}"), "the status of notifications cannot be read");
                }
            }
            if now >= reserve {
                let next = join_all(self.paces().into_iter().map(|wanting| self.reserve(wanting))).await;
                let next = next.into_iter().flatten().min();
                reserve = next.map_or(now + LOOK, |wait| Instant::now() + wait);
            }
        }
    }

    async fn look(&self) -> anyhow::Result<()> {
        let flows = self.flows();
        if flows.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = flows.iter().map(|flow| flow.id).collect();
        let standings: HashMap<Uuid, Option<NotificationStatus>> =
            self.store.standings(&ids).await?.into_iter().collect();
        for flow in flows {
            match standings.get(&flow.id) {
                Some(Some(standing)) => flow.set(*standing),
                // The row cannot be read: the notification goes on as before.
                Some(None) => {}
                None => flow.set(NotificationStatus::GONE),
            }
        }
        Ok(())
    }

    /// The paces that want another slice.
    fn paces(&self) -> Vec<Wanting> {
        let flows = self.flows().into_iter().filter(|flow| flow.pace.is_wanted()).map(Wanting::Flow);
        let origins = self.origins.lock();
        let wanted = origins.iter().filter(|(_, pace)| pace.is_wanted());
        flows.chain(wanted.map(|(origin, pace)| Wanting::Origin(origin.clone(), Arc::clone(pace)))).collect()
    }

    /// Reserves a slice; when there is none now, returns the wait before the next try.
    async fn reserve(&self, wanting: Wanting) -> Option<Duration> {
        let pace = wanting.pace();
        let reserved = match &wanting {
            Wanting::Flow(flow) => self.store.reserve(flow.id).await,
            Wanting::Origin(origin, _) => {
                let schedule = RateSchedule { rate: self.origin_rate.unwrap_or(f64::MAX), ramp: 0.0 };
                self.store.reserve_origin(origin, schedule).await
            }
        };
        let replied = Instant::now();
        match reserved {
            Ok(Reserved::Slice { schedule, now, began, next, end }) => {
                let now = self.local(now, replied);
                let began = since(now, began);
                pace.add(Slice { schedule, began, next, end });
                None
            }
            Ok(Reserved::Later(wait)) => {
                pace.want_still();
                Some(wait.clamp(SOON, LOOK))
            }
            Ok(Reserved::Nothing) => None,
            Err(error) => {
                warn!(error = format!("{error:#}"), "no slice could be reserved");
                pace.want_still();
                Some(AGAIN)
            }
        }
    }

    /// The estimate of the store's clock, updated by a reading in an answer that came at `replied`.
    fn local(&self, store_us: i64, replied: Instant) -> StoreClock {
        let mut clock = self.clock.lock();
        let new = StoreClock { at: replied, us: store_us };
        let better = match *clock {
            Some(known) => known.with(new),
            None => new,
        };
        *clock = Some(better);
        better
    }
}

enum Wanting {
    Flow(Arc<Flow>),
    Origin(String, Arc<Pace>),
}

impl Wanting {
    fn pace(&self) -> &Pace {
        match self {
            Self::Flow(flow) => &flow.pace,
            Self::Origin(_, pace) => pace,
        }
    }
}

/// Time of the store's clock at an instant of ours, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct StoreClock {
    at: Instant,
    us: i64,
}

impl StoreClock {
    /// A reading that took longer to arrive is behind the real time. So the most advanced reading is used, and
    /// slowly corrected. A reading that differs much comes from a clock that was set, and is used as it is.
    fn with(self, new: Self) -> Self {
        let expected = self.us + micros(new.at.saturating_duration_since(self.at));
        let off = new.us - expected;
        let us = if (-1_000_000..=0).contains(&off) { expected + off / 64 } else { new.us };
        Self { at: new.at, us }
    }
}

/// The instant at which the store's clock showed `us`.
fn since(clock: StoreClock, us: i64) -> Instant {
    let distance = Duration::from_micros(us.abs_diff(clock.us));
    if us >= clock.us { clock.at + distance } else { clock.at.checked_sub(distance).unwrap_or(clock.at) }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_answer_does_not_move_the_clock_much() {
        let at = Instant::now();
        let clock = StoreClock { at, us: 1_000_000_000 };
        let second = Duration::from_secs(1);
        let late = clock.with(StoreClock { at: at + second, us: 1_000_990_000 });
        assert_eq!(late.us, 1_001_000_000 - 156, "a reading that was 10 ms on its way");
        let early = late.with(StoreClock { at: at + second * 2, us: 1_002_000_000 });
        assert_eq!(early.us, 1_002_000_000);
        let stepped = early.with(StoreClock { at: at + second * 3, us: 900_000_000 });
        assert_eq!(stepped.us, 900_000_000, "somebody has set it back");
    }
}
