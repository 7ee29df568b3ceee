//! What this process knows about the notifications that it sends: whether they may go on, and how fast.
//!
//! One task asks the store twice a second how they stand, since another replica may have been told to pause one; and it
//! reserves the slices of those that are paced.

use crate::model::notification::NotificationStatus;
use crate::model::notification::Stage;
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

use crate::model::schedule::RateSchedule;
use crate::pacing::pace::{Pace, Slice};
use crate::store::{PushStore, Reserved};

/// How often the store is asked how notifications stand.
const LOOK: Duration = Duration::from_millis(500);
/// How many origins' paces are kept.
const MAX_ORIGINS: usize = 1024;
/// Before asking again for what others hold, at least.
const SOON: Duration = Duration::from_millis(5);
/// After a reservation that failed.
const AGAIN: Duration = Duration::from_millis(100);

/// A notification that this process sends.
#[derive(Debug)]
pub(crate) struct Flow {
    id: Uuid,
    standing: watch::Sender<NotificationStatus>,
    pace: Pace,
    /// The batches that have members left, the oldest first.
    line: Mutex<BTreeSet<Uuid>>,
}

impl Flow {
    /// How it stands, and when that changes.
    pub(crate) fn standing(&self) -> watch::Receiver<NotificationStatus> {
        self.standing.subscribe()
    }

    /// Puts a batch into the line of those that send.
    pub(crate) fn stand_in_line(self: &Arc<Self>, batch: Uuid) -> PlaceInLine {
        self.line.lock().insert(batch);
        PlaceInLine { flow: Arc::clone(self), batch }
    }

    /// The pace that it keeps, if it has one.
    pub(crate) fn pace(&self) -> Option<&Pace> {
        self.standing.borrow().rate.is_some().then_some(&self.pace)
    }

    /// It stands like this now.
    pub(crate) fn set(&self, new: NotificationStatus) {
        let mut repaced = false;
        self.standing.send_if_modified(|standing| {
            // A pause begins the schedule anew, too.
            repaced =
                standing.rate != new.rate || (standing.state, new.state) == (Stage::Paused, Stage::Sending);
            std::mem::replace(standing, new) != new
        });
        if repaced {
            self.pace.reset();
        }
    }
}

/// A batch's place in the line of its notification. Whoever is first takes what is due, and the others what it leaves: so
/// that batches end one after the other, and not all at once before there are new ones.
#[derive(Debug)]
pub(crate) struct PlaceInLine {
    flow: Arc<Flow>,
    batch: Uuid,
}

impl PlaceInLine {
    /// How many are before it.
    pub(crate) fn rank(&self) -> u32 {
        u32::try_from(self.flow.line.lock().range(..self.batch).count()).unwrap_or(u32::MAX)
    }
}

impl Drop for PlaceInLine {
    fn drop(&mut self) {
        self.flow.line.lock().remove(&self.batch);
    }
}

/// All of them. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Flows {
    store: PushStore,
    /// For as long as one of their batches is in hand.
    notifications: Arc<Mutex<HashMap<Uuid, Weak<Flow>>>>,
    /// Kept while nobody waits: what was reserved is not lost.
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

    /// The flow of a notification that stands like this.
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

    /// Those that are sent now.
    fn flows(&self) -> Vec<Arc<Flow>> {
        let mut flows = self.notifications.lock();
        flows.retain(|_, flow| flow.strong_count() > 0);
        flows.values().filter_map(Weak::upgrade).collect()
    }

    /// The pace of an origin, if there is a rate for all.
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

    /// Somebody has changed how a notification stands, here and now.
    pub(crate) fn changed(&self, id: Uuid, standing: NotificationStatus) {
        let flow = self.notifications.lock().get(&id).and_then(Weak::upgrade);
        if let Some(flow) = flow {
            flow.set(standing);
        }
    }

    /// Looks and reserves, until nothing is sent any more.
    pub(crate) async fn run(self, drain: Drain) -> anyhow::Result<()> {
        let mut look = Instant::now() + LOOK;
        let mut reserve = look;
        loop {
            // What is being sent when the process stops is sent at its pace to the end.
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
                    warn!(error = format!("{error:#}"), "how notifications stand is not known");
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
                // It goes on as it did.
                Some(None) => {}
                None => flow.set(NotificationStatus::GONE),
            }
        }
        Ok(())
    }

    /// Those that want another slice.
    fn paces(&self) -> Vec<Wanting> {
        let flows = self.flows().into_iter().filter(|flow| flow.pace.is_wanted()).map(Wanting::Flow);
        let origins = self.origins.lock();
        let wanted = origins.iter().filter(|(_, pace)| pace.is_wanted());
        flows.chain(wanted.map(|(origin, pace)| Wanting::Origin(origin.clone(), Arc::clone(pace)))).collect()
    }

    /// Reserves a slice; if there is none to be had now, returns when to try again.
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

    /// The store's clock as far as is known, with what it showed when an answer came.
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

/// What the store's clock showed at an instant of ours, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct StoreClock {
    at: Instant,
    us: i64,
}

impl StoreClock {
    /// A reading that took longer to come shows less than there is: the most advanced one is believed, and slowly
    /// corrected. One that differs much is another clock.
    fn with(self, new: Self) -> Self {
        let expected = self.us + micros(new.at.saturating_duration_since(self.at));
        let off = new.us - expected;
        let us = if (-1_000_000..=0).contains(&off) { expected + off / 64 } else { new.us };
        Self { at: new.at, us }
    }
}

/// When it was `us` by the store's clock.
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
