//! `perennial keys`.

use std::path::Path;

use clap::Subcommand;
use perennial_webpush::VapidKey;

use super::{block_on, load, read};
use crate::boot;
use crate::data_dir::{ADMIN_TOKEN, API_KEY, DataDir, VAPID_KEY};
use crate::module::Blueprint;
use crate::push;
use crate::settings::Sources;

#[derive(Clone, Copy, Debug, Subcommand)]
pub(super) enum Keys {
    /// Make the keys that are missing: what a first start would do
    Generate,
    /// Print the public VAPID key, and where the secret ones are
    Show,
}

impl Keys {
    pub(super) fn run(self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules)?;
        let (config, _) = read(&settings, modules)?;
        if matches!(self, Self::Generate) {
            let migrations = boot::migrations(modules.iter().map(|module| module.migrations));
            block_on(async {
                let data_dir = DataDir::lock(&config.data_dir)?;
                let store = boot::open_store(&data_dir, &config).await?;
                store.migrate(&migrations).await?;
                boot::first_keys(&data_dir, &store).await?;
                push::ensure_vapid_key(&data_dir)?;
                store.close().await;
                anyhow::Ok(())
            })??;
        }
        show(&config.data_dir)
    }
}

/// Never the secrets themselves.
fn show(data_dir: &Path) -> anyhow::Result<()> {
    let place = |name: &str| {
        let file = data_dir.join(name);
        if file.exists() { file.display().to_string() } else { format!("none yet ({})", file.display()) }
    };
    if let Ok(pem) = std::fs::read_to_string(data_dir.join(VAPID_KEY)) {
        println!("VAPID public key  {}", VapidKey::from_pem(&pem)?.public_key());
    }
    println!("VAPID key pair    {}", place(VAPID_KEY));
    println!("first API key     {}", place(API_KEY));
    println!("admin token       {}", place(ADMIN_TOKEN));
    println!("Keep a copy of {VAPID_KEY}: every subscription is bound to it, and losing it loses them all.");
    Ok(())
}
