//! Connections that ended before there was a request, since their first bytes could not be served: counted by reason, and
//! told to the log with their address, but not more often than somebody reads.

use std::time::Duration;

use tracing::warn;

use super::connection::Peer;
use crate::metrics;
use perennial_runtime::telemetry::Seldom;

/// How often the log tells of one reason.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Why the first bytes of a connection, or of a request, could not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A request head that is no HTTP.
    BadHead,
    /// A request target that is too long, answered with 414.
    LongTarget,
    /// A request head that is too long, answered with 431.
    LongHead,
    /// A trusted proxy sent no PROXY header, or one that cannot be used.
    ProxyHeader,
    /// A TLS handshake on a port without TLS.
    TlsOnPlainPort,
    /// Plain HTTP on a port with TLS.
    PlainOnTlsPort,
    /// A TLS handshake that failed.
    Handshake,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::BadHead,
        Self::LongTarget,
        Self::LongHead,
        Self::ProxyHeader,
        Self::TlsOnPlainPort,
        Self::PlainOnTlsPort,
        Self::Handshake,
    ];

    /// The word for it in metrics and in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadHead => "bad_head",
            Self::LongTarget => "uri_too_long",
            Self::LongHead => "head_too_large",
            Self::ProxyHeader => "bad_proxy_header",
            Self::TlsOnPlainPort => "tls_on_plain_port",
            Self::PlainOnTlsPort => "plain_on_tls_port",
            Self::Handshake => "tls_handshake",
        }
    }
}

static TOLD: [Seldom; Refusal::ALL.len()] = [const { Seldom::every(TELL_EVERY) }; Refusal::ALL.len()];

/// Counts a refusal, and tells the log of it.
pub(crate) fn refused(listener: &'static str, refusal: Refusal, peer: Peer, detail: &dyn std::fmt::Display) {
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
        for (index, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, index);
        }
    }
}
