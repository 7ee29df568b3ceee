//! An example application: a setting, a route, a table, a job, a schedule, a condition for readiness, a status.
//!
//! `cargo run --example hello`, then `curl -X POST http://127.0.0.1:8080/hello/world`.

use std::process::ExitCode;

use perennial::Perennial;
use perennial::anyhow;
use perennial::api::{Json, Result};
use perennial::axum::Router;
use perennial::axum::extract::{Path, State};
use perennial::axum::routing::post;
use perennial::module::{Host, Module};
use perennial::settings::Reader;
use perennial::store::pool::sql::Store;
use perennial::store::values;
use perennial::workers::{Context, Job, JobOutcome, Jobs, NewJob, Options, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

struct Hello {
    greeting: String,
}

impl Module for Hello {
    const NAME: &'static str = "hello";
    const DEFAULTS: &'static str = "[hello]\n# How visitors are greeted.\ngreeting = \"Hello\"";
    const MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE greeted (name TEXT PRIMARY KEY, times INTEGER NOT NULL)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] = Self::MIGRATIONS;

    fn configure(settings: &mut Reader<'_>) -> Self {
        Self { greeting: settings.get("hello.greeting") }
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let ready = host.readiness("hello", "warming up");
        host.job::<Count>(host.store.clone());
        // Settings may change the time (`cron.schedules`); `perennial cron run hello.morning` does not wait for it.
        host.schedule(Schedule::new(
            "hello.morning",
            "0 7 * * *",
            &Count { name: "the morning".to_owned() },
        )?);
        let greeting = self.greeting.clone();
        host.status(Self::NAME, move || json!({ "greeting": greeting }));
        let state = (self.greeting, host.jobs.clone());
        let greet = async |State((greeting, jobs)): State<(String, Jobs)>,
                           Path(name): Path<String>|
               -> Result<Json<Value>> {
            jobs.enqueue(NewJob::new(&Count { name: name.clone() })?).await?;
            Ok(Json(json!({ "said": format!("{greeting}, {name}") })))
        };
        host.routes(Router::new().route("/hello/{name}", post(greet)).with_state(state));
        ready.met();
        Ok(())
    }
}

/// Counts a greeting, after the answer has gone out.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Count {
    name: String,
}

impl Job for Count {
    const KIND: &'static str = "hello.count";
    type Tools = Store;

    fn options() -> Options {
        // Callers may enqueue it, too: POST /jobs/hello.count {"payload": {"name": "Ada"}}
        Options { public: true, ..Options::default() }
    }

    async fn run(&self, _context: Context, store: Store) -> anyhow::Result<JobOutcome> {
        let sql =
            "INSERT INTO greeted VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET times = greeted.times + 1";
        store.execute(sql, values![&self.name]).await?;
        Ok(JobOutcome::Done)
    }
}

fn main() -> ExitCode {
    Perennial::new().host::<Hello>().main()
}
