//! A push service of our own beside a server, with imaginary browsers: for a trial on one machine, where no push service
//! of a browser's maker can be reached or is wanted.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http::Method;
use parking_lot::Mutex;
use perennial_webpush::{ReceiverKeys, decode_base64};
use serde_json::{Value, json};

use super::client::Client;
use super::output::say;
use crate::addresses::{Addresses, url};
use crate::data_dir::{ADMIN_TOKEN, API_KEY};
use crate::settings::TRIAL_HOST;
use crate::sink::{self, Behaviour, Push, Refusal};

/// How long to wait for the server that imaginary browsers are to be subscribed at.
const WAIT: Duration = Duration::from_secs(120);
/// The endpoints of the imaginary browsers, in the directory of the certificates.
const SUBSCRIBERS: &str = "subscribers";
/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The service, and what it shows.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    service: sink::Sink,
    printer: Arc<Printer>,
    /// Where a Firefox connects.
    pub(super) browsers: String,
    /// The authority that signed its certificate.
    pub(super) ca: PathBuf,
    host: IpAddr,
}

/// Prints a line for each message.
#[derive(Debug, Default)]
struct Printer {
    /// The subscribers' numbers by their tokens.
    numbers: Mutex<HashMap<String, usize>>,
}

impl Behaviour for Printer {
    fn taken(&self, push: &Push, plaintext: Option<&[u8]>) {
        let numbers = self.numbers.lock();
        let to = numbers.get(&push.token).map_or_else(|| "browser".to_owned(), |number| format!("#{number}"));
        let text = plaintext.map(|text| String::from_utf8_lossy(text).into_owned());
        let topic = push.topic.as_deref();
        let line = json!({ "to": to, "ttl": push.ttl, "urgency": push.urgency.as_str(), "topic": topic, "text": text });
        say!("{line}");
    }

    fn refused(&self, refusal: &Refusal) {
        say!("{}", json!({ "refused": refusal.status.as_u16(), "because": refusal.message }));
    }
}

impl Trial {
    /// Opens the sockets of the service; what serves them is returned beside it.
    pub(super) async fn bind(
        listen: SocketAddr,
        browsers: SocketAddr,
        directory: &Path,
    ) -> anyhow::Result<(Self, sink::Bound)> {
        let printer = Arc::new(Printer::default());
        let config =
            sink::Config { push: listen, browsers, names: Vec::new(), directory: directory.to_owned() };
        let bound = sink::bind(config, Arc::clone(&printer) as Arc<dyn Behaviour>).await?;
        let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
        let trial = Self {
            service: bound.sink.clone(),
            printer,
            browsers: bound.browsers.clone(),
            ca: directory.join(sink::CA_FILE),
            host: listen.ip(),
        };
        Ok((trial, bound))
    }

    /// Where messages are sent to.
    pub(super) fn origin(&self) -> &str {
        self.service.origin()
    }

    /// The settings that a server needs to send here, as flags.
    pub(super) fn flags(&self) -> [String; 4] {
        let (host, ca) = (self.host, self.ca.display());
        [
            "--set push.allow_insecure=true".to_owned(),
            format!("--set push.allow_hosts={host}"),
            format!("--set push.allow_networks={host}"),
            format!("--set push.extra_ca_file={ca}"),
        ]
    }

