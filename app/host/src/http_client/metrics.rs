//! The metrics of calls to other servers, by target.

use std::time::Duration;

use metrics::{Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics::{gauge, histogram};
use perennial_runtime::metrics::Counted;

/// Counter by `target`, `result`: calls that have ended. The result is the status of the answer, or the reason why there
/// is none: busy, open, connect, broken, timeout, forbidden, request.
const CALLS: &str = "perennial_client_calls_total";
/// Histogram by `target`, seconds: time from the call to the head of its answer, with retries.
const DURATION: &str = "perennial_client_call_duration_seconds";
/// Gauge by `target`: calls that run, to the end of the body of their answer.
const IN_FLIGHT: &str = "perennial_client_calls_in_flight";
/// Counter by `target`: attempts after the first one.
const RETRIES: &str = "perennial_client_retries_total";

/// Describes the metrics to the recorder.
pub(crate) fn describe() {
    describe_counter!(CALLS, Unit::Count, "calls to other servers that have ended, by target and result");
    describe_histogram!(DURATION, Unit::Seconds, "time to the head of the answer of a call, by target");
    describe_gauge!(IN_FLIGHT, Unit::Count, "calls to other servers that run, by target");
    describe_counter!(RETRIES, Unit::Count, "attempts of calls after the first, by target");
}

/// The metrics of one target.
pub(super) struct CallMetrics {
    target: &'static str,
    duration: Histogram,
    in_flight: Gauge,
}

impl CallMetrics {
    pub(super) fn new(target: &'static str) -> Self {
        counter!(RETRIES, "target" => target).increment(0);
        Self {
            target,
            duration: histogram!(DURATION, "target" => target),
            in_flight: gauge!(IN_FLIGHT, "target" => target),
        }
    }

    /// Counts a call as running until the guard drops.
    pub(super) fn count(&self) -> Counted {
        Counted::new(self.in_flight.clone())
    }

    /// Counts the end of a call.
    pub(super) fn ended(&self, result: &str, took: Duration) {
        self.duration.record(took);
        counter!(CALLS, "target" => self.target, "result" => result.to_owned()).increment(1);
    }

    pub(super) fn retried(&self) {
        counter!(RETRIES, "target" => self.target).increment(1);
    }
}
