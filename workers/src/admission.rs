//! Who may still enqueue: a queue that grows until something dies is none.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::queue::{Depth, Error, NewJob, Result};

/// How much may wait in one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// So many jobs,
    pub jobs: u64,
    /// or so many bytes of payloads.
    pub bytes: u64,
}

/// Knows how full the queues are: as they were counted last, and what was added here since. A cheap handle.
///
/// Several processes may together go over a bound by what they add between two counts. Work in progress, such
/// as retries and what a job enqueues in the course of its own, is not asked for admission: refusing it would
/// lose what was accepted.
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

/// What was added here, ever.
#[derive(Clone, Copy, Debug, Default)]
pub struct Added {
    jobs: u64,
    bytes: u64,
}

impl Admission {
    /// Nothing waits yet.
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, queues: Arc::default() }
    }

    /// Whether these jobs may be enqueued. If so, they count from now on.
    ///
    /// # Errors
    /// [`Error::Full`] names the queue; nothing was counted.
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

    /// What was added here so far: to be asked before counting.
    pub(crate) fn added(&self, queue: &str) -> Added {
        let queues = self.queues.lock();
        queues.get(queue).map(|fill| fill.added).unwrap_or_default()
    }

    /// A queue was counted. What was added since then may or may not be among it, and is counted on top.
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
