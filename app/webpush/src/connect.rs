//! From an origin to a connection: resolve, check every address, dial, TLS, ALPN.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::resolve::{ResolveError, Resolver};
use crate::target::{Origin, Policy, TargetError};

/// After this long without an acknowledgement a connection is dead, in milliseconds.
#[cfg(target_os = "linux")]
const SILENCE_MS: u32 = 20_000;

/// Which versions of HTTP are offered to push services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/2, or HTTP/1.1 where the service prefers it.
    #[default]
    Auto,
    /// Only HTTP/1.1.
    One,
    /// Only HTTP/2.
    Two,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Forbidden(#[from] TargetError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error("cannot connect to {0}: {1}")]
    Dial(SocketAddr, io::Error),
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    #[error("{0} does not speak HTTP/2")]
    Protocol(String),
    #[error("{0} accepted the connection and then failed: {1}")]
    Handshake(String, String),
}

/// An open connection and what was agreed on it.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) stream: Stream,
    pub(crate) http2: bool,
}

#[derive(Debug)]
pub(crate) struct Connector {
    policy: Policy,
    resolver: Resolver,
    tls: Arc<ClientConfig>,
    http: HttpVersion,
    timeout: Duration,
    /// Turns through the addresses of a name.
    turn: AtomicUsize,
}

impl Connector {
    pub(crate) fn new(
        policy: Policy,
        resolver: Resolver,
        roots: RootCertStore,
        http: HttpVersion,
        timeout: Duration,
    ) -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = match http {
            HttpVersion::Auto => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            HttpVersion::One => vec![b"http/1.1".to_vec()],
            HttpVersion::Two => vec![b"h2".to_vec()],
        };
        Ok(Self { policy, resolver, tls: Arc::new(tls), http, timeout, turn: AtomicUsize::new(0) })
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The addresses of a host, if every one of them may be sent to.
    pub(crate) async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, ConnectError> {
        let addresses = timeout(self.timeout, self.resolver.resolve(host)).await;
        let addresses = addresses.map_err(|_| ConnectError::Timeout(self.timeout))??;
        for address in &addresses {
            self.policy.check_address(*address)?;
        }
        Ok(addresses)
    }

    /// Opens a connection, trying each address until one answers.
    pub(crate) async fn connect(&self, origin: &Origin) -> Result<Connected, ConnectError> {
        timeout(self.timeout, self.dial_any(origin)).await.map_err(|_| ConnectError::Timeout(self.timeout))?
    }

    async fn dial_any(&self, origin: &Origin) -> Result<Connected, ConnectError> {
        let mut addresses = self.addresses(&origin.host).await?;
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % addresses.len();
        addresses.rotate_left(first);
        // Each gets its share of the time, so that one that swallows packets does not spend all of it.
        let share = self.timeout / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let mut last = ConnectError::Timeout(self.timeout);
        for address in addresses {
            let address = SocketAddr::new(address, origin.port);
            match timeout(share, self.dial(origin, address)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => last = error,
                Err(_) => last = ConnectError::Dial(address, io::ErrorKind::TimedOut.into()),
            }
        }
        Err(last)
    }

    async fn dial(&self, origin: &Origin, address: SocketAddr) -> Result<Connected, ConnectError> {
        let failed = |error| ConnectError::Dial(address, error);
        let tcp = TcpStream::connect(address).await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        notice_silence(&tcp);
        if !origin.tls {
            return Ok(Connected { stream: Stream::Plain(tcp), http2: self.http == HttpVersion::Two });
        }
        let name = ServerName::try_from(origin.host.clone())
            .map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidInput, "not a name for TLS")))?;
        let tls = TlsConnector::from(Arc::clone(&self.tls)).connect(name, tcp).await.map_err(failed)?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        if self.http == HttpVersion::Two && !http2 {
            return Err(ConnectError::Protocol(origin.to_string()));
        }
        Ok(Connected { stream: Stream::Tls(Box::new(tls)), http2 })
    }
}

/// Has the kernel end a connection whose peer has not acknowledged anything for a while, instead of sending
/// again for a quarter of an hour.
#[cfg(target_os = "linux")]
fn notice_silence(tcp: &TcpStream) {
    // Without it the service is still asked, by pings and timeouts.
    let _ = rustix::net::sockopt::set_tcp_user_timeout(tcp, SILENCE_MS);
}

#[cfg(not(target_os = "linux"))]
fn notice_silence(_tcp: &TcpStream) {}

/// A connection with or without TLS.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
