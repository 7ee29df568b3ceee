//! The hosted application: web push. It comes in through the same [`Module`] as any other.
//!
//! ```text
//! subscriptions.rs  POST /subscriptions ─► store
//! notify.rs         POST /notify ────────► store + job, one transaction ─► 202
//! fanout.rs           push.fan_out: the audience, cut into ranges of ids
//! deliver.rs          push.deliver: one range, sent on one of the threads of senders.rs,
//!   round.rs          checkpointed; send.rs is one message to one member
//! progress.rs       GET /notifications/{id} ◄── store
//! lifecycle.rs      pausing, another rate, following; flows.rs tells those that send
//!   pace.rs           when the next send is due, by schedule.rs
//! ```

mod audience;
mod close;
mod deliver;
mod fanout;
mod flows;
pub(crate) mod import;
mod lifecycle;
mod limits;
mod metrics;
mod notify;
mod outcome;
mod pace;
mod page;
mod progress;
mod round;
mod schedule;
mod send;
mod senders;
mod services;
mod store;
mod subscriptions;
mod tags;
mod template;
mod users;
mod vapid;
mod webhook;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRef;
use perennial_server::drain::{Drain, Phase};
use perennial_server::http::detach::Detach;
use perennial_server::pool::sql;
use perennial_webpush::{Contact, ContactError, HostPattern, HttpVersion, Pin, Policy, Proxy, SenderKey};
use perennial_workers::Jobs;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tracing::{info, warn};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::access::{Access, Scope};
use crate::data_dir::DataDir;
use crate::module::{Host, Module};
use crate::settings::{Network, Reader, Size};
use flows::Flows;
use import::Porter;
use limits::Limits;
use progress::Progress;
use senders::Senders;
use store::Store;
use vapid::VapidKeys;
use webhook::{Registered, Webhooks};

/// Cuts audiences into batches.
const FAN_OUT_QUEUE: &str = "push-fan-out";
/// Sends the batches of big notifications.
const BULK_QUEUE: &str = "push";
/// Sends small notifications: never behind a big one.
const SMALL_QUEUE: &str = "push-small";
/// Sends what is tried again, and takes no place of what is tried first.
const RETRY_QUEUE: &str = "push-retry";
/// Sends what has a rate: such a job mostly waits.
const PACED_QUEUE: &str = "push-paced";
/// Tells the backend.
const WEBHOOK_QUEUE: &str = "push-webhook";
/// How many requests to the backend at once.
const WEBHOOKS: usize = 8;
/// How often notifications that have ended long ago are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(600);
/// How many audiences are cut at once.
const FAN_OUTS: usize = 4;
/// How long the page's token is good for.
const PAGE_TOKEN: Duration = Duration::from_secs(3600);

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// The longest time to live that every push service grants: 28 days.
const MAX_TTL: Duration = Duration::from_secs(28 * 24 * 3600);

/// The module, with its settings read.
#[derive(Debug)]
pub struct Push {
    config: Config,
    contact: Result<Contact, String>,
    sender: perennial_webpush::Config,
    limits: limits::Config,
}

/// What the routes and jobs need to know.
#[derive(Debug)]
struct Config {
    page: bool,
    origins: Vec<String>,
    public_tags: Vec<String>,
    user_secret: Option<SecretString>,
    ttl: Duration,
    attempts: u32,
    batch: usize,
    window: usize,
    batches: usize,
    small_batches: usize,
    small_audience: u64,
    retry_batches: usize,
    paced_batches: usize,
    /// Messages per second to one push service.
    origin_rate: Option<f64>,
    threads: usize,
    /// How long one send may take, and as long again its wait for a turn.
    send_timeout: Duration,
    /// For how long notifications that have ended are kept.
    retention: Duration,
    webhooks: BTreeMap<String, Registered>,
    /// How long sends that are in flight may take when the process must stop. What is cut off is sent again.
    last_sends: Duration,
    checkpoint_every: Duration,
    checkpoint_sends: usize,
}

/// Everything that routes and jobs work with.
#[derive(Debug)]
pub(crate) struct Application {
    config: Config,
    store: Store,
    access: Access,
    senders: Senders,
    flows: Flows,
    vapid: Arc<VapidKeys>,
    porter: Arc<Porter>,
    webhooks: Webhooks,
    limits: Limits,
    progress: Progress,
    meters: metrics::Meters,
    in_flight: notify::InFlight,
}

