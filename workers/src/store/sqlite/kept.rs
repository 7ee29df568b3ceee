//! Answers of the store that are kept until something is written, so that an idle process hardly queries its store.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use perennial_store::pool::sqlite::Stamp;

/// Longest time that an answer is kept: a stamp may miss what another process writes at the same moment.
const FOR: Duration = Duration::from_secs(5);

/// One answer that is kept.
#[derive(Debug)]
pub(super) struct KeptStatement<T>(Mutex<Option<KeptAnswer<T>>>);

#[derive(Debug)]
struct KeptAnswer<T> {
    /// Stamp of the store when the answer was asked for.
    stamp: Stamp,
    at: Instant,
    value: T,
}

impl<T> Default for KeptStatement<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> KeptStatement<T> {
    /// Returns the answer, if the store has not changed since.
    pub(super) fn get(&self, stamp: Stamp) -> Option<T> {
        let kept = self.0.lock();
        let answer = kept.as_ref()?;
        (answer.stamp == stamp && answer.at.elapsed() < FOR).then(|| answer.value.clone())
    }

    /// Keeps an answer to a question that was asked at `stamp`.
    pub(super) fn set(&self, stamp: Stamp, value: T) -> T {
        let answer = KeptAnswer { stamp, at: Instant::now(), value: value.clone() };
        *self.0.lock() = Some(answer);
        value
    }
}
