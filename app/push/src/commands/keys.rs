//! `perennial keys import` and `perennial keys rotate`: the VAPID keys.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use http::Method;
use perennial_webpush::VapidKey;
use serde_json::json;

use crate::api::vapid;
use crate::offline::{import_key, vapid_keys};
use perennial_host::command::output::done;
use perennial_host::command::{self, AdminBackend, CommandContext, Offline, block_on};
use perennial_host::sites;

/// The longest file of keys that is read, in bytes.
const MAX_KEY_FILE: u64 = 64 << 10;

/// Import the VAPID key pair of another sender: pages subscribe with it from now on, and the earlier keys still
/// sign for the subscriptions that were made with them
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial keys import private_key.pem
  npx web-push generate-vapid-keys --json | perennial keys import -
  grep VAPID_ .env | perennial keys import --site shop -
It reads PEM (PKCS#8, SEC1), DER, JWK, JSON, and base64 of the private key, alone or beside the public one.")]
pub(super) struct ImportKeyArgs {
    /// A file with the private key; - is standard input
    file: PathBuf,
    /// The site of the key
    #[arg(long, default_value = sites::DEFAULT)]
    site: String,
}

impl command::Command for ImportKeyArgs {
    const NAME: &'static str = "import";

    fn run(self, context: &CommandContext) -> anyhow::Result<()> {
        let Self { file, site } = &self;
        context.check_access()?;
        let mut bytes = Vec::new();
        let mut input: Box<dyn Read> = match file.as_os_str() == "-" {
            true => Box::new(std::io::stdin()),
            false => {
                Box::new(File::open(file).with_context(|| format!("{} cannot be read", file.display()))?)
            }
        };
        input.by_ref().take(MAX_KEY_FILE).read_to_end(&mut bytes)?;
        let key =
            VapidKey::import(&bytes).with_context(|| format!("{}: nothing was imported", file.display()))?;
        block_on(import(context, site, &key))??;
        let key = key.public_key();
        let words = format!(
            "VAPID public key  {key}\nPages of the site {site} subscribe with it within a minute; subscriptions that are there keep the key that they were made with.\n"
        );
        done(context.json, &json!({ "site": site, "key": key }), &words)
    }
}

/// Imports a key pair: through the running server, or directly into the store when no server runs, also before the
/// first start.
async fn import(context: &CommandContext, site: &str, key: &VapidKey) -> anyhow::Result<()> {
    if !context.is_running() {
        let (data_dir, store) = context.open_alone().await?;
        let imported = import_key(context.settings(), site, &data_dir, &store, key).await;
        store.close().await;
        return imported;
    }
    let body = json!({ "site": site, "pem": key.to_pem()? });
    let ask = async |backend: &AdminBackend| backend.call(Method::POST, "/vapid/import", Some(&body)).await;
    context.with_backend(async |_| Ok(axum::Router::new()), ask).await.map(drop)
}

/// Make a new VAPID key for browsers to subscribe with; the earlier keys still sign for their subscriptions
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  perennial keys rotate --site shop")]
pub(super) struct RotateArgs {
    /// The site of the key
    #[arg(long, default_value = sites::DEFAULT)]
    site: String,
}

impl command::Command for RotateArgs {
    const NAME: &'static str = "rotate";

    fn run(self, context: &CommandContext) -> anyhow::Result<()> {
        let body = json!({ "site": self.site });
        let routes = async |offline: Offline| {
            let (keys, _) = vapid_keys(context.settings(), &offline).await?;
            Ok(vapid::admin_write(keys.into()))
        };
        let ask =
            async |backend: &AdminBackend| backend.call(Method::POST, "/vapid/rotate", Some(&body)).await;
        let answer = block_on(context.with_backend(routes, ask))??;
        let key = answer["key"].as_str().unwrap_or_default();
        let words = format!(
            "VAPID public key  {key}\nPages get it within a minute; subscriptions keep the one they were made with.\n"
        );
        done(context.json, &answer, &words)
    }
}
