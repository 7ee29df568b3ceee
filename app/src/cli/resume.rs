//! `perennial resume`.

use clap::Args;
use http::Method;
use serde_json::Value;

use super::desk::Desk;
use super::output::done;
use super::{block_on, load, read};
use crate::module::Blueprint;
use crate::pause::{self, Pause};
use crate::settings::Sources;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  perennial resume --config /etc/perennial.toml")]
pub(super) struct Resume {}

impl Resume {
    pub(super) fn run(&self, json: bool, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        let answer = block_on(async {
            let desk = Desk::open(&config, modules, async |_, store, _| {
                Ok(pause::admin_write(Pause::new(None), store))
            });
            let desk = desk.await?;
            let answer = desk.call(Method::POST, "/resume", None).await;
            desk.close().await;
            answer
        })??;
        let resumed = answer.get("resumed").and_then(Value::as_bool).unwrap_or_default();
        let words = if resumed {
            "jobs and schedules go on\n"
        } else {
            "nothing was paused: jobs and schedules go on as before\n"
        };
        done(json, &answer, words)
    }
}
