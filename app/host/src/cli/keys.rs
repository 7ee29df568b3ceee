//! `perennial keys`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use axum::{Extension, Router};
use clap::Subcommand;
use http::Method;
use serde_json::{Value, json};

use crate::access::{self, first};
use crate::admin::keys::{self, Keyring};
use crate::command::arguments::whole;
use crate::command::output::{done, json_lines, leads_nowhere, say, table, utc};
use crate::command::{AdminBackend, CommandContext, Offline, block_on, print};
use crate::config::StoreConfig;
use crate::data_dir::{ADMIN_TOKEN, API_KEY};
use crate::module::Blueprint;
use crate::sites;

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  perennial keys show
  perennial keys add backend --scopes notify,read --per-minute 600
  perennial keys list")]
pub(super) enum KeysCommand {
    /// Make the missing keys, as a first start does, and a new API key if its file is lost
    Generate,
    /// Show where the keys are, and the public part of each key that has one
    Show,
    /// List the API keys in the store, and their scopes
    #[command(after_help = "Example:\n  perennial keys list --json")]
    List,
    /// Make an API key, and print it; only its hash is stored
    #[command(
        after_help = "Examples:\n  perennial keys add backend --scopes notify,read --per-minute 600\n  perennial keys add partner --site shop --scopes notify --expires-in 720h"
    )]
    Add(Add),
    /// Replace an API key by a new one, and print it; the old key stays valid for a while
    #[command(after_help = "Example:\n  perennial keys replace backend --overlap 1h")]
    Replace(ReplaceArgs),
    /// End an API key now
    #[command(after_help = "Example:\n  perennial keys revoke backend")]
    Revoke(Named),
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// Name of the key
    name: String,
    /// Site of the key
    #[arg(long, default_value = sites::DEFAULT)]
    site: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Add {
    #[command(flatten)]
    named: Named,
    /// Scopes of the key; all of them by default
    #[arg(long, value_delimiter = ',')]
    scopes: Option<Vec<String>>,
    /// Maximum number of requests per minute
    #[arg(long, value_name = "NUMBER", value_parser = whole::<u32>)]
    per_minute: Option<u32>,
    /// Time for which the key is valid, such as 720h; without end by default
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ReplaceArgs {
    #[command(flatten)]
    named: Named,
    /// Time for which the old key stays valid
    #[arg(long, default_value = "24h", value_name = "DURATION")]
    overlap: String,
    /// Time for which the new key is valid, such as 720h; by default it keeps the end of the old key, if that has one
    #[arg(long, value_name = "DURATION")]
    expires_in: Option<String>,
}

impl KeysCommand {
    pub(super) fn run(self, context: &CommandContext, modules: &[Blueprint]) -> anyhow::Result<()> {
        context.check_access()?;
        if matches!(self, Self::Add(_) | Self::Replace(_)) && leads_nowhere() {
            bail!("standard output leads nowhere: the key, which is shown once, would be lost");
        }
        match self {
            Self::Show => show(context),
            Self::Generate if context.is_running() => {
                show(context)?;
                if key_files(context).iter().any(KeyFile::is_missing) {
                    bail!("a server runs on {}; stop it to have a key made", context.data_dir().display());
                }
                Ok(())
            }
            Self::Generate => block_on(generate(context, modules))?,
            asked => block_on(
                context.with_backend(keyring, async |backend| asked.answer(context.json, backend).await),
            )?,
        }
    }

    async fn answer(self, json: bool, backend: &AdminBackend) -> anyhow::Result<()> {
        let named = match &self {
            Self::Add(Add { named, .. }) | Self::Replace(ReplaceArgs { named, .. }) | Self::Revoke(named) => {
                Some(named)
            }
            _ => None,
        };
        if named.is_some_and(|named| !access::keys::is_name(&named.name)) {
            bail!("NAME: wanted {}", access::keys::NAME_WANTED);
        }
        match self {
            Self::List => list(json, &backend.call(Method::GET, "/keys", None).await?),
            Self::Add(Add { named, scopes, per_minute, expires_in }) => {
                let Named { name, site } = named;
                let mut body = json!({ "name": name, "site": site, "scopes": scopes,
                                       "per_minute": per_minute, "expires_in": expires_in });
                if let Some(fields) = body.as_object_mut() {
                    fields.retain(|_, value| !value.is_null());
                }
                let answer = backend.call(Method::POST, "/keys", Some(&body)).await?;
                let Err(error) = made(json, &answer) else { return Ok(()) };
                // The lost key is stored nowhere, so it can never be used, and is revoked here.
                let path = format!("/keys/{name}/revoke");
                backend.call(Method::POST, &path, Some(&json!({ "site": site }))).await?;
                Err(error.context("the key could not be printed, and was withdrawn"))
            }
            Self::Replace(ReplaceArgs { named: Named { name, site }, overlap, expires_in }) => {
                let mut body = json!({ "site": site, "overlap": &overlap });
                if let Some(life) = expires_in {
                    body["expires_in"] = life.into();
                }
                let answer =
                    backend.call(Method::POST, &format!("/keys/{name}/replace"), Some(&body)).await?;
                made(json, &answer).with_context(|| format!("the new key of {name} could not be printed, and is lost; the old key stays valid for {overlap}: replace it again before it ends"))
            }
            Self::Revoke(Named { name, site }) => {
                let path = format!("/keys/{name}/revoke");
                backend.call(Method::POST, &path, Some(&json!({ "site": site }))).await?;
                let words = format!(
                    "{name} has ended. Without a shared Redis, a replica that has just seen it accepts it for 15 s more.\n"
                );
                done(json, &json!({ "name": name, "site": site, "revoked": true }), &words)
            }
            Self::Generate | Self::Show => Ok(()),
        }
    }
}

/// Prints a new key. Only the key goes to standard output, so that it can be redirected.
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
    // A closed pipe is an error here, since the key is shown only once.
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

/// Makes the routes for API keys, on the store.
async fn keyring(offline: Offline) -> anyhow::Result<Router> {
    let (sites, caches) = (offline.sites().await?, offline.caches());
    let keyring = Keyring { scopes: offline.scopes().clone(), store: offline.store, sites, caches };
    Ok(keys::admin_read().merge(keys::admin_write()).layer(Extension(keyring)))
}

async fn generate(context: &CommandContext, modules: &[Blueprint]) -> anyhow::Result<()> {
    let shown = make_keys(context, modules).await?;
    if !context.json {
        for (label, value) in shown {
            say!("{label:<18}  {value}");
        }
    }
    show(context)
}

/// Makes all keys that are missing, and returns a label and a public value for each key of a module.
pub(crate) async fn make_keys(
    context: &CommandContext,
    modules: &[Blueprint],
) -> anyhow::Result<Vec<(String, String)>> {
    let config = &context.config;
    let (data_dir, store) = context.open_alone().await?;
    // With keys in files, none is needed in the store.
    let needs_one = !access::keys::exist(&store).await? || !data_dir.join(API_KEY).exists();
    if config.key_files.is_empty() && needs_one {
        first::make_api_key(&data_dir, &store, &config.scopes).await?;
    }
    first::make(&data_dir, &store, &config.scopes, true).await?;
    let sites = config.sites.clone().open(&store).await?;
    let mut shown = Vec::new();
    for module in modules {
        shown.extend((module.keys)(context.settings(), &sites, &data_dir, &store).await?);
    }
    store.close().await;
    Ok(shown)
}

/// A file with a key.
struct KeyFile {
    label: String,
    path: PathBuf,
    public: fn(&str) -> Option<String>,
    /// Whether the store has the key if the file does not exist.
    is_in_store: bool,
    loss: Option<&'static str>,
}

impl KeyFile {
    /// The public part of the key, if it has one and the file can be read.
    fn public(&self) -> Option<String> {
        (self.public)(&std::fs::read_to_string(&self.path).ok()?)
    }

    fn is_missing(&self) -> bool {
        !self.path.exists() && !self.is_in_store
    }

    fn json(&self) -> Value {
        let mut shown = json!({ "key": self.label, "file": self.path, "exists": self.path.exists() });
        if let Some(public) = self.public() {
            shown["public"] = public.into();
        }
        shown
    }

    /// Lines with a label and the public part or the place of the key, never the secret itself.
    fn lines(&self) -> Vec<(String, String)> {
        let Self { label, path, is_in_store, .. } = self;
        let place = match (path.exists(), is_in_store) {
            (true, _) => "",
            (false, true) => "in the store, unless there is ",
            (false, false) => "none yet: ",
        };
        let public = self.public().map(|key| (format!("{label}, public"), key));
        public.into_iter().chain([(label.clone(), format!("{place}{}", path.display()))]).collect()
    }
}

/// The key files of the modules and of the host.
fn key_files(context: &CommandContext) -> Vec<KeyFile> {
    let is_in_store = matches!(context.config.store, StoreConfig::Postgres(_));
    let of_modules = context.files.iter().cloned().map(|file| KeyFile {
        label: file.label,
        path: context.data_dir().join(file.file),
        public: file.public,
        is_in_store,
        loss: Some(file.loss),
    });
    let own = [("API key", API_KEY), ("admin token", ADMIN_TOKEN)].map(|(label, file)| KeyFile {
        label: label.to_owned(),
        path: context.data_dir().join(file),
        public: |_| None,
        is_in_store: false,
        loss: None,
    });
    of_modules.chain(own).collect()
}

fn show(context: &CommandContext) -> anyhow::Result<()> {
    let files = key_files(context);
    if context.json {
        return print(&json_lines(&files.iter().map(KeyFile::json).collect::<Vec<_>>()));
    }
    let lines: Vec<(String, String)> = files.iter().flat_map(KeyFile::lines).collect();
    let width = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or_default();
    for (label, value) in lines {
        say!("{label:<width$}  {value}");
    }
    for loss in files.iter().filter_map(|file| file.loss).collect::<BTreeSet<_>>() {
        say!("{loss}");
    }
    Ok(())
}
