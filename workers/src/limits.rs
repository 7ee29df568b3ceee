//! Limits after which a process drains and ends, and its supervisor starts a fresh one: a remedy for leaks that
//! have not been found yet.

use std::fmt;
use std::time::{Duration, Instant};

use crate::worker::Status;

/// How often the limits are checked.
const LOOK: Duration = Duration::from_secs(1);

/// Limits after which the process is recycled; `None` means unlimited.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Number of jobs that have ended.
    pub jobs: Option<u64>,
    /// Time that the process has run.
    pub age: Option<Duration>,
    /// Resident memory, in bytes.
    pub memory: Option<u64>,
}

/// The limit that was reached, with the value that reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Number of jobs that have ended.
    Jobs(u64),
    /// Time that the process has run.
    Age(Duration),
    /// Resident memory, in bytes.
    Memory(u64),
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jobs(jobs) => write!(f, "{jobs} jobs have run"),
            Self::Age(age) => write!(f, "the process has run for {age:?}"),
            Self::Memory(bytes) => write!(f, "{bytes} bytes are resident"),
        }
    }
}

impl Limits {
    /// Waits until one of the limits is reached, and returns it.
    pub async fn reached(&self, worker: &Status) -> Reached {
        let began = Instant::now();
        if (self.jobs, self.age, self.memory) == (None, None, None) {
            return std::future::pending().await;
        }
        loop {
            let memory = if self.memory.is_some() { resident_bytes() } else { None };
            if let Some(reached) = self.check(worker.ended(), began.elapsed(), memory) {
                return reached;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn check(&self, jobs: u64, age: Duration, memory: Option<u64>) -> Option<Reached> {
        if self.jobs.is_some_and(|limit| jobs >= limit) {
            Some(Reached::Jobs(jobs))
        } else if self.age.is_some_and(|limit| age >= limit) {
            Some(Reached::Age(age))
        } else {
            let memory = memory.filter(|memory| self.memory.is_some_and(|limit| *memory >= limit));
            memory.map(Reached::Memory)
        }
    }
}

/// Returns the resident memory of this process, in bytes.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_limit_that_is_reached_counts() {
        let limits = Limits { jobs: Some(10), age: Some(Duration::from_secs(60)), memory: Some(1 << 20) };
        let second = Duration::from_secs(1);
        assert_eq!(limits.check(9, second, Some(1000)), None);
        assert_eq!(limits.check(10, second, Some(1000)), Some(Reached::Jobs(10)));
        assert_eq!(limits.check(9, second * 60, None), Some(Reached::Age(second * 60)));
        assert_eq!(limits.check(9, second, Some(2 << 20)), Some(Reached::Memory(2 << 20)));
        assert_eq!(Limits::default().check(u64::MAX, Duration::MAX, Some(u64::MAX)), None);
    }

    #[test]
    fn this_process_has_some_memory() {
        assert!(resident_bytes().unwrap() > 100_000);
    }
}
