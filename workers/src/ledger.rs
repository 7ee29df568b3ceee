//! What operators ask of a store of jobs: look, and act on what has ended or must not go on.

use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::queue::{Failure, Progress, Result};
use crate::state::State;

/// How many jobs one step of [`JobAdmin::retry`], [`JobAdmin::discard`] and [`JobAdmin::prune`] takes.
pub const STEP: usize = 500;

/// Which jobs. What is not named is not asked for; nothing at all means every job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobFilter {
    /// This one.
    pub id: Option<Uuid>,
    /// Of this kind.
    pub kind: Option<String>,
    /// In this queue.
    pub queue: Option<String>,
    /// In this state.
    pub state: Option<State>,
    /// Whose reason for having ended contains this text.
    pub reason: Option<String>,
}

/// A job as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct JobView {
    /// Its id.
    pub id: Uuid,
    /// Its kind.
    pub kind: String,
    /// Its queue.
    pub queue: String,
    /// Where it stands.
    pub state: State,
    /// Lower goes first.
    pub priority: i16,
    /// How often it was claimed, on stores that count by one: it only ever rises.
    pub epoch: i64,
    /// Runs that failed, in a row.
    pub failures: u32,
    /// Workers that crashed.
    pub recoveries: u32,
    /// When it is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_at: Option<Timestamp>,
    /// Who has it in hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// How far it has come, as it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What joins it to whatever enqueued it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// When it was enqueued.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Why it ended, or must not go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its last errors, the newest last.
    pub errors: Vec<Failure>,
    /// What it is about. Left out of lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<Box<RawValue>>,
}

/// What came of asking that a job must not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cancelled {
    /// It had not begun, and never will.
    Now,
    /// It runs, and is told with its worker's next renewal.
    Soon,
    /// There is no such job, or it has ended.
    Never,
}

/// The books of a store of jobs. A cheap handle.
pub trait JobAdmin: Clone + Send + Sync + 'static {
    /// Jobs in the order of their ids, after `cursor`. Without payloads.
    fn list(
        &self,
        filter: JobFilter,
        cursor: Option<Uuid>,
        limit: usize,
    ) -> impl Future<Output = Result<Vec<JobView>>> + Send;

    /// One job with everything.
    fn show(&self, id: Uuid) -> impl Future<Output = Result<Option<JobView>>> + Send;

    /// Gives jobs that have ended another life, as if they were new, and returns how many: at most [`STEP`];
    /// ask again until there are none. Their epochs rise on.
    fn retry(&self, filter: JobFilter) -> impl Future<Output = Result<usize>> + Send;

    /// Deletes jobs that have ended, and returns how many: at most [`STEP`].
    fn discard(&self, filter: JobFilter) -> impl Future<Output = Result<usize>> + Send;

    /// Ends a job that has not ended.
    fn cancel(&self, id: Uuid, reason: String) -> impl Future<Output = Result<Cancelled>> + Send;

    /// Lets no more jobs of a queue be claimed, or lets them again.
    fn pause(&self, queue: String, paused: bool) -> impl Future<Output = Result<()>> + Send;

    /// The queues that are paused.
    fn paused(&self) -> impl Future<Output = Result<Vec<String>>> + Send;

    /// How many jobs have ended in each queue and are kept.
    fn ended(&self) -> impl Future<Output = Result<Vec<(String, u64)>>> + Send;

    /// Deletes what ended longer ago than this, and unique keys that nobody has any more; returns how many
    /// jobs: at most [`STEP`].
    fn prune(&self, older: Duration) -> impl Future<Output = Result<usize>> + Send;
}
