//! A table in the memory of the process, shared by all requests and jobs: values with a time to live, and counters.
//!
//! It is for what may be lost: rate limits of an application, tokens that live for minutes, what is known to be absent.
//! Other replicas do not see it, and it ends with the process. [`Caches`](crate::cache::Caches) are for values that the
//! store has; locks and sessions are in the store.
//!
//! ```
//! use std::time::Duration;
//!
//! use perennial_store::table::Table;
//!
//! let attempts = Table::new(10_000);
//! let minute = Duration::from_secs(60);
//! assert_eq!(attempts.add("ada", 1, minute), 1);
//! assert_eq!(attempts.add("ada", 1, minute), 2);
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::Expiry;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

/// A table of values by their names, with a bound. A cheap handle.
pub struct Table<V>(Cache<String, Entry<V>>);

struct Entry<V> {
    value: Arc<V>,
    ttl: Duration,
    /// True when the time to live begins anew with this write.
    is_renewed: bool,
}

impl<V> Clone for Table<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V> Clone for Entry<V> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), ttl: self.ttl, is_renewed: self.is_renewed }
    }
}

/// The time to live of each entry is its own.
struct OwnTtl;

impl<V> Expiry<String, Entry<V>> for OwnTtl {
    fn expire_after_create(&self, _: &String, entry: &Entry<V>, _: Instant) -> Option<Duration> {
        Some(entry.ttl)
    }

    fn expire_after_update(
        &self,
        _: &String,
        entry: &Entry<V>,
        _: Instant,
        left: Option<Duration>,
    ) -> Option<Duration> {
        if entry.is_renewed { Some(entry.ttl) } else { left }
    }
}

impl<V> fmt::Debug for Table<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Table")
    }
}

impl<V: Send + Sync + 'static> Table<V> {
    /// Makes a table of at most `most` entries. A new entry in a full table takes the place of the one that was used the
    /// longest time ago.
    pub fn new(most: u64) -> Self {
        let table = Cache::builder().max_capacity(most).eviction_policy(EvictionPolicy::lru());
        Self(table.expire_after(OwnTtl).build())
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<Arc<V>> {
        self.0.get(name).map(|entry| entry.value)
    }

    /// Sets a value, for this long.
    pub fn set(&self, name: &str, value: V, ttl: Duration) {
        self.0.insert(name.to_owned(), Entry { value: Arc::new(value), ttl, is_renewed: true });
    }

    /// Changes a value, or makes it: no other change comes between. The time to live begins anew. Returns the new value.
    pub fn change(&self, name: &str, ttl: Duration, change: impl FnOnce(Option<&V>) -> V) -> Arc<V> {
        let changed = self.0.entry_by_ref(name).and_upsert_with(|before| {
            let value = Arc::new(change(before.map(|entry| entry.into_value().value).as_deref()));
            Entry { value, ttl, is_renewed: true }
        });
        changed.into_value().value
    }

    /// The value of this name. If there is none, it is made, for this long: of several callers at once, one makes it.
    pub fn get_or_make(&self, name: &str, ttl: Duration, make: impl FnOnce() -> V) -> Arc<V> {
        let entry = self.0.entry_by_ref(name).or_insert_with(|| Entry {
            value: Arc::new(make()),
            ttl,
            is_renewed: true,
        });
        entry.into_value().value
    }

    /// Removes a value, and returns it.
    pub fn remove(&self, name: &str) -> Option<Arc<V>> {
        self.0.remove(name).map(|entry| entry.value)
    }

    /// Number of entries, including some that have ended and were not yet removed.
    pub fn len(&self) -> u64 {
        self.0.run_pending_tasks();
        self.0.entry_count()
    }

    /// Returns true when there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Table<i64> {
    /// Adds to a counter, which begins at 0, and returns its new value. The counter ends `ttl` after its first addition:
    /// later ones do not put that off.
    pub fn add(&self, name: &str, by: i64, ttl: Duration) -> i64 {
        let added = self.0.entry_by_ref(name).and_upsert_with(|before| {
            let is_renewed = before.is_none();
            let before = before.map_or(0, |entry| *entry.into_value().value);
            Entry { value: Arc::new(before.saturating_add(by)), ttl, is_renewed }
        });
        *added.into_value().value
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_value_lives_as_long_as_it_was_set_for() {
        let table = Table::new(100);
        table.set("a", "one", MINUTE);
        table.set("b", "two", Duration::from_millis(50));
        assert_eq!(table.get("a").as_deref(), Some(&"one"));
        thread::sleep(Duration::from_millis(80));
        assert_eq!((table.get("b"), table.get("a").as_deref()), (None, Some(&"one")));
        assert_eq!(table.remove("a").as_deref(), Some(&"one"));
        assert_eq!(table.get("a"), None);
    }

    #[test]
    fn a_counter_counts_each_addition_and_ends_after_its_first() {
        let counters = Table::new(100);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..250).for_each(|_| _ = counters.add("all", 1, MINUTE)));
            }
        });
        assert_eq!(counters.get("all").as_deref(), Some(&1000));
        // A later addition does not put off the end, and a value that is set anew begins anew.
        let (now, left) = (Instant::now(), Some(Duration::from_secs(7)));
        let after = |is_renewed| {
            let entry = Entry { value: Arc::new(1), ttl: MINUTE, is_renewed };
            OwnTtl.expire_after_update(&String::new(), &entry, now, left)
        };
        assert_eq!((after(false), after(true)), (left, Some(MINUTE)));
    }

    #[test]
    fn no_change_comes_between() {
        let table = Table::<Vec<u32>>::new(100);
        thread::scope(|scope| {
            for n in 0..4 {
                let table = &table;
                scope.spawn(move || {
                    for _ in 0..100 {
                        table.change("list", MINUTE, |before| {
                            let mut list = before.cloned().unwrap_or_default();
                            list.push(n);
                            list
                        });
                    }
                });
            }
        });
        assert_eq!(table.get("list").unwrap().len(), 400);
    }

    #[test]
    fn a_full_table_keeps_what_was_used_last() {
        let table = Table::new(10);
        for number in 0..100 {
            table.set(&number.to_string(), number, MINUTE);
        }
        assert!(table.len() <= 10);
        assert_eq!(table.get("99").as_deref(), Some(&99));
    }
}
