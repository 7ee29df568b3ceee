//! `perennial resume`.

use clap::Args;
use http::Method;
use serde_json::Value;

use crate::command::output::done;
use crate::command::{AdminBackend, CommandContext, Offline, block_on};
use crate::pause::{self, Pause};

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  perennial resume --config /etc/perennial.toml")]
pub(super) struct ResumeArgs {}

impl ResumeArgs {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        let routes = async |offline: Offline| Ok(pause::admin_write(Pause::new(None), offline.store));
        let ask = async |backend: &AdminBackend| backend.call(Method::POST, "/resume", None).await;
        let answer = block_on(context.with_backend(routes, ask))??;
        let resumed = answer.get("resumed").and_then(Value::as_bool).unwrap_or_default();
        let words = if resumed {
            "jobs and schedules go on\n"
        } else {
            "nothing was paused: jobs and schedules go on as before\n"
        };
        done(context.json, &answer, words)
    }
}
