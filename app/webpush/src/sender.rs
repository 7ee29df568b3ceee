//! Sends a message to a subscription and reports the outcome.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST};
use http::{HeaderName, HeaderValue, Method, Request, Version};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::circuit_breaker::{Cause, HeldFor, Signal};
use crate::client::PushClient;
use crate::concurrency_limit::ConcurrencyPermit;
use crate::connect::{ConnectError, Connector, HttpVersion};
use crate::connection_pool::ConnectionPool;
use crate::message::Message;
use crate::proxy::Proxy;
use crate::reputation::Reputation;
use crate::sender_keys::{Keying, SenderKey};
use crate::service::{Acceptance, Asking, Permit, ServiceStatus, Services};
use crate::subscription::Keys;
use crate::target::{Endpoint, Policy, TargetError};
use crate::vapid::VapidKey;
use crate::verdict::{Verdict, is_windows, verdict};
use crate::wire::{ClientError, PoolLimits, PushResponse, Rooms};
use perennial_addresses::{Pin, ResolveError, Resolver};

const TTL: HeaderName = HeaderName::from_static("ttl");
const URGENCY: HeaderName = HeaderName::from_static("urgency");
const TOPIC: HeaderName = HeaderName::from_static("topic");
const WNS_CACHE_POLICY: HeaderName = HeaderName::from_static("x-wns-cache-policy");
const WNS_ERROR: HeaderName = HeaderName::from_static("x-wns-error-description");

/// Longest time that a message waits here for a circuit breaker that holds it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest text of a refusal that is kept, in characters.
const MAX_DETAIL: usize = 200;

/// Settings of a [`Sender`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Rules for the endpoints and addresses that may be sent to.
    pub policy: Policy,
    /// HTTP versions to offer.
    pub http: HttpVersion,
    /// A PEM file of certificate authorities, in addition to the system's.
    pub extra_ca_file: Option<PathBuf>,
    /// Host names with fixed addresses.
    pub resolve: Vec<Pin>,
    /// Proxy that all connections go through.
    pub proxy: Option<Proxy>,
    /// The way in which sender keys are made.
    pub sender_key: SenderKey,
    /// Maximum number of HTTP/2 connections to one push service.
    pub connections: usize,
    /// Maximum number of requests at once on one HTTP/2 connection.
    pub streams: usize,
    /// Maximum number of HTTP/1.1 connections to one push service.
    pub http1_connections: usize,
    /// Maximum number of connections to all push services together.
    pub max_connections: usize,
    /// Shortest time between two new connections to one push service, which are opened one after the other.
    pub connect_every: Duration,
    /// Longest time to open a connection, over all addresses.
    pub connect_timeout: Duration,
    /// Longest time of one request. Its wait for a permit of the concurrency limit may take as long again.
    pub timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            http: HttpVersion::Auto,
            extra_ca_file: None,
            resolve: Vec::new(),
            proxy: None,
            sender_key: SenderKey::Fresh,
            connections: 16,
            streams: 100,
            http1_connections: 64,
            max_connections: 1024,
            connect_every: Duration::from_millis(10),
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(30),
        }
    }
}

/// Reason why a sender cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The extra certificate authorities cannot be read.
    #[error("cannot read certificates from {}", .0.display())]
    ExtraCa(PathBuf, #[source] rustls_pki_types::pem::Error),
    /// The extra file contains no certificate.
    #[error("there is no certificate in {}", .0.display())]
    NoExtraCa(PathBuf),
    /// There is no certificate authority at all: no push service could be trusted.
    #[error("the system has no certificate authorities (Debian: install ca-certificates)")]
    NoRoots,
    /// The TLS library rejects the configuration.
    #[error("TLS cannot be set up")]
    Tls(#[from] rustls::Error),
}

/// Outcome of one attempt to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Meaning of the outcome for the message and the subscription.
    pub verdict: Verdict,
    /// HTTP status of the answer; `None` without an answer.
    pub status: Option<u16>,
    /// Reason in a few words; empty when the message was delivered.
    pub detail: String,
    /// True when a refusal counts against the subscription: false while the service refuses the key for many.
    pub counts: bool,
}

impl Report {
    fn failed(verdict: Verdict, why: &dyn ToString) -> Self {
        Self { verdict, status: None, detail: why.to_string(), counts: true }
    }
}

/// Sends web push messages; a cheap handle. Its connections belong to the runtime that uses it. Several runtimes
/// need one sender each; these share the state of the push services: see [`Sender::split`].
#[derive(Clone, Debug)]
pub struct Sender(Arc<SenderInner>);

