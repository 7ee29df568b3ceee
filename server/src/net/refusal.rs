//! Why the first bytes of a connection, or of a request, could not be served.

/// Why the first bytes of a connection, or of a request, could not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionRefusal {
    /// A request head that is not HTTP.
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

impl ConnectionRefusal {
    /// All reasons.
    pub const ALL: [Self; 7] = [
        Self::BadHead,
        Self::LongTarget,
        Self::LongHead,
        Self::ProxyHeader,
        Self::TlsOnPlainPort,
        Self::PlainOnTlsPort,
        Self::Handshake,
    ];

    /// Name of the reason in metrics and in the log.
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
