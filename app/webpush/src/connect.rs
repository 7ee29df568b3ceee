//! Opens connections to push services: resolve, check every address, choose one, dial, TLS, ALPN.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, BufWriter, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::addresses::{ChosenAddress, ServiceAddresses};
use crate::proxy::{Proxied, Proxy};
use crate::silence::notice_silence;
use crate::target::{Origin, Policy, TargetError};
use perennial_addresses::{ResolveError, Resolver};

/// Size of the write buffer, in bytes: as many small frames as fit become one TLS record and one system call.
const GATHER: usize = 32 * 1024;

/// Maximum number of addresses of a name that are tried for one connection.
const MAX_DIALS: usize = 8;

/// HTTP versions that are offered to push services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::EnumString)]
#[strum(parse_err_ty = HttpVersionError, parse_err_fn = no_version)]
pub enum HttpVersion {
    /// HTTP/2, or HTTP/1.1 where the service prefers it.
    #[default]
    #[strum(serialize = "auto")]
    Auto,
    /// Only HTTP/1.1.
    #[strum(serialize = "1")]
    One,
    /// Only HTTP/2.
    #[strum(serialize = "2")]
    Two,
}

/// The text is none of the words of [`HttpVersion::as_str`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("auto, 1 or 2")]
pub struct HttpVersionError;

fn no_version(_: &str) -> HttpVersionError {
    HttpVersionError
}

impl HttpVersion {
    /// The word of the settings: `auto`, `1` or `2`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Reason why there is no connection.
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
    #[error("too many connections are open")]
    TooMany,
    #[error("{0} does not speak HTTP/2")]
    Protocol(String),
    #[error("{0} accepted the connection and then failed: {1}")]
    Handshake(String, String),
}

/// An open connection and its negotiated protocol.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) stream: PushStream,
    pub(crate) http2: bool,
    /// The address of the peer; `None` when a proxy has chosen it.
    pub(crate) chosen: Option<ChosenAddress>,
}

#[derive(Debug)]
pub(crate) struct Connector {
    policy: Policy,
    resolver: Resolver,
    proxy: Option<Proxy>,
    /// One configuration for each [`HttpVersion`], in its order: auto, 1, 2.
    tls: [Arc<ClientConfig>; 3],
    http: HttpVersion,
    timeout: Duration,
}

