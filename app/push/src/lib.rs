//! Web push as a module of the host, which it uses by the same interfaces as any other module.
//!
//! ```text
//! api/        the routes: subscriptions, POST /notify, progress, operators
//! delivery/   the jobs: an audience is cut into batches and sent to, and its outcomes are recorded
//! pacing/     the time at which the next message may be sent
//! model/      values and decisions
//! store/      the tables, and every statement on them
//! commands/   the commands; sink/ is a push service to try web push with
//! ```

mod api;
mod census;
mod commands;
mod config;
mod delivery;
mod metrics;
mod model;
mod offline;
mod pacing;
mod retention;
mod scopes;
pub mod sink;
mod store;
#[cfg(feature = "testing")]
pub mod testing;
mod vapid;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use perennial_host::access::Scope;
use perennial_host::command::Commands;
use perennial_host::data_dir::DataDir;
use perennial_host::http_client::Target;
use perennial_host::module::{Host, Module, Provides, SecretFile};
use perennial_host::settings::{Reader, Settings};
use perennial_host::sites::{self, Sites};
use perennial_store::pool::sql;
use perennial_webpush::Contact;
use secrecy::ExposeSecret;
use serde_json::json;
use tracing::warn;

use api::import::Transfer;
pub use api::notify::{Notification, Notified, PushHandle};
use api::{ApiState, guests, import, limits};
use config::Config;
use delivery::DeliveryContext;
use delivery::senders::Senders;
use delivery::services::HeldServices;
use delivery::webhook::Webhooks;
use model::profile::{self, Profile, Profiles};
use pacing::active::Flows;
pub use perennial_webpush::Urgency;
use store::PushStore;
use vapid::VapidKeys;

/// Validity of the page's token.
const PAGE_TOKEN: Duration = Duration::from_secs(3600);

/// The webhooks, whose URLs operators choose.
const WEBHOOKS: Target = Target::any("push-webhooks").internal();

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

impl Module for Push {
    const NAME: &'static str = "push";
    const DEFAULTS: &'static str = include_str!("../../../config/push.toml");
    const MIGRATIONS: &'static [&'static str] = store::SQLITE;
    const POSTGRES_MIGRATIONS: &'static [&'static str] = store::POSTGRES;
    const SCOPES: &'static [Scope] = &[scopes::SUBSCRIBE, scopes::NOTIFY];

    const TARGETS: &'static [Target] = &[WEBHOOKS];

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
        let mut made = Vec::new();
        for (name, place) in profile::places(&mut Reader::new(settings)) {
            let Some(site) = sites.named(&name) else { continue };
            let label = match name.as_str() {
                sites::DEFAULT => "VAPID public key".to_owned(),
                name => format!("{name}: VAPID key"),
            };
            let key = vapid::make(data_dir, store, site.id, &place).await?;
            made.push((label, key.public_key()));
        }
        Ok(made)
    }

    fn configure(settings: &mut Reader<'_>) -> Self {
        let contact = config::contact(settings);
        let sender = config::sender(settings);
        Self {
            config: config::config(settings, sender.timeout),
            sender,
            profiles: profile::read(settings, contact.as_ref().ok()),
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
        if let Err(reason) = &self.contact {
            warn!(reason, "Apple refuses messages without a contact");
        }
        metrics::describe();
        let (limits, guests) = (self.limits, self.guests);
        let delivery = Arc::new(self.delivery(host).await?);
        delivery.services.at_risk.look(&delivery).await?;
        let api = ApiState::new(host, &delivery, limits, guests);
        api::mount(host, &api);
        delivery::mount(host, &delivery);
        retention::mount(host, &delivery.store, delivery.config.retention)?;
        let (store, senders) = (delivery.store.clone(), delivery.senders.any().clone());
        let transfer = Transfer::new(store, senders, Arc::clone(&delivery.vapid), host.sites.clone());
        host.admin_write(import::admin_write(Arc::new(transfer)));
        host.task("push census", {
            let (store, profiles) = (delivery.store.clone(), delivery.profiles.clone());
            let drain = host.drain.clone();
            move || census::run(store.clone(), profiles.clone(), drain.clone())
        });
        if delivery.config.page && host.prefix.is_empty() {
            announce_page(host);
        }
        host.provide::<Self>(PushHandle::new(api.clone()));
        host.status(Self::NAME, move || status(&api, &delivery.vapid));
        Ok(())
    }
}

impl Provides for Push {
    type Handle = PushHandle;
}

impl Push {
    /// Makes the context of deliveries: it opens the keys, and starts the threads that send.
    async fn delivery(self, host: &mut Host) -> anyhow::Result<DeliveryContext> {
        let store = PushStore::new(host.store.clone(), host.jobs.clone());
        let profiles = Profiles::of(self.profiles, &host.sites);
        let vapid = VapidKeys::open(&host.data_dir, &host.store, &store, &profiles, &host.caches).await?;
        let senders = Senders::start(self.sender, self.config.threads)?;
        let flows = Flows::new(store.clone(), self.config.origin_rate);
        let webhooks = profiles.iter().map(|(site, profile)| (*site, profile.webhooks.clone())).collect();
        Ok(DeliveryContext {
            config: Arc::new(self.config),
            store,
            profiles,
            vapid: Arc::new(vapid),
            senders,
            flows,
            services: Arc::new(HeldServices::default()),
            webhooks: Webhooks::new(webhooks, host.http_client(WEBHOOKS.name())?),
            progress: delivery::progress::ProgressRates::default(),
            meters: metrics::Meters::new(),
        })
    }
}

/// Prints the address of the page at the terminal, with a token that lets it send.
fn announce_page(host: &mut Host) {
    let token = host.access.issue("page", &[scopes::SUBSCRIBE, scopes::NOTIFY, Scope::READ], PAGE_TOKEN);
    host.announce(move |base| {
        format!(
            "Open this page, good for an hour, and send yourself a notification:\n  {base}/#key={}",
            token.expose_secret()
        )
    });
}

/// The status that `GET /modules` shows.
fn status(api: &ApiState, vapid: &VapidKeys) -> serde_json::Value {
    let known = vapid.known();
    let keys = known.iter().map(|(site, keys)| (site, keys.current.public_key()));
    let (addresses_limited, followers) = api.counts();
    json!({
        "vapid_keys": keys.collect::<BTreeMap<_, _>>(),
        "addresses_limited": addresses_limited,
        "followers": followers,
    })
}
