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
mod commands;
mod config;
mod deliver;
mod dumps;
mod fanout;
mod flows;
mod followers;
mod guests;
mod import;
mod lifecycle;
mod limits;
mod metrics;
mod notify;
mod offline;
mod outcome;
mod pace;
mod page;
mod profile;
mod progress;
mod refusals;
mod retention;
mod round;
mod schedule;
mod scopes;
mod send;
mod senders;
mod services;
pub mod sink;
mod store;
mod subscriptions;
mod tags;
mod template;
mod user_token;
mod users;
mod vapid;
mod webhook;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use axum::extract::FromRef;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
use perennial_server::http::detach::Detach;
use perennial_server::http::problem::Problem;
use perennial_store::cache::{self, Cache, Kept};
use perennial_store::pool::sql;
use perennial_webpush::Contact;
use secrecy::ExposeSecret;
use serde_json::json;
use tracing::{info, warn};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use audience::Audience;
use config::Config;
use flows::Flows;
use followers::Followers;
use guests::Guests;
use import::Transfer;
use limits::Limits;
use perennial_host::access::{Access, Scope};
use perennial_host::api::not_found;
use perennial_host::command::Commands;
use perennial_host::data_dir::DataDir;
use perennial_host::module::{Host, Module, SecretFile};
use perennial_host::settings::{Reader, Settings};
use perennial_host::sites::{self, SiteId, Sites};
use profile::Profile;
use progress::Progress;
use senders::Senders;
use store::Store;
use vapid::VapidKeys;
use webhook::Webhooks;

/// Cuts audiences into batches.
const FAN_OUT_QUEUE: &str = "push-fan-out";
/// Sends the batches of big notifications.
const BULK_QUEUE: &str = "push";
/// Sends small notifications: never behind a big one.
const SMALL_QUEUE: &str = "push-small";
/// Sends what is tried again, and takes no place of what is tried first.
const RETRY_QUEUE: &str = "push-retry";
/// Sends what waits for push services that bear little, and takes no place of what could go at once.
const SLOW_QUEUE: &str = "push-slow";
/// Sends what has a rate: such a job mostly waits.
const PACED_QUEUE: &str = "push-paced";
/// Tells the backend.
const WEBHOOK_QUEUE: &str = "push-webhook";
/// How many requests to the backend at once.
const WEBHOOKS: usize = 8;
/// How many audiences are cut at once.
const FAN_OUTS: usize = 4;
/// How soon a job is looked at again that is about a site which this process does not serve: another one may, of the version
/// that is just being rolled out.
const NOT_SERVED: Duration = Duration::from_secs(30);
/// How often subscriptions are counted for the gauge.
const CENSUS_EVERY: Duration = Duration::from_secs(60);
/// How long the page's token is good for.
const PAGE_TOKEN: Duration = Duration::from_secs(3600);

/// How many members big audiences have. A count that is a few seconds old decides nothing but how the notification is
/// cut; who its members are is read when it is sent.
const COUNTS: cache::Config = cache::Config {
    name: "audience_counts",
    bytes: 4 << 20,
    ttl: Duration::from_secs(10),
    negative_ttl: Duration::ZERO,
    stale: Duration::ZERO,
};

/// The module, with its settings read.
#[derive(Debug)]
pub struct Push {
    config: Config,
    contact: Result<Contact, String>,
    sender: perennial_webpush::Config,
    limits: limits::Config,
    guests: guests::Config,
    profiles: Vec<Profile>,
}

/// Everything that routes and jobs work with.
#[derive(Debug)]
pub(crate) struct Application {
    config: Config,
    store: Store,
    access: Access,
    senders: Senders,
    flows: Flows,
    profiles: Arc<HashMap<SiteId, Profile>>,
    counts: Cache<Count>,
    vapid: Arc<VapidKeys>,
    transfer: Arc<Transfer>,
    webhooks: Webhooks,
    limits: Limits,
    guests: Guests,
    progress: Progress,
    at_risk: services::AtRisk,
    /// An operator has said something about a push service here.
    services_changed: AtomicBool,
    followers: Followers,
    meters: metrics::Meters,
    in_flight: notify::InFlight,
}

/// How many members an audience has.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    /// As many as there are at most, if they could not be counted in time.
    members: u64,
    is_exact: bool,
    is_small: bool,
}

impl Kept for Count {
    fn bytes(&self) -> usize {
        size_of::<Self>()
    }

