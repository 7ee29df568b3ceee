//! `perennial jobs`.

use anyhow::{Context as _, bail};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Cli;
use crate::command::arguments::{job_id, whole};
use crate::command::output::{self, NONE, clipped, json_lines, table, text, utc};
use crate::command::{AdminBackend, CommandContext, block_on, print};

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  perennial jobs queues
  perennial jobs list --state dead --kind mail.send
  perennial jobs retry --all
  perennial jobs pause push")]
pub(super) enum JobsCommand {
    /// List jobs, the oldest first
    #[command(
        after_help = "Examples:\n  perennial jobs list --state dead --kind mail.send\n  perennial jobs list --reason timeout --limit 10"
    )]
    List {
        #[command(flatten)]
        which: WhichJobs,
        /// Begin after the job with this id
        #[arg(long, value_parser = job_id)]
        cursor: Option<Uuid>,
        /// Maximum number of jobs
        #[arg(long, default_value_t = 100, value_parser = whole::<usize>)]
        limit: usize,
    },
    /// Show one job, with its payload and its last errors
    #[command(after_help = "Example:\n  perennial jobs show 01890a5d-ac96-774b-bcce-b302099a8057")]
    Show {
        /// Id of the job
        #[arg(value_parser = job_id)]
        id: Uuid,
    },
    /// Run jobs that have ended again
    #[command(
        after_help = "Examples:\n  perennial jobs retry --kind mail.send --reason timeout\n  perennial jobs retry --all"
    )]
    Retry(ChosenJobs),
    /// Delete jobs that have ended
    #[command(after_help = "Example:\n  perennial jobs discard --state cancelled")]
    Discard(ChosenJobs),
    /// Cancel a job that has not ended
    Cancel {
        /// Id of the job
        #[arg(value_parser = job_id)]
        id: Uuid,
    },
    /// Enqueue a job of any kind through the running server
    #[command(
        after_help = "Example:\n  perennial jobs enqueue mail.send '{\"to\": \"a@example.com\"}' --delay 30s"
    )]
    Enqueue {
        /// Kind of the job
        kind: String,
        /// Payload of the job, in JSON
        payload: String,
        /// Time to wait before the job is due, such as 30s or 1h
        #[arg(long)]
        delay: Option<String>,
        /// Unique key: no second job of this kind has it until the first has ended
        #[arg(long)]
        unique: Option<String>,
        /// Priority; jobs with a lower number go first
        #[arg(long, allow_hyphen_values = true, value_parser = whole::<i16>)]
        priority: Option<i16>,
    },
    /// Show how many jobs wait and run in each queue
    Queues,
    /// Pause a queue, so that no more of its jobs begin
    #[command(after_help = "Example:\n  perennial jobs pause push")]
    Pause {
        /// Name of the queue
        queue: String,
    },
    /// Resume a queue, so that its jobs begin again
    Resume {
        /// Name of the queue
        queue: String,
    },
}

/// Filter of jobs; a field that is not given matches every job.
#[derive(Args, Debug)]
pub(super) struct WhichJobs {
    /// Only jobs of this kind
    #[arg(long)]
    kind: Option<String>,
    /// Only jobs in this queue
    #[arg(long)]
    queue: Option<String>,
    /// Only jobs in this state: scheduled, ready, running, dead or cancelled
    #[arg(long)]
    state: Option<String>,
    /// Only jobs that ended for a reason that contains this text
    #[arg(long)]
    reason: Option<String>,
}

/// Selection of jobs that have ended.
#[derive(Args, Debug)]
pub(super) struct ChosenJobs {
    /// Ids of the jobs
    #[arg(value_parser = job_id)]
    ids: Vec<Uuid>,
    /// All jobs that have ended
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    which: WhichJobs,
}

impl WhichJobs {
    fn fields(&self) -> Map<String, Value> {
        let given =
            [("kind", &self.kind), ("queue", &self.queue), ("state", &self.state), ("reason", &self.reason)];
        given
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), json!(value.as_ref()?))))
            .collect()
    }

    fn query(&self) -> String {
        let fields = self.fields();
        let pairs = fields.iter().map(|(name, value)| (name.as_str(), value.as_str().unwrap_or_default()));
        url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
    }
}

impl ChosenJobs {
    /// Refuses a command that selects no jobs, so that all jobs are selected only by `--all`.
    fn check(&self, command: &str) -> Result<(), clap::Error> {
        if self.ids.is_empty() && !self.all && self.which.fields().is_empty() {
            let text = "say which jobs: their ids, or --kind, --queue, --state or --reason, or --all";
            let mut cli = Cli::command();
            cli.build();
            let jobs = cli.find_subcommand_mut("jobs").and_then(|jobs| jobs.find_subcommand_mut(command));
            return Err(match jobs {
                Some(command) => command.error(ErrorKind::MissingRequiredArgument, text),
                None => cli.error(ErrorKind::MissingRequiredArgument, text),
            });
        }
        Ok(())
    }
}

