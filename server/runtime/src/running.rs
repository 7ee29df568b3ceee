//! Counts of running work by key, such as the address or the host that it is for, so that one key does not take all places.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

/// Number of running pieces of work by key. A cheap handle. The table has only keys with running work.
pub struct RunningByKey<K>(Arc<Mutex<HashMap<K, usize>>>);

impl<K> Clone for RunningByKey<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K> Default for RunningByKey<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K> fmt::Debug for RunningByKey<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RunningByKey")
    }
}

impl<K: Clone + Eq + Hash> RunningByKey<K> {
    /// Counts a piece of work until the returned guard drops; `None` when `most` pieces of this key run already.
    pub fn enter(&self, key: K, most: usize) -> Option<RunningWork<K>> {
        let mut running = self.0.lock();
        let count = running.get(&key).copied().unwrap_or_default();
        (count < most).then(|| {
            running.insert(key.clone(), count + 1);
            RunningWork { by_key: self.clone(), key }
        })
    }
}

/// Guard of a running piece of work.
#[derive(Debug)]
pub struct RunningWork<K: Eq + Hash> {
    by_key: RunningByKey<K>,
    key: K,
}

impl<K: Eq + Hash> Drop for RunningWork<K> {
    fn drop(&mut self) {
        let mut running = self.by_key.0.lock();
        match running.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(running.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_places_of_its_own_and_the_table_forgets_idle_keys() {
        let running = RunningByKey::default();
        let first = running.enter("a", 2).unwrap();
        let second = running.enter("a", 2).unwrap();
        assert!(running.enter("a", 2).is_none() && running.enter("b", 2).is_some());
        drop(first);
        assert!(running.enter("a", 2).is_some());
        drop(second);
        assert!(running.0.lock().is_empty());
    }
}
