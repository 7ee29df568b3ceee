//! Connections that end before their first request because their first bytes cannot be served. They are counted by
//! reason, and logged with their address at a limited rate.

use std::time::Duration;

use tracing::warn;

use super::connection::Connection;
use super::refusal::ConnectionRefusal;
use crate::metrics;
use perennial_runtime::telemetry::Seldom;

/// Minimum interval between two log messages with the same reason.
const TELL_EVERY: Duration = Duration::from_secs(10);

static TOLD: [Seldom; <ConnectionRefusal as strum::VariantArray>::VARIANTS.len()] =
    [const { Seldom::every(TELL_EVERY) }; <ConnectionRefusal as strum::VariantArray>::VARIANTS.len()];

/// Counts a refusal, and logs it unless its reason was logged less than [`TELL_EVERY`] ago.
pub(crate) fn refused(connection: &Connection, refusal: ConnectionRefusal, detail: &dyn std::fmt::Display) {
    let (listener, peer) = (connection.listener, connection.peer());
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
        for (index, refusal) in <ConnectionRefusal as strum::VariantArray>::VARIANTS.iter().enumerate() {
            assert_eq!(*refusal as usize, index);
        }
    }
}
