//! Caches in front of a store: one load at a time for each key, entries that expire, negative answers, and a bound in
//! bytes.
//!
//! ```text
//!  get(key, load) ── hit ────────────────────────────────► the entry
//!        └─ miss ─ one load, and all callers wait for it ─► kept for `ttl`, or for `negative_ttl` if there is no value
//!
//!                                                           a load that fails ─► the previous value, for `stale`
//!
//!  forget(key) ─► dropped here ─► published ─► dropped by every process that listens
//! ```
//!
//! An entry that is forgotten while it is loaded is not kept. Between processes a message may be lost, with a
//! connection or with Redis: so a process that begins to listen loads everything again, and `ttl` bounds the age of an
//! entry whose message was lost.

mod bus;
pub(crate) mod status;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, FutureExt, join_all};
use moka::Expiry;
use moka::notification::RemovalCause;
use parking_lot::RwLock;
use tracing::warn;

pub use bus::Bus;

use crate::metrics;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
pub use status::CacheStatus;

/// Interval at which expired entries are removed and sizes are counted. moka evicts only on access, so a timer runs its
/// pending tasks.
const TIDY: Duration = Duration::from_secs(1);
/// One in this many stale answers is logged.
const STALE_TOLD: u64 = 1000;
/// Size of an entry besides its key and value, in bytes.
const OVERHEAD: usize = 128;

/// Settings of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Name of the cache in metrics, in `/cache`, and between processes.
    pub name: &'static str,
    /// Maximum size of keys and values, in bytes.
    pub bytes: u64,
    /// Time to live of an answer with a value.
    pub ttl: Duration,
    /// Time to live of a negative answer, which says that there is no value.
    pub negative_ttl: Duration,
    /// Time for which an expired answer is still returned while loads fail.
    pub stale: Duration,
}

/// A value that a cache can keep.
pub trait Kept: Send + Sync + 'static {
    /// Approximate size of the value in memory, in bytes.
    fn bytes(&self) -> usize;

    /// Returns false when the value is only for the callers that wait for it now, and must not be kept.
    fn is_kept(&self) -> bool {
        true
    }
}

impl<T: Kept> Kept for Arc<T> {
    fn bytes(&self) -> usize {
        T::bytes(self)
    }

    fn is_kept(&self) -> bool {
        T::is_kept(self)
    }
}

/// A cache of values `V` with text keys. A cheap handle.
pub struct Cache<V>(Arc<CacheInner<V>>);

impl<V> Clone for Cache<V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct CacheInner<V> {
    config: Config,
    entries: moka::future::Cache<String, Option<V>>,
    /// Previous values, which are returned when a load fails.
    older: moka::sync::Cache<String, V>,
    /// Rises with every invalidation, so that a value whose load began before it is not kept.
    forgotten: AtomicU64,
    /// Time that has passed for a test since the entries were last loaded again, in milliseconds.
    elapsed: AtomicU64,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    failed: AtomicU64,
    stale: AtomicU64,
    evicted: AtomicU64,
    expired: AtomicU64,
    forgotten: AtomicU64,
}

impl<V> fmt::Debug for Cache<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(self.0.config.name).finish()
    }
}

fn weight<V: Kept>(key: &str, value: Option<&V>) -> u32 {
    u32::try_from(OVERHEAD + key.len() + value.map_or(0, Kept::bytes)).unwrap_or(u32::MAX)
}

/// Chooses the time to live of an entry.
struct Lives(Config);

impl<V: Kept> Expiry<String, Option<V>> for Lives {
    fn expire_after_create(&self, _: &String, value: &Option<V>, _: Instant) -> Option<Duration> {
        Some(match value {
            Some(value) if value.is_kept() => self.0.ttl,
            Some(_) => Duration::ZERO,
            None => self.0.negative_ttl,
        })
    }
}

impl<V: Kept + Clone> Cache<V> {
    /// Creates an empty cache.
    pub fn new(config: Config) -> Self {
        let counts = Arc::new(Counts::default());
        let removed = Arc::clone(&counts);
        let entries = moka::future::Cache::builder()
            .name(config.name)
            .max_capacity(config.bytes)
            .weigher(|key: &String, value: &Option<V>| weight(key, value.as_ref()))
            .expire_after(Lives(config))
            .eviction_listener(move |_, _, cause| {
                let count = match cause {
                    RemovalCause::Size => &removed.evicted,
                    RemovalCause::Expired => &removed.expired,
                    RemovalCause::Explicit => &removed.forgotten,
                    RemovalCause::Replaced => return,
                };
                count.fetch_add(1, Ordering::Relaxed);
            })
            .build();
        let older = moka::sync::Cache::builder()
            .max_capacity(config.bytes)
            .weigher(|key: &String, value: &V| weight(key, Some(value)))
            .time_to_live(config.ttl + config.stale)
            .build();
        Self(Arc::new(CacheInner {
            config,
            entries,
            older,
            forgotten: AtomicU64::new(0),
            elapsed: AtomicU64::new(0),
            counts,
        }))
    }

