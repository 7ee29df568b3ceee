//! Admission: bounds on how much may wait in a queue, so that a queue never grows until a process fails.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::queue::{Depth, Error, NewJob, Result};

/// Bounds of one queue. A queue that has reached either is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Number of jobs.
    pub jobs: u64,
    /// Length of all payloads, in bytes.
    pub bytes: u64,
}

/// Knows how full the queues are, from their last count and the jobs that were added here since. A cheap
/// handle.
///
/// Several processes together may exceed a bound by the jobs that they add between two counts. Work in
/// progress, such as retries and jobs that a job enqueues during its run, needs no admission: refusing it
/// would lose accepted work.
#[derive(Clone, Debug)]
pub struct Admission {
    bounds: Bounds,
    queues: Arc<Mutex<HashMap<Arc<str>, Fill>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Fill {
    jobs: u64,
    bytes: u64,
    added: Added,
}

/// Jobs and bytes that were ever added here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Added {
    jobs: u64,
    bytes: u64,
}

impl Admission {
    /// Creates an admission for queues that are empty.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, queues: Arc::default() }
    }

    /// Checks whether these jobs may be enqueued. If so, they count from now on.
    ///
    /// # Errors
    /// [`Error::Full`] names the queue; no job was counted.
    pub fn admit(&self, jobs: &[NewJob]) -> Result<()> {
        let mut queues = self.queues.lock();
        for job in jobs {
            let full = queues
                .get(&*job.queue)
                .is_some_and(|fill| fill.jobs >= self.bounds.jobs || fill.bytes >= self.bounds.bytes);
            if full {
                return Err(Error::Full { queue: job.queue.to_string() });
            }
        }
        for job in jobs {
            let bytes = job.payload.len() as u64;
            if !queues.contains_key(&*job.queue) {
                queues.insert(Arc::from(&*job.queue), Fill::default());
            }
            let Some(fill) = queues.get_mut(&*job.queue) else { continue };
            fill.jobs += 1;
            fill.bytes += bytes;
            fill.added.jobs += 1;
            fill.added.bytes += bytes;
        }
        Ok(())
    }

    /// Returns the jobs that were added here so far. Call it before the queue is counted.
    pub(crate) fn added(&self, queue: &str) -> Added {
        let queues = self.queues.lock();
        queues.get(queue).map(|fill| fill.added).unwrap_or_default()
    }

    /// Takes over a count of a queue. Jobs that were added since `before` may or may not be in the count, and
    /// are counted on top.
    pub(crate) fn measured(&self, queue: &Arc<str>, depth: Depth, before: Added) {
        let mut queues = self.queues.lock();
        let fill = queues.entry(Arc::clone(queue)).or_default();
        fill.jobs = depth.waiting() + (fill.added.jobs - before.jobs);
        fill.bytes = depth.bytes + (fill.added.bytes - before.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use uuid::Uuid;

    use super::*;
    use crate::queue::Due;

    fn jobs(queue: &'static str, count: usize) -> Vec<NewJob> {
        let job = NewJob {
            id: Uuid::nil(),
            kind: Cow::Borrowed("test"),
            queue: Cow::Borrowed(queue),
            priority: 0,
            payload: "12345678".to_owned(),
            due: Due::Now,
            unique: None,
            trace: None,
            recoveries: 0,
        };
        vec![job; count]
    }

    #[test]
    fn a_full_queue_takes_no_more_until_it_was_counted_again() {
        let admission = Admission::new(Bounds { jobs: 2, bytes: 1000 });
        admission.admit(&jobs("a", 2)).unwrap();
        assert!(matches!(admission.admit(&jobs("a", 1)), Err(Error::Full { queue }) if queue == "a"));
        admission.admit(&jobs("b", 1)).unwrap();
        let before = admission.added("a");
        admission.measured(&"a".into(), Depth { ready: 1, ..Depth::default() }, before);
        admission.admit(&jobs("a", 1)).unwrap();
        admission.admit(&jobs("a", 1)).unwrap_err();
    }

    #[test]
    fn bytes_are_bounded_too_and_what_comes_while_counting_is_not_forgotten() {
        let admission = Admission::new(Bounds { jobs: 1000, bytes: 16 });
        let before = admission.added("a");
        admission.admit(&jobs("a", 1)).unwrap();
        admission.measured(&"a".into(), Depth { bytes: 8, ..Depth::default() }, before);
        admission.admit(&jobs("a", 1)).unwrap_err();
    }
}
