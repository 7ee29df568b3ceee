//! `perennial keys`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Subcommand;
use http::Method;
use perennial_webpush::VapidKey;
use serde_json::{Value, json};

use super::arguments::whole;
use super::desk::Desk;
use super::output::{done, json_lines, leads_nowhere, say, table, utc};
use super::{block_on, load, open_alone, print, read};
use crate::access::{self, first};
use crate::config::{Config, Store};
use crate::data_dir::{self, ADMIN_TOKEN, API_KEY, VAPID_KEY};
use crate::module::Blueprint;
use crate::push;
use crate::settings::{Settings, Sources};
use crate::sites;

/// The longest file of keys that is read, in bytes.
const MAX_KEY_FILE: u64 = 64 << 10;

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  perennial keys show
  perennial keys add backend --scopes notify,read --per-minute 600
  perennial keys import private_key.pem")]
pub(super) enum Keys {
    /// Make the keys that are missing: what a first start would do, and a new API key if its file is lost
    Generate,
    /// Say where the keys are, and show the public VAPID keys
    Show,
    /// Take over the VAPID key pair of another sender: pages subscribe with it from now on, and those there are go on signing for
    /// the subscriptions that were made with them
    #[command(after_help = "Examples:
  perennial keys import private_key.pem
  npx web-push generate-vapid-keys --json | perennial keys import -
  grep VAPID_ .env | perennial keys import --site shop -
It reads PEM (PKCS#8, SEC1), DER, JWK, JSON, and base64 of the private key, alone or beside the public one.")]
    Import {
        /// A file with the private key; - is standard input
        file: PathBuf,
        /// Of which site
        #[arg(long, default_value = sites::DEFAULT)]
        site: String,
    },
    /// API keys in the store, and what they may be used for
    #[command(after_help = "Example:\n  perennial keys list --json")]
    List,
    /// Make an API key, and print it: it is stored nowhere
    #[command(
        after_help = "Examples:\n  perennial keys add backend --scopes notify,read --per-minute 600\n  perennial keys add partner --site shop --scopes notify --expires-in 720h"
    )]
    Add(Add),
    /// Make another API key in the place of one, and print it; the old one goes on being good for a while
    #[command(after_help = "Example:\n  perennial keys replace backend --overlap 1h")]
    Replace(Replace),
    /// End an API key now
    #[command(after_help = "Example:\n  perennial keys revoke backend")]
    Revoke(Named),
    /// Make a new VAPID key for browsers to subscribe with; those before it go on signing for their subscriptions
    #[command(after_help = "Example:\n  perennial keys rotate --site shop")]
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
    #[arg(long, value_name = "NUMBER", value_parser = whole::<u32>)]
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
    pub(super) fn run(self, json: bool, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        data_dir::check_access(&config.data_dir)?;
        if matches!(self, Self::Add(_) | Self::Replace(_)) && leads_nowhere() {
            bail!("standard output leads nowhere: the key, which is shown once, would be lost");
        }
        match self {
            Self::Import { file, site } => {
                block_on(import(json, &file, &site, &config, &settings, modules))??;
            }
            Self::Show => show(json, &config, &settings)?,
            Self::Generate if data_dir::is_locked(&config.data_dir) => {
                show(json, &config, &settings)?;
                let files = [VAPID_KEY, API_KEY, ADMIN_TOKEN];
                if files.iter().any(|file| !config.data_dir.join(file).exists()) {
                    bail!("a server runs on {}; stop it to have a key made", config.data_dir.display());
                }
            }
            Self::Generate => block_on(generate(json, config, &settings, modules))??,
            asked => block_on(asked.ask(json, &config, &settings, modules))??,
        }
        Ok(())
    }

    /// Asks the server that runs, or does it here.
    async fn ask(
        self,
        json: bool,
        config: &Config,
        settings: &Settings,
        modules: &[Blueprint],
    ) -> anyhow::Result<()> {
        let desk = match &self {
            Self::Rotate { .. } => {
                Desk::open(config, modules, async |data_dir, store, jobs| {
                    push::vapid_routes(settings, config, &data_dir, &store, jobs).await
                })
                .await?
            }
            _ => Desk::of_keys(config, modules).await?,
        };
        let answered = self.answer(json, &desk).await;
        desk.close().await;
        answered
    }

    async fn answer(self, json: bool, desk: &Desk) -> anyhow::Result<()> {
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
            Self::List => list(json, &desk.call(Method::GET, "/keys", None).await?),
            Self::Add(Add { named, scopes, per_minute, expires_in }) => {
                let Named { name, site } = named;
                let mut body = json!({ "name": name, "site": site, "scopes": scopes,
                                       "per_minute": per_minute, "expires_in": expires_in });
                if let Some(fields) = body.as_object_mut() {
                    fields.retain(|_, value| !value.is_null());
                }
                let answer = desk.call(Method::POST, "/keys", Some(&body)).await?;
                let Err(error) = made(json, &answer) else { return Ok(()) };
                // It is stored nowhere, so that nobody could ever use it, or end it by itself.
                let path = format!("/keys/{name}/revoke");
                desk.call(Method::POST, &path, Some(&json!({ "site": site }))).await?;
                Err(error.context("the key could not be printed, and was withdrawn"))
            }
            Self::Replace(Replace { named: Named { name, site }, overlap, expires_in }) => {
                let mut body = json!({ "site": site, "overlap": &overlap });
                if let Some(life) = expires_in {
                    body["expires_in"] = life.into();
                }
                let answer = desk.call(Method::POST, &format!("/keys/{name}/replace"), Some(&body)).await?;
                made(json, &answer).with_context(|| format!("the new key of {name} could not be printed, so that it is in no hands; the old one is good for {overlap}: replace it again before"))
            }
            Self::Revoke(Named { name, site }) => {
                let path = format!("/keys/{name}/revoke");
                desk.call(Method::POST, &path, Some(&json!({ "site": site }))).await?;
                let words = format!(
                    "{name} has ended. Where replicas share no Redis, one that has just seen it takes it for 15 s more.\n"
                );
                done(json, &json!({ "name": name, "site": site, "revoked": true }), &words)
            }
            Self::Rotate { site } => {
                let body = json!({ "site": site });
                let answer = desk.call(Method::POST, "/vapid/rotate", Some(&body)).await?;
                let key = answer["key"].as_str().unwrap_or_default();
                let words = format!(
                    "VAPID public key  {key}\nPages get it within a minute; subscriptions keep the one they were made with.\n"
                );
                done(json, &answer, &words)
            }
            Self::Generate | Self::Show | Self::Import { .. } => Ok(()),
        }
    }
}

