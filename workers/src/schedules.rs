//! What a store of jobs can do for schedules.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::cron::{Ending, Run, Schedule, ScheduleClaim, ScheduleStates, TakeOver};
use crate::queue::Result;

/// How many runs are kept of each schedule once they have ended,
pub const KEPT_RUNS: usize = 100;
/// and how many as long as they have not.
pub const KEPT_UNFINISHED: usize = 1000;
/// A definition that no process has upheld for so long may be replaced by another.
pub const ABANDONED: Duration = Duration::from_secs(60);
/// What no process has upheld for so long is forgotten at the next boot of one.
pub const FORGOTTEN: Duration = Duration::from_secs(30 * 24 * 3600);

/// The schedules of a store of jobs. A cheap handle.
pub trait Schedules: Clone + Send + Sync + 'static {
    /// Says which schedules this process defines. One whose expression or zone has changed, or that was paused and is
    /// no more, begins anew from now.
    fn sync(
        &self,
        schedules: Vec<Arc<Schedule>>,
        take_over: TakeOver,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Where all stand.
    fn due(&self) -> impl Future<Output = Result<ScheduleStates>> + Send;

    /// Writes down how a schedule goes on, and enqueues its jobs, in one transaction. False when somebody else has
    /// changed it since it was read: nothing has happened then.
    fn fire(&self, claim: ScheduleClaim) -> impl Future<Output = Result<bool>> + Send;

    /// Pauses a schedule, or lets it go on from now. False when there is none.
    fn set(&self, schedule: String, paused: bool) -> impl Future<Output = Result<bool>> + Send;

    /// The jobs of a schedule that have not ended, of those that wait in `queue`.
    fn unfinished(&self, schedule: &str, queue: &str) -> impl Future<Output = Result<Vec<Uuid>>> + Send;

    /// The newest runs of a schedule, the newest first.
    fn runs(&self, schedule: &str, limit: usize) -> impl Future<Output = Result<Vec<Run>>> + Send;

    /// Writes down how jobs of schedules ended: the schedule, the job, and how.
    fn record_endings(&self, endings: Vec<(String, Uuid, Ending)>)
    -> impl Future<Output = Result<()>> + Send;
}
