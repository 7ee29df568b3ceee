//! A message to a subscription, a report back.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{HeaderName, HeaderValue, Method, Request, Version};
use http_body_util::Full;
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::client::{Client, ClientError, Limits};
use crate::connect::{ConnectError, Connector, HttpVersion};
use crate::encrypt::encrypt;
use crate::message::Message;
use crate::resolve::{Pin, ResolveError, Resolver};
use crate::subscription::Keys;
use crate::target::{Endpoint, Policy, TargetError};
use crate::vapid::{Claimed, Contact, VapidKey};
use crate::verdict::{Verdict, verdict};

const TTL: HeaderName = HeaderName::from_static("ttl");
const URGENCY: HeaderName = HeaderName::from_static("urgency");
const TOPIC: HeaderName = HeaderName::from_static("topic");

/// How much of a refusal's text is kept, in characters.
const MAX_DETAIL: usize = 200;

/// How to send.
#[derive(Clone, Debug)]
pub struct Config {
    /// What may be sent to.
    pub policy: Policy,
    /// Whom push services may ask.
    pub contact: Option<Contact>,
    /// Which versions of HTTP to offer.
    pub http: HttpVersion,
    /// A PEM file of certificate authorities, in addition to the system's.
    pub extra_ca_file: Option<PathBuf>,
    /// Names whose addresses are given.
    pub resolve: Vec<Pin>,
    /// How many HTTP/2 connections to one push service.
    pub connections: usize,
    /// How many requests at once on one of them.
    pub streams: usize,
    /// How many HTTP/1.1 connections to one push service.
    pub http1_connections: usize,
    /// How long dialing may take, over all addresses.
    pub connect_timeout: Duration,
    /// How long one request may take, waiting for its turn included.
    pub timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            contact: None,
            http: HttpVersion::Auto,
            extra_ca_file: None,
            resolve: Vec::new(),
            connections: 4,
            streams: 100,
            http1_connections: 64,
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(30),
        }
    }
}

/// Why a sender cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The extra certificate authorities cannot be read.
    #[error("cannot read certificates from {}", .0.display())]
    ExtraCa(PathBuf, #[source] rustls_pki_types::pem::Error),
    /// There are none in that file.
    #[error("there is no certificate in {}", .0.display())]
    NoExtraCa(PathBuf),
    /// No certificate authority at all: every service would be refused.
    #[error("the system has no certificate authorities (Debian: install ca-certificates)")]
    NoRoots,
    /// rustls refused.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
}

/// What came of one attempt to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What it means.
    pub verdict: Verdict,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// Why, in a few words; empty when delivered.
    pub detail: String,
}

/// The sender. A cheap handle.
#[derive(Clone, Debug)]
pub struct Sender(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    client: Client,
    claims: Claimed,
    contact: Option<Contact>,
}