#[derive(Debug)]
struct SenderInner {
    client: PushClient,
    shared: Arc<SenderCore>,
}

#[derive(Debug)]
struct SenderCore {
    connector: Arc<Connector>,
    services: Services,
    keying: Keying,
}

impl Sender {
    /// Reads the certificate authorities and the resolver's configuration. It opens no connection.
    ///
    /// # Errors
    /// When there are no certificate authorities, the extra file cannot be read, or TLS cannot be set up.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let mut one = Self::split(config, 1)?;
        one.pop().ok_or(ConfigError::NoRoots)
    }

    /// Makes `count` senders, each for its own runtime. They share the connections that `config` allows.
    ///
    /// # Errors
    /// As [`Sender::new`].
    pub fn split(config: Config, count: usize) -> Result<Vec<Self>, ConfigError> {
        let roots = roots(config.extra_ca_file)?;
        let resolver = Resolver::new(config.resolve);
        let Config { policy, proxy, http, connect_timeout, .. } = config;
        let connector = Connector::new(policy, resolver, proxy, roots, http, connect_timeout)?;
        let shared = Arc::new(SenderCore {
            connector: Arc::new(connector),
            services: Services::default(),
            keying: Keying::new(config.sender_key),
        });
        let count = count.max(1);
        let limits = PoolLimits {
            connections: config.connections.div_ceil(count),
            streams: config.streams,
            http1_connections: config.http1_connections.div_ceil(count),
            connect_every: config.connect_every,
            timeout: config.timeout,
        };
        let rooms = Rooms::new(config.max_connections);
        let make = |_| {
            let client = PushClient::new(Arc::clone(&shared.connector), limits, rooms.clone());
            Self(Arc::new(SenderInner { client, shared: Arc::clone(&shared) }))
        };
        Ok((0..count).map(make).collect())
    }

    /// The rules for the endpoints and addresses that may be sent to.
    pub fn policy(&self) -> &Policy {
        self.0.shared.connector.policy()
    }

    /// Returns the endpoint with this URL when the policy allows it.
    ///
    /// # Errors
    /// [`TargetError`] says why not.
    pub fn endpoint(&self, url: String) -> Result<Endpoint, TargetError> {
        self.0.shared.services.endpoint(self.policy(), url)
    }

    /// Looks up an endpoint's host and checks every address. A host that cannot be looked up now passes when the
    /// policy names it or it has delivered a message before; every send checks again.
    ///
    /// # Errors
    /// When the host does not exist, has a forbidden address, or cannot be looked up now.
    pub async fn check_addresses(&self, endpoint: &Endpoint) -> Result<(), TargetError> {
        match self.0.shared.connector.addresses(endpoint.host()).await {
            Err(ConnectError::Forbidden(error)) => Err(error),
            Err(ConnectError::Resolve(ResolveError::NotFound(host))) if !endpoint.origin.is_named() => {
                Err(TargetError::NoSuchHost(host))
            }
            Err(_)
                if !endpoint.origin.is_named()
                    && !self.0.shared.services.has_delivered(&endpoint.origin.name) =>
            {
                Err(TargetError::NotLookedUp(endpoint.host().to_owned()))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Encrypts and sends one message to a subscription that the caller vouches for. Every failure is part of the
    /// report about this subscription.
    pub async fn send(&self, endpoint: &Endpoint, keys: &Keys, message: &Message, key: &VapidKey) -> Report {
        let never = std::future::pending();
        let sent = self.send_unless(endpoint, keys, message, key, Reputation::Proven, never).await;
        sent.unwrap_or_else(|| Report::failed(Verdict::Held(PATIENCE), &"it was given up"))
    }

    /// Like [`Sender::send`], but returns `None` and sends nothing when `given_up` completes before the message has
    /// its permit. The outcomes of messages to unproven subscriptions (`who`) decide nothing about proven ones.
    pub async fn send_unless(
        &self,
        endpoint: &Endpoint,
        keys: &Keys,
        message: &Message,
        key: &VapidKey,
        who: Reputation,
        given_up: impl Future<Output = ()> + Send,
    ) -> Option<Report> {
        let shared = &self.0.shared;
        let origin = &endpoint.origin;
        let pool = self.0.client.pool(&origin.name, message.http, || shared.services.of(origin));
        let Some(pool) = pool else {
            return Some(Report::failed(RETRY, &"too many different push services at once"));
        };
        let asking = Asking { key, who, urgent: !message.bulk };
        let admitted = match admit_at_once(&pool, asking) {
            Some(admitted) => Ok(admitted),
            None => tokio::select! {
                biased;
                () = given_up => return None,
                admitted = self.admit(&pool, asking) => admitted,
            },
        };
        let (turn, permit) = match admitted {
            Ok(admitted) => admitted,
            Err(report) => return Some(report),
        };
        let (mut report, signal) = self.send_on(&pool, turn, endpoint, keys, message, asking).await;
        if permit.end(signal, endpoint) {
            pool.turns.restart();
        }
        if report.verdict == Verdict::Unauthorized {
            report.counts = !pool.service.refuses(key.signer());
        }
        Some(report)
    }

    /// Waits for a permit of the concurrency limit, then asks the circuit breaker, whose state may have changed
    /// meanwhile. A hold that ends within [`PATIENCE`] is waited for.
    async fn admit<'a>(
        &self,
        pool: &'a ConnectionPool,
        asking: Asking<'_>,
    ) -> Result<(ConcurrencyPermit<'a>, Permit<'a>), Report> {
        let asked = Instant::now();
        let held = |(wait, cause): (Duration, Cause)| Report::failed(Verdict::Held(wait), &cause.as_str());
        loop {
            if let Some(closed) = pool.service.is_held(asking, PATIENCE) {
                return Err(held(closed));
            }
            let Some(turn) = self.0.client.turn(pool, !asking.urgent).await else {
                return Err(Report::failed(Verdict::Held(PATIENCE), &"the service takes no more at once"));
            };
            let (wait, cause) = match pool.service.admit(asking) {
                Ok(permit) => return Ok((turn, permit)),
                Err(held) => held,
            };
            drop(turn);
            if asked.elapsed() + wait > PATIENCE {
                return Err(held((wait, cause)));
            }
            // Jitter, so that waiting messages do not wake all at once, nor always in the same order.
            tokio::time::sleep(wait.mul_f64(1.0 + fastrand::f64())).await;
        }
    }

    async fn send_on(
        &self,
        pool: &Arc<ConnectionPool>,
        turn: ConcurrencyPermit<'_>,
        endpoint: &Endpoint,
        keys: &Keys,
        message: &Message,
        asking: Asking<'_>,
    ) -> (Report, Signal) {
        let shared = &self.0.shared;
        let claim = pool.service.claimed.header(asking.key, &endpoint.origin.name, SystemTime::now());
        let claim = match claim {
            Ok(claim) => claim,
            Err(error) => return (Report::failed(RETRY, &error), Signal::Nothing),
        };
        let body = if message.payload.as_bytes().is_empty() {
            Bytes::new()
        } else {
            match shared.keying.encrypt(keys, &message.payload) {
                Ok(body) => Bytes::from(body),
                // The curve of keys from the store has not been checked before.
                Err(error) => {
                    let verdict = if keys.are_valid() { RETRY } else { Verdict::Forbidden };
                    return (Report::failed(verdict, &error), Signal::Nothing);
                }
            }
        };
        let make = |version| request(version, endpoint, message, claim.clone(), body.len());
        match self.0.client.send(pool, turn, make, body.clone(), asking.who).await {
            Ok(answer) => {
                pool.service.compare_clocks(&answer.headers);
                let verdict =
                    verdict(endpoint.host(), answer.status, &answer.headers, &answer.body, SystemTime::now());
                let detail = match verdict {
                    Verdict::Delivered => String::new(),
                    _ => excerpt(reason(endpoint.host(), &answer)),
                };
                let status = Some(answer.status.as_u16());
                (Report { verdict, status, detail, counts: true }, signal(verdict))
            }
            Err(ClientError::Connect(error)) => {
                let (verdict, signal) = match &*error {
                    ConnectError::Forbidden(_) => (Verdict::Forbidden, Signal::Nothing),
                    ConnectError::Resolve(ResolveError::NotFound(_)) => {
                        (Verdict::Unresolvable, Signal::Nothing)
                    }
                    // The name server of a host that a visitor brought may never answer.
                    ConnectError::Resolve(ResolveError::Failed(..)) if pool.service.is_lost() => {
                        (Verdict::Unresolvable, Signal::Unreachable)
                    }
                    // The limit is our own and says nothing about the service.
                    ConnectError::TooMany => (RETRY, Signal::Nothing),
                    _ => (RETRY, Signal::Unreachable),
                };
                (Report::failed(verdict, &error), signal)
            }
            Err(error @ ClientError::Timeout(_)) => (Report::failed(RETRY, &error), Signal::Silent),
            // A broken connection fails many requests at once, and says nothing about the next connection.
            Err(error) => (Report::failed(RETRY, &error), Signal::Nothing),
        }
    }

    /// Status of all known push services. All senders of one [`Sender::split`] share it.
    pub fn services(&self) -> Vec<ServiceStatus> {
        self.0.shared.services.status()
    }

    /// Status of this sender's connection pools.
    pub fn pools(&self) -> Vec<ServicePoolStatus> {
        let status = |pool: &Arc<ConnectionPool>| {
            let (window, in_flight) = pool.turns.status();
            ServicePoolStatus {
                origin: pool.service.origin.name.clone(),
                connections: pool.connections(),
                window,
                in_flight,
            }
        };
        self.0.client.pools().iter().map(status).collect()
    }

    /// Holds messages to an origin for at least `wait`, to all subscriptions or to unproven ones (`whom`): another
    /// process was asked to wait, or has seen the failures.
    pub fn hold(&self, origin: &str, wait: Duration, cause: Cause, whom: HeldFor) {
        self.0.shared.services.hold(self.policy(), origin, wait, cause, whom);
    }

    /// Takes the acceptances since the last call: one for each push service and signer, with the time of the last
    /// one.
    pub fn take_accepted(&self) -> Vec<Acceptance> {
        self.0.shared.services.take_accepted()
    }

    /// Ends all holds of an origin. Returns false when the origin is not known here.
    pub fn resume(&self, origin: &str) -> bool {
        self.0.shared.services.resume(origin)
    }

    /// Closes every connection of this sender. Requests under way fail.
    pub async fn close(&self) {
        self.0.client.close().await;
    }
}

/// One sender's connections to one push service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePoolStatus {
    /// The service's origin.
    pub origin: String,
    /// Number of open connections.
    pub connections: usize,
    /// Limit of requests at once that the service can take, as far as is known.
    pub window: usize,
    /// Number of requests under way.
    pub in_flight: usize,
}

