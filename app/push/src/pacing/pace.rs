//! An even rate of sends, which all replicas keep together.
//!
//! The schedule of a paced notification, or of an origin whose rate is capped, is in the store: its beginning, and
//! the time at which the next send that is not reserved is due, by the store's clock. A process that wants to send
//! reserves the next slice of the schedule, some 250 ms ahead, by compare-and-swap, and sends evenly inside its
//! slices. A process that dies wastes a slice; a process that cannot reach the store sends nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::model::schedule::{CATCH_UP, RateSchedule, SLICE};

/// The next slice is reserved when less than this is left of the reserved ones.
const LOW: Duration = Duration::from_millis(200);

/// A part of a schedule that this process may send in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) schedule: RateSchedule,
    /// Beginning of the schedule.
    pub(crate) began: Instant,
    /// Number of sends of the schedule before the next one of this slice.
    pub(crate) next: f64,
    /// Number of sends of the schedule before the first one after this slice.
    pub(crate) end: f64,
}

impl Slice {
    fn at(&self, count: f64) -> Instant {
        self.began + Duration::from_secs_f64(self.schedule.at(count).max(0.0))
    }

    fn is_used_up(&self) -> bool {
        self.next + 0.5 > self.end
    }
}

/// Decision whether a send may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    /// The send may begin now.
    Now,
    /// The send may not begin before this time.
    At(Instant),
    /// The send waits for another slice.
    WhenReserved,
}

/// The pace of one notification or origin, in this process.
#[derive(Debug)]
pub(crate) struct Pace {
    slices: Mutex<VecDeque<Slice>>,
    /// Notified when there are more slices, or other ones.
    changed: Notify,
    wanted: AtomicBool,
    /// Wakes the task that reserves slices.
    pacer: Arc<Notify>,
}

impl Pace {
    pub(crate) fn new(pacer: Arc<Notify>) -> Self {
        Self { slices: Mutex::default(), changed: Notify::new(), wanted: AtomicBool::new(false), pacer }
    }

    /// Takes the next send, if it is due.
    pub(crate) fn take(&self, now: Instant) -> Take {
        self.take_at(now, now)
    }

    /// Takes the next send even if it is not due yet. The sends after it come later for that.
    fn take_early(&self, now: Instant) -> Take {
        self.take_at(now, now + SLICE * 8)
    }

    fn take_at(&self, now: Instant, due: Instant) -> Take {
        let mut slices = self.slices();
        loop {
            let Some(slice) = slices.front_mut() else {
                self.want();
                return Take::WhenReserved;
            };
            if slice.is_used_up() {
                slices.pop_front();
                continue;
            }
            let at = slice.at(slice.next);
            let late = now.saturating_duration_since(at);
            if at > due {
                return Take::At(at);
            }
            slice.next += 1.0;
            if late > CATCH_UP {
                continue;
            }
            let last = slices.back().map_or(now, |last| last.at(last.end));
            if last.saturating_duration_since(now) < LOW {
                self.want();
            }
            return Take::Now;
        }
    }

    /// Waits for a send. An urgent one goes before all others.
    pub(crate) async fn wait(&self, urgent: bool) {
        loop {
            let changed = self.changed.notified();
            let now = Instant::now();
            match if urgent { self.take_early(now) } else { self.take(now) } {
                Take::Now => return,
                Take::At(at) => sleep_until(at).await,
                Take::WhenReserved => changed.await,
            }
        }
    }

    /// Returns when there are more slices, or other ones.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Adds a slice that was reserved.
    pub(crate) fn add(&self, slice: Slice) {
        self.slices().push_back(slice);
        self.changed.notify_waiters();
    }

    /// Drops the reserved slices, since the schedule begins anew.
    pub(crate) fn reset(&self) {
        self.slices().clear();
        self.changed.notify_waiters();
    }

    /// Takes and clears the "wants a slice" flag.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.swap(false, Ordering::Relaxed)
    }

    /// Asks for another slice.
    pub(crate) fn want(&self) {
        if !self.wanted.swap(true, Ordering::Relaxed) {
            self.pacer.notify_one();
        }
    }

    /// Sets the "wants a slice" flag again after a try without success. The task that reserves is not woken: it
    /// knows.
    pub(crate) fn want_still(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    fn slices(&self) -> MutexGuard<'_, VecDeque<Slice>> {
        self.slices.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        Pace::new(Arc::default())
    }

    fn slice(began: Instant, rate: f64, next: f64, end: f64) -> Slice {
        Slice { schedule: RateSchedule { rate, ramp: 0.0 }, began, next, end }
    }

    #[tokio::test(start_paused = true)]
    async fn sends_are_even_inside_a_slice() {
        let (pace, began) = (pace(), Instant::now());
        pace.add(slice(began, 100.0, 0.0, 25.0));
        for count in 0..25_u32 {
            pace.wait(false).await;
            let off = began.elapsed().abs_diff(Duration::from_millis(10) * count);
            assert!(off <= Duration::from_millis(2), "{count}: {off:?}");
        }
        assert_eq!(pace.take(Instant::now()), Take::WhenReserved);
        assert!(pace.is_wanted());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_made_up_for_only_a_little() {
        let (pace, began) = (pace(), Instant::now());
        pace.add(slice(began, 100.0, 0.0, 1000.0));
        tokio::time::advance(Duration::from_secs(5)).await;
        let mut taken = 0;
        while pace.take(Instant::now()) == Take::Now {
            taken += 1;
        }
        assert!((25..=27).contains(&taken), "{taken}: a quarter of a second");
    }

    #[tokio::test(start_paused = true)]
    async fn an_urgent_send_does_not_wait_and_others_do_for_it() {
        let (pace, began) = (pace(), Instant::now());
        pace.add(slice(began, 10.0, 0.0, 10.0));
        pace.wait(false).await;
        pace.wait(true).await;
        assert!(began.elapsed() < Duration::from_millis(5));
        pace.wait(false).await;
        assert!(began.elapsed() >= Duration::from_millis(195), "its place was taken");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_reserves_is_not_woken_for_what_could_not_be_had() {
        let pacer = Arc::new(Notify::new());
        let pace = Pace::new(Arc::clone(&pacer));
        pace.take(Instant::now());
        tokio::time::timeout(Duration::from_millis(1), pacer.notified()).await.unwrap();
        assert!(pace.is_wanted());
        pace.want_still();
        pace.take(Instant::now());
        assert!(tokio::time::timeout(Duration::from_secs(1), pacer.notified()).await.is_err());
        assert!(pace.is_wanted());
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_slice_is_wanted_in_time() {
        let (pace, began) = (pace(), Instant::now());
        pace.add(slice(began, 100.0, 0.0, 25.0));
        pace.wait(false).await;
        assert!(!pace.is_wanted());
        for _ in 0..8 {
            pace.wait(false).await;
        }
        assert!(pace.is_wanted());
    }
}
