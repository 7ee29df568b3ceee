//! A push service for the tests: the product's own strict one, with a script for its failures, a record of
//! what came, and a decryption that is not ours.

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

/// A message that was taken.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Its headers.
    pub push: Push,
    /// What the independent decryption made of it.
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

/// A browser that decrypts with RustCrypto and the crate web-push-native: none of our code.
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
    /// One that takes everything.
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

    /// From now on it answers like this.
    pub fn script(&self, script: impl Fn(&Push) -> Answer + Send + Sync + 'static) {
        *self.record.script.lock().unwrap() = Box::new(script);
    }

    /// From now on it answers with this status.
    pub fn answer(&self, status: u16) {
        self.script(move |_| status_answer(status, &[]));
    }

    /// The authority that its certificate is signed by.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join(sink::CA_FILE)
    }

    /// Its own certificate and key, which are good for any name of this machine.
    pub fn identity(&self) -> tls::Config {
        let file = |name: &str| self.directory.path().join(name);
        tls::Config { cert_file: file("cert.pem"), key_file: file("key.pem") }
    }

    /// Where endpoints begin.
    pub fn origin(&self) -> &str {
        self.sink.origin()
    }

    /// Where browsers connect.
    pub fn browsers(&self) -> &str {
        &self.browsers
    }

    /// A new subscription.
    pub fn mint(&self) -> Value {
        self.sink.mint(Arc::new(Independent::new()), None)
    }

    /// A new subscription that only this VAPID key may send to.
    pub fn mint_for(&self, vapid_key: &str) -> Value {
        let key = URL_SAFE_NO_PAD.decode(vapid_key).unwrap();
        self.sink.mint(Arc::new(Independent::new()), Some(key))
    }

    /// Cuts the connections of browsers, and forgets them.
    pub fn disconnect_browsers(&self) {
        self.sink.disconnect_browsers();
    }

    /// Everything that was taken.
    pub fn taken(&self) -> Vec<Taken> {
        self.record.taken.lock().unwrap().clone()
    }

    /// How many messages kept the rules, whatever the script said.
    pub fn asked(&self) -> usize {
        self.record.asked.load(Ordering::SeqCst)
    }

    /// Messages that broke a rule.
    pub fn refused(&self) -> Vec<Refusal> {
        self.record.refused.lock().unwrap().clone()
    }

    /// How many subscriptions took a message, and how many messages were repeats.
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
