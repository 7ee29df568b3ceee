//! A proxy for outgoing connections, where only it may open them: CONNECT (RFC 9110, section 9.3.6).

use std::fmt;
use std::io;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::{HeaderValue, Method, Request};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use url::Url;

use crate::silence::notice_silence;

/// A connection through a proxy.
pub(crate) type Proxied = TokioIo<Upgraded>;

/// A proxy for outgoing connections. By default it gets the address that was checked.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    authorization: Option<HeaderValue>,
    resolves: bool,
}

/// The text is not the URL of a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a proxy such as http://proxy.example.net:3128")]
pub struct ProxyError;

impl FromStr for Proxy {
    type Err = ProxyError;

    /// Reads `http://host:port`. Credentials do not belong here: see [`Proxy::with_credentials`].
    fn from_str(text: &str) -> Result<Self, ProxyError> {
        let url = Url::parse(text).map_err(|_| ProxyError)?;
        let plain = url.scheme() == "http" && url.username().is_empty() && url.password().is_none();
        if !plain || url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(ProxyError);
        }
        let host = url.host_str().ok_or(ProxyError)?.trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().ok_or(ProxyError)?;
        Ok(Self { host, port, authorization: None, resolves: false })
    }
}

impl Proxy {
    /// Adds credentials: `user:password` (RFC 7617).
    #[must_use]
    pub fn with_credentials(mut self, credentials: &str) -> Self {
        let value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(credentials)));
        self.authorization = value.ok().map(|mut value| {
            value.set_sensitive(true);
            value
        });
        self
    }

    /// Sets whether the proxy gets names instead of addresses. Their addresses are not checked then: the only
    /// remaining check is the list of allowed hosts.
    #[must_use]
    pub fn resolving(mut self, resolves: bool) -> Self {
        self.resolves = resolves;
        self
    }

    pub(crate) fn resolves(&self) -> bool {
        self.resolves
    }

    /// Opens a connection to `host`, which is an address unless the proxy resolves names.
    pub(crate) async fn connect(&self, host: &str, port: u16) -> io::Result<Proxied> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
        tcp.set_nodelay(true)?;
        notice_silence(&tcp);
        let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await.map_err(io::Error::other)?;
        let target = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let mut request = Request::builder().method(Method::CONNECT).uri(&target).header(HOST, &target);
        if let Some(authorization) = &self.authorization {
            request = request.header(PROXY_AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(io::Error::other)?;
        let asking = async move {
            let response = sender.send_request(request).await.map_err(io::Error::other)?;
            if !response.status().is_success() {
                return Err(io::Error::other(format!("the proxy {self:?} answered {}", response.status())));
            }
            hyper::upgrade::on(response).await.map_err(io::Error::other)
        };
        let (asked, _ended) = tokio::join!(asking, connection.with_upgrades());
        asked.map(TokioIo::new)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_a_plain_address() {
        for text in ["http://proxy.example.net:3128", "http://10.0.0.1", "http://[fd00::1]:8080/"] {
            assert!(text.parse::<Proxy>().is_ok(), "{text}");
        }
        for text in
            ["proxy:3128", "https://proxy", "socks5://proxy", "http://u:p@proxy", "http://proxy/x", ""]
        {
            assert_eq!(text.parse::<Proxy>(), Err(ProxyError), "{text}");
        }
    }

    #[test]
    fn its_credentials_are_not_shown() {
        let proxy = "http://proxy:3128".parse::<Proxy>().unwrap().with_credentials("user:secret");
        assert_eq!(format!("{proxy:?}"), "proxy:3128");
    }
}
