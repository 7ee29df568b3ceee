//! A local push service beside a server, with imaginary browsers. It is for a trial on one machine where the push
//! services of browser makers cannot be reached or are not wanted.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use http::Method;
use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_runtime::telemetry::has_colours;
use perennial_webpush::{ReceiverKeys, decode_base64};
use serde_json::{Value, json};
use tracing::error;

use crate::sink::{self, Behaviour, Push, Refusal};
use perennial_host::command::output::say;
use perennial_host::command::{Beside, Client, CommandContext, Companion, admin_client};

/// Longest wait for the server at which imaginary browsers are to be subscribed.
const WAIT: Duration = Duration::from_secs(120);
/// File with the endpoints of the imaginary browsers, in the directory of the certificates.
const SUBSCRIBERS: &str = "subscribers";
/// Longest time of one answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The push service of a trial, and the printer of its messages.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    service: sink::Sink,
    printer: Arc<Printer>,
    /// URL that a Firefox connects to.
    pub(super) browsers: String,
    /// File of the authority that signed the service's certificate.
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
    /// Opens the sockets of the service. The second value serves them.
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

    /// The origin that messages are sent to.
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

    /// Subscribes imaginary browsers, whose messages are decrypted here, at the server that runs on this directory,
    /// or starts soon.
    ///
    /// # Errors
    /// When there is no server, or it could not send here; then the error lists the settings that it lacks.
    pub(super) async fn subscribe(&self, context: &CommandContext, count: usize) -> anyhow::Result<()> {
        wait_for_server(context).await?;
        self.check(context).await?;
        let client = context.client(None, None, TIMEOUT)?;
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

    /// Checks the settings of a running server, since its refusals do not show which settings it lacks.
    async fn check(&self, context: &CommandContext) -> anyhow::Result<()> {
        let Ok(client) = admin_client(context.data_dir(), TIMEOUT) else { return Ok(()) };
        let settings = client.call(Method::GET, "/settings", None).await?;
        let lacking = self.lacking(&settings);
        if lacking.is_empty() {
            return Ok(());
        }
        bail!(
            "the server that runs on {} would not send here: it lacks {}.\nStop it, and start it with\n  perennial {}\nor have everything in one with perennial serve --dev",
            context.data_dir().display(),
            lacking.join(", "),
            self.flags().join(" \\\n            ")
        )
    }

    /// Warns in red that a trial must not be taken for a server.
    fn warn(&self) {
        let (red, plain) = if std::io::stderr().is_terminal() && has_colours() {
            ("\x1b[1;31m", "\x1b[0m")
        } else {
            ("", "")
        };
        eprintln!(
            "{red}This is a trial: it sends to a push service of its own at {}, for this machine alone. Do not serve visitors with it.{plain}",
            self.origin()
        );
        eprintln!(
            "A Firefox takes part with these in about:config: dom.push.serverURL = {}, dom.push.testing.allowInsecureServerURL = true",
            self.browsers
        );
    }

    /// The settings that the server lacks and without which it sends nothing here.
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

/// Deletes the subscriptions of the imaginary browsers of an earlier trial, which are gone.
async fn forget_earlier(client: &Client, list: &Path) -> anyhow::Result<()> {
    for endpoint in std::fs::read_to_string(list).unwrap_or_default().lines() {
        // A subscription that the server does not know is already deleted.
        client.ask(Method::DELETE, "/subscriptions", Some(&json!({ "endpoint": endpoint })), None).await?;
    }
    Ok(())
}

/// Waits for the server. It needs this service's certificate before it starts, so it often starts second.
async fn wait_for_server(context: &CommandContext) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match context.running() {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() > WAIT => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The flags of `perennial serve` for a trial: this service beside the server.
#[derive(Args, Debug)]
pub(super) struct Dev {
    /// Run a trial on this machine alone: a local push service runs beside the server, with imaginary browsers that
    /// show their messages
    #[arg(long)]
    dev: bool,
    /// The number of imaginary browsers
    #[arg(long, default_value_t = 3, value_name = "COUNT", requires = "dev")]
    subscribers: usize,
}

/// Preferred ports of a trial's push service: for messages, and for a Firefox.
const PORTS: (u16, u16) = (8443, 8444);
/// Address of a trial's push service.
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Directory of its certificates, in the data directory.
const DIRECTORY: &str = "dev";

impl Companion for Dev {
    const FLAG: &'static str = "--dev";

    fn is_wanted(&self) -> bool {
        self.dev
    }

    async fn open(self, context: &CommandContext) -> anyhow::Result<Beside> {
        if let Some(listen) = context.reachable() {
            bail!("--dev is for this machine alone: {listen} can be reached from others");
        }
        context.make_data_dir()?;
        let directory = context.data_dir().join(DIRECTORY);
        let at = |port| SocketAddr::new(HOST, port);
        let bind = async |(push, browsers)| Trial::bind(at(push), at(browsers), &directory).await;
        let (trial, bound) = match bind(PORTS).await {
            Ok(bound) => bound,
            // Any other ports work, except that a Firefox does not find them again.
            Err(_) => bind((0, 0)).await.context("--dev needs two ports of this machine")?,
        };
        let host = || toml::Value::from(vec![HOST.to_string()]);
        let settings = [
            ("push.allow_insecure", true.into()),
            ("push.extra_ca_file", trial.ca.to_string_lossy().into_owned().into()),
            ("push.allow_hosts", host()),
            ("push.allow_networks", host()),
        ];
        let (told, context, count) = (trial.clone(), context.clone(), self.subscribers);
        Ok(Beside {
            settings: settings.map(|(key, value)| (key.to_owned(), value)).into(),
            announce: Box::new(move || told.warn()),
            run: Box::new(move |drain| Box::pin(run(trial, bound, context, count, drain))),
        })
    }
}

/// Runs the service, and subscribes imaginary browsers once the server is there.
async fn run(trial: Trial, bound: sink::Bound, context: CommandContext, count: usize, drain: Drain) {
    let subscribe = async {
        if count > 0
            && let Err(error) = trial.subscribe(&context, count).await
        {
            error!(error = format!("{error:#}"), "the imaginary browsers could not be subscribed");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = bound.run(drain) => {}
        () = subscribe => {}
    }
}
