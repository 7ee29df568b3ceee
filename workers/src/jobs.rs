//! The handle through which applications and operators use the jobs of a process.

use perennial_store::pool::sql::{self, Dialect, Engine, Tx};
use uuid::Uuid;

use crate::admission::Admission;
use crate::job_admin::{Cancelled, JobAdmin, JobFilter, STEP};
use crate::outbox;
use crate::queue::{NewJob, Queue, Result};
use crate::store::{self, JobStore};

/// Enqueues jobs, and acts on them for operators. A cheap handle.
#[derive(Clone, Debug)]
pub struct Jobs {
    store: JobStore,
    admission: Admission,
}

impl Jobs {
    /// Creates a handle to the jobs in `store`. `admission` bounds how many may wait.
    pub fn new(store: JobStore, admission: Admission) -> Self {
        Self { store, admission }
    }

    /// Returns the store.
    pub fn store(&self) -> &JobStore {
        &self.store
    }

    /// Returns the admission, which refuses jobs for full queues.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Adds a job and returns its id, or that of the job that has its unique key.
    ///
    /// # Errors
    /// When its queue is full, or the store fails.
    pub async fn enqueue(&self, job: NewJob) -> Result<Uuid> {
        let id = job.id;
        Ok(self.enqueue_all(vec![job]).await?.first().copied().unwrap_or(id))
    }

    /// Adds jobs, all or none, and returns their ids: see [`Queue::enqueue`].
    ///
    /// # Errors
    /// When a queue is full, or the store fails.
    pub async fn enqueue_all(&self, jobs: Vec<NewJob>) -> Result<Vec<Uuid>> {
        self.admission.admit(&jobs)?;
        self.store.enqueue(jobs).await
    }

    /// Adds jobs within a transaction of the caller, so that the jobs exist if and only if the rows of that
    /// transaction do. If jobs are kept in the same store, they exist with the commit. Otherwise the outbox
    /// of that store keeps them, and publishes them after the commit. Admission is not checked: see
    /// [`Jobs::admission`]. The commit of a transaction of `Store::begin` wakes their queues; after `transact!`, call
    /// [`Jobs::wake`].
    ///
    /// # Errors
    /// When the store refuses.
    pub async fn insert<T: Tx>(&self, tx: &T, jobs: &[NewJob]) -> sql::Result<()> {
        if matches!(tx.engine(), Engine::SqliteSession(_) | Engine::PostgresSession(_)) {
            let queues: Vec<_> = jobs.iter().map(|job| job.queue.clone()).collect();
            let woken = self.clone();
            tx.after_commit(move || woken.wake(queues.iter().map(|queue| &**queue)));
        }
        match (&self.store, tx.dialect()) {
            (JobStore::Sqlite(_), Dialect::Sqlite) | (JobStore::Postgres(_), Dialect::Postgres) => {
                store::insert_jobs(tx, jobs).await
            }
            _ => outbox::insert(tx, jobs).await,
        }
    }

    /// Wakes these queues. Call it after the commit of a transaction that added jobs to them.
    pub fn wake<'a>(&self, queues: impl IntoIterator<Item = &'a str>) {
        self.store.committed(&queues.into_iter().collect());
    }

    /// Revives jobs that have ended, and returns how many.
    ///
    /// # Errors
    /// When the store fails: some jobs may have been revived.
    pub async fn retry(&self, filter: &JobFilter) -> Result<usize> {
        let mut all = 0;
        loop {
            let some = self.store.retry(filter.clone()).await?;
            all += some;
            if some < STEP {
                return Ok(all);
            }
        }
    }

    /// Deletes jobs that have ended, and returns how many.
    ///
    /// # Errors
    /// When the store fails: some jobs may have been deleted.
    pub async fn discard(&self, filter: &JobFilter) -> Result<usize> {
        let mut all = 0;
        loop {
            let some = self.store.discard(filter.clone()).await?;
            all += some;
            if some < STEP {
                return Ok(all);
            }
        }
    }

    /// Cancels a job that has not ended.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn cancel(&self, id: Uuid, reason: &str) -> Result<Cancelled> {
        self.store.cancel(id, reason.to_owned()).await
    }
}
