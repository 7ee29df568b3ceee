//! A rate limit for log lines that repeat for as long as a failure lasts.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lets one line through per period and counts the lines left out in between. Each place that logs has its own.
#[derive(Debug)]
pub struct Seldom {
    period: Duration,
    told: Mutex<SeldomState>,
}

#[derive(Clone, Copy, Debug)]
struct SeldomState {
    at: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// Lets one line through per `period`.
    pub const fn every(period: Duration) -> Self {
        Self { period, told: Mutex::new(SeldomState { at: None, left_out: 0 }) }
    }

    /// Lets one line through per minute. For failures caused by an unreachable store, which a readiness condition
    /// reports anyway.
    pub const fn each_minute() -> Self {
        Self::every(Duration::from_secs(60))
    }

    /// Returns the number of lines left out since the last one, or `None` when this line must be left out too.
    pub fn tell(&self) -> Option<u64> {
        self.told.lock().tell(self.period, Instant::now())
    }
}

impl SeldomState {
    fn tell(&mut self, period: Duration, now: Instant) -> Option<u64> {
        if self.at.is_some_and(|at| now.duration_since(at) < period) {
            self.left_out += 1;
            return None;
        }
        self.at = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_once_in_a_period_and_says_how_many_it_stands_for() {
        let period = Duration::from_secs(10);
        let mut told = SeldomState { at: None, left_out: 0 };
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(told.tell(period, began), Some(0));
        assert_eq!(told.tell(period, after(1)), None);
        assert_eq!(told.tell(period, after(9)), None);
        assert_eq!(told.tell(period, after(10)), Some(2));
        assert_eq!(told.tell(period, after(20)), Some(0));
    }
}
