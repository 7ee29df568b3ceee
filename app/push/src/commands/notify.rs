//! `perennial notify`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use http::Method;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Zoned;
use serde_json::{Value, json};

use perennial_host::command::arguments::{number, seconds};
use perennial_host::command::output::{say, utc};
use perennial_host::command::{self, Client, CommandContext, Refused, block_on, moment};

/// Longest time of one answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Time between two requests for the progress: short at first, since small notifications are done at once, then
/// longer.
const POLL: Duration = Duration::from_millis(200);
const POLL_SLOWLY: Duration = Duration::from_secs(1);
/// Time for which a server that does not answer may be restarting.
const AWAY: Duration = Duration::from_secs(60);

/// Send a notification through the running server, and follow it to the last delivery. Fails when it was delivered
/// to no subscription of its audience
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial notify --all --title Hello --body World
  perennial notify --tags 'news and not muted' --title News --rate 500
  perennial notify --user 42 --title 'Your order' --at 'tomorrow 9:00'
  perennial notify --all --title Hello --dry-run")]
pub(super) struct NotifyArgs {
    #[command(flatten)]
    to: ToArgs,
    /// The title of the notification
    #[arg(long, required_unless_present_any = ["payload", "watch"])]
    title: Option<String>,
    /// The text of the notification
    #[arg(long)]
    body: Option<String>,
    /// The URL that a click opens
    #[arg(long)]
    link: Option<String>,
    /// Any JSON, or a text, for your own service worker, instead of a notification
    #[arg(long, conflicts_with_all = ["title", "body", "link"])]
    payload: Option<String>,
    /// How long push services keep the notification: 3600 (seconds), 1h
    #[arg(long, value_parser = seconds)]
    ttl: Option<u32>,
    /// The urgency: very-low, low, normal or high
    #[arg(long)]
    urgency: Option<String>,
    /// A later notification with the same topic replaces this one while it waits
    #[arg(long)]
    topic: Option<String>,
    /// Sends per second, kept evenly: 0.5 is one every two seconds
    #[arg(long, value_parser = number)]
    rate: Option<f64>,
    /// How long the rate takes to rise from nothing: 30s
    #[arg(long, requires = "rate", value_name = "DURATION")]
    ramp_up: Option<String>,
    /// The earliest time of sending: 2027-01-31T12:00:00Z, "tomorrow 9:00", "in 2h"
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// The latest time of sending
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// The version of HTTP to send with: auto, 1 or 2
    #[arg(long, value_name = "VERSION")]
    http: Option<String>,
    /// The name of a webhook in the settings that is called when the notification has ended
    #[arg(long, value_name = "NAME")]
    webhook: Option<String>,
    /// Let browsers that support it show the notification without a service worker; this needs --link
    #[arg(long, requires = "link")]
    declarative: bool,
    /// Send nothing; only print the audience
    #[arg(long)]
    dry_run: bool,
    /// Follow a notification that was accepted before, instead of sending one
    #[arg(long, value_name = "ID", conflicts_with_all = ["title", "payload"])]
    watch: Option<String>,
    /// Do not follow the notification
    #[arg(long, conflicts_with = "watch")]
    detach: bool,
    /// Makes repeating the command safe for 24 hours
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
    /// The server [default: the one that runs on data_dir]
    #[arg(long)]
    url: Option<String>,
    /// A file with an API key [default: api.key in data_dir]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
}

/// The audience of the notification.
#[derive(Args, Debug)]
#[group(multiple = false)]
struct ToArgs {
    /// Every subscription
    #[arg(long, required_unless_present_any = ["user", "tags", "subscriptions", "watch"])]
    all: bool,
    /// The subscriptions of one user
    #[arg(long)]
    user: Option<String>,
    /// The subscriptions whose tags match: "news and fr and not muted"
    #[arg(long)]
    tags: Option<String>,
    /// The subscriptions with these ids
    #[arg(long, value_delimiter = ',', value_name = "ID", value_parser = subscription_id)]
    subscriptions: Option<Vec<i64>>,
}

/// Reads the id of a subscription.
fn subscription_id(text: &str) -> Result<i64, String> {
    text.parse().map_err(|_| "wanted the id of a subscription, a number".to_owned())
}

impl command::Command for NotifyArgs {
    const NAME: &'static str = "notify";

    fn run(self, context: &CommandContext) -> anyhow::Result<()> {
        let client = context.client(self.url.as_deref(), self.key_file.as_deref(), TIMEOUT)?;
        block_on(self.send(context.json, &client))?
    }
}

impl NotifyArgs {
    async fn send(&self, json: bool, client: &Client) -> anyhow::Result<()> {
        if let Some(id) = &self.watch {
            return told(json, id, &follow(client, id).await?);
        }
        let request = self.request()?;
        if let Some(at) = request.get("at") {
            eprintln!("not before {}", utc(at));
        }
        let idempotency_key = self.idempotency_key.as_deref().map(|key| ("idempotency-key", key));
        let accepted = client.call_with(Method::POST, "/notify", Some(&request), idempotency_key).await?;
        for warning in accepted["warnings"].as_array().into_iter().flatten() {
            eprintln!("warning: {}", warning.as_str().unwrap_or_default());
        }
        if json && (self.dry_run || self.detach) {
            say!("{accepted}");
            return Ok(());
        }
        if self.dry_run {
            say!("{}", accepted["audience"]);
            return Ok(());
        }
        let id = accepted["id"].as_str().context("the answer has no id")?;
        if self.detach {
            say!("{id}");
            return Ok(());
        }
        eprintln!("accepted as {id}");
        told(json, id, &follow(client, id).await?)
    }