    /// Returns the kept answer for `key`, or the answer of `load`. `None` is an answer too. When several callers ask at
    /// once, one of them loads and the others wait for it. When that caller goes away, the next one loads.
    ///
    /// # Errors
    /// The error of the load, if there is no previous value, for all callers that waited for it. Errors are not kept.
    pub async fn get<E>(
        &self,
        key: &str,
        load: impl Future<Output = Result<Option<V>, E>>,
    ) -> Result<Option<V>, Arc<E>>
    where
        E: Send + Sync + 'static,
    {
        let CacheInner { config, entries, older, forgotten, counts, .. } = &*self.0;
        // A hit needs only a lookup: moka's load is a future of many kilobytes.
        if let Some(value) = entries.get(key).await {
            counts.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(value);
        }
        let (loads, before) = (AtomicBool::new(false), AtomicU64::new(0));
        let load = async {
            loads.store(true, Ordering::Relaxed);
            before.store(forgotten.load(Ordering::Acquire), Ordering::Relaxed);
            load.await
        };
        let got = Box::pin(entries.try_get_with_by_ref(key, load)).await;
        if !loads.into_inner() {
            counts.hits.fetch_add(1, Ordering::Relaxed);
            return self.or_older(key, got);
        }
        counts.misses.fetch_add(1, Ordering::Relaxed);
        match &got {
            Err(_) => drop(counts.failed.fetch_add(1, Ordering::Relaxed)),
            Ok(Some(value)) if !config.stale.is_zero() && value.is_kept() => {
                older.insert(key.to_owned(), value.clone());
            }
            Ok(_) => older.invalidate(key),
        }
        // Checked after the entry was kept: a later invalidation finds the entry.
        if forgotten.load(Ordering::Acquire) != before.into_inner() {
            older.invalidate(key);
            Box::pin(entries.invalidate(key)).await;
        }
        self.or_older(key, got)
    }

    /// Returns true when the cache has an answer for `key`: a value, a stale value or a negative answer.
    pub fn has(&self, key: &str) -> bool {
        self.0.entries.contains_key(key) || self.0.older.contains_key(key)
    }

    /// Replaces the error of a failed load by the previous value, if there is one.
    fn or_older<E>(&self, key: &str, got: Result<Option<V>, Arc<E>>) -> Result<Option<V>, Arc<E>> {
        let Err(error) = got else { return got };
        let older = self.0.older.get(key).ok_or(error)?;
        // One line for many requests is enough.
        if self.0.counts.stale.fetch_add(1, Ordering::Relaxed).is_multiple_of(STALE_TOLD) {
            warn!(cache = self.0.config.name, "a load has failed: the previous value is returned");
        }
        Ok(Some(older))
    }

    /// The loaded values that may still be returned, without a check whether they have changed.
    pub fn known(&self) -> Vec<(String, V)> {
        self.0.older.iter().map(|(key, value)| (String::clone(&key), value)).collect()
    }

    /// Makes every key load again on its next use. The previous values stay available while loads fail.
    fn renew(&self) {
        self.0.forgotten.fetch_add(1, Ordering::AcqRel);
        self.0.entries.invalidate_all();
    }

    /// Lets time pass for a test, see [`Caches::elapse`].
    fn elapse(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        let elapsed = self.0.elapsed.fetch_add(by, Ordering::AcqRel).saturating_add(by);
        if u128::from(elapsed) >= self.0.config.ttl.as_millis() {
            self.0.elapsed.store(0, Ordering::Release);
            self.renew();
        }
    }

    /// Drops the entry of `key`, or all entries if it is `None`, in this process only. [`Caches::forget`] tells the
    /// others.
    pub async fn forget(&self, key: Option<&str>) {
        self.0.forgotten.fetch_add(1, Ordering::AcqRel);
        match key {
            Some(key) => {
                self.0.older.invalidate(key);
                Box::pin(self.0.entries.invalidate(key)).await;
            }
            None => {
                self.0.older.invalidate_all();
                self.0.entries.invalidate_all();
            }
        }
    }