/// Returns both permits when neither needs a wait.
fn admit_at_once<'a>(
    pool: &'a ConnectionPool,
    asking: Asking<'_>,
) -> Option<(ConcurrencyPermit<'a>, Permit<'a>)> {
    let turn = pool.turns.take_at_once(!asking.urgent)?;
    Some((turn, pool.service.admit(asking).ok()?))
}

const RETRY: Verdict = Verdict::Retry { after: None, throttled: false };

/// The signal about the push service that a verdict contains.
fn signal(verdict: Verdict) -> Signal {
    match verdict {
        Verdict::Delivered | Verdict::Gone => Signal::Success,
        Verdict::Unauthorized => Signal::Unauthorized,
        Verdict::Retry { after, throttled } if throttled || after.is_some() => Signal::Throttled(after),
        Verdict::TooLarge | Verdict::Rejected | Verdict::Retry { .. } => Signal::Answered,
        Verdict::Forbidden | Verdict::Unresolvable | Verdict::Held(_) => Signal::Nothing,
    }
}

fn request(
    version: Version,
    endpoint: &Endpoint,
    message: &Message,
    claim: HeaderValue,
    length: usize,
) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.version_mut() = version;
    *request.uri_mut() = endpoint.uri.clone();
    let headers = request.headers_mut();
    headers.reserve(8);
    headers.insert(AUTHORIZATION, claim);
    headers.insert(TTL, HeaderValue::from(message.ttl));
    headers.insert(URGENCY, HeaderValue::from_static(message.urgency.as_str()));
    if let Some(topic) = &message.topic {
        headers.insert(TOPIC, topic.clone());
    }
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    if is_windows(endpoint.host()) {
        // For WNS the TTL alone does not say whether the message is kept.
        let cache = if message.ttl == 0 { "no-cache" } else { "cache" };
        headers.insert(WNS_CACHE_POLICY, HeaderValue::from_static(cache));
    }
    if length > 0 {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("aes128gcm"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(message.content_type));
    }
    if version == Version::HTTP_11 {
        as_http1(&mut request);
    }
    request
}

/// Rewrites a request for HTTP/1.1, which has the host in a header and only the path in its first line. HTTP/2
/// takes the whole URL.
fn as_http1(request: &mut Request<()>) {
    let uri = std::mem::take(request.uri_mut());
    if let Some(host) = uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok()) {
        request.headers_mut().insert(HOST, host);
    }
    if let Some(path) = uri.path_and_query() {
        *request.uri_mut() = path.clone().into();
    }
}

/// Reason of a refusal: the body, or, when WNS sends no body, a header of WNS.
fn reason<'a>(host: &str, answer: &'a PushResponse) -> &'a [u8] {
    if answer.body.is_empty() && is_windows(host) {
        return answer.headers.get(WNS_ERROR).map_or(b"", HeaderValue::as_bytes);
    }
    &answer.body
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