impl Sender {
    /// Reads the certificate authorities and the resolver's configuration. Connects to nobody.
    ///
    /// # Errors
    /// When there is nobody to trust, or the extra file cannot be read.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let roots = roots(config.extra_ca_file)?;
        let resolver = Resolver::new(config.resolve);
        let connector = Connector::new(config.policy, resolver, roots, config.http, config.connect_timeout)?;
        let limits = Limits {
            connections: config.connections,
            streams: config.streams,
            http1_connections: config.http1_connections,
            timeout: config.timeout,
        };
        let client = Client::new(connector, limits);
        Ok(Self(Arc::new(Shared { client, claims: Claimed::default(), contact: config.contact })))
    }

    /// What may be sent to.
    pub fn policy(&self) -> &Policy {
        self.0.client.connector().policy()
    }

    /// Looks up an endpoint's host and checks every address. Whoever cannot be looked up now is let pass:
    /// every send checks again.
    ///
    /// # Errors
    /// When the host does not exist, or leads to where nobody should be sent.
    pub async fn check_addresses(&self, endpoint: &Endpoint) -> Result<(), TargetError> {
        match self.0.client.connector().addresses(endpoint.host()).await {
            Err(ConnectError::Forbidden(error)) => Err(error),
            Err(ConnectError::Resolve(ResolveError::NotFound(host))) => Err(TargetError::Host(host)),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Encrypts and sends one message. Whatever goes wrong is a report about this subscription.
    pub async fn send(&self, endpoint: &Endpoint, keys: &Keys, message: &Message, key: &VapidKey) -> Report {
        let origin = endpoint.origin.to_string();
        let now = SystemTime::now();
        let claim = match self.0.claims.header(key, &origin, self.0.contact.as_ref(), now) {
            Ok(claim) => claim,
            Err(error) => return failed(&error),
        };
        let body = if message.payload.as_bytes().is_empty() {
            Bytes::new()
        } else {
            match encrypt(keys, &message.payload) {
                Ok(body) => Bytes::from(body),
                Err(error) => return failed(&error),
            }
        };
        let make = |version| request(version, endpoint, message, claim.clone(), body.clone());
        match self.0.client.send(&endpoint.origin, message.bulk, make).await {
            Ok(answer) => {
                let verdict = verdict(endpoint.host(), answer.status, &answer.headers, SystemTime::now());
                let detail =
                    if verdict == Verdict::Delivered { String::new() } else { excerpt(&answer.body) };
                Report { verdict, status: Some(answer.status.as_u16()), detail }
            }
            Err(ClientError::Connect(error)) => {
                let verdict = match &*error {
                    ConnectError::Forbidden(_) => Verdict::Forbidden,
                    _ => Verdict::Retry { after: None, throttled: false },
                };
                Report { verdict, status: None, detail: error.to_string() }
            }
            Err(error) => failed(&error),
        }
    }

    /// Ends every connection. What is being sent fails.
    pub async fn close(&self) {
        self.0.client.close().await;
    }
}

fn failed(error: &dyn std::error::Error) -> Report {
    let verdict = Verdict::Retry { after: None, throttled: false };
    Report { verdict, status: None, detail: error.to_string() }
}

fn request(
    version: Version,
    endpoint: &Endpoint,
    message: &Message,
    claim: HeaderValue,
    body: Bytes,
) -> Request<Full<Bytes>> {
    let with_body = !body.is_empty();
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.version_mut() = version;
    *request.uri_mut() = endpoint.uri.clone();
    let headers = request.headers_mut();
    headers.insert(AUTHORIZATION, claim);
    headers.insert(TTL, HeaderValue::from(message.ttl));
    headers.insert(URGENCY, HeaderValue::from_static(message.urgency.as_str()));
    if let Some(topic) = &message.topic {
        headers.insert(TOPIC, topic.clone());
    }
    if with_body {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("aes128gcm"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    } else {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
    }
    if version == Version::HTTP_11 {
        as_http1(&mut request);
    }
    request
}

/// HTTP/1.1 names the host in a header and only the path in its first line, HTTP/2 takes the whole URL.
fn as_http1(request: &mut Request<Full<Bytes>>) {
    let uri = std::mem::take(request.uri_mut());
    if let Some(host) = uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok()) {
        request.headers_mut().insert(HOST, host);
    }
    if let Some(path) = uri.path_and_query() {
        *request.uri_mut() = path.clone().into();
    }
}

/// The beginning of a refusal's text, in one line.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_DETAIL).collect::<String>().trim().to_owned()
}

fn roots(extra: Option<PathBuf>) -> Result<RootCertStore, ConfigError> {
    let mut roots = RootCertStore::empty();
    // Single unreadable files of the system's directory do not matter as long as others can be read.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(file) = extra {
        let read = CertificateDer::pem_file_iter(&file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = read.map_err(|error| ConfigError::ExtraCa(file.clone(), error))?;
        if roots.add_parsable_certificates(certificates).0 == 0 {
            return Err(ConfigError::NoExtraCa(file));
        }
    }
    if roots.is_empty() { Err(ConfigError::NoRoots) } else { Ok(roots) }
}