impl JobsCommand {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        match self {
            Self::Retry(some) => some.check("retry")?,
            Self::Discard(some) => some.check("discard")?,
            _ => {}
        }
        let answer = block_on(context.with_backend(super::books, async |backend| self.ask(backend).await))??;
        print(&self.shown(&answer, context.json))
    }

    fn shown(&self, answer: &Value, json: bool) -> String {
        // Output that does not go to a terminal is for programs, which read JSON.
        let is_read_on = json || !output::is_terminal();
        let list = answer.as_array().or_else(|| answer["jobs"].as_array());
        match (self, list) {
            (_, Some(list)) if is_read_on => json_lines(list),
            (Self::Queues, Some(queues)) => table(
                ["QUEUE", "STATE", "BUSY", "READY", "SCHEDULED", "ENDED", "OLDEST"],
                queues.iter().map(queue),
            ),
            (_, Some(jobs)) => {
                table(["ID", "KIND", "QUEUE", "STATE", "FAILURES", "CREATED", "REASON"], jobs.iter().map(job))
            }
            (_, None) if json => format!("{answer}\n"),
            (Self::Show { .. } | Self::Enqueue { .. }, None) => format!("{answer:#}\n"),
            (_, None) if is_read_on => format!("{answer:#}\n"),
            (_, None) => counts(answer),
        }
    }

    async fn ask(&self, backend: &AdminBackend) -> anyhow::Result<Value> {
        let get = async |path: String| backend.call(Method::GET, &path, None).await;
        let post = async |path: &str, body: Value| backend.call(Method::POST, path, Some(&body)).await;
        match self {
            Self::List { which, cursor, limit } => {
                let cursor = cursor.map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
                get(format!("/jobs?limit={limit}{cursor}&{}", which.query())).await
            }
            Self::Show { id } => get(format!("/jobs/{id}")).await,
            Self::Retry(some) => each(some, async |filter| post("/jobs/retry", filter).await).await,
            Self::Discard(some) => each(some, async |filter| post("/jobs/discard", filter).await).await,
            Self::Cancel { id } => post("/jobs/cancel", json!({ "id": id })).await,
            Self::Enqueue { .. } if matches!(backend, AdminBackend::Own(_)) => {
                bail!("enqueueing takes a running server: it knows the kinds of jobs");
            }
            Self::Enqueue { kind, payload, delay, unique, priority } => {
                let payload: Value = serde_json::from_str(payload).context("the payload is no JSON")?;
                let mut job = json!({ "payload": payload });
                let given =
                    [("delay", json!(delay)), ("unique", json!(unique)), ("priority", json!(priority))];
                for (name, value) in given.into_iter().filter(|(_, value)| !value.is_null()) {
                    job[name] = value;
                }
                post("/jobs", json!({ "kind": kind, "job": job })).await
            }
            Self::Queues => get("/queues".to_owned()).await,
            Self::Pause { queue } => post("/queues/pause", json!({ "queue": queue })).await,
            Self::Resume { queue } => post("/queues/resume", json!({ "queue": queue })).await,
        }
    }
}

/// Sends one request per id, or one request for all jobs that fit, and adds up the answers.
async fn each(some: &ChosenJobs, ask: impl AsyncFn(Value) -> anyhow::Result<Value>) -> anyhow::Result<Value> {
    let fields = some.which.fields();
    if some.ids.is_empty() {
        return ask(Value::Object(fields)).await;
    }
    let mut sums = Map::<String, Value>::new();
    for id in &some.ids {
        let mut filter = fields.clone();
        filter.insert("id".to_owned(), json!(id));
        let answer = ask(Value::Object(filter)).await?;
        for (name, count) in answer.as_object().into_iter().flatten() {
            let sum = sums.get(name).and_then(Value::as_u64).unwrap_or_default();
            sums.insert(name.clone(), json!(sum + count.as_u64().unwrap_or_default()));
        }
    }
    if sums.values().all(|sum| *sum == 0) {
        bail!(
            "none of these jobs has ended, or none of them exists: `{} jobs show ID` shows the state of one",
            crate::program_name()
        );
    }
    Ok(Value::Object(sums))
}

fn job(job: &Value) -> [String; 7] {
    let last = job["errors"].as_array().and_then(|errors| errors.last());
    let reason = job["reason"].as_str().or_else(|| last?["error"].as_str()).unwrap_or_default();
    [
        text(&job["id"]),
        text(&job["kind"]),
        text(&job["queue"]),
        text(&job["state"]),
        job["failures"].to_string(),
        utc(&job["created_at"]),
        clipped(reason, 60),
    ]
}

fn queue(queue: &Value) -> [String; 7] {
    let oldest = queue["oldest_ms"].as_u64().filter(|ms| *ms > 0);
    [
        text(&queue["queue"]),
        if queue["paused"] == true { "paused".to_owned() } else { "open".to_owned() },
        format!("{}/{}", queue["busy"], queue["slots"]),
        queue["ready"].to_string(),
        queue["scheduled"].to_string(),
        queue["ended"].to_string(),
        oldest.map_or_else(|| NONE.to_owned(), |ms| format!("{}s", ms / 1000)),
    ]
}

/// Formats the counts of an answer in words, such as `2 retried`.
fn counts(answer: &Value) -> String {
    let counts = answer.as_object().into_iter().flatten();
    let counts: Vec<String> = counts.map(|(what, count)| format!("{count} {what}")).collect();
    if counts.is_empty() { "done\n".to_owned() } else { format!("{}\n", counts.join(", ")) }
}
