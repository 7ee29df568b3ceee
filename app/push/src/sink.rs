//! A local push service. It is as strict as the real ones, and shows the messages that came.
//!
//! `perennial sink` runs it for developers, and the tests send to it. Its subscriptions are either minted here,
//! with keys that this process holds and decrypts with, or made by a Firefox that uses this service instead of
//! Mozilla's and decrypts itself (see `sink/browser.rs`).
//!
//! | route | purpose |
//! |---|---|
//! | `POST /wpush/v2/{token}` | a message, over TLS; every rule of RFC 8030, 8188, 8291 and 8292 is checked |
//! | `GET /` (WebSocket) | a browser's connection |

mod browser;
mod rules;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as PathParameter, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::stream;
use http::request::Parts;
use http::{StatusCode, header};
use http_body_util::{BodyExt, Limited};
use parking_lot::{Mutex, MutexGuard};
use perennial_runtime::drain::Drain;
use perennial_server::http::scope::RequestScope;
use perennial_server::http::{self as server, Server};
use perennial_server::net::{self, Inherited, Listen, tls};
use perennial_webpush::{Keys, ReceiverKeys};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use perennial_host::api::is_too_long;
pub use rules::{Push, Refusal};

/// The file of the certificate authority that the service's certificate is signed by.
pub const CA_FILE: &str = "ca.pem";

/// A browser's side of a minted subscription.
pub trait Receiver: Send + Sync + 'static {
    /// The public half of the keys.
    fn keys(&self) -> Keys;

    /// Decrypts a body.
    ///
    /// # Errors
    /// The reason why it cannot be decrypted.
    fn decrypt(&self, body: &[u8]) -> Result<Vec<u8>, String>;
}

impl Receiver for ReceiverKeys {
    fn keys(&self) -> Keys {
        Self::keys(self)
    }

    fn decrypt(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        Self::decrypt(self, body).map_err(|error| error.to_string())
    }
}

/// The behaviour of the service: its answers to valid messages, and its reports of taken and refused ones.
pub trait Behaviour: Send + Sync + 'static {
    /// Decides how a valid message is answered.
    fn answer(&self, _push: &Push) -> Answer {
        Answer::Take
    }

    /// Reports a message that was taken. There is no plaintext when a browser has the key.
    fn taken(&self, push: &Push, plaintext: Option<&[u8]>);

    /// Reports a message that broke a rule.
    fn refused(&self, refusal: &Refusal);
}

/// The answer to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Answers 201.
    Take,
    /// Answers this status with these headers.
    Status(StatusCode, Vec<(&'static str, String)>),
    /// Answers 201 and closes the connection in order: GOAWAY, or `Connection: close`.
    TakeAndClose,
    /// Cuts the connection.
    Cut,
    /// Answers 201 with a body that never ends.
    TakeEndless,
    /// Never answers.
    Stall,
}

/// Addresses and certificate of the service.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address for messages, with TLS.
    pub push: SocketAddr,
    /// Address for browsers' WebSockets, without TLS.
    pub browsers: SocketAddr,
    /// Names of the certificate, besides localhost and loopback addresses.
    pub names: Vec<String>,
    /// Directory of the certificates.
    pub directory: PathBuf,
}

/// The service; a cheap handle.
#[derive(Clone)]
pub struct Sink(Arc<SinkState>);

struct SinkState {
    /// `https://127.0.0.1:8443`, without a slash.
    origin: String,
    behaviour: Arc<dyn Behaviour>,
    mailboxes: Mutex<HashMap<String, Mailbox>>,
    disconnect: Notify,
}

/// Destination of the messages of one subscription.
struct Mailbox {
    /// The only VAPID key that may send, if the subscription was made with one.
    vapid_key: Option<Vec<u8>>,
    owner: Owner,
}

#[derive(Clone)]
enum Owner {
    Minted(Arc<dyn Receiver>),
    Browser {
        channel: String,
        to: mpsc::Sender<browser::Notice>,
    },
    /// The subscription has ended.
    Gone,
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sink({})", self.0.origin)
    }
}

/// A bound service, about to run.
#[derive(Debug)]
pub struct Bound {
    /// The handle.
    pub sink: Sink,
    /// URL that browsers connect to: `ws://127.0.0.1:8444/`.
    pub browsers: String,
    server: Server,
}

