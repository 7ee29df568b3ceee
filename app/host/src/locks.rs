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

use futures_util::future::join_all;
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
/// Leases that ended this long ago are deleted, in microseconds.
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
    lease: Arc<LeaseState>,
    is_given_up: bool,
}

/// What a guard knows of its lease. The clock decides, also when no renewal comes to an end.
#[derive(Debug)]
struct LeaseState {
    /// Time before the last renewal that the store has confirmed.
    renewed: Mutex<Instant>,
    /// Cancelled when another one has the lock, or it was given up by force.
    lost: CancellationToken,
}

impl LeaseState {
    fn lost_at(&self) -> Instant {
        *self.renewed.lock() + LOST
    }

    fn is_lost(&self) -> bool {
        self.lost.is_cancelled() || self.lost_at() <= Instant::now()
    }
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
    lease: Arc<LeaseState>,
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

    /// Renews the leases of this process until the drain is hard, and releases the leases of guards that were dropped. The
    /// host runs this task for [`Host::locks`](crate::module::Host::locks).
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn run(self, drain: Drain) -> anyhow::Result<()> {
        let mut renew_at = Instant::now() + RENEW;
        let mut forget_at = Instant::now();
        loop {
            tokio::select! {
                () = self.0.changed.notified() => {}
                // A process without locks does not wake up.
                () = tokio::time::sleep_until(renew_at), if self.has_locks() => {
                    self.renew().await;
                    renew_at = Instant::now() + RENEW;
                }
                () = drain.hard() => {
                    for held in self.0.held.lock().values_mut() {
                        held.is_given_up = true;
                        held.lease.lost.cancel();
                    }
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

    fn has_locks(&self) -> bool {
        !self.0.held.lock().is_empty()
    }

    /// Renews all leases at once: one that hangs delays no other.
    async fn renew(&self) {
        let held: Vec<_> = self.0.held.lock().iter().map(|(id, held)| (*id, held.clone())).collect();
        let renewals = held.into_iter().filter(|(_, held)| !held.is_given_up && !held.lease.is_lost());
        join_all(renewals.map(|(id, held)| self.renew_one(id, held))).await;
    }

    async fn renew_one(&self, id: Uuid, Held { name, permit, lease, .. }: Held) {
        let now = self.0.store.dialect().now_us();
        let sql = format!(
            "UPDATE locks SET until = {now} + ?1 WHERE name = ?2 AND permit = ?3 AND holder = ?4 AND until > {now}"
        );
        let asked = Instant::now();
        let renewing = self.0.store.execute(sql, values![lease_us(), &name, permit, id.to_string()]);
        // Without an answer, the time decides.
        let Ok(Ok(rows)) = tokio::time::timeout(RENEW, renewing).await else { return };
        if rows > 0 {
            *lease.renewed.lock() = asked;
        } else if self.0.held.lock().get(&id).is_some_and(|held| !held.is_given_up) {
            warn!(lock = name, "a lock was lost: its lease could not be renewed in time");
            lease.lost.cancel();
        }
    }

    /// Releases in the store what was given up.
    async fn release(&self) {
        let given_up: Vec<_> = {
            let held = self.0.held.lock();
            held.iter().filter(|(_, held)| held.is_given_up).map(|(id, held)| (*id, held.clone())).collect()
        };
        let releases = given_up.into_iter().map(async |(id, Held { name, permit, .. })| {
            // Without an answer, the lease ends by itself.
            let released = tokio::time::timeout(RENEW, self.release_one(id, &name, permit)).await;
            if !matches!(released, Ok(Ok(()))) {
                warn!(lock = name, "a lock was not released, and is free when its lease ends");
            }
            self.0.held.lock().remove(&id);
        });
        join_all(releases).await;
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
        let _ = tokio::time::timeout(RENEW, self.0.store.execute(sql, values![FORGET_US])).await;
    }
}

/// Length of a lease, in microseconds.
fn lease_us() -> i64 {
    i64::try_from(LEASE.as_micros()).unwrap_or(i64::MAX)
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
             VALUES (?1, ?2, ?3, {now}, {now} + ?4)
             ON CONFLICT (name, permit) DO UPDATE
             SET holder = excluded.holder, until = excluded.until,
                 epoch = CASE WHEN held.epoch < excluded.epoch THEN excluded.epoch ELSE held.epoch + 1 END
             WHERE held.until < {now}
             RETURNING epoch"
        );
        let id = Uuid::now_v7();
        let taken = "SELECT permit FROM locks WHERE name = ? AND until >= ";
        let taken = inner.store.query_as::<(i64,)>(format!("{taken}{now}"), values![&self.name]).await?;
        let free = (0..i64::from(self.permits)).filter(|permit| !taken.contains(&(*permit,)));
        let mut free: Vec<i64> = free.collect();
        fastrand::shuffle(&mut free);
        for permit in free {
            let asked = Instant::now();
            let values = values![&self.name, permit, id.to_string(), lease_us()];
            let rows = inner.store.execute_returning(sql.clone(), values).await?;
            let Some(row) = rows.first() else { continue };
            let epoch = row.first()?;
            let lease = Arc::new(LeaseState { renewed: Mutex::new(asked), lost: CancellationToken::new() });
            let held =
                Held { name: self.name.clone(), permit, lease: Arc::clone(&lease), is_given_up: false };
            inner.held.lock().insert(id, held);
            inner.changed.notify_one();
            return Ok(Some(LockGuard { locks: self.locks.clone(), id, epoch, lease }));
        }
        Ok(None)
    }

    /// Waits for a permit.
    ///
    /// # Errors
    /// [`Error::Held`] when others had all of them for all of `patience`.
    pub async fn acquire(&self, patience: Duration) -> Result<LockGuard, Error> {
        let end = Instant::now().checked_add(patience);
        loop {
            if let Some(guard) = self.try_acquire().await? {
                return Ok(guard);
            }
            if end.is_some_and(|end| Instant::now() + AGAIN > end) {
                return Err(Error::Held(self.name.clone()));
            }
            // Replicas that wait do not all look at the same moment.
            tokio::time::sleep(AGAIN.mul_f64(0.5 + fastrand::f64())).await;
        }
    }
}

impl LockGuard {
    /// Fencing token: it is higher than that of every earlier holder of the same permit, as long as the clock of the store
    /// is not set back by more than a day. It is a time in microseconds since 1970, or a little more.
    pub fn epoch(&self) -> i64 {
        self.epoch
    }

    /// Returns when the lock is lost: the store could not be reached for too long.
    pub async fn lost(&self) {
        loop {
            let lost_at = self.lease.lost_at();
            tokio::select! {
                () = self.lease.lost.cancelled() => return,
                () = tokio::time::sleep_until(lost_at) => {}
            }
            // The lease may have been renewed meanwhile.
            if self.lease.is_lost() {
                return;
            }
        }
    }

    /// Returns true when the lock is lost.
    pub fn is_lost(&self) -> bool {
        self.lease.is_lost()
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
