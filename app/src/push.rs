//! The hosted application: web push. It comes in through the same [`Module`] as any other.
//!
//! ```text
//! subscriptions.rs  POST /subscriptions ─► store
//! notify.rs         POST /notify ────────► store + job, one transaction ─► 202
//! fanout.rs           push.fan_out: the audience, cut into ranges of ids
//! deliver.rs          push.deliver: one range, sent, checkpointed
//! progress.rs       GET /notifications/{id} ◄── store
//! ```

mod audience;
mod deliver;
mod fanout;
mod limits;
mod metrics;
mod notify;
mod outcome;
mod page;
mod progress;
mod store;
mod subscriptions;
mod tags;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::extract::FromRef;
use perennial_server::http::detach::Detach;
use perennial_server::pool::sql::{self, Dialect};
use perennial_webpush::{Contact, ContactError, HostPattern, HttpVersion, Pin, Policy, Sender, VapidKey};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tracing::{info, warn};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::access::{self, Access, Scope, SiteId};
use crate::data_dir::{DataDir, VAPID_KEY};
use crate::module::{Host, Module};
use crate::settings::{Network, Reader};
use limits::Limits;
use progress::Progress;
use store::Store;

/// Cuts audiences into batches.
const FAN_OUT_QUEUE: &str = "push-fan-out";
/// Sends the batches of big notifications.
const BULK_QUEUE: &str = "push";
/// Sends small notifications: never behind a big one.
const SMALL_QUEUE: &str = "push-small";
/// Sends what is tried again, and takes no place of what is tried first.
const RETRY_QUEUE: &str = "push-retry";
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
    sender: Sender,
    vapid: VapidKey,
    vapid_id: i64,
    limits: Limits,
    progress: Progress,
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
        let key = match store.dialect() {
            Dialect::Sqlite => vapid_key(data_dir, store).await?,
            Dialect::Postgres => share_vapid_key(data_dir, store).await?,
        };
        Ok(vec![("VAPID public key", key.public_key())])
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
        let vapid = vapid_key(&host.data_dir, &host.store).await?;
        let vapid_id = store.vapid_key(SiteId::DEFAULT.0, *vapid.public_bytes()).await?;
        let orphans = store.made_with_other_keys(vapid_id).await?;
        if orphans > 0 {
            warn!(
                subscriptions = orphans,
                "made with another VAPID key: push services will refuse ours for them"
            );
        }
        let sender = Sender::new(self.sender).context("the sender cannot be made (push.extra_ca_file)")?;
        let application = Arc::new(Application {
            config: self.config,
            store,
            access: host.access.clone(),
            sender: sender.clone(),
            vapid,
            vapid_id,
            limits: Limits::new(self.limits),
            progress: Progress::default(),
            in_flight: notify::InFlight::default(),
        });

        host.routes(routes(&application));
        host.serve_queue(FAN_OUT_QUEUE, FAN_OUTS);
        host.serve_queue(BULK_QUEUE, application.config.batches);
        host.serve_queue(SMALL_QUEUE, application.config.small_batches);
        host.serve_queue(RETRY_QUEUE, application.config.retry_batches);
        host.job::<fanout::FanOut>(Arc::clone(&application));
        host.job::<deliver::Deliver>(Arc::clone(&application));
        host.task("push limits", {
            let (application, drain) = (Arc::clone(&application), host.drain.clone());
            move || Arc::clone(&application).forget_limits(drain.clone())
        });
        host.status(Self::NAME, {
            let application = Arc::clone(&application);
            move || json!({ "vapid_key": application.vapid.public_key(), "addresses_limited": application.limits.len() })
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
        host.at_close(async move { sender.close().await });
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

    /// Forgets the addresses that have kept within their limits, until nothing new is taken.
    async fn forget_limits(self: Arc<Self>, drain: perennial_server::drain::Drain) -> anyhow::Result<()> {
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
        .routes(routes!(progress::one));
    if application.config.page {
        routes = routes.merge(page::routes().into());
    }
    routes.with_state(Arc::clone(application))
}

/// The key pair in the data directory. A first one is made, but never a second: whoever lost the first has
/// lost its subscribers, and should hear of it.
async fn vapid_key(data_dir: &DataDir, store: &sql::Store) -> anyhow::Result<VapidKey> {
    let file = data_dir.join(VAPID_KEY);
    if store.dialect() == Dialect::Postgres && !file.exists() {
        let shared = access::shared_secret(store, VAPID_KEY).await?;
        let shared = shared
            .context("there is no VAPID key in the store: make it once, with `perennial keys generate`")?;
        return VapidKey::from_pem(shared.expose_secret())
            .context("the VAPID key in the store cannot be used");
    }
    if !file.exists() && store::has_subscriptions(store).await? {
        anyhow::bail!(
            "{} is missing, and the stored subscriptions were made with it: restore the file, \
             or delete the subscriptions with the store",
            file.display()
        );
    }
    let new = VapidKey::generate()?.to_pem()?;
    let (pem, made) = data_dir.secret(VAPID_KEY, || new)?;
    if made {
        info!(file = %file.display(), "made the VAPID key pair; losing it loses every subscriber");
    }
    VapidKey::from_pem(&pem).with_context(|| format!("{} cannot be used", file.display()))
}

/// The key pair that all replicas share: the file's if there is one, or the one that is stored, or a new one.
async fn share_vapid_key(data_dir: &DataDir, store: &sql::Store) -> anyhow::Result<VapidKey> {
    let pem = match data_dir.read(VAPID_KEY) {
        Some(pem) => pem,
        None => VapidKey::generate()?.to_pem()?,
    };
    let pem = access::share_secret(store, VAPID_KEY, &pem).await?;
    Ok(VapidKey::from_pem(pem.expose_secret())?)
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
        // The rest of that phase is for writing down what they were.
        last_sends: (settings.get::<Duration>("drain.hard") / 2).min(2 * SECOND),
        checkpoint_every: settings.duration("push.checkpoint.every", MILLISECOND..=HOUR),
        checkpoint_sends: settings.number("push.checkpoint.sends", 1..=100_000),
    }
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
        connections: settings.number("push.connections", 1..=1000),
        streams: settings.number("push.streams", 1..=10_000),
        http1_connections: settings.number("push.http1_connections", 1..=10_000),
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
