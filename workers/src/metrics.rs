//! Every metric of the job engine, each named once.

use std::time::Duration;

use metrics::{Gauge, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Counter by `kind`, `outcome`: runs of jobs that ended. Outcomes: done, snoozed, handed-back, failed,
/// timed-out, panicked, dead.
pub const JOBS: &str = "perennial_jobs_total";
/// Histogram by `kind`, seconds: how long a run took.
pub const JOB_DURATION: &str = "perennial_job_duration_seconds";
/// Histogram by `queue`, seconds: from when a job was due to when it was claimed.
pub const JOB_WAIT: &str = "perennial_job_wait_seconds";
/// Gauge: jobs that run now.
pub const JOBS_RUNNING: &str = "perennial_jobs_running";
/// Counter by `kind`: settlements that came too late and changed nothing.
pub const JOBS_STALE: &str = "perennial_jobs_stale_total";
/// Counter: leases that lapsed and were taken from their worker.
pub const JOBS_RESCUED: &str = "perennial_jobs_rescued_total";

/// Describes them to the recorder.
pub fn describe() {
    describe_counter!(JOBS, Unit::Count, "runs of jobs that ended, by kind and outcome");
    describe_histogram!(JOB_DURATION, Unit::Seconds, "how long a run took, by kind");
    describe_histogram!(JOB_WAIT, Unit::Seconds, "from when a job was due to its claim, by queue");
    describe_gauge!(JOBS_RUNNING, Unit::Count, "jobs that run now");
    describe_counter!(JOBS_STALE, Unit::Count, "settlements that came too late and changed nothing, by kind");
    describe_counter!(JOBS_RESCUED, Unit::Count, "leases that lapsed and were taken from their worker");
}

/// The gauge of jobs that run.
pub(crate) fn running() -> Gauge {
    gauge!(JOBS_RUNNING)
}

pub(crate) fn ended(kind: &'static str, outcome: &'static str, took: Duration) {
    counter!(JOBS, "kind" => kind, "outcome" => outcome).increment(1);
    histogram!(JOB_DURATION, "kind" => kind).record(took);
}

pub(crate) fn waited(queue: &str, wait: Duration) {
    histogram!(JOB_WAIT, "queue" => queue.to_owned()).record(wait);
}

pub(crate) fn stale(kind: &'static str) {
    counter!(JOBS_STALE, "kind" => kind).increment(1);
}

pub(crate) fn rescued(jobs: usize) {
    counter!(JOBS_RESCUED).increment(jobs as u64);
}
