//! The recorder that Prometheus reads, and the metrics of the process itself, with one constant for each name.

use std::convert::Infallible;
use std::time::Duration;

use metrics::{Gauge, Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::drain::Drain;

/// Gauge: 1 while requests are refused because memory is nearly used up.
pub const SHEDDING: &str = "perennial_memory_shedding";
/// Gauge: work items that wait for a thread of `server.cpu`.
pub const CPU_WAITING: &str = "perennial_cpu_waiting";
/// Gauge: work items that run on a thread of `server.cpu`.
pub const CPU_RUNNING: &str = "perennial_cpu_running";
/// Counter: work items that were refused because the queue of `server.cpu` was full.
pub const CPU_REFUSED: &str = "perennial_cpu_refused_total";
/// Counter by `task`: contained tasks that failed and were started again.
pub const TASK_FAILURES: &str = "perennial_task_failures_total";
/// Gauge by `dependency`: 1 while its circuit breaker is open.
pub const BREAKER_OPEN: &str = "perennial_breaker_open";
/// Counter: log lines that were dropped because the log's reader was too slow.
pub const LOG_LINES_DROPPED: &str = "perennial_log_lines_dropped_total";
/// Gauge, bytes: memory of the cgroup without the page cache.
pub const MEMORY_USED: &str = "perennial_memory_used_bytes";
/// Gauge, bytes: memory limit of the cgroup, if it has one.
pub const MEMORY_LIMIT: &str = "perennial_memory_limit_bytes";
/// Gauge by `version`, `commit`: always 1.
pub const BUILD_INFO: &str = "perennial_build_info";

/// Upper bounds, in seconds, of the buckets of every histogram of durations.
const SECONDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0];

/// Interval of the recorder's maintenance, without which histograms grow while no scraper reads them.
const UPKEEP: Duration = Duration::from_secs(5);

/// The metrics of the process, as Prometheus text. A cheap handle.
#[derive(Clone)]
pub struct Metrics {
    recorder: PrometheusHandle,
    /// The standard metrics of a process: processor time, memory, file descriptors, threads, start time.
    process: metrics_process::Collector,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Installs the recorder, once per process.
    ///
    /// # Errors
    /// When another recorder is already installed.
    pub fn install() -> Result<Self, BuildError> {
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
            .install_recorder()?;
        describe();
        let process = metrics_process::Collector::default();
        process.describe();
        Ok(Self { recorder: handle, process })
    }

    /// Sets [`BUILD_INFO`]. `commit` is empty when it is not known.
    pub fn built(&self, version: &'static str, commit: &'static str) {
        gauge!(BUILD_INFO, "version" => version, "commit" => commit).set(1.0);
    }

    /// Renders all metrics in the text exposition format.
    pub fn render(&self) -> String {
        self.process.collect();
        self.recorder.render()
    }

    /// Runs the recorder's maintenance until the hard phase of the drain.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn upkeep(self, drain: Drain) -> Result<(), Infallible> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(UPKEEP) => self.recorder.run_upkeep(),
                () = drain.hard() => return Ok(()),
            }
        }
    }
}

fn describe() {
    describe_gauge!(BREAKER_OPEN, Unit::Count, "1 while the circuit breaker of a dependency is open");
    describe_gauge!(SHEDDING, Unit::Count, "1 while requests are refused because memory is nearly used up");
    describe_gauge!(CPU_WAITING, Unit::Count, "work that waits for a processor thread");
    describe_gauge!(CPU_RUNNING, Unit::Count, "work that runs on a processor thread");
    describe_counter!(CPU_REFUSED, Unit::Count, "work refused because the processor queue was full");
    describe_counter!(TASK_FAILURES, Unit::Count, "contained tasks that failed and were started again");
    describe_counter!(LOG_LINES_DROPPED, Unit::Count, "log lines dropped because their reader was too slow");
    describe_gauge!(MEMORY_USED, Unit::Bytes, "memory of the cgroup without the page cache");
    describe_gauge!(MEMORY_LIMIT, Unit::Bytes, "the limit of the cgroup's memory");
    describe_gauge!(BUILD_INFO, Unit::Count, "always 1, with the version and the commit of the build");
    gauge!(SHEDDING).set(0.0);
    // A counter that is absent until something happens hides its first increment from every alert.
    for name in [CPU_REFUSED, LOG_LINES_DROPPED] {
        counter!(name).increment(0);
    }
}

/// Registers the counter of failures of a contained task.
pub(crate) fn task_may_fail(task: &'static str) {
    counter!(TASK_FAILURES, "task" => task).increment(0);
}

/// The gauge of work that waits for a processor thread.
pub(crate) fn cpu_waiting() -> Gauge {
    gauge!(CPU_WAITING)
}

/// The gauge of work that a processor thread does.
pub(crate) fn cpu_running() -> Gauge {
    gauge!(CPU_RUNNING)
}

/// Counts one work item that was refused because the queue was full.
pub(crate) fn cpu_refused() {
    counter!(CPU_REFUSED).increment(1);
}

/// Counts one failure of a contained task.
pub(crate) fn task_failed(task: &'static str) {
    counter!(TASK_FAILURES, "task" => task).increment(1);
}

/// Sets whether the circuit breaker of a dependency is open.
pub(crate) fn breaker_open(dependency: &'static str, open: bool) {
    gauge!(BREAKER_OPEN, "dependency" => dependency).set(f64::from(u8::from(open)));
}

/// Sets the number of log lines dropped so far.
pub(crate) fn log_lines_dropped(total: u64) {
    counter!(LOG_LINES_DROPPED).absolute(total);
}

/// Sets whether requests are refused because memory is nearly used up.
pub(crate) fn shedding(shedding: bool) {
    gauge!(SHEDDING).set(f64::from(u8::from(shedding)));
}

/// Sets the used memory and its limit, in bytes.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
pub(crate) fn memory(used: u64, limit: u64) {
    gauge!(MEMORY_USED).set(used as f64);
    gauge!(MEMORY_LIMIT).set(limit as f64);
}

/// A guard that is counted while it exists: the gauge falls when the guard drops.
pub struct Counted(Gauge);

impl Counted {
    /// Raises the gauge by one.
    pub fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counted")
    }
}
