//! Waits that end together, so that periodic background tasks wake the process once and not one by one.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Waits until the next multiple of `period` since the first call in the process, which is at most one `period`.
pub async fn pulse(period: Duration) {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let began = *BEGAN.get_or_init(Instant::now);
    sleep_until(next(began, Instant::now(), period)).await;
}

fn next(began: Instant, now: Instant, period: Duration) -> Instant {
    let since = now.saturating_duration_since(began).as_nanos();
    let left = period.as_nanos().saturating_sub(since % period.as_nanos().max(1));
    now + Duration::from_nanos(u64::try_from(left).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_of_the_same_period_end_together() {
        let began = Instant::now();
        let second = Duration::from_secs(1);
        let at = |ms| began + Duration::from_millis(ms);
        for (now, until) in [(0, 1000), (1, 1000), (999, 1000), (1000, 2000), (2345, 3000)] {
            assert_eq!(next(began, at(now), second), at(until));
        }
    }
}
