//! How fast outcomes are decided.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;

use crate::model::notification::{Notification, NotificationView};

/// Over how long the rate of now is measured.
const WINDOW: Duration = Duration::from_secs(5);
/// How far apart two readings must be to tell a rate: outcomes are written down once a second.
const APART: Duration = Duration::from_secs(2);
/// How much later than the last a reading is kept.
const BETWEEN: Duration = Duration::from_millis(200);

/// How fast outcomes are decided. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgressRates(Arc<Mutex<HashMap<Uuid, Recent>>>);

/// Within [`WINDOW`]:
#[derive(Debug, Default)]
struct Recent {
    /// how many this process has recorded when,
    recorded: VecDeque<(Instant, u64)>,
    /// and how many there were by all replicas when somebody asked.
    read: VecDeque<(Instant, u64)>,
}

impl Recent {
    /// Forgets what is too old. False when nothing is left.
    fn tidy(&mut self, now: Instant) -> bool {
        for all in [&mut self.recorded, &mut self.read] {
            while all.front().is_some_and(|(when, _)| now - *when > WINDOW) {
                all.pop_front();
            }
        }
        !(self.recorded.is_empty() && self.read.is_empty())
    }

    /// Outcomes a second: by all replicas if that was asked for before, else by this process.
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

    /// A notification as a caller is shown it, with its recent rate.
    pub(crate) fn view(&self, notification: Notification) -> NotificationView {
        let rate = match notification.ended_at {
            Some(_) => 0.0,
            None => self.rate(notification.id, notification.outcomes.values().sum()),
        };
        NotificationView::new(notification, rate)
    }

    /// Recent outcomes a second of a notification that has `decided` outcomes.
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
