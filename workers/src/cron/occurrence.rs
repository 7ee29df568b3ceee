//! One time of a schedule, and the id of its job.

use std::fmt;

use jiff::Timestamp;
use uuid::Uuid;

/// Namespace of the UUIDs that are made of the names of schedules.
pub(super) const NAMESPACE: Uuid = Uuid::from_u128(0x5f2c_68f9_5d0c_4b6e_9a57_1d4f_0c3b_8e21);

/// One time of one schedule, which joins a job to the schedule that enqueued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occurrence {
    /// Name of the schedule.
    pub schedule: String,
    /// Time at which it was due, without its delay.
    pub time: Timestamp,
}

impl Occurrence {
    /// Prefix of the traces of such jobs.
    const TRACE: &str = "cron:";

    /// Reads the occurrence from the trace of a job; `None` if no schedule enqueued the job.
    pub fn of_trace(trace: &str) -> Option<Self> {
        let (schedule, time) = trace.strip_prefix(Self::TRACE)?.split_once('@')?;
        Some(Self { schedule: schedule.to_owned(), time: time.parse().ok()? })
    }

    /// Returns true if this is the job of the occurrence, and not one that follows from it and has the same
    /// trace.
    pub(crate) fn has_job(&self, id: Uuid) -> bool {
        id == self.job(false) || id == self.job(true)
    }

    /// Returns the id of the job. It is made of the schedule and the time, so that the job can be enqueued
    /// again without becoming two.
    pub(super) fn job(&self, is_manual: bool) -> Uuid {
        let seed = if is_manual { format!("{} by hand", self.schedule) } else { self.schedule.clone() };
        let name = Uuid::new_v5(&NAMESPACE, seed.as_bytes());
        let mut random = [0; 10];
        random.copy_from_slice(&name.as_bytes()[..10]);
        let ms = u64::try_from(self.time.as_millisecond()).unwrap_or_default();
        uuid::Builder::from_unix_timestamp_millis(ms, &random).into_uuid()
    }
}

/// Formats the occurrence as a trace.
impl fmt::Display for Occurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}@{}", Self::TRACE, self.schedule, self.time)
    }
}