    /// Subscribes imaginary browsers, whose messages are decrypted here, at the server that runs on this directory, or soon will.
    ///
    /// # Errors
    /// When there is none, or one that could not send here: with the settings that it lacks.
    pub(super) async fn subscribe(&self, data_dir: &Path, count: usize) -> anyhow::Result<()> {
        let addresses = wait_for_server(data_dir).await?;
        self.check(data_dir, &addresses).await?;
        let base = url(&addresses.server).context("the server has only a Unix socket")?;
        let key = std::fs::read_to_string(data_dir.join(API_KEY)).context("the API key cannot be read")?;
        let client = Client::new(&base, Some(key.trim().to_owned()), TIMEOUT)?;
        let vapid = client.call(Method::GET, "/push/key", None).await?;
        let vapid = vapid["key"].as_str().context("the server has no VAPID key")?.to_owned();
        let vapid_bytes = decode_base64(&vapid).context("the server's VAPID key is not base64url")?;
        let list = self.ca.with_file_name(SUBSCRIBERS);
        forget_earlier(&client, &list).await?;
        let mut endpoints = String::new();
        for number in 1..=count {
            let receiver = ReceiverKeys::generate().context("no randomness")?;
            let subscription = self.service.mint(Arc::new(receiver), Some(vapid_bytes.clone()));
            let endpoint = subscription["endpoint"].as_str().unwrap_or_default();
            endpoints.push_str(&format!("{endpoint}\n"));
            let token = endpoint.rsplit('/').next().unwrap_or_default().to_owned();
            self.printer.numbers.lock().insert(token, number);
            let request = json!({ "subscription": subscription, "key": vapid, "tags": ["sink"] });
            let stored: Value = client.call(Method::POST, "/subscriptions", Some(&request)).await?;
            say!("{}", json!({ "subscribed": format!("#{number}"), "id": stored["id"] }));
        }
        std::fs::write(&list, endpoints).with_context(|| format!("{} cannot be written", list.display()))
    }

    /// Asks a running server for its settings, since what it lacks cannot be seen from what it refuses.
    async fn check(&self, data_dir: &Path, addresses: &Addresses) -> anyhow::Result<()> {
        let Ok(base) = addresses.admin_url() else { return Ok(()) };
        let token = std::fs::read_to_string(data_dir.join(ADMIN_TOKEN)).ok();
        let client = Client::new(&base, token.map(|token| token.trim().to_owned()), TIMEOUT)?;
        let settings = client.call(Method::GET, "/settings", None).await?;
        let lacking = self.lacking(&settings);
        if lacking.is_empty() {
            return Ok(());
        }
        bail!(
            "the server that runs on {} would not send here: it lacks {}.\nStop it, and start it with\n  perennial {}\nor have everything in one with perennial serve --dev",
            data_dir.display(),
            lacking.join(", "),
            self.flags().join(" \\\n            ")
        )
    }

    /// The settings without which a server sends nothing here.
    fn lacking(&self, settings: &Value) -> Vec<&'static str> {
        let value = |key: &str| {
            let all = settings.as_array().into_iter().flatten();
            all.into_iter()
                .find(|setting| setting["key"] == key)
                .map_or(&Value::Null, |setting| &setting["value"])
        };
        let has = |key: &str, fits: &dyn Fn(&str) -> bool| {
            let list = value(key).as_array().into_iter().flatten().filter_map(Value::as_str);
            list.chain(value(key).as_str()).any(fits)
        };
        let host = self.host.to_string();
        let is_network = |network: &str| {
            network.parse::<ipnet::IpNet>().map_or(network == host, |network| network.contains(&self.host))
        };
        let is_ca = |file: &str| Path::new(file).canonicalize().is_ok_and(|file| file == self.ca);
        let needed = [
            ("push.allow_insecure", *value("push.allow_insecure") == true),
            ("push.allow_hosts", has("push.allow_hosts", &|allowed| allowed == "*" || allowed == host)),
            ("push.allow_networks", has("push.allow_networks", &is_network)),
            ("push.extra_ca_file", has("push.extra_ca_file", &is_ca)),
        ];
        needed.into_iter().filter_map(|(key, is_there)| (!is_there).then_some(key)).collect()
    }
}

/// Takes back the imaginary browsers of an earlier trial, which nothing stands behind any more.
async fn forget_earlier(client: &Client, list: &Path) -> anyhow::Result<()> {
    for endpoint in std::fs::read_to_string(list).unwrap_or_default().lines() {
        // One that the server does not know has gone already.
        client.ask(Method::DELETE, "/subscriptions", Some(&json!({ "endpoint": endpoint })), None).await?;
    }
    Ok(())
}

/// Where a trial listens unless something else is said.
pub(super) fn usual(port: u16) -> SocketAddr {
    SocketAddr::new(TRIAL_HOST, port)
}

/// The server needs this service's certificate before it starts, and so it often comes second.
async fn wait_for_server(data_dir: &Path) -> anyhow::Result<Addresses> {
    let began = Instant::now();
    loop {
        match Addresses::of_running(data_dir) {
            Ok(addresses) => return Ok(addresses),
            Err(error) if began.elapsed() > WAIT => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
