//! Connections that ended before there was a request, since their first bytes could not be served: counted by reason, and
//! told to the log with their address, but not more often than somebody reads.

use std::time::Duration;

use tracing::warn;

use super::connection::Peer;
use super::refusal::ConnectionRefusal;
use crate::metrics;
use perennial_runtime::telemetry::Seldom;

/// How often the log tells of one reason.
const TELL_EVERY: Duration = Duration::from_secs(10);

static TOLD: [Seldom; ConnectionRefusal::ALL.len()] =
    [const { Seldom::every(TELL_EVERY) }; ConnectionRefusal::ALL.len()];

/// Counts a refusal, and tells the log of it.
pub(crate) fn refused(
    listener: &'static str,
    refusal: ConnectionRefusal,
    peer: Peer,
    detail: &dyn std::fmt::Display,
) {
    metrics::refused(listener, refusal);
    if let Some(more) = TOLD[refusal as usize].tell() {
        let reason = refusal.as_str();
        warn!(listener, reason, %peer, %detail, more_since_last = more, "a connection could not be served");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_place() {
        for (index, refusal) in ConnectionRefusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, index);
        }
    }
}
