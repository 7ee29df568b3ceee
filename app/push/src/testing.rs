//! Web push for the test kit: a local push service, as strict as the real ones, that shows the decrypted messages.
//!
//! ```no_run
//! use perennial_host::Perennial;
//! use perennial_push::Push;
//! use perennial_push::testing::{Pushes, PushTest};
//!
//! # async fn example() -> anyhow::Result<()> {
//! let shop = Perennial::new().host::<Push>().test().with(&Pushes::start().await?).start().await?;
//! shop.pushes().subscribe(&shop, &["new-books"]).await?;
//! // What is to be tested sends a notification here.
//! let received = shop.pushes().wait_for(1).await?;
//! assert_eq!(received[0].title(), "A new book");
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use perennial_host::testing::{Beside, TestProgram};
use perennial_runtime::drain::{self, Trigger};
use perennial_webpush::ReceiverKeys;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::sink::{self, Answer, Behaviour, Push, Refusal, Sink};

/// Time limit for what a test waits for.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);

/// A local push service beside a program within a test. A cheap handle; the service ends with the last one.
#[derive(Clone, Debug)]
pub struct Pushes(Arc<Service>);

#[derive(Debug)]
struct Service {
    sink: Sink,
    record: Arc<Record>,
    directory: TempDir,
    _trigger: Trigger,
    _running: JoinSet<()>,
}

/// A message that the push service has taken, decrypted.
#[derive(Clone, Debug)]
pub struct ReceivedPush {
    /// The request, with its headers.
    pub push: Push,
    /// The plaintext.
    pub text: String,
}

impl ReceivedPush {
    /// The payload as JSON; null when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    /// The title of the notification; empty when it has none.
    pub fn title(&self) -> String {
        self.field("title")
    }

    /// The text of the notification; empty when it has none.
    pub fn body(&self) -> String {
        self.field("body")
    }

    fn field(&self, name: &str) -> String {
        let json = self.json();
        let shown = json.get("notification").unwrap_or(&json);
        shown[name].as_str().unwrap_or_default().to_owned()
    }
}

#[derive(Debug, Default)]
struct Record {
    received: Mutex<Vec<ReceivedPush>>,
    refused: Mutex<Vec<Refusal>>,
    answer: Mutex<Option<Answer>>,
}

impl Behaviour for Record {
    fn answer(&self, _push: &Push) -> Answer {
        self.answer.lock().clone().unwrap_or(Answer::Take)
    }

    fn taken(&self, push: &Push, plaintext: Option<&[u8]>) {
        let text = String::from_utf8_lossy(plaintext.unwrap_or_default()).into_owned();
        self.received.lock().push(ReceivedPush { push: push.clone(), text });
    }

    fn refused(&self, refusal: &Refusal) {
        self.refused.lock().push(refusal.clone());
    }
}

impl Beside for Pushes {
    fn settings(&self) -> Vec<String> {
        let authority = self.0.directory.path().join(sink::CA_FILE);
        vec![
            "push.allow_insecure=true".to_owned(),
            "push.allow_hosts=127.0.0.1,localhost".to_owned(),
            "push.allow_networks=127.0.0.0/8".to_owned(),
            format!("push.extra_ca_file={}", authority.display()),
        ]
    }
}

impl Pushes {
    /// Starts a push service on free ports.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start() -> anyhow::Result<Self> {
        let (directory, record) = (TempDir::new()?, Arc::new(Record::default()));
        let any = "127.0.0.1:0".parse()?;
        let config = sink::Config {
            push: any,
            browsers: any,
            names: Vec::new(),
            directory: directory.path().to_owned(),
        };
        let bound = sink::bind(config, Arc::clone(&record) as Arc<dyn Behaviour>).await?;
        let sink = bound.sink.clone();
        let (trigger, drain) = drain::channel();
        let mut running = JoinSet::new();
        running.spawn(bound.run(drain));
        Ok(Self(Arc::new(Service { sink, record, directory, _trigger: trigger, _running: running })))
    }

    /// A subscription as a browser would hand it in.
    ///
    /// # Errors
    /// When no keys can be made.
    pub fn subscription(&self) -> anyhow::Result<Value> {
        Ok(self.0.sink.mint(Arc::new(ReceiverKeys::generate()?), None))
    }

    /// Subscribes a browser with these tags, and returns the id of its subscription.
    ///
    /// # Errors
    /// When the program refuses it.
    pub async fn subscribe(&self, program: &TestProgram, tags: &[&str]) -> anyhow::Result<i64> {
        let request = json!({ "subscription": self.subscription()?, "tags": tags });
        let answer = program.client().post("/subscriptions", &request).await?;
        answer.json()["id"].as_i64().with_context(|| format!("not subscribed: {}", answer.text()))
    }

    /// Answers all further messages like this.
    pub fn answer(&self, answer: Answer) {
        *self.0.record.answer.lock() = Some(answer);
    }

    /// The messages so far.
    pub fn received(&self) -> Vec<ReceivedPush> {
        self.0.record.received.lock().clone()
    }

    /// The messages that broke a rule.
    pub fn refused(&self) -> Vec<Refusal> {
        self.0.record.refused.lock().clone()
    }

    /// Waits for this many messages, and returns them.
    ///
    /// # Errors
    /// When there are fewer after 30 seconds.
    pub async fn wait_for(&self, count: usize) -> anyhow::Result<Vec<ReceivedPush>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let received = self.received();
            if received.len() >= count {
                return Ok(received);
            }
            if Instant::now() > end {
                let (found, refused) = (received.len(), self.refused());
                bail!("{found} of {count} messages came within {PATIENCE:?}; refused: {refused:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// The push service of a program within a test.
pub trait PushTest {
    /// The push service that was added with `TestBuilder::with`.
    fn pushes(&self) -> Pushes;
}

impl PushTest for TestProgram {
    fn pushes(&self) -> Pushes {
        self.beside::<Pushes>()
    }
}