    fn status(&self) -> CacheStatus {
        let CacheInner { config, entries, counts, .. } = &*self.0;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CacheStatus {
            entries: entries.entry_count(),
            bytes: entries.weighted_size(),
            max_bytes: config.bytes,
            hits: count(&counts.hits),
            misses: count(&counts.misses),
            failed: count(&counts.failed),
            stale: count(&counts.stale),
            evicted: count(&counts.evicted),
            expired: count(&counts.expired),
            forgotten: count(&counts.forgotten),
        }
    }
}

/// A cache whose value type is erased.
trait AnyCache: Send + Sync {
    fn name(&self) -> &'static str;
    fn status(&self) -> CacheStatus;
    fn renew(&self);
    fn elapse(&self, by: Duration);
    fn forget<'a>(&'a self, key: Option<&'a str>) -> BoxFuture<'a, ()>;
    fn tidy(&self) -> BoxFuture<'_, ()>;
}

impl<V: Kept + Clone> AnyCache for Cache<V> {
    fn name(&self) -> &'static str {
        self.0.config.name
    }

    fn status(&self) -> CacheStatus {
        self.status()
    }

    fn renew(&self) {
        self.renew();
    }

    fn elapse(&self, by: Duration) {
        self.elapse(by);
    }

    fn forget<'a>(&'a self, key: Option<&'a str>) -> BoxFuture<'a, ()> {
        self.forget(key).boxed()
    }

    fn tidy(&self) -> BoxFuture<'_, ()> {
        self.0.older.run_pending_tasks();
        self.0.entries.run_pending_tasks().boxed()
    }
}

/// All caches of a process, and the bus to the other processes that have the same caches. A cheap handle.
#[derive(Clone, Default)]
pub struct Caches(Arc<All>);

#[derive(Default)]
struct All {
    caches: RwLock<Vec<Arc<dyn AnyCache>>>,
    bus: Option<Bus>,
}

impl fmt::Debug for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all().iter().map(|cache| cache.name())).finish()
    }
}

impl Caches {
    /// Creates an empty set of caches. Invalidations are published on `bus`, if there is one.
    pub fn new(bus: Option<Bus>) -> Self {
        Self(Arc::new(All { caches: RwLock::default(), bus }))
    }

    /// Creates a cache and adds it to the set.
    pub fn make<V: Kept + Clone>(&self, config: Config) -> Cache<V> {
        let cache = Cache::new(config);
        self.0.caches.write().push(Arc::new(cache.clone()));
        cache
    }

    /// Drops the entry of `key`, or all entries if it is `None`, from the cache `name` after a change in the store, in
    /// this process and in every process that listens.
    pub async fn forget(&self, name: &str, key: Option<&str>) {
        self.forget_here(name, key).await;
        if let Some(bus) = &self.0.bus {
            bus.tell(name, key).await;
        }
    }

    /// The name and the status of each cache.
    pub fn status(&self) -> Vec<(&'static str, CacheStatus)> {
        self.all().iter().map(|cache| (cache.name(), cache.status())).collect()
    }

    /// Removes expired entries again and again, until the soft phase of the drain.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn tidy(self, drain: Drain) -> Result<(), Infallible> {
        loop {
            join_all(self.all().iter().map(|cache| cache.tidy())).await;
            for (name, status) in self.status() {
                metrics::cache(name, status);
            }
            tokio::select! {
                () = pulse(TIDY) => {}
                () = drain.soft() => return Ok(()),
            }
        }
    }

    /// Applies the invalidations of other processes, until the soft phase of the drain.
    ///
    /// # Errors
    /// When the connection ends. The caller runs it again.
    pub async fn listen(self, drain: Drain) -> Result<(), bus::Error> {
        let Some(bus) = &self.0.bus else { return Ok(()) };
        let listen = async {
            let mut ear = bus.ear().await?;
            // Messages from before the subscription are lost.
            self.all().iter().for_each(|cache| cache.renew());
            loop {
                let (name, key) = ear.next().await?;
                self.forget_here(&name, key.as_deref()).await;
            }
        };
        tokio::select! {
            ended = listen => ended,
            () = drain.soft() => Ok(()),
        }
    }

    /// Lets time pass for a test: the entries of a cache are loaded again when its time to live has passed in all. An entry
    /// that was loaded in between ends early, as any entry may.
    pub fn elapse(&self, by: Duration) {
        for cache in self.all() {
            cache.elapse(by);
        }
    }

    /// Returns true when invalidations reach other processes.
    pub fn is_shared(&self) -> bool {
        self.0.bus.is_some()
    }

    async fn forget_here(&self, name: &str, key: Option<&str>) {
        for cache in self.all().iter().filter(|cache| cache.name() == name) {
            cache.forget(key).await;
        }
    }

    fn all(&self) -> Vec<Arc<dyn AnyCache>> {
        self.0.caches.read().clone()
    }
}

#[cfg(test)]
mod tests;
