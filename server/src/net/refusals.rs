//! Connections that ended before there was a request, since their first bytes could not be served: counted by reason, and
//! told to the log with their address, but not more often than somebody reads.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use super::connection::Peer;
use crate::metrics;

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

/// When the log was last told of each reason, and how many it was not told of since.
static TOLD: Mutex<[Told; Refusal::ALL.len()]> = Mutex::new([Told { at: None, more: 0 }; Refusal::ALL.len()]);

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Option<Instant>,
    more: u64,
}

impl Told {
    /// How many were left out since the last line; none when this one is left out, too.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        if self.at.is_some_and(|at| now.duration_since(at) < TELL_EVERY) {
            self.more += 1;
            return None;
        }
        self.at = Some(now);
        Some(std::mem::take(&mut self.more))
    }
}

/// Counts a refusal, and tells the log of it.
pub(crate) fn refused(listener: &'static str, refusal: Refusal, peer: Peer, detail: &dyn std::fmt::Display) {
    metrics::refused(listener, refusal);
    let told = TOLD.lock().unwrap_or_else(PoisonError::into_inner)[refusal as usize].tell(Instant::now());
    if let Some(more) = told {
        let reason = refusal.as_str();
        warn!(listener, reason, %peer, %detail, more_since_last = more, "a connection could not be served");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_told_once_in_a_while_and_how_many_it_missed() {
        let mut told = Told { at: None, more: 0 };
        let began = Instant::now();
        assert_eq!(told.tell(began), Some(0));
        assert_eq!(told.tell(began + Duration::from_secs(1)), None);
        assert_eq!(told.tell(began + Duration::from_secs(9)), None);
        assert_eq!(told.tell(began + Duration::from_secs(10)), Some(2));
        assert_eq!(told.tell(began + Duration::from_secs(20)), Some(0));
    }

    #[test]
    fn each_reason_has_its_place() {
        for (index, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, index);
        }
    }
}
