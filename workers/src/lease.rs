//! Leases: the right to work on a job for a while.
//!
//! A lease is measured by `CLOCK_BOOTTIME`, which goes on while the process is stopped and while the machine is
//! suspended: a process that wakes up late finds its leases expired before it does anything under them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since the machine was started, by a clock that never stops and never steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// Returns the time now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        let nanos = u32::try_from(now.tv_nsec).unwrap_or_default();
        Self(Duration::new(seconds, nanos))
    }

    /// Returns the time `wait` after this one.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0 + wait)
    }

    /// Returns the time in milliseconds.
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
    /// Creates a lease that ends at `end`.
    pub fn until(end: BootTime) -> Self {
        Self(Arc::new(AtomicU64::new(end.nanos())))
    }

    /// Extends the lease to `end`, if that is later than its end.
    pub fn extend(&self, end: BootTime) {
        self.0.fetch_max(end.nanos(), Ordering::AcqRel);
    }

    /// Returns true if the lease has not ended at `now`.
    pub fn is_held_at(&self, now: BootTime) -> bool {
        now.nanos() < self.0.load(Ordering::Acquire)
    }

    /// Returns true if the lease has not ended yet.
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