/// Makes a certificate and opens the sockets.
///
/// # Errors
/// When a certificate cannot be written, or an address cannot be bound.
pub async fn bind(config: Config, behaviour: Arc<dyn Behaviour>) -> anyhow::Result<Bound> {
    let tls = certificate(&config.directory, &config.names)?;
    let listen = vec![Listen::Https(config.push.to_string()), Listen::Http(config.browsers.to_string())];
    let net = net::Config { tls: Some(tls), ..net::Config::new("sink", listen) };
    // A service that stalls has to do so for longer than any client waits.
    let patient = Duration::from_secs(3600);
    let server = server::Config {
        quiet: true,
        request_timeout: patient,
        slow_after: patient,
        ..server::Config::new(net)
    };
    let server = Server::bind(server, &Inherited::default()).await?;
    let addresses = server.addresses();
    let (origin, browsers) = addresses.split_first().context("two addresses were asked for")?;
    let browsers = format!("ws://{}/", browsers.first().context("two addresses were asked for")?);
    let shared = SinkState {
        origin: origin.clone(),
        behaviour,
        mailboxes: Mutex::default(),
        disconnect: Notify::new(),
    };
    Ok(Bound { sink: Sink(Arc::new(shared)), browsers, server })
}

impl Bound {
    /// Serves until drained.
    pub async fn run(self, drain: Drain) {
        let router = Router::new()
            .route("/wpush/v2/{token}", post(take))
            .route("/", get(browser::connect))
            .with_state(self.sink);
        // Serving cannot fail.
        let _ = self.server.run(router, None, drain).await;
    }
}

impl Sink {
    /// The origin that endpoints begin with.
    pub fn origin(&self) -> &str {
        &self.0.origin
    }

    /// Makes a new subscription, in the form of a browser's `PushSubscription.toJSON()`.
    pub fn mint(&self, receiver: Arc<dyn Receiver>, vapid_key: Option<Vec<u8>>) -> Value {
        let keys = receiver.keys();
        let endpoint = self.register(Owner::Minted(receiver), vapid_key);
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        json!({
            "endpoint": endpoint,
            "expirationTime": null,
            "keys": { "p256dh": encode(keys.p256dh()), "auth": encode(keys.auth()) },
        })
    }

    /// Ends a subscription: messages to it are answered with 410.
    pub fn end(&self, endpoint: &str) {
        let token = endpoint.rsplit('/').next().unwrap_or_default();
        if let Some(mailbox) = self.mailboxes().get_mut(token) {
            mailbox.owner = Owner::Gone;
        }
    }

    /// Cuts the connections of browsers, like a service that has lost its data: the browsers connect again, learn
    /// that they are unknown, and subscribe anew.
    pub fn disconnect_browsers(&self) {
        self.0.disconnect.notify_waiters();
    }

    fn register(&self, owner: Owner, vapid_key: Option<Vec<u8>>) -> String {
        let token = uuid::Uuid::now_v7().simple().to_string();
        let endpoint = format!("{}/wpush/v2/{token}", self.0.origin);
        self.mailboxes().insert(token, Mailbox { vapid_key, owner });
        endpoint
    }

    fn mailboxes(&self) -> MutexGuard<'_, HashMap<String, Mailbox>> {
        self.0.mailboxes.lock()
    }

    /// The owner of a subscription, and the key that may send to it.
    fn find(&self, token: &str) -> Option<(Owner, Option<Vec<u8>>)> {
        let mailboxes = self.mailboxes();
        let mailbox = mailboxes.get(token)?;
        Some((mailbox.owner.clone(), mailbox.vapid_key.clone()))
    }

    /// Checks a message against every rule.
    fn check(
        &self,
        token: &str,
        head: &Parts,
        body: &[u8],
    ) -> Result<(Push, Owner, Option<Vec<u8>>), Refusal> {
        let (owner, vapid_key) =
            self.find(token).ok_or_else(|| Refusal::new(404, 102, "no such subscription"))?;
        let push = rules::check(token, head, body, self.origin(), vapid_key.as_deref(), SystemTime::now())?;
        match owner {
            Owner::Gone => Err(Refusal::new(410, 106, "the subscription has ended")),
            Owner::Minted(ref receiver) if !body.is_empty() => {
                let plaintext = receiver.decrypt(body).map_err(|error| Refusal::new(400, 110, error))?;
                Ok((push, owner, Some(plaintext)))
            }
            owner => Ok((push, owner, None)),
        }
    }
}

