//! The rate at which jobs of a kind start.

use std::time::Duration;

use tokio::time::Instant;

use crate::job::Rate;

/// Longest unused time that may be made up for, so that a worker that looks every few milliseconds still
/// keeps a rate of thousands.
const CATCH_UP: Duration = Duration::from_millis(100);

/// The virtual scheduling form of the generic cell rate algorithm (ITU-T I.371): starts are as far apart as
/// the rate says, except that a little unused time may be made up for.
#[derive(Clone, Debug)]
pub(super) struct StartRate {
    interval: Duration,
    next: Instant,
}

impl StartRate {
    pub(super) fn new(rate: Rate) -> Self {
        Self { interval: rate.per / rate.jobs.max(1), next: Instant::now() }
    }

    /// Returns how many jobs may start now; as an error, when the next one may.
    pub(super) fn available(&self, now: Instant) -> Result<usize, Instant> {
        if self.next > now {
            return Err(self.next);
        }
        let missed = (now - self.next).min(CATCH_UP);
        let interval = self.interval.as_nanos().max(1);
        Ok(1 + usize::try_from(missed.as_nanos() / interval).unwrap_or(usize::MAX - 1))
    }

    /// Counts the start of `jobs` jobs.
    pub(super) fn take(&mut self, jobs: usize, now: Instant) {
        if jobs == 0 {
            return;
        }
        let jobs = u32::try_from(jobs).unwrap_or(u32::MAX);
        let behind = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.next = self.next.max(behind) + self.interval * jobs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_a_little_is_made_up_for() {
        let mut rate = StartRate::new(Rate { jobs: 100, per: Duration::from_secs(1) });
        let start = Instant::now();
        assert_eq!(rate.available(start), Ok(1));
        rate.take(1, start);
        assert_eq!(rate.available(start), Err(start + 10 * MILLISECOND));
        assert_eq!(rate.available(start + 35 * MILLISECOND), Ok(3));
        rate.take(3, start + 35 * MILLISECOND);
        assert_eq!(rate.available(start + 35 * MILLISECOND), Err(start + 40 * MILLISECOND));
        // The whole hour is not made up for.
        let later = start + Duration::from_secs(3600);
        assert_eq!(rate.available(later), Ok(11));
        rate.take(11, later);
        assert_eq!(rate.available(later), Err(later + 10 * MILLISECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_allowed_and_not_found_is_not_lost() {
        let mut rate = StartRate::new(Rate { jobs: 1, per: Duration::from_secs(3600) });
        let start = Instant::now();
        rate.take(0, start);
        assert_eq!(rate.available(start), Ok(1));
    }
}
