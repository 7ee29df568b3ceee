//! What was read of the store: it holds until something is written. A process that has nothing to do asks its store hardly
//! anything by that.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use perennial_store::pool::sqlite::Stamp;

/// It is read again after this long all the same: a stamp may miss what another process writes in the same moment.
const FOR: Duration = Duration::from_secs(5);

/// One answer.
#[derive(Debug)]
pub(super) struct KeptStatement<T>(Mutex<Option<KeptAnswer<T>>>);

#[derive(Debug)]
struct KeptAnswer<T> {
    /// Where the store stood when it was asked for.
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
    /// The answer, if the store stands where it stood then.
    pub(super) fn get(&self, stamp: Stamp) -> Option<T> {
        let kept = self.0.lock();
        let answer = kept.as_ref()?;
        (answer.stamp == stamp && answer.at.elapsed() < FOR).then(|| answer.value.clone())
    }

    /// Keeps an answer to a question that was asked when the store stood there.
    pub(super) fn set(&self, stamp: Stamp, value: T) -> T {
        let answer = KeptAnswer { stamp, at: Instant::now(), value: value.clone() };
        *self.0.lock() = Some(answer);
        value
    }
}
