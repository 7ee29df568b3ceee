//! Why the first bytes of a connection, or of a request, could not be served.

/// Why the first bytes of a connection, or of a request, could not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
pub enum ConnectionRefusal {
    /// A request head that is not HTTP.
    #[strum(serialize = "bad_head")]
    BadHead,
    /// A request target that is too long, answered with 414.
    #[strum(serialize = "uri_too_long")]
    LongTarget,
    /// A request head that is too long, answered with 431.
    #[strum(serialize = "head_too_large")]
    LongHead,
    /// A trusted proxy sent no PROXY header, or one that cannot be used.
    #[strum(serialize = "bad_proxy_header")]
    ProxyHeader,
    /// A TLS handshake on a port without TLS.
    #[strum(serialize = "tls_on_plain_port")]
    TlsOnPlainPort,
    /// Plain HTTP on a port with TLS.
    #[strum(serialize = "plain_on_tls_port")]
    PlainOnTlsPort,
    /// A TLS handshake that failed.
    #[strum(serialize = "tls_handshake")]
    Handshake,
}

impl ConnectionRefusal {
    /// Name of the reason in metrics and in the log.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}
