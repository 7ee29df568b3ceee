//! A pool of connections in which every wait is bounded.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ::metrics::Histogram;
use deadpool::Runtime;
use deadpool::managed::{BuildError, Manager, Metrics, Object, Pool, PoolBuilder, PoolError, TimeoutType};
use futures_util::future::join_all;

use super::status::PoolStatus;
use crate::metrics;

/// Number of connections that are made at boot.
const WARM: usize = 2;

/// Limits of a pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct BoundedLimits {
    /// Maximum number of connections.
    pub(super) size: usize,
    /// Time that a caller waits for a free connection.
    pub(super) wait: Duration,
    /// Time limit for making a connection, and for checking an old one.
    pub(super) connect_timeout: Duration,
    /// Maximum age of a connection.
    pub(super) max_age: Duration,
}

/// A pool of connections in which every wait is bounded.
pub(super) struct Bounded<M: Manager, W: From<Object<M>> = Object<M>> {
    name: &'static str,
    pool: Pool<M, W>,
    max_age: Duration,
    /// Time limit for getting a connection in total: dead connections are detected one after the other.
    patience: Duration,
    oldest_ms: AtomicU64,
    waits: Histogram,
}

impl<M: Manager, W: From<Object<M>>> fmt::Debug for Bounded<M, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(self.name).field(&self.status()).finish()
    }
}

impl<M: Manager, W: From<Object<M>>> Bounded<M, W> {
    /// Creates a pool without connections. `name` is its name in metrics and logs.
    pub(super) fn new(
        name: &'static str,
        builder: PoolBuilder<M, W>,
        limits: BoundedLimits,
    ) -> Result<Self, BuildError> {
        let pool = builder
            .max_size(limits.size)
            .wait_timeout(Some(limits.wait))
            .create_timeout(Some(limits.connect_timeout))
            .recycle_timeout(Some(limits.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()?;
        let (oldest_ms, waits) = (AtomicU64::new(0), metrics::pool_waits(name));
        let patience = limits.wait + limits.connect_timeout;
        Ok(Self { name, pool, max_age: limits.max_age, patience, oldest_ms, waits })
    }

    /// Returns a connection.
    pub(super) async fn get(&self) -> Result<W, PoolError<M::Error>> {
        let began = Instant::now();
        let got = tokio::time::timeout(self.patience, self.pool.get()).await;
        self.waits.record(began.elapsed());
        got.unwrap_or_else(|_elapsed| {
            // The server is gone without closing its connections: the other connections will not answer either.
            self.pool.retain(|_, _| false);
            Err(PoolError::Timeout(TimeoutType::Recycle))
        })
    }

    /// Makes the first connections, all at once, so that a server that is slow to accept them is noticed here.
    pub(super) async fn warm(&self) -> Result<(), PoolError<M::Error>> {
        // The connections are given back when the last one is made.
        let warmed = join_all((0..WARM.min(self.pool.status().max_size)).map(|_| self.get())).await;
        warmed.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
    }

    /// The status of the pool.
    pub(super) fn status(&self) -> PoolStatus {
        let status = self.pool.status();
        PoolStatus {
            max: status.max_size,
            size: status.size,
            available: status.available,
            waiting: status.waiting,
            oldest_ms: self.oldest_ms.load(Ordering::Relaxed),
        }
    }

    /// Closes idle connections that are dead or have reached their maximum age.
    pub(super) fn retire(&self, is_dead: impl Fn(&M::Type) -> bool) {
        self.look_through(|connection, metrics| {
            !is_dead(connection) && metrics.age() < self.lifetime(metrics)
        });
    }

    /// Publishes the status of the pool as metrics.
    pub(super) fn publish(&self) {
        self.look_through(|_, _| true);
    }

    fn look_through(&self, stays: impl Fn(&M::Type, &Metrics) -> bool) {
        let mut oldest = Duration::ZERO;
        self.pool.retain(|connection, metrics| {
            let stays = stays(connection, &metrics);
            if stays {
                oldest = oldest.max(metrics.age());
            }
            stays
        });
        self.oldest_ms.store(u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        metrics::pool(self.name, self.status());
    }

    /// Refuses new callers, and closes every connection when it comes back.
    pub(super) fn close(&self) {
        self.pool.close();
    }

    /// Maximum age of this connection: a bit less than `max_age`, by an amount that differs between connections, so
    /// that connections that were made together do not end together.
    fn lifetime(&self, metrics: &Metrics) -> Duration {
        let mut hasher = DefaultHasher::new();
        metrics.created.hash(&mut hasher);
        self.max_age
            .saturating_sub(self.max_age / 1000 * u32::try_from(hasher.finish() % 200).unwrap_or_default())
    }
}
