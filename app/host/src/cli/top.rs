//! `perennial top`: the activity of a running server, updated every second.

mod terminal;

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use http::Method;
use serde_json::{Map, Value};

use crate::command::output::clipped;
use crate::command::{Client, CommandContext, admin_client, block_on, print};
use terminal::KeyPresses;

/// Time limit for one answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How many lines of each list are shown.
const LINES: usize = 8;

/// Paths that are asked for one frame.
const PATHS: [&str; 11] = [
    "/build",
    "/process",
    "/readyz",
    "/requests",
    "/connections",
    "/pools",
    "/cache",
    "/queues",
    "/workers",
    // A host without web push does not have these.
    "/notifications",
    "/origins",
];

#[derive(Args, Debug)]
#[command(after_help = "It ends with q or Ctrl-C. Examples:
  perennial top
  perennial top --once --json")]
pub(super) struct Top {
    /// Print one frame, and end
    #[arg(long)]
    once: bool,
    /// Seconds between two frames
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
}

impl Top {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        let client = admin_client(context.data_dir(), TIMEOUT)?;
        block_on(async {
            let first = Look::take(&client).await?;
            if context.json {
                return print(&format!("{}\n", Value::Object(first.answers)));
            }
            if self.once || !std::io::stdout().is_terminal() {
                return print(&first.frame(None));
            }
            self.follow(&client, first).await
        })?
    }

    /// Shows one frame after the other, until q is pressed.
    async fn follow(&self, client: &Client, first: Look) -> anyhow::Result<()> {
        let mut keys = KeyPresses::listen();
        let mut before: Option<Look> = None;
        let mut now = first;
        loop {
            let width = terminal::width();
            let frame = now.frame(before.as_ref());
            // A frame overwrites the one before, from the top left corner. A line that is too long is clipped, since it
            // would become two.
            let lines = frame.lines().map(|line| format!("{}\x1b[K\n", clipped(line, width)));
            let frame: String = lines.collect();
            let mut out = std::io::stdout().lock();
            if write!(out, "\x1b[H{frame}\x1b[J").and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
            drop(out);
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(self.every)) => {}
                () = keys.quit() => return Ok(()),
            }
            before = Some(now);
            now = Look::take(client).await.context("the server does not answer any more")?;
        }
    }
}

/// Answers of the server at one moment.
struct Look {
    at: Instant,
    answers: Map<String, Value>,
}

impl Look {
    async fn take(client: &Client) -> anyhow::Result<Self> {
        let mut answers = Map::new();
        for path in PATHS {
            let answer = client.ask(Method::GET, path, None, None).await?;
            let is_optional = matches!(path, "/notifications" | "/origins");
            if !answer.status.is_success() && path != "/readyz" {
                if is_optional {
                    continue;
                }
                bail!("{path} answered {}", answer.status);
            }
            answers.insert(path.trim_start_matches('/').to_owned(), answer.body);
        }
        Ok(Self { at: Instant::now(), answers })
    }

    fn of(&self, name: &str) -> &Value {
        self.answers.get(name).unwrap_or(&Value::Null)
    }

    /// Formats the answers as lines. Rates are computed from the look before.
    fn frame(&self, before: Option<&Self>) -> String {
        let mut frame = self.head(before);
        requests(&mut frame, self.of("requests"), self.of("connections"));
        pools(&mut frame, self.of("pools"), self.of("cache"));
        queues(&mut frame, self.of("queues"), self.of("workers"));
        notifications(&mut frame, self.of("notifications"));
        services(&mut frame, self.of("origins"));
        frame
    }

    fn head(&self, before: Option<&Self>) -> String {
        let (build, process, ready) = (self.of("build"), self.of("process"), self.of("readyz"));
        let busy = before.map(|before| {
            let took =
                number(process, "processor_seconds") - number(before.of("process"), "processor_seconds");
            let share = took / self.at.duration_since(before.at).as_secs_f64().max(0.001);
            format!(", processor {:.0} %", share * 100.0)
        });
        let mut frame = format!(
            "perennial {}, process {}, up {}: {}\nmemory {:.0} MiB{}, {} threads, {} open files\n",
            text(build, "version"),
            process["pid"],
            age(number(process, "uptime_seconds")),
            text(ready, "status"),
            number(process, "resident_bytes") / f64::from(1 << 20),
            busy.unwrap_or_default(),
            number(process, "threads"),
            number(process, "open_files"),
        );
        for reason in list(&ready["reasons"]).filter_map(Value::as_str) {
            frame.push_str(&format!("  {reason}\n"));
        }
        frame
    }
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
        let used = (number(pool, "size") - number(pool, "available")).max(0.0);
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
    if notifications.is_null() {
        return;
    }
    let unfinished = |one: &&Value| !matches!(text(one, "state"), "done" | "cancelled" | "expired");
    let going_on: Vec<&Value> = list(notifications).filter(unfinished).collect();
    frame.push_str(&format!("\nNOTIFICATIONS  {} of the newest go on\n", going_on.len()));
    for one in going_on.iter().take(LINES) {
        let outcomes = one["outcomes"].as_object().into_iter().flatten();
        let ended: f64 = outcomes.filter_map(|(_, count)| count.as_f64()).sum();
        let (id, state, audience) = (text(one, "id"), text(one, "state"), number(one, "audience"));
        let (rate, wanted) = (number(one, "rate"), one["rate_wanted"].as_f64());
        let wanted = wanted.map(|wanted| format!(" of {wanted}")).unwrap_or_default();
        frame.push_str(&format!(
            "  {id}  {state:<10} {:>10} of {audience}  {rate:.0}{wanted}/s\n",
            ended + 0.0
        ));
    }
}

/// Adds the push services that are sent nothing now, and the cause.
fn services(frame: &mut String, origins: &Value) {
    let held: Vec<&Value> = list(origins).filter(|origin| !origin["held"].is_null()).collect();
    if held.is_empty() {
        return;
    }
    frame.push_str(&format!("\nHELD  {} push services are sent nothing\n", held.len()));
    for origin in held.iter().take(LINES) {
        let (cause, left) = (text(origin, "held"), number(origin, "held_seconds"));
        frame.push_str(&format!(
            "  {:<44} {cause:<14} for {left:.0} s\n",
            clipped(text(origin, "origin"), 44)
        ));
    }
}

fn age(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// Reads a number. It is never negative zero, which is the sum of an empty list.
fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_default() + 0.0
}
