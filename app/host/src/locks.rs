//! Locks and semaphores over all replicas, by leases in the store.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use perennial_host::locks::Locks;
//! # async fn example(locks: Locks) -> Result<(), perennial_host::locks::Error> {
//! if let Some(lock) = locks.try_lock("import").await? {
//!     // No other replica imports now. `lock.epoch()` is higher than that of every earlier holder.
//!     lock.release().await?;
//! }
//! let _one_of_three = locks.semaphore("crawler", 3).acquire(Duration::from_secs(10)).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A lease ends 15 seconds after its holder was last able to renew it: when the process dies, another one gets the lock
//! by then. A holder that was paused for longer may still believe that it has the lock, so rows that it writes should
//! carry the epoch, or the work should end with [`LockGuard::lost`] (M. Kleppmann, How to do distributed locking, 2016).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_store::pool::sql::{self, Store, Tables};
use perennial_store::values;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

/// Length of a lease.
const LEASE: Duration = Duration::from_secs(15);
/// Time between two renewals.
const RENEW: Duration = Duration::from_secs(3);
/// A holder whose lease could not be renewed for this long has lost its lock. Another replica gets it later than that.
const LOST: Duration = Duration::from_secs(12);
/// Time between two attempts to get a lock that another one has.
const AGAIN: Duration = Duration::from_millis(100);
/// Maximum length of a name, in bytes.
const MAX_NAME: usize = 200;
/// Maximum number of holders of a semaphore.
const MAX_PERMITS: u32 = 1000;
/// Leases that ended this long ago are deleted, in microseconds. Their epochs begin anew.
const FORGET_US: i64 = 24 * 3600 * 1_000_000;

const MIGRATION: &str = "CREATE TABLE locks (
    name   TEXT NOT NULL,
    permit BIGINT NOT NULL,
    holder TEXT NOT NULL,
    epoch  BIGINT NOT NULL,
    -- microseconds since 1970, by the clock of the store
    until  BIGINT NOT NULL,
    PRIMARY KEY (name, permit)
)";

/// The table of the locks.
pub const TABLES: Tables = Tables { module: "locks", sqlite: &[MIGRATION], postgres: &[MIGRATION] };

/// Error of a lock.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Others had the lock for the whole time.
    #[error("{0} was held by others for the whole time")]
    Held(String),
    /// The name or the number of permits is not valid, which is a mistake of the program.
    #[error("wanted a name of 1 to {MAX_NAME} bytes and 1 to {MAX_PERMITS} permits")]
    Invalid,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] sql::Error),
}

/// Locks and semaphores. A cheap handle.
#[derive(Clone, Debug)]
pub struct Locks(Arc<LocksInner>);

#[derive(Debug)]
struct LocksInner {
    store: Store,
    held: Mutex<HashMap<Uuid, Held>>,
    changed: Notify,
}

/// A lock that this process has, or has given up and not yet released in the store.
#[derive(Clone, Debug)]
struct Held {
    name: String,
    permit: i64,
    renewed: Instant,
    lost: CancellationToken,
    is_given_up: bool,
}

/// A semaphore: so many holders at once, over all replicas.
#[derive(Clone, Debug)]
pub struct Semaphore {
    locks: Locks,
    name: String,
    permits: u32,
}

/// A lock or a permit. It is released when this drops.
#[derive(Debug)]
pub struct LockGuard {
    locks: Locks,
    id: Uuid,
    epoch: i64,
    lost: CancellationToken,
}

impl Locks {
    /// Makes a handle on the locks of a store, in which the tables of the host exist. Its leases are renewed by
    /// [`Locks::run`].
    pub fn new(store: Store) -> Self {
        Self(Arc::new(LocksInner { store, held: Mutex::default(), changed: Notify::new() }))
    }

