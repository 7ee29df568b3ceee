//! Every metric of the job engine, each named once.

use std::time::Duration;

use metrics::{
    Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::queue::Depth;

/// Counter by `kind`, `outcome`: runs of jobs that ended, by [`OutcomeLabel`].
pub const JOBS: &str = "perennial_jobs_total";
/// Histogram by `kind`, seconds: how long a run took.
pub const JOB_DURATION: &str = "perennial_job_duration_seconds";
/// Histogram by `queue`, seconds: time from when a job was due to its claim.
pub const JOB_WAIT: &str = "perennial_job_wait_seconds";
/// Gauge: jobs that run now.
pub const JOBS_RUNNING: &str = "perennial_jobs_running";
/// Gauge by `queue`, `state` (ready, scheduled, running, dead): how many jobs there are. Dead are the jobs
/// that have ended and are kept, including the cancelled ones.
pub const QUEUE_DEPTH: &str = "perennial_queue_depth";
/// Gauge by `queue`, bytes: the length of all payloads in the queue.
pub const QUEUE_BYTES: &str = "perennial_queue_bytes";
/// Gauge by `queue`, seconds: for how long the oldest job has been due.
pub const QUEUE_AGE: &str = "perennial_queue_oldest_seconds";
/// Counter by `kind`: settlements that came too late and changed nothing.
pub const JOBS_STALE: &str = "perennial_jobs_stale_total";
/// Counter: jobs that were taken from their worker because its lease had expired.
pub const JOBS_RESCUED: &str = "perennial_jobs_rescued_total";
/// Counter: jobs that were passed on from the outbox.
pub const JOBS_RELAYED: &str = "perennial_jobs_relayed_total";
/// Histogram, seconds: how much later than planned leases were renewed.
pub const RENEWAL_LAG: &str = "perennial_lease_renewal_lag_seconds";
/// Counter by `schedule`, `outcome` (fired, missed, overlapped, passed): what became of the occurrences of a
/// schedule. Passed are the occurrences that another one stands for.
pub const CRON_OCCURRENCES: &str = "perennial_cron_occurrences_total";
/// Histogram by `schedule`, seconds: time from when an occurrence was due to its claim.
pub const CRON_LAG: &str = "perennial_cron_lag_seconds";
/// Gauge by `schedule`, seconds: how long an occurrence has been due without being claimed.
pub const CRON_OVERDUE: &str = "perennial_cron_overdue_seconds";

/// Label for how a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum OutcomeLabel {
    /// The job is done.
    Done,
    /// There was nothing to do.
    Skipped,
    /// The job runs again later, without having failed.
    Snoozed,
    /// Another worker goes on with the job.
    HandedBack,
    /// The run returned an error.
    Failed,
    /// The run took longer than its timeout.
    TimedOut,
    /// The run panicked.
    Panicked,
    /// The job was given up.
    Dead,
    /// The job was cancelled.
    Cancelled,
}

