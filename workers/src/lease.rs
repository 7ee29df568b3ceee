//! The right to work on a job, for a while.
//!
//! It is measured by `CLOCK_BOOTTIME`, which goes on while the process is stopped and while the machine is
//! suspended: whoever wakes up late finds the lease lapsed before doing anything with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point in time by a clock that never stops and never steps, since the machine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// The time now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        let nanos = u32::try_from(now.tv_nsec).unwrap_or_default();
        Self(Duration::new(seconds, nanos))
    }

    /// This long after it.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0 + wait)
    }

    /// In milliseconds.
    pub fn millis(self) -> i64 {
        i64::try_from(self.0.as_millis()).unwrap_or(i64::MAX)
    }

    fn nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// One lease, shared by the job that works under it and the task that renews it.
#[derive(Clone, Debug)]
pub struct Lease(Arc<AtomicU64>);

impl Lease {
    /// A lease that ends at `end`.
    pub fn until(end: BootTime) -> Self {
        Self(Arc::new(AtomicU64::new(end.nanos())))
    }

    /// It now ends at `end`, if that is later.
    pub fn extend(&self, end: BootTime) {
        self.0.fetch_max(end.nanos(), Ordering::AcqRel);
    }

    /// Whether it has not ended at `now`.
    pub fn is_held_at(&self, now: BootTime) -> bool {
        now.nanos() < self.0.load(Ordering::Acquire)
    }

    /// Whether it has not ended yet.
    pub fn is_held(&self) -> bool {
        self.is_held_at(BootTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_unless_it_is_extended() {
        let now = BootTime::now();
        let in_seconds = |seconds| now.after(Duration::from_secs(seconds));
        let lease = Lease::until(in_seconds(15));
        assert!(lease.is_held_at(in_seconds(14)) && !lease.is_held_at(in_seconds(15)));
        lease.extend(in_seconds(20));
        lease.extend(in_seconds(10));
        assert!(lease.is_held_at(in_seconds(19)) && !lease.is_held_at(in_seconds(20)));
    }
}
