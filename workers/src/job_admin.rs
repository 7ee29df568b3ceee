//! The job admin: what operators do with the jobs of a store.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::queue::{Failure, Progress, Result};
use crate::state::State;

/// Highest number of jobs that one step of [`JobAdmin::retry`], [`JobAdmin::discard`] and [`JobAdmin::prune`]
/// takes.
pub const STEP: usize = 500;

/// Filter for jobs. A field that is `None` matches every job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobFilter {
    /// Matches the job with this id.
    pub id: Option<Uuid>,
    /// Matches jobs of this kind.
    pub kind: Option<String>,
    /// Matches jobs in this queue.
    pub queue: Option<String>,
    /// Matches jobs in this state.
    pub state: Option<State>,
    /// Matches jobs whose reason for having ended contains this text.
    pub reason: Option<String>,
}

/// A job as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    /// Id of the job.
    pub id: Uuid,
    /// Name of the kind.
    pub kind: String,
    /// Queue of the job.
    pub queue: String,
    /// State of the job.
    pub state: State,
    /// Priority within the queue: a lower number goes first.
    pub priority: i16,
    /// Epoch of the last claim, which only rises. On stores that count by one it is the number of claims.
    pub epoch: i64,
    /// Number of runs that failed, in a row.
    pub failures: u32,
    /// Number of workers that crashed.
    pub recoveries: u32,
    /// Time at which the job is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_at: Option<Timestamp>,
    /// Worker that has claimed the job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Progress that the job reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Trace that joins the job to its origin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Time at which the job was enqueued.
    pub created_at: Timestamp,
    /// Time at which the job ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Reason why the job ended, or must not go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Last errors of the job, the newest last.
    pub errors: Vec<Failure>,
    /// Payload of the job. Lists leave it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<Box<RawValue>>,
}

/// Result of cancelling a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cancelled {
    /// The job had not begun, and never will.
    Now,
    /// The job runs, and is told with its worker's next renewal.
    Soon,
    /// There is no such job, or it has ended.
    Never,
}

/// The operations of a job store for operators. A cheap handle.
pub trait JobAdmin: Clone + Send + Sync + 'static {
    /// Returns jobs in the order of their ids, after `cursor` and without payloads.
    fn list(
        &self,
        filter: JobFilter,
        cursor: Option<Uuid>,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<JobView>>> + Send;

    /// Returns one job with all fields; `None` if there is no such job.
    fn show(&self, id: Uuid) -> impl Future<Output = Result<Option<JobView>>> + Send;

    /// Revives jobs that have ended, as if they were new, and returns how many, at most [`STEP`]. Call it
    /// again until no job is left. The epochs of the jobs rise further.
    fn retry(&self, filter: JobFilter) -> impl Future<Output = Result<usize>> + Send;

    /// Deletes jobs that have ended, and returns how many, at most [`STEP`].
    fn discard(&self, filter: JobFilter) -> impl Future<Output = Result<usize>> + Send;

    /// Cancels a job that has not ended.
    fn cancel(&self, id: Uuid, reason: String) -> impl Future<Output = Result<Cancelled>> + Send;

    /// Pauses a queue, so that none of its jobs is claimed, or resumes it.
    fn pause(&self, queue: String, paused: bool) -> impl Future<Output = Result<()>> + Send;

    /// Returns the queues that are paused.
    fn paused(&self) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// Returns the number of ended jobs that each queue keeps.
    fn ended(&self) -> impl Future<Output = Result<Vec<(String, u64)>>> + Send;

    /// Deletes jobs that ended longer ago than `older`, and unique keys whose window is over. Returns the
    /// number of jobs, at most [`STEP`].
    fn prune(&self, older: Duration) -> impl Future<Output = Result<usize>> + Send;
}
