//! Caches in front of a store: one load at a time for each key, entries that end, answers that there is nothing among
//! them, and a bound in bytes.
//!
//! ```text
//!  get(key, load) ── there ──────────────────────────────► the entry
//!        └─ not there ─ one load, everybody waits for it ─► kept for `ttl`, or for `negative_ttl` when there is nothing
//!
//!                                                           a load that fails ─► what was there before, for `stale`
//!
//!  forget(key) ─► dropped here ─► published ─► dropped by every process that listens
//! ```
//!
//! What is forgotten while it is loaded is not kept. Between processes a word may be lost, with a connection or with
//! Redis: so a process that has just begun to listen loads everything anew, and `ttl` bounds what is left.

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

/// How often entries that have ended are removed, and sizes are counted. Nobody else does while nobody asks.
const TIDY: Duration = Duration::from_secs(1);
/// Of answers that had ended, and were given all the same, one in so many is logged.
const STALE_TOLD: u64 = 1000;
/// What an entry takes besides its key and value, in bytes.
const OVERHEAD: usize = 128;

/// How much a cache keeps, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// What it is called: in metrics, in `/cache`, and between processes.
    pub name: &'static str,
    /// The most bytes of keys and values.
    pub bytes: u64,
    /// How long an answer is good,
    pub ttl: Duration,
    /// and how long one that there is nothing.
    pub negative_ttl: Duration,
    /// For how long an answer that has ended is given all the same, while nobody can say what is true now.
    pub stale: Duration,
}

/// What can be kept.
pub trait Kept: Send + Sync + 'static {
    /// About how many bytes of memory it holds.
    fn bytes(&self) -> usize;

    /// Whether it is good for more than those who wait for it.
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

/// A cache of `V`s by text. A cheap handle.
pub struct Cache<V>(Arc<CacheInner<V>>);

impl<V> Clone for Cache<V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct CacheInner<V> {
    config: Config,
    entries: moka::future::Cache<String, Option<V>>,
    /// What was there, for when a load fails.
    older: moka::sync::Cache<String, V>,
    /// Rises whenever something is forgotten, so that what was loaded before is not kept after.
    forgotten: AtomicU64,
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

/// Which of the two times an entry gets.
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
    /// An empty one.
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
        Self(Arc::new(CacheInner { config, entries, older, forgotten: AtomicU64::new(0), counts }))
    }

    /// What is kept for `key`, or what `load` brings: nothing is an answer, too. However many ask at once, one of
    /// them loads, and the others wait for it. When that one leaves, the next goes on.
    ///
    /// # Errors
    /// What the load said, to all who waited for it; it is not kept.
    pub async fn get<E>(
        &self,
        key: &str,
        load: impl Future<Output = Result<Option<V>, E>>,
    ) -> Result<Option<V>, Arc<E>>
    where
        E: Send + Sync + 'static,
    {
        let CacheInner { config, entries, older, forgotten, counts } = &*self.0;
        // What is there costs no more than a look: the library's load is a future of many kilobytes.
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
        // After it was kept: whoever forgets it later finds it.
        if forgotten.load(Ordering::Acquire) != before.into_inner() {
            older.invalidate(key);
            Box::pin(entries.invalidate(key)).await;
        }
        self.or_older(key, got)
    }

    /// Whether something was found for `key` lately, or nothing a moment ago.
    pub fn has(&self, key: &str) -> bool {
        self.0.entries.contains_key(key) || self.0.older.contains_key(key)
    }

    /// What was there before, where a load has failed.
    fn or_older<E>(&self, key: &str, got: Result<Option<V>, Arc<E>>) -> Result<Option<V>, Arc<E>> {
        let Err(error) = got else { return got };
        let older = self.0.older.get(key).ok_or(error)?;
        // Once a second says it as well as once a request.
        if self.0.counts.stale.fetch_add(1, Ordering::Relaxed).is_multiple_of(STALE_TOLD) {
            warn!(
                cache = self.0.config.name,
                "what was known before is given, since nobody can say what is true now"
            );
        }
        Ok(Some(older))
    }

    /// What was loaded and may still be given, without a look at whether it has changed.
    pub fn known(&self) -> Vec<(String, V)> {
        self.0.older.iter().map(|(key, value)| (String::clone(&key), value)).collect()
    }

    /// Has everything loaded anew when it is asked for. What was there stays good for as long as that fails.
    fn renew(&self) {
        self.0.forgotten.fetch_add(1, Ordering::AcqRel);
        self.0.entries.invalidate_all();
    }

    /// Something has changed, as this process alone has found out: [`Caches::forget`] tells others.
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

/// A cache with its type taken off.
trait AnyCache: Send + Sync {
    fn name(&self) -> &'static str;
    fn status(&self) -> CacheStatus;
    fn renew(&self);
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

    fn forget<'a>(&'a self, key: Option<&'a str>) -> BoxFuture<'a, ()> {
        self.forget(key).boxed()
    }

    fn tidy(&self) -> BoxFuture<'_, ()> {
        self.0.older.run_pending_tasks();
        self.0.entries.run_pending_tasks().boxed()
    }
}

/// All caches of a process, and the other processes that keep the same. A cheap handle.
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
    /// None yet; what is forgotten is told to those on the bus, if there is one.
    pub fn new(bus: Option<Bus>) -> Self {
        Self(Arc::new(All { caches: RwLock::default(), bus }))
    }

    /// One more.
    pub fn make<V: Kept + Clone>(&self, config: Config) -> Cache<V> {
        let cache = Cache::new(config);
        self.0.caches.write().push(Arc::new(cache.clone()));
        cache
    }

    /// Something has changed in the store: what the cache `name` has of it is dropped, here and by whoever listens. All
    /// of it when no key is named.
    pub async fn forget(&self, name: &str, key: Option<&str>) {
        self.forget_here(name, key).await;
        if let Some(bus) = &self.0.bus {
            bus.tell(name, key).await;
        }
    }

    /// How each stands.
    pub fn status(&self) -> Vec<(&'static str, CacheStatus)> {
        self.all().iter().map(|cache| (cache.name(), cache.status())).collect()
    }

    /// Removes what has ended, again and again, until nothing new is taken.
    ///
    /// # Errors
    /// Never: the type is that of a task.
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

    /// Listens to what others have changed, until nothing new is taken.
    ///
    /// # Errors
    /// When the connection ends; to be run again.
    pub async fn listen(self, drain: Drain) -> Result<(), bus::Error> {
        let Some(bus) = &self.0.bus else { return Ok(()) };
        let listen = async {
            let mut ear = bus.ear().await?;
            // What was said before is lost.
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

    /// Whether others may be told.
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
