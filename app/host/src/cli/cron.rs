//! `perennial cron`.

use clap::Subcommand;
use http::Method;
use serde_json::Value;

use crate::command::arguments::whole;
use crate::command::output::{self, NONE, json_lines, table, text};
use crate::command::{AdminBackend, CommandContext, block_on, print};

/// A schedule that is due for less than this, in milliseconds, is just being claimed.
const OVERDUE_MS: i64 = 3000;

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  perennial cron list
  perennial cron history push.retention --limit 5
  perennial cron run nightly-report")]
pub(super) enum Cron {
    /// List schedules with the next time and the newest run of each, in UTC and in the zone of the schedule
    List,
    /// Show the newest runs of a schedule
    #[command(after_help = "Example:\n  perennial cron history push.retention --limit 5")]
    History {
        /// Name of the schedule
        name: String,
        /// Maximum number of runs
        #[arg(long, default_value_t = 20, value_parser = whole::<usize>)]
        limit: usize,
    },
    /// Run a schedule's job now, and print the job's id
    Run {
        /// Name of the schedule
        name: String,
    },
    /// Pause a schedule in every process, until it is resumed
    Pause {
        /// Name of the schedule
        name: String,
    },
    /// Resume a schedule from now on; missed times are not made up for
    Resume {
        /// Name of the schedule
        name: String,
    },
}

impl Cron {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        let answer = block_on(context.with_backend(super::books, async |backend| self.ask(backend).await))??;
        self.print(context.json, &answer)
    }

    async fn ask(&self, backend: &AdminBackend) -> anyhow::Result<Value> {
        let (method, path) = match self {
            Self::List => (Method::GET, "/schedules".to_owned()),
            Self::History { name, limit, .. } => (Method::GET, of(name, &format!("runs?limit={limit}"))),
            Self::Run { name } => (Method::POST, of(name, "run")),
            Self::Pause { name } => (Method::POST, of(name, "pause")),
            Self::Resume { name } => (Method::POST, of(name, "resume")),
        };
        backend.call(method, &path, None).await
    }

    fn print(&self, json: bool, answer: &Value) -> anyhow::Result<()> {
        let entries = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let text = match self {
            Self::List | Self::History { .. } if json => json_lines(entries),
            Self::List => {
                let titles = [
                    "NAME",
                    "WHEN",
                    "ZONE",
                    "STATE",
                    "NEXT",
                    "NEXT (UTC)",
                    "LAST",
                    "LAST (UTC)",
                    "LAG",
                    "OUTCOME",
                ];
                table(titles, entries.iter().map(schedule))
            }
            Self::History { .. } => {
                table(["DUE", "DUE (UTC)", "CAUSE", "LAG", "TOOK", "OUTCOME", "JOB"], entries.iter().map(run))
            }
            _ if json => format!("{answer}\n"),
            Self::Run { .. } => format!("{}\n", text(&answer["id"])),
            Self::Pause { name } => format!("{name} is paused until it is resumed\n"),
            Self::Resume { name } => format!("{name} goes on\n"),
        };
        print(&text)
    }
}

/// Path of a route of a schedule.
fn of(name: &str, what: &str) -> String {
    let name: String = url::form_urlencoded::byte_serialize(name.as_bytes()).collect();
    format!("/schedules/{name}/{what}")
}

fn schedule(entry: &Value) -> [String; 10] {
    let (next, last) = (&entry["next"], &entry["last"]);
    let overdue = entry["overdue_ms"].as_i64().filter(|ms| *ms >= OVERDUE_MS);
    let outcome = text(&last["outcome"]);
    [
        text(&entry["name"]),
        text(&entry["expression"]),
        text(&entry["zone"]),
        overdue.map_or_else(|| text(&entry["state"]), |ms| format!("overdue by {}s", ms / 1000)),
        text(&next["local"]),
        utc(next),
        text(&last["occurrence"]["local"]),
        utc(&last["occurrence"]),
        time(&last["lag_ms"]),
        if entry["queued"].is_null() { outcome } else { format!("{outcome}, one queued") },
    ]
}

fn run(entry: &Value) -> [String; 7] {
    let passed = entry["passed"].as_u64().unwrap_or_default();
    let outcome = text(&entry["outcome"]);
    let reason = entry["reason"].as_str().map(|reason| format!(": {reason}")).unwrap_or_default();
    let passed = if passed > 0 { format!(" (and {passed} before it)") } else { String::new() };
    [
        text(&entry["occurrence"]["local"]),
        utc(&entry["occurrence"]),
        text(&entry["cause"]),
        time(&entry["lag_ms"]),
        time(&entry["took_ms"]),
        format!("{outcome}{reason}{passed}"),
        text(&entry["job"]),
    ]
}

fn utc(moment: &Value) -> String {
    output::utc(&moment["utc"])
}

fn time(ms: &Value) -> String {
    ms.as_i64().map_or_else(|| NONE.to_owned(), |ms| format!("{}.{:03}s", ms / 1000, ms % 1000))
}
