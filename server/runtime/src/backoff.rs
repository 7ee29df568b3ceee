//! The wait before the next attempt: exponential, capped and jittered.

use std::time::Duration;

/// An exponential backoff between two bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The wait after the first failure, before jitter.
    pub base: Duration,
    /// The longest wait, before jitter.
    pub cap: Duration,
}

impl Backoff {
    /// A backoff that doubles from `base` up to `cap`.
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap }
    }

    /// The wait after `failures` failures in a row (1 is the first), for a `random` number in `0.0..1.0`.
    ///
    /// Half of the wait is fixed and half is random, so that callers that failed together do not retry together, and
    /// none retries at once.
    pub fn delay(&self, failures: u32, random: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(32);
        let full = self.base.saturating_mul(2u32.saturating_pow(doublings)).min(self.cap);
        full / 2 + (full / 2).mul_f64(random.clamp(0.0, 1.0))
    }

    /// [`Backoff::delay`] with a random number drawn here.
    pub fn jittered(&self, failures: u32) -> Duration {
        self.delay(failures, fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));

    #[test]
    fn it_doubles_up_to_its_cap() {
        let at = |failures| BACKOFF.delay(failures, 1.0).as_millis();
        assert_eq!(
            [at(1), at(2), at(3), at(7), at(8), at(4_000_000_000)],
            [100, 200, 400, 6400, 10_000, 10_000]
        );
    }

    #[test]
    fn half_of_the_wait_is_random() {
        assert_eq!(BACKOFF.delay(3, 0.0), Duration::from_millis(200));
        assert_eq!(BACKOFF.delay(3, 0.5), Duration::from_millis(300));
    }
}