    /// Gets a lock at once; `None` when another one has it, in this process or in another.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn try_lock(&self, name: &str) -> Result<Option<LockGuard>, Error> {
        self.semaphore(name, 1).try_acquire().await
    }

    /// Waits for a lock.
    ///
    /// # Errors
    /// [`Error::Held`] when others had it for all of `patience`.
    pub async fn lock(&self, name: &str, patience: Duration) -> Result<LockGuard, Error> {
        self.semaphore(name, 1).acquire(patience).await
    }

    /// The semaphore of this name. All replicas must give it the same number of permits.
    #[must_use]
    pub fn semaphore(&self, name: &str, permits: u32) -> Semaphore {
        Semaphore { locks: self.clone(), name: name.to_owned(), permits }
    }

    /// Renews the leases of this process, and releases those that were given up, until the drain is hard. The host runs
    /// it for [`Host::locks`](crate::module::Host::locks).
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn run(self, drain: Drain) -> anyhow::Result<()> {
        let mut renew_at = Instant::now() + RENEW;
        let mut forget_at = Instant::now();
        loop {
            tokio::select! {
                () = self.0.changed.notified() => {}
                () = tokio::time::sleep_until(renew_at) => {
                    self.renew().await;
                    renew_at = Instant::now() + RENEW;
                }
                () = drain.hard() => {
                    self.0.held.lock().values_mut().for_each(|held| held.is_given_up = true);
                    self.release().await;
                    return Ok(());
                }
            }
            self.release().await;
            if forget_at <= Instant::now() {
                self.forget().await;
                forget_at = Instant::now() + Duration::from_secs(3600);
            }
        }
    }

    async fn renew(&self) {
        let held: Vec<_> = self.0.held.lock().iter().map(|(id, held)| (*id, held.clone())).collect();
        for (id, Held { name, permit, renewed, lost, is_given_up }) in held {
            if is_given_up || lost.is_cancelled() {
                continue;
            }
            let now = self.0.store.dialect().now_us();
            let sql = format!(
                "UPDATE locks SET until = {now} + ?1 WHERE name = ?2 AND permit = ?3 AND holder = ?4 AND until > {now}"
            );
            let asked = Instant::now();
            let lease = i64::try_from(LEASE.as_micros()).unwrap_or(i64::MAX);
            let renewing = self.0.store.execute(sql, values![lease, &name, permit, id.to_string()]);
            let is_lost = match tokio::time::timeout(RENEW, renewing).await {
                Ok(Ok(rows)) => rows == 0,
                Ok(Err(_)) | Err(_) => renewed.elapsed() >= LOST,
            };
            if is_lost {
                warn!(lock = name, "a lock was lost: its lease could not be renewed in time");
                lost.cancel();
            } else if let Some(held) = self.0.held.lock().get_mut(&id) {
                held.renewed = asked.max(held.renewed);
            }
        }
    }

    /// Releases in the store what was given up.
    async fn release(&self) {
        let given_up: Vec<_> = {
            let held = self.0.held.lock();
            held.iter().filter(|(_, held)| held.is_given_up).map(|(id, held)| (*id, held.clone())).collect()
        };
        for (id, Held { name, permit, .. }) in given_up {
            // Without an answer, the lease ends by itself.
            if let Err(error) = self.release_one(id, &name, permit).await {
                warn!(lock = name, %error, "a lock was not released, and is free when its lease ends");
            }
            self.0.held.lock().remove(&id);
        }
    }

    async fn release_one(&self, id: Uuid, name: &str, permit: i64) -> sql::Result<()> {
        let now = self.0.store.dialect().now_us();
        let sql = format!(
            "UPDATE locks SET until = {now} - 1 WHERE name = ? AND permit = ? AND holder = ? AND until >= {now}"
        );
        self.0.store.execute(sql, values![name, permit, id.to_string()]).await.map(drop)
    }

    async fn forget(&self) {
        let now = self.0.store.dialect().now_us();
        let sql = format!("DELETE FROM locks WHERE until < {now} - ?");
        let _ = self.0.store.execute(sql, values![FORGET_US]).await;
    }
}

impl Semaphore {
    /// Gets a permit at once; `None` when others have all of them.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn try_acquire(&self) -> Result<Option<LockGuard>, Error> {
        let is_name = (1..=MAX_NAME).contains(&self.name.len());
        if !is_name || !(1..=MAX_PERMITS).contains(&self.permits) {
            return Err(Error::Invalid);
        }
        let inner = &self.locks.0;
        let now = inner.store.dialect().now_us();
        // The statement takes a permit that is free; of two replicas that see the same one, one changes no row.
        let sql = format!(
            "INSERT INTO locks AS held (name, permit, holder, epoch, until)
             VALUES (?1, ?2, ?3, 1, {now} + ?4)
             ON CONFLICT (name, permit) DO UPDATE
             SET holder = excluded.holder, epoch = held.epoch + 1, until = excluded.until
             WHERE held.until < {now}
             RETURNING epoch"
        );
        let id = Uuid::now_v7();
        let lease = i64::try_from(LEASE.as_micros()).unwrap_or(i64::MAX);
        let taken = "SELECT permit FROM locks WHERE name = ? AND until >= ";
        let taken = inner.store.query_as::<(i64,)>(format!("{taken}{now}"), values![&self.name]).await?;
        let free = (0..i64::from(self.permits)).filter(|permit| !taken.contains(&(*permit,)));
        let mut free: Vec<i64> = free.collect();
        fastrand::shuffle(&mut free);
        for permit in free {
            let asked = Instant::now();
            let values = values![&self.name, permit, id.to_string(), lease];
            let rows = inner.store.execute_returning(sql.clone(), values).await?;
            let Some(row) = rows.first() else { continue };
            let lost = CancellationToken::new();
            let held = Held {
                name: self.name.clone(),
                permit,
                renewed: asked,
                lost: lost.clone(),
                is_given_up: false,
            };
            inner.held.lock().insert(id, held);
            return Ok(Some(LockGuard { locks: self.locks.clone(), id, epoch: row.first()?, lost }));
        }
        Ok(None)
    }

    /// Waits for a permit.
    ///
    /// # Errors
    /// [`Error::Held`] when others had all of them for all of `patience`.
    pub async fn acquire(&self, patience: Duration) -> Result<LockGuard, Error> {
        let end = Instant::now() + patience;
        loop {
            if let Some(guard) = self.try_acquire().await? {
                return Ok(guard);
            }
            if Instant::now() + AGAIN > end {
                return Err(Error::Held(self.name.clone()));
            }
            // Replicas that wait do not all look at the same moment.
            tokio::time::sleep(AGAIN.mul_f64(0.5 + fastrand::f64())).await;
        }
    }
}

impl LockGuard {
    /// Fencing token: it is higher than that of every earlier holder of the same permit.
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Returns when the lock is lost: the store could not be reached for too long.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Returns true when the lock is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.is_cancelled()
    }

    /// Releases the lock, and returns when the store knows it.
    ///
    /// # Errors
    /// When the store fails: the lock is free when its lease ends.
    pub async fn release(self) -> Result<(), Error> {
        let held = self.locks.0.held.lock().remove(&self.id);
        if let Some(Held { name, permit, .. }) = held {
            self.locks.release_one(self.id, &name, permit).await?;
        }
        Ok(())
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        let inner = &self.locks.0;
        if let Some(held) = inner.held.lock().get_mut(&self.id) {
            held.is_given_up = true;
            inner.changed.notify_one();
        }
    }
}