/// A cheap handle on it.
pub(crate) type Tools = Arc<Application>;

impl FromRef<Tools> for Access {
    fn from_ref(tools: &Tools) -> Self {
        tools.access.clone()
    }
}

impl Module for Push {
    const NAME: &'static str = "push";
    const DEFAULTS: &'static str = include_str!("../../config/push.toml");
    const MIGRATIONS: &'static [&'static str] = store::SQLITE;
    const POSTGRES_MIGRATIONS: &'static [&'static str] = store::POSTGRES;

    async fn keys(data_dir: &DataDir, store: &sql::Store) -> anyhow::Result<Vec<(&'static str, String)>> {
        Ok(vec![("VAPID public key", vapid::make(data_dir, store).await?.public_key())])
    }

    async fn rotate(data_dir: &DataDir, store: &sql::Store) -> anyhow::Result<Vec<(&'static str, String)>> {
        Ok(vec![("VAPID public key", vapid::rotate(data_dir, store).await?.public_key())])
    }

    fn configure(settings: &mut Reader<'_>) -> Self {
        let contact = contact(settings);
        Self {
            config: config(settings),
            sender: perennial_webpush::Config { contact: contact.clone().ok(), ..sender(settings) },
            contact,
            limits: limits::Config {
                address_burst: settings.number("push.address_burst", 1..=1_000_000),
                address_per_minute: settings.number("push.address_per_minute", 1..=100_000_000),
                site_burst: settings.number("push.site_burst", 1..=1_000_000),
                site_per_minute: settings.number("push.site_per_minute", 1..=100_000_000),
            },
        }
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        if let Err(reason) = self.contact {
            warn!(reason, "Apple refuses messages without a contact");
        }
        metrics::describe();
        let store = Store::new(host.store.clone(), host.jobs.clone());
        let vapid = Arc::new(VapidKeys::load(&host.data_dir, &host.store, &store).await?);
        let senders = Senders::start(self.sender, self.config.threads)?;
        let flows = Flows::new(store.clone(), self.config.origin_rate);
        let porter = Porter::new(store.clone(), senders.any().clone(), Arc::clone(&vapid));
        let webhooks = Webhooks::new(self.config.webhooks.clone())?;
        let application = Arc::new(Application {
            config: self.config,
            store,
            access: host.access.clone(),
            senders: senders.clone(),
            flows: flows.clone(),
            vapid,
            porter: Arc::new(porter),
            webhooks,
            limits: Limits::new(self.limits),
            progress: Progress::default(),
            meters: metrics::Meters::new(),
            in_flight: notify::InFlight::default(),
        });

        host.routes(routes(&application));
        host.serve_queue(FAN_OUT_QUEUE, FAN_OUTS);
        host.serve_queue(BULK_QUEUE, application.config.batches);
        host.serve_queue(SMALL_QUEUE, application.config.small_batches);
        host.serve_queue(RETRY_QUEUE, application.config.retry_batches);
        host.serve_queue(PACED_QUEUE, application.config.paced_batches);
        host.serve_queue(WEBHOOK_QUEUE, WEBHOOKS);
        host.job::<webhook::Webhook>(Arc::clone(&application));
        host.job::<close::Close>(Arc::clone(&application));
        host.job::<fanout::FanOut>(Arc::clone(&application));
        host.job::<deliver::Deliver>(Arc::clone(&application));
        host.looking(services::looking(Arc::clone(&application)));
        host.acting(services::acting(Arc::clone(&application)));
        host.acting(import::acting(Arc::clone(&application.porter)));
        host.task("push limits", {
            let (application, drain) = (Arc::clone(&application), host.drain.clone());
            move || Arc::clone(&application).forget_limits(drain.clone())
        });
        host.task("push retention", {
            let (application, drain) = (Arc::clone(&application), host.drain.clone());
            move || Arc::clone(&application).forget_notifications(drain.clone())
        });
        host.task("push flows", {
            let drain = host.drain.clone();
            move || flows.clone().run(drain.clone())
        });
        host.task("push services", {
            let (application, drain) = (Arc::clone(&application), host.drain.clone());
            move || services::run(Arc::clone(&application), drain.clone())
        });
        host.status(Self::NAME, {
            let application = Arc::clone(&application);
            move || {
                json!({
                    "vapid_key": application.vapid.current.public_key(),
                    "vapid_keys": application.vapid.len(),
                    "addresses_limited": application.limits.len(),
                })
            }
        });
        if application.config.page {
            let token =
                host.access.issue("page", &[Scope::Subscribe, Scope::Notify, Scope::Read], PAGE_TOKEN);
            host.announce(move |base| {
                format!(
                    "Open this page, good for an hour, and send yourself a notification:\n  {base}/#key={}",
                    token.expose_secret()
                )
            });
        }
        host.at_close(async move { senders.close().await });
        Ok(())
    }
}