impl Connector {
    pub(crate) fn new(
        policy: Policy,
        resolver: Resolver,
        proxy: Option<Proxy>,
        roots: RootCertStore,
        http: HttpVersion,
        timeout: Duration,
    ) -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut auto = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        auto.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let only = |protocol: &[u8]| {
            let mut only = auto.clone();
            only.alpn_protocols = vec![protocol.to_vec()];
            only
        };
        let tls = [Arc::new(auto.clone()), Arc::new(only(b"http/1.1")), Arc::new(only(b"h2"))];
        Ok(Self { policy, resolver, proxy, tls, http, timeout })
    }

    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The HTTP version to offer when a message asks for `asked`.
    pub(crate) fn offered(&self, asked: HttpVersion) -> HttpVersion {
        if asked == HttpVersion::Auto { self.http } else { asked }
    }

    /// Returns the addresses of a host when every one of them may be sent to; `None` when the proxy resolves names.
    pub(crate) async fn addresses(&self, host: &str) -> Result<Option<Vec<IpAddr>>, ConnectError> {
        if self.proxy.as_ref().is_some_and(Proxy::resolves) {
            return Ok(None);
        }
        let addresses = timeout(self.timeout, self.resolver.resolve(host)).await;
        let addresses = addresses.map_err(|_| ConnectError::Timeout(self.timeout))??;
        for address in &addresses {
            self.policy.check_address(*address)?;
        }
        Ok(Some(addresses))
    }

    /// Opens a connection, trying each address until one answers.
    pub(crate) async fn connect(
        &self,
        origin: &Origin,
        addresses: &ServiceAddresses,
        http: HttpVersion,
    ) -> Result<Connected, ConnectError> {
        let dialed = timeout(self.timeout, self.dial_any(origin, addresses, http)).await;
        dialed.map_err(|_| ConnectError::Timeout(self.timeout))?
    }

    async fn dial_any(
        &self,
        origin: &Origin,
        known: &ServiceAddresses,
        http: HttpVersion,
    ) -> Result<Connected, ConnectError> {
        let Some(addresses) = self.addresses(&origin.host).await? else {
            let (stream, http2) = self.dial(origin, None, http).await?;
            return Ok(Connected { stream, http2, chosen: None });
        };
        let mut addresses = known.in_turn(addresses, Instant::now());
        addresses.truncate(MAX_DIALS);
        // Each address gets a share of the timeout, so that one that swallows packets does not use all of it. The
        // shares add up to less than the timeout, so that the failure of the last address is recorded, too.
        let share = self.timeout * 9 / 10 / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let mut last = ConnectError::Timeout(self.timeout);
        for address in addresses {
            let chosen = known.choose(address);
            match timeout(share, self.dial(origin, Some(address), http)).await {
                Ok(Ok((stream, http2))) => {
                    chosen.works();
                    return Ok(Connected { stream, http2, chosen: Some(chosen) });
                }
                Ok(Err(error)) => last = error,
                Err(_) => {
                    let address = SocketAddr::new(address, origin.port);
                    last = ConnectError::Dial(address, io::ErrorKind::TimedOut.into());
                }
            }
            chosen.fails(Instant::now());
        }
        Err(last)
    }

    /// Dials one address; without an address, the proxy gets the name.
    async fn dial(
        &self,
        origin: &Origin,
        address: Option<IpAddr>,
        http: HttpVersion,
    ) -> Result<(PushStream, bool), ConnectError> {
        let shown = SocketAddr::new(address.unwrap_or(IpAddr::from([0, 0, 0, 0])), origin.port);
        let failed = |error| ConnectError::Dial(shown, error);
        let tcp = match (&self.proxy, address) {
            (None, Some(address)) => {
                let tcp = TcpStream::connect((address, origin.port)).await.map_err(failed)?;
                tcp.set_nodelay(true).map_err(failed)?;
                notice_silence(&tcp);
                Either::Left(tcp)
            }
            (Some(proxy), address) => {
                let host = address.map_or_else(|| origin.host.clone(), |address| address.to_string());
                Either::Right(proxy.connect(&host, origin.port).await.map_err(failed)?)
            }
            (None, None) => return Err(failed(io::ErrorKind::AddrNotAvailable.into())),
        };
        if !origin.tls {
            return Ok((PushStream::over(Either::Left(tcp)), http == HttpVersion::Two));
        }
        let name = ServerName::try_from(origin.host.clone())
            .map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidInput, "not a name for TLS")))?;
        let tls = TlsConnector::from(Arc::clone(&self.tls[http as usize]));
        let tls = tls.connect(name, tcp).await.map_err(failed)?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        if http == HttpVersion::Two && !http2 {
            return Err(ConnectError::Protocol(origin.to_string()));
        }
        Ok((PushStream::over(Either::Right(Box::new(tls))), http2))
    }
}

type TcpOrProxied = Either<TcpStream, Proxied>;

/// A connection with or without TLS, directly or through a proxy. It buffers writes until they are flushed.
#[derive(Debug)]
pub(crate) struct PushStream(BufWriter<Either<TcpOrProxied, Box<TlsStream<TcpOrProxied>>>>);

impl PushStream {
    fn over(inner: Either<TcpOrProxied, Box<TlsStream<TcpOrProxied>>>) -> Self {
        Self(BufWriter::with_capacity(GATHER, inner))
    }
}

impl AsyncRead for PushStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(context, buffer)
    }
}

/// There are no vectored writes: with them, h2 would make one call for each frame.
impl AsyncWrite for PushStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(context)
    }
}