/// Takes a message to a subscription.
async fn take(
    State(sink): State<Sink>,
    PathParameter(token): PathParameter<String>,
    scope: RequestScope,
    request: Request,
) -> Response {
    let (head, body) = request.into_parts();
    let body = match Limited::new(body, rules::MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if is_too_long(&*error) => {
            return refuse(&sink, &Refusal::new(413, 104, "the body has more than 4096 bytes"));
        }
        // The sender has gone.
        Err(_) => return StatusCode::BAD_REQUEST.into_response(),
    };
    let (push, owner, plaintext) = match sink.check(&token, &head, &body) {
        Ok(checked) => checked,
        Err(refusal) => return refuse(&sink, &refusal),
    };
    let mut endless = false;
    match sink.0.behaviour.answer(&push) {
        Answer::Take => {}
        Answer::TakeEndless => endless = true,
        Answer::TakeAndClose => scope.connection().close(),
        Answer::Status(status, headers) => {
            let mut response = status.into_response();
            for (name, value) in headers {
                response
                    .headers_mut()
                    .extend(value.parse().ok().map(|value| (header::HeaderName::from_static(name), value)));
            }
            return response;
        }
        Answer::Cut => {
            scope.connection().abort();
            return std::future::pending().await;
        }
        Answer::Stall => return std::future::pending().await,
    }
    if let Owner::Browser { channel, to } = owner {
        let notice = browser::Notice { channel, body };
        match to.try_send(notice) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return refuse(&sink, &Refusal::new(503, 202, "the browser is too slow"));
            }
            Err(TrySendError::Closed(_)) => {
                return refuse(&sink, &Refusal::new(410, 106, "the browser has gone"));
            }
        }
    }
    sink.0.behaviour.taken(&push, plaintext.as_deref());
    let location = format!("{}/m/{}", sink.origin(), uuid::Uuid::now_v7().simple());
    let headers =
        [(header::LOCATION, location), (header::HeaderName::from_static("ttl"), push.ttl.to_string())];
    let body = if endless {
        Body::from_stream(stream::repeat(Ok::<_, Infallible>(Bytes::from_static(b"and so on "))))
    } else {
        Body::empty()
    };
    (StatusCode::CREATED, headers, body).into_response()
}

fn refuse(sink: &Sink, refusal: &Refusal) -> Response {
    sink.0.behaviour.refused(refusal);
    let body = json!({ "code": refusal.status.as_u16(), "errno": refusal.errno, "message": refusal.message });
    (refusal.status, axum::Json(body)).into_response()
}

/// Makes a certificate authority, and a certificate for localhost signed by it.
fn certificate(directory: &Path, names: &[String]) -> anyhow::Result<tls::Config> {
    let files = tls::Config { cert_file: directory.join("cert.pem"), key_file: directory.join("key.pem") };
    // Clients that trust the authority of an earlier run need no change.
    if files.cert_file.exists() && files.key_file.exists() && directory.join(CA_FILE).exists() {
        return Ok(files);
    }
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.distinguished_name.push(DnType::CommonName, "Perennial's local push service");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_key = KeyPair::generate()?;
    let ca_certificate = ca.self_signed(&ca_key)?;
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into_iter().chain(names.iter().cloned());
    let leaf_key = KeyPair::generate()?;
    let leaf =
        CertificateParams::new(names.collect::<Vec<_>>())?.signed_by(&leaf_key, &Issuer::new(ca, ca_key))?;
    let write = |file: &Path, text: String| {
        let mut options = OpenOptions::new();
        let opened = options.create(true).truncate(true).write(true).mode(0o600).open(file);
        opened
            .and_then(|mut opened| opened.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", file.display()))
    };
    write(&directory.join(CA_FILE), ca_certificate.pem())?;
    write(&files.cert_file, leaf.pem())?;
    write(&files.key_file, leaf_key.serialize_pem())?;
    Ok(files)
}