/// Nothing but the key goes to standard output, so that it can be put where it belongs.
fn made(json: bool, answer: &Value) -> anyhow::Result<()> {
    let text = if json {
        format!("{answer}\n")
    } else {
        let ends = match &answer["ends_at"] {
            Value::Null => String::new(),
            at => format!(", and ends at {}", utc(at)),
        };
        eprintln!("This key is shown once, is stored nowhere{ends}:");
        format!("{}\n", answer["key"].as_str().unwrap_or_default())
    };
    // A pipe that nobody reads is no place for a key that is shown once.
    let mut out = std::io::stdout().lock();
    Ok(out.write_all(text.as_bytes()).and_then(|()| out.flush())?)
}

fn list(json: bool, keys: &Value) -> anyhow::Result<()> {
    let keys = keys.as_array().map(Vec::as_slice).unwrap_or_default();
    if json {
        return print(&json_lines(keys));
    }
    let row = |key: &Value| {
        let word = |field: &str| key[field].as_str().unwrap_or_default().to_owned();
        let scopes: Vec<&str> =
            key["scopes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let limit = key["per_minute"].as_u64().map_or("no limit".to_owned(), |limit| limit.to_string());
        let ends = match (&key["ends_at"], key["has_ended"] == true) {
            (Value::Null, _) => "never".to_owned(),
            (at, true) => format!("{} (ended)", utc(at)),
            (at, false) => utc(at),
        };
        [word("site"), word("name"), scopes.join(","), limit, ends]
    };
    print(&table(["SITE", "NAME", "SCOPES", "PER MINUTE", "ENDS"], keys.iter().map(row)))
}

/// Takes over a key pair: through the server that runs, or in the store while none does, also before the first start.
async fn import(
    json: bool,
    file: &Path,
    site: &str,
    config: &Config,
    settings: &Settings,
    modules: &[Blueprint],
) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    let mut input: Box<dyn Read> = match file.as_os_str() == "-" {
        true => Box::new(std::io::stdin()),
        false => Box::new(File::open(file).with_context(|| format!("{} cannot be read", file.display()))?),
    };
    input.by_ref().take(MAX_KEY_FILE).read_to_end(&mut bytes)?;
    let key =
        VapidKey::import(&bytes).with_context(|| format!("{}: nothing was imported", file.display()))?;
    if data_dir::is_locked(&config.data_dir) {
        let desk = Desk::of_keys(config, modules).await?;
        let body = json!({ "site": site, "pem": key.to_pem()? });
        let answer = desk.call(Method::POST, "/vapid/import", Some(&body)).await;
        desk.close().await;
        answer?;
    } else {
        let (data_dir, store) = open_alone(config, modules).await?;
        let imported = push::import_key(settings, site, &data_dir, &store, &key).await;
        store.close().await;
        imported?;
    }
    let key = key.public_key();
    let words = format!(
        "VAPID public key  {key}\nPages of the site {site} subscribe with it within a minute; subscriptions that are there keep the key that they were made with.\n"
    );
    done(json, &json!({ "site": site, "key": key }), &words)
}

