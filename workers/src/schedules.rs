//! The operations of a job store for schedules.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::cron::{Ending, Run, Schedule, ScheduleClaim, ScheduleStates, TakeOver};
use crate::queue::Result;

/// Number of newest runs of each schedule that are kept once they have ended.
pub const KEPT_RUNS: usize = 100;
/// Number of newest runs of each schedule that are kept as long as they have not ended.
pub const KEPT_UNFINISHED: usize = 1000;
/// Time without being upheld by a process after which a definition may be replaced by another.
pub const ABANDONED: Duration = Duration::from_secs(60);
/// Time without being upheld by a process after which a schedule is deleted, at the next boot of a process.
pub const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// The operations of a job store for schedules. A cheap handle.
pub trait Schedules: Clone + Send + Sync + 'static {
    /// Says which schedules this process defines. A schedule whose expression or zone has changed, or that
    /// was paused and is not any more, begins anew from now.
    fn sync(
        &self,
        schedules: Vec<Arc<Schedule>>,
        take_over: TakeOver,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Returns the states of all schedules.
    fn due(&self) -> impl Future<Output = Result<ScheduleStates>> + Send;

    /// Writes the new state of a schedule and enqueues its jobs, in one transaction. Returns false, without
    /// any change, when the schedule has changed since its state was read.
    fn fire(&self, claim: ScheduleClaim) -> impl Future<Output = Result<bool>> + Send;

    /// Pauses a schedule, or resumes it from now on. Returns false when there is no such schedule.
    fn set(&self, schedule: String, paused: bool) -> impl Future<Output = Result<bool>> + Send;

    /// Returns the jobs of a schedule that have not ended. `queue` is the queue of jobs whose run does not
    /// record one.
    fn unfinished(&self, schedule: &str, queue: &str) -> impl Future<Output = Result<Vec<Uuid>>> + Send;

    /// Returns the newest runs of a schedule, the newest first.
    fn runs(&self, schedule: &str, limit: usize) -> impl Future<Output = Result<Vec<Run>>> + Send;

    /// Records how jobs of schedules ended: the schedule, the job, and its ending.
    fn record_endings(&self, endings: Vec<(String, Uuid, Ending)>)
    -> impl Future<Output = Result<()>> + Send;
}
