//! `perennial keys`.

use anyhow::bail;
use clap::Subcommand;

use super::{block_on, load, open_alone, read};
use crate::access;
use crate::boot;
use crate::config::{Config, Store};
use crate::data_dir::{self, ADMIN_TOKEN, API_KEY, VAPID_KEY};
use crate::module::Blueprint;
use crate::settings::Sources;

#[derive(Clone, Copy, Debug, Subcommand)]
pub(super) enum Keys {
    /// Make the keys that are missing: what a first start would do, and a new API key if its file is lost
    Generate,
    /// Make a new VAPID key for browsers to subscribe with; those before it go on signing for their subscriptions
    Rotate,
    /// Say where the keys are
    Show,
}

impl Keys {
    pub(super) fn run(self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules)?;
        let (config, _) = read(&settings, modules)?;
        match self {
            Self::Show => show(&config),
            Self::Generate if data_dir::is_locked(&config.data_dir) => {
                show(&config);
                let missing =
                    [VAPID_KEY, API_KEY, ADMIN_TOKEN].map(|file| config.data_dir.join(file).exists());
                if missing.contains(&false) {
                    bail!("a server runs on {}; stop it to have a key made", config.data_dir.display());
                }
            }
            Self::Generate => block_on(generate(&config, modules))??,
            Self::Rotate if data_dir::is_locked(&config.data_dir) => {
                bail!("a server runs on {}; stop it to have a key made", config.data_dir.display());
            }
            Self::Rotate => block_on(rotate(&config, modules))??,
        }
        Ok(())
    }
}

async fn rotate(config: &Config, modules: &[Blueprint]) -> anyhow::Result<()> {
    let (data_dir, store) = open_alone(config, modules).await?;
    let mut shown = Vec::new();
    for module in modules {
        shown.extend((module.rotate)(&data_dir, &store).await?);
    }
    store.close().await;
    for (label, value) in shown {
        println!("{label:<18}{value}");
    }
    println!(
        "Start every server anew: pages get the new key, and subscriptions keep the one they were made with."
    );
    Ok(())
}

async fn generate(config: &Config, modules: &[Blueprint]) -> anyhow::Result<()> {
    let (data_dir, store) = open_alone(config, modules).await?;
    if !access::has_keys(&store).await? || !data_dir.join(API_KEY).exists() {
        boot::make_api_key(&data_dir, &store).await?;
    }
    boot::first_keys(&data_dir, &store).await?;
    let mut shown = Vec::new();
    for module in modules {
        shown.extend((module.keys)(&data_dir, &store).await?);
    }
    store.close().await;
    for (label, value) in shown {
        println!("{label:<18}{value}");
    }
    show(config);
    Ok(())
}

/// Never the secrets themselves.
fn show(config: &Config) {
    let is_shared = matches!(config.store, Store::Postgres(_));
    for (label, name) in [("VAPID key pair", VAPID_KEY), ("API key", API_KEY), ("admin token", ADMIN_TOKEN)] {
        let file = config.data_dir.join(name);
        let place = match (file.exists(), is_shared && name == VAPID_KEY) {
            (true, _) => "",
            (false, true) => "in the store, unless there is ",
            (false, false) => "none yet: ",
        };
        println!("{label:<18}{place}{}", file.display());
    }
    println!("Keep a copy of {VAPID_KEY}: every subscription is bound to it, and losing it loses them all.");
}