async fn generate(
    json: bool,
    config: Config,
    settings: &Settings,
    modules: &[Blueprint],
) -> anyhow::Result<()> {
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
    if !json {
        for (label, value) in shown {
            say!("{label:<18}  {value}");
        }
    }
    show(json, &config, settings)
}

/// The public half of the key in use, if this is a file of VAPID keys.
fn public_key(file: &Path) -> Option<String> {
    let pem = std::fs::read_to_string(file).ok()?;
    Some(VapidKey::from_pem(&pem).ok()?.public_key())
}

/// A file that keys are in.
struct KeyFile {
    label: String,
    path: PathBuf,
    /// Whether the store has the key unless the file is there.
    is_in_store: bool,
}

impl KeyFile {
    fn json(&self) -> Value {
        let mut shown = json!({ "key": self.label, "file": self.path, "exists": self.path.exists() });
        if let Some(public) = public_key(&self.path) {
            shown["public"] = public.into();
        }
        shown
    }

    /// Lines of what it is and where: never the secrets themselves.
    fn lines(&self) -> Vec<(String, String)> {
        let Self { label, path, is_in_store } = self;
        let place = match (path.exists(), is_in_store) {
            (true, _) => "",
            (false, true) => "in the store, unless there is ",
            (false, false) => "none yet: ",
        };
        let public = public_key(path).map(|key| (format!("{label}, public"), key));
        public.into_iter().chain([(label.clone(), format!("{place}{}", path.display()))]).collect()
    }
}

fn show(json: bool, config: &Config, settings: &Settings) -> anyhow::Result<()> {
    let is_shared = matches!(config.store, Store::Postgres(_));
    let vapid = push::vapid_files(settings).into_iter().map(|(file, name)| {
        let label = if name == VAPID_KEY { "VAPID key pair".to_owned() } else { name };
        (label, file, is_shared)
    });
    let own = [("API key", API_KEY), ("admin token", ADMIN_TOKEN)];
    let own = own.map(|(label, file)| (label.to_owned(), file.to_owned(), false));
    let files = vapid.chain(own).map(|(label, file, is_in_store)| KeyFile {
        label,
        path: config.data_dir.join(file),
        is_in_store,
    });
    if json {
        return print(&json_lines(&files.map(|file| file.json()).collect::<Vec<_>>()));
    }
    let lines: Vec<(String, String)> = files.flat_map(|file| file.lines()).collect();
    let width = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or_default();
    for (label, value) in lines {
        say!("{label:<width$}  {value}");
    }
    say!("Keep a copy of the VAPID keys: every subscription is bound to one, and losing it loses them all.");
    Ok(())
}
