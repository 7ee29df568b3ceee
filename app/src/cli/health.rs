//! `perennial health`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use http::Method;

use super::client::Client;
use super::{block_on, load, read};
use crate::addresses::Addresses;
use crate::module::Blueprint;
use crate::settings::Sources;

/// Probes are answered at once, or the process is in trouble.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Args, Debug)]
pub(super) struct Health {
    /// Ask whether it is alive, instead of ready
    #[arg(long)]
    live: bool,
}

impl Health {
    pub(super) fn run(&self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules)?;
        let (config, _) = read(&settings, modules)?;
        let base = Addresses::of_running(&config.data_dir)?.admin_url()?;
        let client = Client::new(&base, None, TIMEOUT)?;
        let path = if self.live { "/livez" } else { "/readyz" };
        let answer = block_on(client.ask(Method::GET, path, None, None))??;
        if answer.status.is_success() {
            println!("ok");
            return Ok(());
        }
        let reasons = answer.body["reasons"].as_array().into_iter().flatten();
        let reasons: Vec<_> = reasons.filter_map(|reason| reason.as_str()).collect();
        bail!("{}: {}", answer.status, reasons.join(", "))
    }
}
