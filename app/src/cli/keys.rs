//! `perennial keys`.

use anyhow::bail;
use clap::Subcommand;
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::desk::Desk;
use super::{block_on, load, open_alone, print, read};
use crate::access::{self, first};
use crate::config::{Config, Store};
use crate::data_dir::{self, ADMIN_TOKEN, API_KEY, VAPID_KEY};
use crate::module::Blueprint;
use crate::push;
use crate::settings::{Settings, Sources};
use crate::sites;

#[derive(Debug, Subcommand)]
pub(super) enum Keys {
    /// Make the keys that are missing: what a first start would do, and a new API key if its file is lost
    Generate,
    /// Say where the keys are
    Show,
    /// API keys in the store, and what they may be used for
    List,
    /// Make an API key, and print it: it is stored nowhere
    Add(Add),
    /// Make another API key in the place of one, and print it; the old one goes on being good for a while
    Replace(Replace),
    /// End an API key now
    Revoke(Named),
    /// Make a new VAPID key for browsers to subscribe with; those before it go on signing for their subscriptions
    Rotate {
        /// Of which site
        #[arg(long, default_value = sites::DEFAULT)]
        site: String,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// What it is called
    name: String,
    /// Of which site
    #[arg(long, default_value = sites::DEFAULT)]
    site: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Add {
    #[command(flatten)]
    named: Named,
    /// What for: subscribe, notify, read, jobs; all of them without this
    #[arg(long, value_delimiter = ',')]
    scopes: Option<Vec<String>>,
    /// How many requests a minute
    #[arg(long, value_name = "NUMBER")]
    per_minute: Option<u32>,
    /// When it ends, such as 720h; never without this
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Replace {
    #[command(flatten)]
    named: Named,
    /// How long the old one is good
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    overlap: String,
    /// When the new one ends, such as 720h; with the old one's end, if it has one, without this
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

impl Keys {
    pub(super) fn run(self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        match self {
            Self::Show => show(&config, &settings),
            Self::Generate if data_dir::is_locked(&config.data_dir) => {
                show(&config, &settings);
                let files = [VAPID_KEY, API_KEY, ADMIN_TOKEN];
                if files.iter().any(|file| !config.data_dir.join(file).exists()) {
                    bail!("a server runs on {}; stop it to have a key made", config.data_dir.display());
                }
            }
            Self::Generate => block_on(generate(config, &settings, modules))??,
            asked => block_on(asked.ask(&config, &settings, modules))??,
        }
        Ok(())
    }

    /// Asks the server that runs, or does it here.
    async fn ask(self, config: &Config, settings: &Settings, modules: &[Blueprint]) -> anyhow::Result<()> {
        let desk = match &self {
            Self::Rotate { .. } => {
                Desk::open(config, modules, async |data_dir, store, jobs| {
                    push::vapid_routes(settings, config, &data_dir, &store, jobs).await
                })
                .await?
            }
            _ => Desk::of_keys(config, modules).await?,
        };
        let answered = self.answer(&desk).await;
        desk.close().await;
        answered
    }

    async fn answer(self, desk: &Desk) -> anyhow::Result<()> {
        let named = match &self {
            Self::Add(Add { named, .. }) | Self::Replace(Replace { named, .. }) | Self::Revoke(named) => {
                Some(named)
            }
            _ => None,
        };
        if named.is_some_and(|named| !access::keys::is_name(&named.name)) {
            bail!("NAME: wanted {}", access::keys::NAME_WANTED);
        }
        match self {
            Self::List => list(&desk.call(Method::GET, "/keys", None).await?),
            Self::Add(Add { named, scopes, per_minute, expires_in }) => {
                let Named { name, site } = named;
                let mut body = json!({ "name": name, "site": site, "scopes": scopes,
                                       "per_minute": per_minute, "expires_in": expires_in });
                if let Some(fields) = body.as_object_mut() {
                    fields.retain(|_, value| !value.is_null());
                }
                made(&desk.call(Method::POST, "/keys", Some(&body)).await?)
            }
            Self::Replace(Replace { named: Named { name, site }, overlap, expires_in }) => {
                let mut body = json!({ "site": site, "overlap": overlap });
                if let Some(life) = expires_in {
                    body["expires_in"] = life.into();
                }
                made(&desk.call(Method::POST, &format!("/keys/{name}/replace"), Some(&body)).await?)
            }
            Self::Revoke(Named { name, site }) => {
                let path = format!("/keys/{name}/revoke");
                desk.call(Method::POST, &path, Some(&json!({ "site": site }))).await?;
                print(&format!(
                    "{name} has ended. Where replicas share no Redis, one that has just seen it takes it for 15 s more.\n"
                ))
            }
            Self::Rotate { site } => {
                let body = json!({ "site": site });
                let answer = desk.call(Method::POST, "/vapid/rotate", Some(&body)).await?;
                let key = answer["key"].as_str().unwrap_or_default();
                print(&format!(
                    "VAPID public key  {key}\nPages get it within a minute; subscriptions keep the one they were made with.\n"
                ))
            }
            Self::Generate | Self::Show => Ok(()),
        }
    }
}

/// Nothing but the key goes to standard output, so that it can be put where it belongs.
fn made(answer: &Value) -> anyhow::Result<()> {
    let ends = answer["ends_at"].as_str().map_or(String::new(), |at| format!(", and ends at {at}"));
    eprintln!("This key is shown once, is stored nowhere{ends}:");
    print(&format!("{}\n", answer["key"].as_str().unwrap_or_default()))
}

fn list(keys: &Value) -> anyhow::Result<()> {
    let mut text = format!("{:<16} {:<24} {:<28} {:>10}  ENDS\n", "SITE", "NAME", "SCOPES", "PER MINUTE");
    for key in keys.as_array().into_iter().flatten() {
        let word = |field: &str| key[field].as_str().unwrap_or_default().to_owned();
        let scopes: Vec<&str> =
            key["scopes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let limit = key["per_minute"].as_u64().map_or("no limit".to_owned(), |limit| limit.to_string());
        let ends = match (key["ends_at"].as_str(), key["has_ended"] == true) {
            (None, _) => "never".to_owned(),
            (Some(at), has_ended) => {
                let at = at.parse::<Timestamp>().map_or(at.to_owned(), |at| format!("{at:.0}"));
                if has_ended { format!("{at} (ended)") } else { at }
            }
        };
        let (site, name, scopes) = (word("site"), word("name"), scopes.join(","));
        text.push_str(&format!("{site:<16} {name:<24} {scopes:<28} {limit:>10}  {ends}\n"));
    }
    print(&text)
}

async fn generate(config: Config, settings: &Settings, modules: &[Blueprint]) -> anyhow::Result<()> {
    let (data_dir, store) = open_alone(&config, modules).await?;
    // Who has keys in files needs none in the store.
    let needs_one = !access::keys::exist(&store).await? || !data_dir.join(API_KEY).exists();
    if config.key_files.is_empty() && needs_one {
        first::make_api_key(&data_dir, &store).await?;
    }
    first::make(&data_dir, &store, true).await?;
    let sites = config.sites.clone().open(&store).await?;
    let mut shown = Vec::new();
    for module in modules {
        shown.extend((module.keys)(settings, &sites, &data_dir, &store).await?);
    }
    store.close().await;
    for (label, value) in shown {
        println!("{label:<18}{value}");
    }
    show(&config, settings);
    Ok(())
}

/// Never the secrets themselves.
fn show(config: &Config, settings: &Settings) {
    let is_shared = matches!(config.store, Store::Postgres(_));
    let vapid = push::vapid_files(settings).into_iter().map(|(file, name)| {
        let label = if name == VAPID_KEY { "VAPID key pair".to_owned() } else { name };
        (label, file, is_shared)
    });
    let own = [("API key", API_KEY), ("admin token", ADMIN_TOKEN)];
    let own = own.map(|(label, file)| (label.to_owned(), file.to_owned(), false));
    for (label, file, is_in_store) in vapid.chain(own) {
        let file = config.data_dir.join(file);
        let place = match (file.exists(), is_in_store) {
            (true, _) => "",
            (false, true) => "in the store, unless there is ",
            (false, false) => "none yet: ",
        };
        println!("{label:<18}{place}{}", file.display());
    }
    println!(
        "Keep a copy of the VAPID keys: every subscription is bound to one, and losing it loses them all."
    );
}