    fn request(&self) -> anyhow::Result<Value> {
        let now = Zoned::now();
        let time = |name: &str, text: &Option<String>| {
            let at = text.as_deref().map(|text| moment::parse(text, &now)).transpose();
            at.map_err(|wanted| anyhow!("--{name}: {wanted}"))
        };
        let (at, expires) = (time("at", &self.at)?, time("expires", &self.expires)?);
        let to = match &self.to {
            ToArgs { user: Some(user), .. } => json!({ "user": user }),
            ToArgs { tags: Some(tags), .. } => json!({ "tags": tags }),
            ToArgs { subscriptions: Some(ids), .. } => json!({ "subscriptions": ids }),
            _ => json!({ "all": true }),
        };
        let mut request = json!({ "to": to });
        if let Some(payload) = &self.payload {
            // A payload that is not JSON is sent as a text.
            request["payload"] = serde_json::from_str(payload).unwrap_or_else(|_| payload.as_str().into());
        } else {
            let given = [("title", &self.title), ("body", &self.body), ("url", &self.link)];
            let given =
                given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), json!(value.as_ref()?))));
            request["notification"] = Value::Object(given.collect());
        }
        let optional = [
            ("ttl", json!(self.ttl)),
            ("urgency", json!(self.urgency)),
            ("topic", json!(self.topic)),
            ("rate", json!(self.rate)),
            ("ramp_up", json!(self.ramp_up)),
            ("at", json!(at)),
            ("expires", json!(expires)),
            ("http", json!(self.http)),
            ("webhook", json!(self.webhook)),
            ("declarative", json!(self.declarative.then_some(true))),
            ("dry_run", json!(self.dry_run.then_some(true))),
        ];
        for (name, value) in optional.into_iter().filter(|(_, value)| !value.is_null()) {
            request[name] = value;
        }
        Ok(request)
    }
}

/// Prints how a notification ended. Fails when it did not end well.
fn told(json: bool, id: &str, progress: &Value) -> anyhow::Result<()> {
    match outcomes(progress) {
        _ if json => say!("{progress}"),
        words if words.is_empty() => say!("{id} nobody to send to"),
        words => say!("{id} {words}"),
    }
    if let Some(error) = progress["error"].as_str() {
        bail!("the notification could not be sent to its whole audience: {error}");
    }
    let state = progress["state"].as_str().unwrap_or_default();
    if state != "done" {
        bail!("the notification was {state}");
    }
    let audience = progress["audience"].as_u64().unwrap_or_default();
    let delivered = progress["outcomes"]["delivered"].as_u64().unwrap_or_default();
    if audience > 0 && delivered == 0 {
        bail!("the notification was delivered to no subscription");
    }
    Ok(())
}

/// Shows a bar until the notification has ended.
async fn follow(client: &Client, id: &str) -> anyhow::Result<Value> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}")?;
    let bar = ProgressBar::new(0).with_style(style);
    let began = Instant::now();
    let mut answered = Instant::now();
    loop {
        match client.call(Method::GET, &format!("/notifications/{id}"), None).await {
            Ok(progress) => {
                answered = Instant::now();
                show(&bar, &progress);
                if progress["audience_final"] == true {
                    bar.finish_and_clear();
                    return Ok(progress);
                }
            }
            Err(error) if answered.elapsed() > AWAY || error.is::<Refused>() => return Err(error),
            // The server continues to send when it is back.
            Err(error) => bar.set_message(format!("{error:#}")),
        }
        tokio::time::sleep(if began.elapsed() < POLL_SLOWLY { POLL } else { POLL_SLOWLY }).await;
    }
}

fn show(bar: &ProgressBar, progress: &Value) {
    bar.set_length(progress["audience"].as_u64().unwrap_or_default());
    bar.set_position(progress["decided"].as_u64().unwrap_or_default());
    let eta = progress["eta_seconds"].as_u64().map(|eta| format!(", {eta} s left")).unwrap_or_default();
    let retrying = progress["retrying"].as_u64().filter(|count| *count > 0);
    let retrying = retrying.map(|count| format!(", {count} to be tried again")).unwrap_or_default();
    let rate = progress["rate"].as_f64().unwrap_or_default();
    let wanted = progress["rate_wanted"].as_f64().map(|wanted| format!(" of {wanted}/s")).unwrap_or_default();
    let state = progress["state"].as_str().filter(|state| *state != "sending").unwrap_or_default();
    bar.set_message(format!("{rate:.0}/s{wanted}{eta}{retrying}  {}  {state}", outcomes(progress)));
}

fn outcomes(progress: &Value) -> String {
    let outcomes = progress["outcomes"].as_object().into_iter().flatten();
    let outcomes: Vec<_> = outcomes.map(|(outcome, count)| format!("{outcome} {count}")).collect();
    outcomes.join(", ")
}
