//! Connections of a target: a name becomes addresses, which are checked where others choose the name; a proxy may stand in
//! between; TLS is that of the host.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use perennial_addresses::Resolver;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::ExposeSecret;
use tokio::net::TcpStream;
use tower::Service;

use super::config::{Proxy, TargetConfig};
use super::request::with_authority;

type Boxed<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;
type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Makes connections, each within the time limit, with its TLS handshake.
#[derive(Clone)]
pub(super) struct Connector {
    https: HttpsConnector<Route>,
    timeout: Duration,
}

impl Connector {
    /// # Errors
    /// When the authorities that sign certificates cannot be read.
    pub(super) fn new(config: &TargetConfig) -> anyhow::Result<Self> {
        let checked = config.any.as_ref().filter(|any| !any.is_internal).map(|any| CheckedLookup {
            networks: Arc::from(any.networks.as_slice()),
            resolver: Arc::new(Resolver::new(Vec::new())),
        });
        let route = Route::new(config.proxy.as_ref(), checked)?;
        let tls = match &config.ca_file {
            None => {
                let provider = rustls::crypto::aws_lc_rs::default_provider();
                HttpsConnectorBuilder::new().with_provider_and_native_roots(provider)?
            }
            Some(file) => {
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let tls = rustls::ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()?
                    .with_root_certificates(authorities(file)?)
                    .with_no_client_auth();
                HttpsConnectorBuilder::new().with_tls_config(tls)
            }
        };
        let https = tls.https_or_http().enable_http1().enable_http2().wrap_connector(route);
        Ok(Self { https, timeout: config.connect_timeout })
    }
}

/// Reads the authorities of a PEM file.
pub(super) fn authorities(file: &Path) -> anyhow::Result<rustls::RootCertStore> {
    let mut roots = rustls::RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(file).with_context(|| format!("{} cannot be read", file.display()))?;
    for certificate in certificates {
        roots.add(certificate?)?;
    }
    anyhow::ensure!(!roots.is_empty(), "{} has no certificate", file.display());
    Ok(roots)
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = AnyError;
    type Future = Boxed<Self::Response, AnyError>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), AnyError>> {
        self.https.poll_ready(context)
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        let (connecting, timeout) = (self.https.call(target), self.timeout);
        Box::pin(async move {
            let connected = tokio::time::timeout(timeout, connecting).await;
            connected.unwrap_or_else(|_elapsed| Err(format!("no connection within {timeout:?}").into()))
        })
    }
}

/// The way to a server: direct, or through a proxy with CONNECT (RFC 9110, section 9.3.6).
#[derive(Clone)]
enum Route {
    Direct(HttpConnector<CheckedNames>),
    Proxied(Tunnel<HttpConnector<CheckedNames>>),
}

impl Route {
    fn new(proxy: Option<&Proxy>, checked: Option<CheckedLookup>) -> anyhow::Result<Self> {
        let connector = |checked| {
            let mut connector = HttpConnector::new_with_resolver(CheckedNames { checked });
            connector.enforce_http(false);
            connector.set_nodelay(true);
            connector
        };
        let Some(Proxy { uri, credentials }) = proxy else { return Ok(Self::Direct(connector(checked))) };
        // The operator chose the proxy, which may be anywhere.
        let mut tunnel = Tunnel::new(uri.clone(), connector(None));
        if let Some(credentials) = credentials {
            let encoded = STANDARD.encode(credentials.expose_secret());
            let mut basic = HeaderValue::from_str(&format!("Basic {encoded}"))?;
            basic.set_sensitive(true);
            tunnel = tunnel.with_auth(basic);
        }
        Ok(Self::Proxied(tunnel))
    }
}

impl Service<Uri> for Route {
    type Response = TokioIo<TcpStream>;
    type Error = AnyError;
    type Future = Boxed<Self::Response, AnyError>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), AnyError>> {
        match self {
            Self::Direct(connector) => connector.poll_ready(context).map_err(Into::into),
            Self::Proxied(tunnel) => tunnel.poll_ready(context).map_err(Into::into),
        }
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        match self {
            Self::Direct(connector) => {
                let connecting = connector.call(target);
                Box::pin(async move { Ok(connecting.await?) })
            }
            Self::Proxied(tunnel) => {
                let connecting = tunnel.call(with_port(target));
                Box::pin(async move { Ok(connecting.await?) })
            }
        }
    }
}

/// Writes the port of `http://` out: a tunnel takes 443 for any URL without a port.
fn with_port(target: Uri) -> Uri {
    let (Some("http"), None, Some(host)) = (target.scheme_str(), target.port(), target.host()) else {
        return target;
    };
    let authority = format!("{host}:80");
    with_authority(target, &authority)
}

/// No address of a name may be connected to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the name has no public address")]
pub(super) struct NotPublic;

/// Looks names up.
#[derive(Clone)]
struct CheckedNames {
    checked: Option<CheckedLookup>,
}

/// How names of strangers are looked up: without a thread that would wait for their name servers, and only public addresses
/// and these networks are left.
#[derive(Clone)]
struct CheckedLookup {
    networks: Arc<[IpNet]>,
    resolver: Arc<Resolver>,
}

impl Service<Name> for CheckedNames {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Boxed<Self::Response, io::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let checked = self.checked.clone();
        Box::pin(async move {
            let Some(CheckedLookup { networks, resolver }) = checked else {
                let addresses: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
                return Ok(addresses.into_iter());
            };
            // Other ways to write an address, such as 127.1 and 0x7f000001, are no names for DNS.
            let mut addresses = resolver.resolve(name.as_str()).await.map_err(io::Error::other)?;
            addresses.retain(|address| perennial_addresses::is_allowed(*address, &networks));
            if addresses.is_empty() {
                return Err(io::Error::other(NotPublic));
            }
            let addresses: Vec<_> =
                addresses.into_iter().map(|address| SocketAddr::new(address, 0)).collect();
            Ok(addresses.into_iter())
        })
    }
}
