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
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::ExposeSecret;
use tokio::net::TcpStream;
use tower::Service;

use super::config::{Proxy, TargetConfig};

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
        let networks = config.any.as_ref().map(|any| Arc::from(any.networks.as_slice()));
        let route = Route::new(config.proxy.as_ref(), networks)?;
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
    /// With `networks`, only public addresses and those networks are connected to.
    fn new(proxy: Option<&Proxy>, networks: Option<Arc<[IpNet]>>) -> anyhow::Result<Self> {
        let connector = |networks| {
            let mut connector = HttpConnector::new_with_resolver(CheckedNames { networks });
            connector.enforce_http(false);
            connector.set_nodelay(true);
            connector
        };
        let Some(Proxy { uri, credentials }) = proxy else { return Ok(Self::Direct(connector(networks))) };
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
                let connecting = tunnel.call(target);
                Box::pin(async move { Ok(connecting.await?) })
            }
        }
    }
}

/// No address of a name may be connected to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the name has no public address")]
pub(super) struct NotPublic;

/// Looks names up. With networks, only public addresses and those networks are left.
#[derive(Clone)]
struct CheckedNames {
    networks: Option<Arc<[IpNet]>>,
}

impl Service<Name> for CheckedNames {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Boxed<Self::Response, io::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let networks = self.networks.clone();
        Box::pin(async move {
            let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if let Some(networks) = networks {
                addresses.retain(|address| perennial_addresses::is_allowed(address.ip(), &networks));
                if addresses.is_empty() {
                    return Err(io::Error::other(NotPublic));
                }
            }
            Ok(addresses.into_iter())
        })
    }
}
