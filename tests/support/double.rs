//! A push service for the tests: the strict sink of the product, with a script for its failures, a record of all
//! messages, and an implementation of decryption that is not ours.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use perennial::sink::{self, Answer, Behaviour, Push, Receiver, Refusal, Sink};
use perennial_runtime::drain::{self, Trigger};
use perennial_server::net::tls;
use perennial_webpush::Keys;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use web_push_native::p256;

/// A message that the push service has accepted.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Headers of the message.
    pub push: Push,
    /// Text to which the independent implementation decrypted the message.
    pub text: String,
}

type Script = Box<dyn Fn(&Push) -> Answer + Send + Sync>;

/// A running push service.
pub struct Double {
    sink: Sink,
    browsers: String,
    record: Arc<Record>,
    directory: TempDir,
    _trigger: Trigger,
    _running: JoinSet<()>,
}

struct Record {
    script: Mutex<Script>,
    taken: Mutex<Vec<Taken>>,
    refused: Mutex<Vec<Refusal>>,
    asked: AtomicUsize,
}

impl Behaviour for Record {
    fn answer(&self, push: &Push) -> Answer {
        self.asked.fetch_add(1, Ordering::SeqCst);
        (self.script.lock().unwrap())(push)
    }

    fn taken(&self, push: &Push, plaintext: Option<&[u8]>) {
        let text = String::from_utf8_lossy(plaintext.unwrap_or_default()).into_owned();
        self.taken.lock().unwrap().push(Taken { push: push.clone(), text });
    }

    fn refused(&self, refusal: &Refusal) {
        self.refused.lock().unwrap().push(refusal.clone());
    }
}

/// A browser that decrypts with RustCrypto and the crate web-push-native, and so with none of our code.
struct Independent {
    secret: p256::SecretKey,
    auth: [u8; 16],
}

impl Independent {
    fn new() -> Self {
        let mut auth = [0; 16];
        let random = uuid::Uuid::now_v7();
        auth.copy_from_slice(random.as_bytes());
        let secret = p256::SecretKey::random(&mut p256::elliptic_curve::rand_core::OsRng);
        Self { secret, auth }
    }
}

impl Receiver for Independent {
    fn keys(&self) -> Keys {
        let public =
            p256::elliptic_curve::sec1::ToEncodedPoint::to_encoded_point(&self.secret.public_key(), false);
        Keys::from_bytes(public.as_bytes(), &self.auth).unwrap()
    }

    fn decrypt(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let auth = web_push_native::Auth::clone_from_slice(&self.auth);
        web_push_native::decrypt(body.to_vec(), &self.secret, &auth).map_err(|error| error.to_string())
    }
}

impl Double {
    /// Starts a push service that accepts all messages.
    pub async fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let record = Arc::new(Record {
            script: Mutex::new(Box::new(|_| Answer::Take)),
            taken: Mutex::default(),
            refused: Mutex::default(),
            asked: AtomicUsize::new(0),
        });
        let any = "127.0.0.1:0".parse().unwrap();
        let config = sink::Config {
            push: any,
            browsers: any,
            names: Vec::new(),
            directory: directory.path().to_owned(),
        };
        let bound = sink::bind(config, Arc::clone(&record) as Arc<dyn Behaviour>).await.unwrap();
        let (sink, browsers) = (bound.sink.clone(), bound.browsers.clone());
        let (trigger, drain) = drain::channel();
        let mut running = JoinSet::new();
        running.spawn(bound.run(drain));
        Self { sink, browsers, record, directory, _trigger: trigger, _running: running }
    }

    /// Answers all further messages as `script` decides.
    pub fn script(&self, script: impl Fn(&Push) -> Answer + Send + Sync + 'static) {
        *self.record.script.lock().unwrap() = Box::new(script);
    }

    /// Answers all further messages with this status.
    pub fn answer(&self, status: u16) {
        self.script(move |_| status_answer(status, &[]));
    }

    /// File of the authority that signed the certificate of the push service.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join(sink::CA_FILE)
    }

    /// Certificate and key of the push service, which are valid for any name of this machine.
    pub fn identity(&self) -> tls::Config {
        let file = |name: &str| self.directory.path().join(name);
        tls::Config { cert_file: file("cert.pem"), key_file: file("key.pem") }
    }

    /// Origin of the endpoints.
    pub fn origin(&self) -> &str {
        self.sink.origin()
    }

    /// Address to which browsers connect.
    pub fn browsers(&self) -> &str {
        &self.browsers
    }

    /// Creates a subscription.
    pub fn mint(&self) -> Value {
        self.sink.mint(Arc::new(Independent::new()), None)
    }

    /// Creates a subscription to which only this VAPID key may send.
    pub fn mint_for(&self, vapid_key: &str) -> Value {
        let key = URL_SAFE_NO_PAD.decode(vapid_key).unwrap();
        self.sink.mint(Arc::new(Independent::new()), Some(key))
    }

    /// Closes the connections of all browsers and forgets the browsers.
    pub fn disconnect_browsers(&self) {
        self.sink.disconnect_browsers();
    }

    /// All messages that were accepted.
    pub fn taken(&self) -> Vec<Taken> {
        self.record.taken.lock().unwrap().clone()
    }

    /// Number of messages that kept the rules, whatever the script answered.
    pub fn asked(&self) -> usize {
        self.record.asked.load(Ordering::SeqCst)
    }

    /// Messages that broke a rule.
    pub fn refused(&self) -> Vec<Refusal> {
        self.record.refused.lock().unwrap().clone()
    }

    /// Number of subscriptions that accepted a message, and number of messages that were repeats.
    pub fn reached_and_repeats(&self) -> (usize, usize) {
        let taken = self.taken();
        let distinct: HashSet<&str> = taken.iter().map(|taken| taken.push.token.as_str()).collect();
        (distinct.len(), taken.len() - distinct.len())
    }
}

/// An answer with this status and these headers.
pub fn status_answer(status: u16, headers: &[(&'static str, &str)]) -> Answer {
    let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Answer::Status(http::StatusCode::from_u16(status).unwrap(), headers)
}
