//! Every metric of web push, each named once.

use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use perennial_webpush::Verdict;

use crate::model::outcome::Outcome;

/// Counter by `verdict`: attempts to send.
pub(crate) const SENDS: &str = "perennial_push_sends_total";
/// Counter by `outcome`: final outcomes of notifications for their subscriptions.
pub(crate) const OUTCOMES: &str = "perennial_push_outcomes_total";
/// Histogram, seconds: one attempt, including its wait for a permit.
pub(crate) const SEND_DURATION: &str = "perennial_push_send_duration_seconds";
/// Counter: notifications that were accepted.
pub(crate) const NOTIFICATIONS: &str = "perennial_push_notifications_total";
/// Counter by `what`: requests without a key that were over a limit.
pub(crate) const LIMITED: &str = "perennial_push_limited_total";

/// The kinds of limits, as the label `what`.
const LIMITS: [&str; 2] = ["address", "site"];

/// Gauge by `site`: subscriptions that are stored, counted once a minute.
pub(crate) const SUBSCRIPTIONS: &str = "perennial_push_subscriptions";

/// Gauge: push services that are held now, since they asked us to wait, cannot be reached, or refuse our key.
pub(crate) const HELD: &str = "perennial_push_services_held";

/// Gauge: subscriptions that are refused, and given up if that continues; counted up to 10,000.
pub(crate) const AT_RISK: &str = "perennial_push_subscriptions_at_risk";

/// Gauge by `site`: subscriptions that strangers made, and that nothing was delivered to.
pub(crate) const GUESTS: &str = "perennial_push_guests";
/// Counter: subscriptions of strangers that were deleted to make room for others.
pub(crate) const EVICTED: &str = "perennial_push_guests_evicted_total";

pub(crate) fn describe() {
    describe_gauge!(GUESTS, Unit::Count, "subscriptions of strangers that nothing was delivered to, by site");
    describe_counter!(EVICTED, Unit::Count, "subscriptions of strangers that made room for others");
    counter!(EVICTED).increment(0);
    describe_gauge!(AT_RISK, Unit::Count, "subscriptions that are refused, and given up if that goes on");
    describe_gauge!(HELD, Unit::Count, "push services that nothing is sent to now");
    describe_counter!(SENDS, Unit::Count, "attempts to send, by verdict");
    describe_counter!(OUTCOMES, Unit::Count, "final outcomes of notifications for their subscriptions");
    describe_histogram!(SEND_DURATION, Unit::Seconds, "one attempt to send, including its wait for a permit");
    describe_counter!(NOTIFICATIONS, Unit::Count, "notifications that were accepted");
    describe_counter!(LIMITED, Unit::Count, "requests without a key that were over a limit, by limit");
    describe_gauge!(SUBSCRIPTIONS, Unit::Count, "subscriptions that are stored, by site");
    counter!(NOTIFICATIONS).increment(0);
    for outcome in <Outcome as strum::VariantArray>::VARIANTS {
        counter!(OUTCOMES, "outcome" => outcome.as_str()).increment(0);
    }
    for what in LIMITS {
        counter!(LIMITED, "what" => what).increment(0);
    }
    for what in ["batches", "deliveries", "notifications", "push_services", "subscriptions"] {
        perennial_store::metrics::may_be_unreadable(what);
    }
}

/// Handles that were looked up once: some of them are used a hundred thousand times a second.
#[derive(Debug)]
pub(crate) struct Meters {
    sends: [Counter; VERDICTS.len()],
    duration: Histogram,
    held: Gauge,
    at_risk: Gauge,
}

const VERDICTS: [&str; 10] = [
    "delivered",
    "gone",
    "unauthorized",
    "too_large",
    "rejected",
    "forbidden",
    "unresolvable",
    "held",
    "throttled",
    "retry",
];

impl Meters {
    pub(crate) fn new() -> Self {
        let sends = VERDICTS.map(|verdict| counter!(SENDS, "verdict" => verdict));
        Self { sends, duration: histogram!(SEND_DURATION), held: gauge!(HELD), at_risk: gauge!(AT_RISK) }
    }

    /// Counts one attempt.
    pub(crate) fn sent(&self, verdict: Verdict, took: Duration) {
        let verdict = match verdict {
            Verdict::Delivered => 0,
            Verdict::Gone => 1,
            Verdict::Unauthorized => 2,
            Verdict::TooLarge => 3,
            Verdict::Rejected => 4,
            Verdict::Forbidden => 5,
            Verdict::Unresolvable => 6,
            Verdict::Held(_) => 7,
            Verdict::Retry { throttled: true, .. } => 8,
            Verdict::Retry { throttled: false, .. } => 9,
        };
        self.sends[verdict].increment(1);
        self.duration.record(took);
    }

    /// Counts recorded outcomes.
    pub(crate) fn decided(&self, outcomes: &[(Outcome, usize)]) {
        for (outcome, count) in outcomes {
            counter!(OUTCOMES, "outcome" => outcome.as_str()).increment(*count as u64);
        }
    }

    /// Sets the number of held push services.
    #[expect(clippy::cast_precision_loss, reason = "a thousand at most")]
    pub(crate) fn held(&self, count: usize) {
        self.held.set(count as f64);
    }
}

impl Meters {
    /// Sets the number of subscriptions at risk.
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    pub(crate) fn at_risk(&self, count: u64) {
        self.at_risk.set(count as f64);
    }
}

pub(crate) fn accepted() {
    counter!(NOTIFICATIONS).increment(1);
}

pub(crate) fn limited(what: &'static str) {
    counter!(LIMITED, "what" => what).increment(1);
}

/// Sets the number of subscriptions of a site.
#[expect(clippy::cast_precision_loss, reason = "some millions")]
pub(crate) fn subscriptions(site: &str, count: u64) {
    gauge!(SUBSCRIPTIONS, "site" => site.to_owned()).set(count as f64);
}

/// Sets the number of subscriptions of strangers of a site.
#[expect(clippy::cast_precision_loss, reason = "some millions")]
pub(crate) fn guests(site: &str, count: u64) {
    gauge!(GUESTS, "site" => site.to_owned()).set(count as f64);
}

pub(crate) fn evicted(count: u64) {
    counter!(EVICTED).increment(count);
}
