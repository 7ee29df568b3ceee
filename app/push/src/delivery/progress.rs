//! The rate at which outcomes are decided.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::model::notification::{Notification, NotificationView};

/// Time over which the recent rate is measured.
const WINDOW: Duration = Duration::from_secs(5);
/// Shortest time between two readings that give a rate: outcomes are recorded once a second.
const APART: Duration = Duration::from_secs(2);
/// Shortest time between two readings that are kept.
const BETWEEN: Duration = Duration::from_millis(200);

/// The rates at which outcomes are decided; a cheap handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgressRates(Arc<Mutex<HashMap<Uuid, Recent>>>);

/// The counts of one notification within [`WINDOW`].
#[derive(Debug, Default)]
struct Recent {
    /// Numbers of outcomes that this process has recorded, with their times.
    recorded: VecDeque<(Instant, u64)>,
    /// Numbers of outcomes of all replicas, with the times at which they were read.
    read: VecDeque<(Instant, u64)>,
}

impl Recent {
    /// Removes counts that are too old. Returns false when nothing is left.
    fn tidy(&mut self, now: Instant) -> bool {
        for all in [&mut self.recorded, &mut self.read] {
            while all.front().is_some_and(|(when, _)| now - *when > WINDOW) {
                all.pop_front();
            }
        }
        !(self.recorded.is_empty() && self.read.is_empty())
    }

    /// Outcomes per second: of all replicas when their number was read before, else of this process.
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    fn rate(&self, decided: u64, now: Instant) -> f64 {
        if let Some((when, before)) = self.read.front().filter(|(when, _)| now - *when >= APART) {
            return decided.saturating_sub(*before) as f64 / (now - *when).as_secs_f64();
        }
        let Some((first, _)) = self.recorded.front() else { return 0.0 };
        let count: u64 = self.recorded.iter().map(|(_, count)| count).sum();
        count as f64 / (now - *first).as_secs_f64().max(0.5)
    }
}

impl ProgressRates {
    pub(crate) fn record(&self, notification: Uuid, count: usize) {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.entry(notification).or_default().recorded.push_back((now, count as u64));
        all.retain(|_, recent| recent.tidy(now));
    }

    /// The view of a notification for callers, with its recent rate.
    pub(crate) fn view(&self, notification: Notification) -> NotificationView {
        let rate = match notification.ended_at {
            Some(_) => 0.0,
            None => self.rate(notification.id, notification.outcomes.values().sum()),
        };
        NotificationView::new(notification, rate)
    }

    /// Recent outcome rate, per second, of a notification that has `decided` outcomes.
    fn rate(&self, notification: Uuid, decided: u64) -> f64 {
        let now = Instant::now();
        let mut all = self.0.lock();
        all.retain(|_, recent| recent.tidy(now));
        let recent = all.entry(notification).or_default();
        if recent.read.back().is_none_or(|(when, _)| now - *when >= BETWEEN) {
            recent.read.push_back((now, decided));
        }
        recent.rate(decided, now)
    }
}
