//! `perennial top`: what a running server does, each second anew.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use http::Method;
use serde_json::Value;

use super::client::Client;
use super::{block_on, load, read};
use crate::addresses::Addresses;
use crate::data_dir::ADMIN_TOKEN;
use crate::module::Blueprint;
use crate::settings::Sources;

/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How many lines of each list are shown.
const LINES: usize = 8;

#[derive(Args, Debug)]
pub(super) struct Top {
    /// Look once, and print it
    #[arg(long)]
    once: bool,
    /// How many seconds there are between two looks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
}

impl Top {
    pub(super) fn run(&self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        let base = Addresses::of_running(&config.data_dir)?.admin_url()?;
        let token = std::fs::read_to_string(config.data_dir.join(ADMIN_TOKEN)).ok();
        let client = Client::new(&base, token.map(|token| token.trim().to_owned()), TIMEOUT)?;
        block_on(async {
            if self.once || !std::io::stdout().is_terminal() {
                return super::print(&look(&client).await?);
            }
            loop {
                let frame = look(&client).await.context("the server does not answer any more")?;
                let mut out = std::io::stdout().lock();
                // From the top left corner, and nothing of what was there before.
                let frame = frame.replace('\n', "\x1b[K\n");
                if write!(out, "\x1b[H{frame}\x1b[J").and_then(|()| out.flush()).is_err() {
                    return Ok(());
                }
                drop(out);
                tokio::time::sleep(Duration::from_secs(self.every)).await;
            }
        })?
    }
}

/// One frame.
async fn look(client: &Client) -> anyhow::Result<String> {
    let get = async |path: &str| -> anyhow::Result<Value> {
        let answer = client.ask(Method::GET, path, None, None).await?;
        if !answer.status.is_success() && path != "/readyz" {
            bail!("{path} answered {}", answer.status);
        }
        Ok(answer.body)
    };
    let (build, ready) = (get("/build").await?, get("/readyz").await?);
    let mut frame = format!(
        "perennial {}, process {}: {}\n",
        text(&build, "version"),
        build["pid"],
        text(&ready, "status")
    );
    for reason in list(&ready["reasons"]).filter_map(Value::as_str) {
        frame.push_str(&format!("  {reason}\n"));
    }
    requests(&mut frame, &get("/requests").await?, &get("/connections").await?);
    pools(&mut frame, &get("/pools").await?, &get("/cache").await?);
    queues(&mut frame, &get("/queues").await?, &get("/workers").await?);
    // Of a host that hosts no web push, there are none.
    if let Ok(notifications) = get("/notifications").await {
        self::notifications(&mut frame, &notifications);
    }
    Ok(frame)
}

fn requests(frame: &mut String, requests: &Value, connections: &Value) {
    let is_public = |one: &&Value| one["listener"] == "public";
    let mut running: Vec<&Value> = list(requests).filter(is_public).collect();
    running.sort_by(|a, b| number(b, "age_ms").total_cmp(&number(a, "age_ms")));
    let open = list(connections).filter(is_public).count();
    frame.push_str(&format!("\nREQUESTS  {} running on {open} connections\n", running.len()));
    for request in running.iter().take(LINES) {
        frame.push_str(&format!(
            "  {:>8.0} ms  {:<7} {:<40} {:<12} {}\n",
            number(request, "age_ms"),
            text(request, "method"),
            clipped(text(request, "path"), 40),
            text(request, "stage"),
            text(request, "waiting"),
        ));
    }
}

fn pools(frame: &mut String, pools: &Value, caches: &Value) {
    frame.push_str(&format!(
        "\n{:<18} {:>6} {:>6} {:>8} {:>14}\n",
        "POOL", "USED", "MOST", "WAITING", "OLDEST"
    ));
    for (name, pool) in pools.as_object().into_iter().flatten() {
        let used = number(pool, "size") - number(pool, "available");
        let (most, waiting, oldest) =
            (number(pool, "max"), number(pool, "waiting"), number(pool, "oldest_ms") / 1e3);
        frame.push_str(&format!("{name:<18} {used:>6} {most:>6} {waiting:>8} {oldest:>12.0} s\n"));
    }
    frame.push_str(&format!(
        "\n{:<18} {:>8} {:>10} {:>8} {:>8}\n",
        "CACHE", "ENTRIES", "KIB", "HITS", "FAILED"
    ));
    for (name, cache) in caches.as_object().into_iter().flatten() {
        let asked = number(cache, "hits") + number(cache, "misses");
        let hits = if asked > 0.0 {
            format!("{:.0} %", number(cache, "hits") / asked * 100.0)
        } else {
            "-".to_owned()
        };
        let (entries, kib, failed) =
            (number(cache, "entries"), number(cache, "bytes") / 1024.0, number(cache, "failed"));
        frame.push_str(&format!("{name:<18} {entries:>8} {kib:>10.0} {hits:>8} {failed:>8}\n"));
    }
}

fn queues(frame: &mut String, queues: &Value, workers: &Value) {
    frame.push_str(&format!(
        "\n{:<18} {:>8} {:>8} {:>10} {:>8} {:>12}\n",
        "QUEUE", "BUSY", "READY", "SCHEDULED", "ENDED", "OLDEST"
    ));
    for queue in list(queues) {
        let busy = format!("{}/{}", queue["busy"], queue["slots"]);
        let name = text(queue, "queue");
        let (ready, scheduled, ended) =
            (number(queue, "ready"), number(queue, "scheduled"), number(queue, "ended"));
        let oldest = number(queue, "oldest_ms") / 1e3;
        let paused = if queue["paused"] == true { "  paused" } else { "" };
        frame.push_str(&format!(
            "{name:<18} {busy:>8} {ready:>8} {scheduled:>10} {ended:>8} {oldest:>10.0} s{paused}\n"
        ));
    }
    let busy: Vec<&Value> = list(workers).collect();
    for job in busy.iter().take(LINES) {
        let (kind, subject) = (text(job, "kind"), text(job, "subject"));
        frame.push_str(&format!("  {:>8.0} ms  {kind:<16} {subject}\n", number(job, "for_ms")));
    }
}

fn notifications(frame: &mut String, notifications: &Value) {
    let unfinished = |one: &&Value| !matches!(text(one, "state"), "done" | "cancelled" | "expired");
    let going_on: Vec<&Value> = list(notifications).filter(unfinished).collect();
    frame.push_str(&format!("\nNOTIFICATIONS  {} of the newest go on\n", going_on.len()));
    for one in going_on.iter().take(LINES) {
        let outcomes = one["outcomes"].as_object().into_iter().flatten();
        let ended: f64 = outcomes.filter_map(|(_, count)| count.as_f64()).sum();
        let (id, state, audience) = (text(one, "id"), text(one, "state"), number(one, "audience"));
        frame.push_str(&format!("  {id}  {state:<10} {ended:>10} of {audience}\n"));
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_default()
}

/// Its first characters, without what a terminal would obey.
fn clipped(text: &str, most: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(most).collect()
}