impl OutcomeLabel {
    /// Returns the text of the label.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Describes all metrics to the recorder.
pub fn describe() {
    describe_counter!(JOBS, Unit::Count, "runs of jobs that ended, by kind and outcome");
    describe_histogram!(JOB_DURATION, Unit::Seconds, "how long a run took, by kind");
    describe_histogram!(JOB_WAIT, Unit::Seconds, "from when a job was due to its claim, by queue");
    describe_gauge!(JOBS_RUNNING, Unit::Count, "jobs that run now");
    describe_gauge!(QUEUE_DEPTH, Unit::Count, "jobs by queue and state");
    describe_gauge!(QUEUE_BYTES, Unit::Bytes, "the length of all payloads, by queue");
    describe_gauge!(QUEUE_AGE, Unit::Seconds, "for how long the oldest job has been due, by queue");
    describe_counter!(JOBS_STALE, Unit::Count, "settlements that came too late and changed nothing, by kind");
    describe_counter!(JOBS_RESCUED, Unit::Count, "jobs taken from workers whose lease had expired");
    describe_counter!(JOBS_RELAYED, Unit::Count, "jobs that were passed on from the outbox");
    describe_histogram!(RENEWAL_LAG, Unit::Seconds, "how much later than wanted leases were renewed");
    describe_counter!(
        CRON_OCCURRENCES,
        Unit::Count,
        "times of schedules, by schedule and what became of them"
    );
    describe_histogram!(CRON_LAG, Unit::Seconds, "from when a time was due to its claim, by schedule");
    describe_gauge!(CRON_OVERDUE, Unit::Seconds, "for how long a time has been due, by schedule");
    for name in [JOBS_RESCUED, JOBS_RELAYED] {
        counter!(name).increment(0);
    }
    for what in ["jobs", "outbox", "schedules", "schedule_runs"] {
        perennial_store::metrics::may_be_unreadable(what);
    }
}

/// Creates the counters of a kind, so that they are zero before its first run.
pub(crate) fn may_run(kind: &'static str) {
    for outcome in <OutcomeLabel as strum::VariantArray>::VARIANTS {
        counter!(JOBS, "kind" => kind, "outcome" => outcome.as_str()).increment(0);
    }
    counter!(JOBS_STALE, "kind" => kind).increment(0);
}

/// Creates the counters of a schedule, so that they are zero before its first occurrence.
pub(crate) fn may_be_due(schedule: &str) {
    for outcome in ["fired", "missed", "overlapped", "passed"] {
        counter!(CRON_OCCURRENCES, "schedule" => schedule.to_owned(), "outcome" => outcome).increment(0);
    }
}

/// Returns the gauge of jobs that run.
pub(crate) fn running() -> Gauge {
    gauge!(JOBS_RUNNING)
}

pub(crate) fn ended(kind: &'static str, outcome: OutcomeLabel, took: Duration) {
    counter!(JOBS, "kind" => kind, "outcome" => outcome.as_str()).increment(1);
    histogram!(JOB_DURATION, "kind" => kind).record(took);
}

/// Returns the histogram of how long jobs of a queue waited.
pub(crate) fn waits(queue: &str) -> Histogram {
    histogram!(JOB_WAIT, "queue" => queue.to_owned())
}

pub(crate) fn depth(queue: &str, depth: Depth) {
    for (state, count) in [("ready", depth.ready), ("scheduled", depth.scheduled), ("running", depth.running)]
    {
        gauge!(QUEUE_DEPTH, "queue" => queue.to_owned(), "state" => state).set(number(count));
    }
    gauge!(QUEUE_BYTES, "queue" => queue.to_owned()).set(number(depth.bytes));
    gauge!(QUEUE_AGE, "queue" => queue.to_owned()).set(number(depth.oldest_ms) / 1000.0);
}

pub(crate) fn kept(queue: &str, jobs: u64) {
    gauge!(QUEUE_DEPTH, "queue" => queue.to_owned(), "state" => "dead").set(number(jobs));
}

pub(crate) fn stale(kind: &'static str) {
    counter!(JOBS_STALE, "kind" => kind).increment(1);
}

pub(crate) fn rescued(jobs: usize) {
    counter!(JOBS_RESCUED).increment(jobs as u64);
}

pub(crate) fn relayed(jobs: usize) {
    counter!(JOBS_RELAYED).increment(jobs as u64);
}

pub(crate) fn renewal_lag(lag: Duration) {
    histogram!(RENEWAL_LAG).record(lag);
}

/// Counts occurrences of a schedule that had this outcome.
pub(crate) fn occurrences(schedule: &str, outcome: &'static str, count: usize) {
    if count > 0 {
        let counter = counter!(CRON_OCCURRENCES, "schedule" => schedule.to_owned(), "outcome" => outcome);
        counter.increment(count as u64);
    }
}

pub(crate) fn cron_lag(schedule: &str, lag: Duration) {
    histogram!(CRON_LAG, "schedule" => schedule.to_owned()).record(lag);
}

pub(crate) fn overdue(schedule: &str, by: Duration) {
    gauge!(CRON_OVERDUE, "schedule" => schedule.to_owned()).set(by.as_secs_f64());
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats, and nobody counts 2^52 jobs")]
fn number(count: u64) -> f64 {
    count as f64
}