impl Application {
    /// Says in the log how a notification went.
    async fn ended(&self, notification: Uuid, site: i64) {
        let Ok(Some(ended)) = self.store.notification(site, notification).await else { return };
        let outcomes = ended.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}"));
        let outcomes = outcomes.collect::<Vec<_>>().join(", ");
        let took = ended.ended_at.unwrap_or(ended.created_at).duration_since(ended.created_at);
        info!(%notification, outcomes, took_ms = took.as_millis(), "notification done");
    }

    /// Forgets notifications that ended long ago, until nothing new is taken.
    async fn forget_notifications(self: Arc<Self>, drain: Drain) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(FORGET_EVERY) => {}
                () = drain.soft() => return Ok(()),
            }
            let before = jiff::Timestamp::now().as_millisecond()
                - i64::try_from(self.config.retention.as_millis()).unwrap_or(i64::MAX);
            while self.store.forget_notifications(before).await? > 0 && drain.phase() < Phase::Soft {}
            self.store.forget_services().await?;
        }
    }

    /// Forgets the addresses that have kept within their limits, until nothing new is taken.
    async fn forget_limits(self: Arc<Self>, drain: Drain) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                () = tokio::time::sleep(limits::FORGET_EVERY) => self.limits.forget(),
                () = drain.soft() => return Ok(()),
            }
        }
    }
}

fn routes(application: &Tools) -> OpenApiRouter {
    let from_pages = OpenApiRouter::new()
        .routes(routes!(subscriptions::key))
        .routes(routes!(subscriptions::subscribe, subscriptions::unsubscribe, subscriptions::list))
        .layer(subscriptions::cors(&application.config.origins));
    let mut routes = OpenApiRouter::new()
        .merge(from_pages)
        .routes(routes!(subscriptions::one, subscriptions::delete))
        // Whoever leaves early has sent all the same, and may ask again with the same Idempotency-Key.
        .merge(OpenApiRouter::new().routes(routes!(notify::notify)).layer(Detach))
        .routes(routes!(progress::list))
        .routes(routes!(progress::one, lifecycle::set_rate))
        .routes(routes!(lifecycle::pause))
        .routes(routes!(lifecycle::resume))
        .routes(routes!(lifecycle::cancel))
        .routes(routes!(lifecycle::events))
        .routes(routes!(lifecycle::deliveries))
        .routes(routes!(users::one, users::delete));
    if application.config.page {
        routes = routes.merge(page::routes().into());
    }
    routes.with_state(Arc::clone(application))
}

/// What pages' user tokens are made with.
const USER_SECRET: &str = "sites.default.user_secret_file";
/// The shortest secret for it, in bytes.
const MIN_USER_SECRET: usize = 16;