    /// Small ones are counted in no time; and whoever has just subscribed is to be among them.
    fn is_kept(&self) -> bool {
        !self.is_small
    }
}

/// A cheap handle on it.
#[derive(Clone, Debug)]
pub(crate) struct Tools(Arc<Application>);

impl std::ops::Deref for Tools {
    type Target = Application;

    fn deref(&self) -> &Application {
        &self.0
    }
}

impl FromRef<Tools> for Access {
    fn from_ref(tools: &Tools) -> Self {
        tools.access.clone()
    }
}

impl Module for Push {
    const NAME: &'static str = "push";
    const DEFAULTS: &'static str = include_str!("../../../config/push.toml");
    const MIGRATIONS: &'static [&'static str] = store::SQLITE;
    const POSTGRES_MIGRATIONS: &'static [&'static str] = store::POSTGRES;
    const SCOPES: &'static [Scope] = &[scopes::SUBSCRIBE, scopes::NOTIFY];

    fn commands() -> Commands {
        commands::all()
    }

    fn files(settings: &Settings) -> Vec<SecretFile> {
        offline::files(settings)
    }

    async fn keys(
        settings: &Settings,
        sites: &Sites,
        data_dir: &DataDir,
        store: &sql::Store,
    ) -> anyhow::Result<Vec<(String, String)>> {
        let profiles = profile::read(&mut Reader::new(settings));
        let mut made = Vec::new();
        for (profile, site) in
            profiles.iter().filter_map(|profile| Some((profile, sites.named(&profile.name)?)))
        {
            let label = match profile.name.as_str() {
                sites::DEFAULT => "VAPID public key".to_owned(),
                name => format!("{name}: VAPID key"),
            };
            let key = vapid::make(data_dir, store, site.id, &profile.vapid).await?;
            made.push((label, key.public_key()));
        }
        Ok(made)
    }

    fn configure(settings: &mut Reader<'_>) -> Self {
        let contact = config::contact(settings);
        Self {
            config: config::config(settings),
            sender: config::sender(settings),
            profiles: profile::read_with(settings, contact.as_ref().ok()),
            contact,
            guests: config::guests(settings),
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
        let profiles = Arc::new(profile::by_site(self.profiles, &host.sites));
        let vapid = VapidKeys::open(&host.data_dir, &host.store, &store, &profiles, &host.caches).await?;
        let vapid = Arc::new(vapid);
        let senders = Senders::start(self.sender, self.config.threads)?;
        let flows = Flows::new(store.clone(), self.config.origin_rate);
        let transfer =
            Transfer::new(store.clone(), senders.any().clone(), Arc::clone(&vapid), host.sites.clone());
        let webhooks = profiles.iter().map(|(site, profile)| (*site, profile.webhooks.clone())).collect();
        let webhooks = Webhooks::new(webhooks)?;
        let application = Tools(Arc::new(Application {
            followers: Followers::new(self.config.followers_per_key),
            config: self.config,
            store,
            access: host.access.clone(),
            senders: senders.clone(),
            flows: flows.clone(),
            profiles,
            counts: host.caches.make(COUNTS),
            vapid,
            transfer: Arc::new(transfer),
            webhooks,
            limits: Limits::new(self.limits),
            guests: Guests::new(self.guests),
            progress: Progress::default(),
            at_risk: services::AtRisk::default(),
            services_changed: AtomicBool::new(false),
            meters: metrics::Meters::new(),
            in_flight: notify::InFlight::default(),
        }));

        application.at_risk.look(&application).await?;
        host.routes(routes(&application));
        host.serve_queue(FAN_OUT_QUEUE, FAN_OUTS);
        host.serve_queue(BULK_QUEUE, application.config.batches);
        host.serve_queue(SMALL_QUEUE, application.config.small_batches);
        host.serve_queue(RETRY_QUEUE, application.config.retry_batches);
        host.serve_queue(SLOW_QUEUE, application.config.retry_batches);
        host.serve_queue(PACED_QUEUE, application.config.paced_batches);
        host.serve_queue(WEBHOOK_QUEUE, WEBHOOKS);
        host.job::<webhook::Webhook>(application.clone());
        host.job::<close::Close>(application.clone());
        host.job::<fanout::FanOut>(application.clone());
        host.job::<deliver::Deliver>(application.clone());
        retention::mount(host, &application)?;
        host.admin_read(services::admin_read(application.clone()));
        host.admin_write(services::admin_write(application.clone()));
        host.admin_write(import::admin_write(Arc::clone(&application.transfer)));
        host.admin_write(vapid::admin_write(Arc::clone(&application.vapid)));
        host.task("push limits", {
            let (application, drain) = (application.clone(), host.drain.clone());
            move || forget_limits(application.clone(), drain.clone())
        });
        host.task("push census", {
            let (application, drain) = (application.clone(), host.drain.clone());
            move || count_subscriptions(application.clone(), drain.clone())
        });
        host.task("push flows", {
            let drain = host.drain.clone();
            move || flows.clone().run(drain.clone())
        });
        host.task("push followers", {
            let (application, drain) = (application.clone(), host.drain.clone());
            move || application.followers.clone().run(application.clone(), drain.clone())
        });
        host.task("push services", {
            let (application, drain) = (application.clone(), host.drain.clone());
            move || services::run(application.clone(), drain.clone())
        });
        host.status(Self::NAME, {
            let application = application.clone();
            move || {
                let known = application.vapid.known();
                let keys = known.iter().map(|(site, keys)| (site, keys.current.public_key()));
                json!({
                    "vapid_keys": keys.collect::<BTreeMap<_, _>>(),
                    "addresses_limited": application.limits.len(),
                    "followers": application.followers.len(),
                })
            }
        });
        if application.config.page {
            let token =
                host.access.issue("page", &[scopes::SUBSCRIBE, scopes::NOTIFY, Scope::READ], PAGE_TOKEN);
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
    /// What web push has of a site.
    fn profile(&self, site: SiteId) -> Result<&Profile, Problem> {
        // Callers are of sites that are served.
        self.profiles.get(&site).ok_or_else(|| not_found("site"))
    }

    /// How many subscriptions an audience has now, about, and the highest id among all of its site: members are those
    /// up to it.
    async fn estimate(&self, site: SiteId, audience: &Audience) -> Result<(Count, i64), Arc<sql::Error>> {
        let watermark = self.store.watermark(site.0).await?;
        let load = async {
            let count = async |audience| self.store.count(site.0, audience, watermark).await;
            let counted = count(audience).await?;
            let members = match counted {
                Some(members) => members,
                // No more than all; of these there are no more than were ever stored.
                None => count(&Audience::All).await?.unwrap_or(u64::try_from(watermark).unwrap_or_default()),
            };
            let is_exact = counted.is_some();
            Ok(Some(Count { members, is_exact, is_small: is_exact && self.config.is_small(members) }))
        };
        let count = self
            .counts
            .get(&format!("{} {}", site.0, serde_json::to_string(audience).unwrap_or_default()), load)
            .await?;
        Ok((count.unwrap_or_default(), watermark))
    }

    /// Says in the log how a notification went.
    async fn ended(&self, notification: Uuid, site: i64) {
        let Ok(Some(ended)) = self.store.notification(site, notification).await else { return };
        let outcomes = ended.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}"));
        let outcomes = outcomes.collect::<Vec<_>>().join(", ");
        let took = ended.ended_at.unwrap_or(ended.created_at).duration_since(ended.created_at);
        info!(%notification, outcomes, took_ms = took.as_millis(), "notification done");
    }
}

/// Keeps the gauges of subscriptions, until nothing new is taken. A site with more than can be counted in time keeps its
/// last number.
async fn count_subscriptions(tools: Tools, drain: Drain) -> anyhow::Result<()> {
    loop {
        for (site, profile) in tools.profiles.iter() {
            // A store that is away is counted later.
            let Ok(watermark) = tools.store.watermark(site.0).await else { break };
            if let Ok(Some(count)) = tools.store.count(site.0, &Audience::All, watermark).await {
                metrics::subscriptions(&profile.name, count);
            }
        }
        tokio::select! {
            () = pulse(CENSUS_EVERY) => {}
            () = drain.soft() => return Ok(()),
        }
    }
}

/// Forgets the addresses that have kept within their limits, until nothing new is taken.
async fn forget_limits(tools: Tools, drain: Drain) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = tokio::time::sleep(limits::FORGET_EVERY) => tools.limits.forget(),
            () = drain.soft() => return Ok(()),
        }
    }
}

fn routes(application: &Tools) -> OpenApiRouter {
    let from_pages = OpenApiRouter::new()
        .routes(routes!(subscriptions::key))
        .routes(routes!(subscriptions::subscribe, subscriptions::unsubscribe, subscriptions::list))
        .layer(subscriptions::cors(application.access.sites()));
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
    routes.with_state(application.clone())
}
