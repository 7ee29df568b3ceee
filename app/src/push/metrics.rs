//! Every metric of web push, each named once.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use perennial_webpush::Verdict;

use super::outcome::Outcome;

/// Counter by `verdict`: attempts to send.
pub(crate) const SENDS: &str = "perennial_push_sends_total";
/// Counter by `outcome`: what finally became of notifications for their subscriptions.
pub(crate) const OUTCOMES: &str = "perennial_push_outcomes_total";
/// Histogram, seconds: one attempt, its wait for a turn included.
pub(crate) const SEND_DURATION: &str = "perennial_push_send_duration_seconds";
/// Counter: notifications that were accepted.
pub(crate) const NOTIFICATIONS: &str = "perennial_push_notifications_total";
/// Counter by `what`: requests without a key that were over a limit.
pub(crate) const LIMITED: &str = "perennial_push_limited_total";

pub(crate) fn describe() {
    describe_counter!(SENDS, Unit::Count, "attempts to send, by verdict");
    describe_counter!(OUTCOMES, Unit::Count, "what finally became of notifications for their subscriptions");
    describe_histogram!(SEND_DURATION, Unit::Seconds, "one attempt to send, its wait for a turn included");
    describe_counter!(NOTIFICATIONS, Unit::Count, "notifications that were accepted");
    describe_counter!(LIMITED, Unit::Count, "requests without a key that were over a limit, by limit");
}

pub(crate) fn sent(verdict: Verdict, took: Duration) {
    let verdict = match verdict {
        Verdict::Delivered => "delivered",
        Verdict::Gone => "gone",
        Verdict::Unauthorized => "unauthorized",
        Verdict::TooLarge => "too_large",
        Verdict::Rejected => "rejected",
        Verdict::Forbidden => "forbidden",
        Verdict::Retry { throttled: true, .. } => "throttled",
        Verdict::Retry { throttled: false, .. } => "retry",
    };
    counter!(SENDS, "verdict" => verdict).increment(1);
    histogram!(SEND_DURATION).record(took);
}

/// Outcomes that were recorded.
pub(crate) fn decided(outcomes: &[(Outcome, usize)]) {
    for (outcome, count) in outcomes {
        counter!(OUTCOMES, "outcome" => outcome.as_str()).increment(*count as u64);
    }
}

pub(crate) fn accepted() {
    counter!(NOTIFICATIONS).increment(1);
}

pub(crate) fn limited(what: &'static str) {
    counter!(LIMITED, "what" => what).increment(1);
}
