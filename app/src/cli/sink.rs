//! `perennial sink`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use http::Method;
use perennial_server::drain::{self, Phase};
use perennial_server::signal::{Signal, Signals};
use perennial_webpush::ReceiverKeys;
use serde_json::{Value, json};

use super::client::Client;
use super::{block_on, load, read};
use crate::addresses::{Addresses, url};
use crate::data_dir::API_KEY;
use crate::module::Blueprint;
use crate::settings::Sources;
use crate::sink::{self, Behaviour, Push, Refusal};

/// How long to wait for the server that imaginary browsers are to be subscribed at.
const WAIT: Duration = Duration::from_secs(120);

#[derive(Args, Debug)]
pub(super) struct Sink {
    /// Where messages are sent to, with TLS
    #[arg(long, default_value = "127.0.0.1:8443", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Where a Firefox connects
    #[arg(long, default_value = "127.0.0.1:8444", value_name = "ADDRESS")]
    browsers: SocketAddr,
    /// Where the certificates are put
    #[arg(long, default_value = "./perennial-sink", value_name = "DIRECTORY")]
    directory: PathBuf,
    /// Subscribe so many imaginary browsers at the server that runs on data_dir, or will in two minutes
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    subscribers: usize,
}

/// Prints a line for each message.
#[derive(Debug, Default)]
struct Printer {
    /// The subscribers' numbers by their tokens.
    numbers: Mutex<HashMap<String, usize>>,
}

impl Behaviour for Printer {
    fn taken(&self, push: &Push, plaintext: Option<&[u8]>) {
        let numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let to = numbers.get(&push.token).map_or_else(|| "browser".to_owned(), |number| format!("#{number}"));
        let text = plaintext.map(|text| String::from_utf8_lossy(text).into_owned());
        let topic = push.topic.as_deref();
        let line = json!({ "to": to, "ttl": push.ttl, "urgency": push.urgency.as_str(), "topic": topic, "text": text });
        println!("{line}");
    }

    fn refused(&self, refusal: &Refusal) {
        println!("{}", json!({ "refused": refusal.status.as_u16(), "because": refusal.message }));
    }
}

/// The server needs this service's certificate before it starts, and so it often comes second.
async fn wait_for_server(data_dir: &Path) -> anyhow::Result<String> {
    let began = Instant::now();
    loop {
        let running = Addresses::of_running(data_dir);
        match running
            .and_then(|addresses| url(&addresses.server).context("the server has only a Unix socket"))
        {
            Ok(base) => return Ok(base),
            Err(error) if began.elapsed() > WAIT => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

impl Sink {
    pub(super) fn run(&self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        block_on(self.serve(sources, modules))?
    }

    async fn serve(&self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let mut signals = Signals::install()?;
        let printer = Arc::new(Printer::default());
        let config = sink::Config {
            push: self.listen,
            browsers: self.browsers,
            names: Vec::new(),
            directory: self.directory.clone(),
        };
        let bound = sink::bind(config, Arc::clone(&printer) as Arc<dyn Behaviour>).await?;
        let (service, browsers) = (bound.sink.clone(), bound.browsers.clone());
        self.explain(&service, &browsers);
        let (trigger, drain) = drain::channel();
        let mut serving = tokio::task::JoinSet::new();
        serving.spawn(bound.run(drain));
        if self.subscribers > 0 {
            self.subscribe(&service, &printer, sources, modules).await?;
        }
        while signals.next().await == Signal::Reload {}
        trigger.advance(Phase::Hard);
        serving.join_all().await;
        Ok(())
    }

    fn explain(&self, service: &sink::Sink, browsers: &str) {
        let host = self.listen.ip();
        let ca = self.directory.join(sink::CA_FILE);
        println!("A push service at {}. Start the server so that it sends here:", service.origin());
        println!("  perennial --set push.allow_insecure=true --set push.allow_hosts={host} \\");
        println!("            --set push.allow_networks={host} --set push.extra_ca_file={}", ca.display());
        println!(
            "then subscribe imaginary browsers with --subscribers, or a Firefox with these in about:config:"
        );
        println!("  dom.push.serverURL = {browsers}   dom.push.testing.allowInsecureServerURL = true");
    }

    /// Subscribes imaginary browsers, whose messages are decrypted here.
    async fn subscribe(
        &self,
        service: &sink::Sink,
        printer: &Printer,
        sources: &Sources,
        modules: &[Blueprint],
    ) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        let base = wait_for_server(&config.data_dir).await?;
        let key_file = config.data_dir.join(API_KEY);
        let key = std::fs::read_to_string(key_file).context("the API key cannot be read")?;
        let client = Client::new(&base, Some(key.trim().to_owned()), Duration::from_secs(30))?;
        let vapid = client.call(Method::GET, "/push/key", None).await?;
        let vapid = vapid["key"].as_str().context("the server has no VAPID key")?.to_owned();
        let vapid_bytes =
            URL_SAFE_NO_PAD.decode(&vapid).context("the server's VAPID key is not base64url")?;
        for number in 1..=self.subscribers {
            let receiver = ReceiverKeys::generate().context("no randomness")?;
            let subscription = service.mint(Arc::new(receiver), Some(vapid_bytes.clone()));
            let token = subscription["endpoint"].as_str().and_then(|endpoint| endpoint.rsplit('/').next());
            let token = token.unwrap_or_default().to_owned();
            printer.numbers.lock().unwrap_or_else(PoisonError::into_inner).insert(token, number);
            let request = json!({ "subscription": subscription, "key": vapid, "tags": ["sink"] });
            let stored: Value = client.call(Method::POST, "/subscriptions", Some(&request)).await?;
            println!("{}", json!({ "subscribed": format!("#{number}"), "id": stored["id"] }));
        }
        Ok(())
    }
}