fn config(settings: &mut Reader<'_>) -> Config {
    let origins = settings.read_with(
        "sites.default.origins",
        "a list of origins such as https://www.example.com",
        |value| {
            let origins = <Vec<String> as crate::settings::Setting>::read(value)?;
            origins.iter().all(|origin| subscriptions::is_origin(origin)).then_some(origins)
        },
    );
    let public_tags = settings.read_with("sites.default.public_tags", "a list of tags", |value| {
        let tags = <Vec<String> as crate::settings::Setting>::read(value)?;
        tags.iter().all(|tag| tags::is_tag(tag)).then_some(tags)
    });
    let user_secret = settings.secret_file(USER_SECRET);
    if user_secret.as_ref().is_some_and(|secret| secret.expose_secret().len() < MIN_USER_SECRET) {
        settings.refuse::<()>(
            USER_SECRET,
            "a file with a secret of at least 16 bytes; this one is guessed in no time",
        );
    }
    Config {
        page: settings.get("push.page"),
        origins,
        public_tags,
        user_secret,
        ttl: settings.duration("push.ttl", Duration::ZERO..=MAX_TTL),
        attempts: settings.number("push.attempts", 1..=100),
        batch: settings.number("push.batch", 1..=100_000),
        window: settings.number("push.window", 1..=10_000),
        batches: settings.number("push.batches", 1..=1000),
        small_batches: settings.number("push.small_batches", 1..=1000),
        small_audience: settings.number("push.small_audience", 0..=10_000),
        retry_batches: settings.number("push.retry_batches", 1..=1000),
        paced_batches: settings.number("push.paced_batches", 1..=1000),
        origin_rate: origin_rate(settings),
        threads: threads(settings),
        send_timeout: settings.duration("push.timeout", SECOND..=HOUR) * 2,
        // Idempotency keys are good for a day.
        retention: settings.duration("push.retention", HOUR * 24..=HOUR * 24 * 3660),
        webhooks: webhooks(settings),
        // The rest of that phase is for writing down what they were.
        last_sends: (settings.get::<Duration>("drain.hard") / 2).min(2 * SECOND),
        checkpoint_every: settings.duration("push.checkpoint.every", MILLISECOND..=HOUR),
        checkpoint_sends: settings.number("push.checkpoint.sends", 1..=100_000),
    }
}

/// Imports and exports for a command that runs while no server does.
pub(crate) async fn porter(
    settings: &mut Reader<'_>,
    data_dir: &DataDir,
    sql: &sql::Store,
    jobs: Jobs,
) -> anyhow::Result<Porter> {
    let store = Store::new(sql.clone(), jobs);
    let vapid = VapidKeys::load(data_dir, sql, &store).await?;
    let sender = perennial_webpush::Sender::new(sender(settings))?;
    Ok(Porter::new(store, sender, Arc::new(vapid)))
}

