//! `perennial health`.

use std::time::Duration;

use anyhow::bail;
use clap::Args;
use http::Method;

use crate::addresses::Addresses;
use crate::command::{Client, CommandContext, block_on, print};

/// Time limit for an answer: a process without trouble answers probes at once.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Args, Debug)]
pub(super) struct HealthArgs {
    /// Ask whether the server is alive, instead of ready
    #[arg(long)]
    live: bool,
}

impl HealthArgs {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        let base = Addresses::of_running(context.data_dir())?.admin_url()?;
        let client = Client::new(&base, None, TIMEOUT)?;
        let path = if self.live { "/livez" } else { "/readyz" };
        let answer = block_on(client.ask(Method::GET, path, None, None))??;
        if context.json {
            print(&format!("{}\n", answer.body))?;
            return if answer.status.is_success() { Ok(()) } else { bail!("not ready") };
        }
        let reasons = answer.body["reasons"].as_array().into_iter().flatten();
        let reasons: Vec<_> = reasons.filter_map(|reason| reason.as_str()).collect();
        if answer.status.is_success() {
            // A ready server may be degraded: then the reasons are printed, too.
            let but = if reasons.is_empty() {
                String::new()
            } else {
                format!(", degraded: {}", reasons.join(", "))
            };
            return print(&format!("ok{but}\n"));
        }
        bail!("{}: {}", answer.status, reasons.join(", "))
    }
}