/// The threads that send: one for each processor, unless the settings say.
fn threads(settings: &mut Reader<'_>) -> usize {
    match settings.number("push.threads", 0..=1024) {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// A rate for each push service; none when it is 0.
fn origin_rate(settings: &mut Reader<'_>) -> Option<f64> {
    let rate: f64 =
        settings.read_with("push.origin_rate", "messages per second, or 0 for no limit", |value| {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let rate = value.as_float().or_else(|| value.as_integer().map(|rate| rate as f64))?;
            (rate == 0.0 || (0.001..=1e6).contains(&rate)).then_some(rate)
        });
    (rate > 0.0).then_some(rate)
}

const WEBHOOKS_KEY: &str = "sites.default.webhooks";

/// Whom notifications may name to be told.
fn webhooks(settings: &mut Reader<'_>) -> BTreeMap<String, Registered> {
    let wanted = "a list of { name, url, secret_file, pruned = false }";
    let found: Vec<(String, http::Uri, std::path::PathBuf, bool)> =
        settings.read_with(WEBHOOKS_KEY, wanted, |value| {
            let webhook = |webhook: &toml::Value| {
                let text = |key: &str| webhook.get(key).and_then(toml::Value::as_str);
                let url: http::Uri = text("url")?.parse().ok()?;
                let is_web = matches!(url.scheme_str(), Some("http" | "https"));
                let pruned = webhook.get("pruned").is_some_and(|pruned| pruned.as_bool() == Some(true));
                let known = ["name", "url", "secret_file", "pruned"];
                let only_known = webhook.as_table()?.keys().all(|key| known.contains(&key.as_str()));
                (is_web && only_known).then_some(())?;
                Some((text("name")?.to_owned(), url, text("secret_file")?.into(), pruned))
            };
            value.as_array()?.iter().map(webhook).collect()
        });
    let mut registered = BTreeMap::new();
    for (name, url, file, pruned) in found {
        match std::fs::read_to_string(&file) {
            Ok(secret) if secret.trim().len() >= MIN_USER_SECRET => {
                let secret = secret.trim().to_owned().into();
                registered.insert(name, Registered { url, secret, pruned });
            }
            _ => {
                let wanted = format!("that {} is a file with a secret of at least 16 bytes", file.display());
                settings.refuse::<()>(WEBHOOKS_KEY, &wanted);
            }
        }
    }
    registered
}

/// The proxy that connections to push services go out through.
fn proxy(settings: &mut Reader<'_>) -> Option<Proxy> {
    let resolves: bool = settings.get("push.proxy_resolves");
    let credentials = settings.secret_file("push.proxy_credentials_file");
    let proxy: Option<Proxy> = settings.read_with(
        "push.proxy",
        "a proxy such as http://proxy.example.net:3128",
        |value| match value.as_str()? {
            "" => Some(None),
            text => text.parse().ok().map(Some),
        },
    );
    let proxy = proxy?.resolving(resolves);
    Some(match credentials {
        Some(credentials) => proxy.with_credentials(credentials.expose_secret()),
        None => proxy,
    })
}

/// How sender keys are made.
fn sender_key(settings: &mut Reader<'_>) -> SenderKey {
    let life = settings.duration("push.sender_key_life", SECOND..=HOUR * 24 * 30);
    let Size(cache) = settings.get("push.sender_key_cache");
    let rotates =
        settings.read_with("push.sender_key", "fresh or rotating", |value| match value.as_str()? {
            "fresh" => Some(false),
            "rotating" => Some(true),
            _ => None,
        });
    if rotates { SenderKey::Rotating { life, cache: cache as u64 } } else { SenderKey::Fresh }
}

fn sender(settings: &mut Reader<'_>) -> perennial_webpush::Config {
    perennial_webpush::Config {
        policy: Policy {
            hosts: settings.parse_list::<HostPattern>("push.allow_hosts", "host names, *.suffix or *"),
            networks: settings
                .parse_list::<Network>("push.allow_networks", "networks such as 10.1.0.0/16")
                .into_iter()
                .map(|Network(network)| network)
                .collect(),
            insecure: settings.get("push.allow_insecure"),
        },
        contact: None,
        http: settings.read_with("push.http", "auto, 1 or 2", |value| {
            match value.to_string().trim_matches('"') {
                "auto" => Some(HttpVersion::Auto),
                "1" => Some(HttpVersion::One),
                "2" => Some(HttpVersion::Two),
                _ => None,
            }
        }),
        extra_ca_file: settings.file("push.extra_ca_file"),
        resolve: settings.read_with(
            "push.resolve",
            "a list of { host = \"name\", addresses = [\"192.0.2.7\"] }",
            pins,
        ),
        proxy: proxy(settings),
        sender_key: sender_key(settings),
        connections: settings.number("push.connections", 1..=1000),
        streams: settings.number("push.streams", 1..=10_000),
        http1_connections: settings.number("push.http1_connections", 1..=10_000),
        max_connections: settings.number("push.max_connections", 2..=100_000),
        connect_every: settings.duration("push.connect_every", Duration::ZERO..=HOUR),
        connect_timeout: settings.duration("push.connect_timeout", MILLISECOND..=HOUR),
        timeout: settings.duration("push.timeout", SECOND..=HOUR),
    }
}

/// Whom push services may ask, or why Apple would refuse to deliver.
fn contact(settings: &mut Reader<'_>) -> Result<Contact, String> {
    let text: String = settings.get("push.contact");
    let contact = match text.as_str() {
        "" => Err("push.contact is not set".to_owned()),
        text => text.parse().map_err(|error: ContactError| format!("push.contact cannot be used: {error}")),
    };
    if contact.is_err() && settings.get("push.contact_required") {
        settings.refuse::<()>("push.contact", &ContactError::Form.to_string());
    }
    contact
}

fn pins(value: &toml::Value) -> Option<Vec<Pin>> {
    let pin = |pin: &toml::Value| {
        let host = pin.get("host")?.as_str()?.to_owned();
        let addresses = pin.get("addresses")?.as_array()?;
        let addresses =
            addresses.iter().map(|address| address.as_str()?.parse().ok()).collect::<Option<Vec<_>>>()?;
        (!addresses.is_empty()).then_some(Pin { host, addresses })
    };
    value.as_array()?.iter().map(pin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_in_the_settings_are_those_of_the_library() {
        let defaults: toml::Table = Push::DEFAULTS.parse().unwrap();
        let listed = defaults["push"]["allow_hosts"].as_array().unwrap();
        assert!(listed.iter().filter_map(|host| host.as_str()).eq(perennial_webpush::DEFAULT_HOSTS));
    }
}
