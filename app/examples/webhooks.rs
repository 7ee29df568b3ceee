//! An example application that tells its customers what has happened, at URLs that they have chosen: signed requests by
//! Standard Webhooks, sent by jobs, with retries for three days.
//!
//! `cargo run --example webhooks --no-default-features`, then
//! `curl --json '{"url": "https://example.com/hook"}' http://127.0.0.1:8080/webhooks` and
//! `curl -d 'A book was sold' http://127.0.0.1:8080/events`.

use std::process::ExitCode;
use std::time::Duration;

use perennial::http::StatusCode;
use perennial::http_client::{HttpClient, Target};
use perennial::prelude::*;
use perennial::{anyhow, uuid::Uuid};
use serde::{Deserialize, Serialize};

/// URLs of strangers: only public addresses are called, and no more than a few at once of one host.
const CUSTOMERS: Target = Target::any("customers");

struct Webhooks;

impl Module for Webhooks {
    const NAME: &'static str = "webhooks";
    const TARGETS: &'static [Target] = &[CUSTOMERS];
    const MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE hooks (id BLOB PRIMARY KEY, url TEXT NOT NULL, secret TEXT NOT NULL)"];
    const POSTGRES_MIGRATIONS: &'static [&'static str] =
        &["CREATE TABLE hooks (id uuid PRIMARY KEY, url text NOT NULL, secret text NOT NULL)"];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        host.job::<Tell>((host.store.clone(), host.http_client(CUSTOMERS.name())?));
        let state = (host.store.clone(), host.jobs.clone());
        host.routes(
            Router::new().route("/webhooks", post(add)).route("/events", post(happened)).with_state(state),
        );
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewHook {
    url: String,
}

#[derive(FromRow, Serialize)]
struct Hook {
    id: Uuid,
    url: String,
    /// The customer checks signatures with it. It is shown only once.
    secret: String,
}

async fn add(
    State((store, _)): State<(Store, Jobs)>,
    Json(new): Json<NewHook>,
) -> Result<(StatusCode, Json<Hook>)> {
    let hook = Hook { id: Uuid::now_v7(), url: new.url, secret: format!("secret-{}", Uuid::new_v4()) };
    store.execute("INSERT INTO hooks VALUES ($1, $2, $3)", values![hook.id, &hook.url, &hook.secret]).await?;
    Ok((StatusCode::CREATED, Json(hook)))
}

/// Stores what has happened as one job for each customer: all of them, or none.
async fn happened(State((store, jobs)): State<(Store, Jobs)>, event: String) -> Result<Json<usize>> {
    let tx = store.begin().await?;
    let hooks = tx.query("SELECT id FROM hooks", &values![]).await?;
    let tell = |row: &Row| Ok(NewJob::new(&Tell { hook: row.first()?, event: event.clone() })?);
    let told = hooks.iter().map(tell).collect::<anyhow::Result<Vec<_>>>()?;
    jobs.insert(&tx, &told).await?;
    tx.commit().await?;
    Ok(Json(told.len()))
}

/// Tells one customer.
#[derive(Serialize, Deserialize)]
struct Tell {
    hook: Uuid,
    event: String,
}

impl Job for Tell {
    const KIND: &'static str = "webhooks.tell";
    type Tools = (Store, HttpClient);

    async fn run(&self, context: Context, (store, customers): Self::Tools) -> anyhow::Result<JobOutcome> {
        let found = store.first_as::<Hook>("SELECT * FROM hooks WHERE id = $1", values![self.hook]).await?;
        let Some(hook) = found else { return Ok(JobOutcome::Skipped("the webhook is gone".to_owned())) };
        // The id is the same for each attempt, so that the customer can tell a repetition.
        let request = customers.post(hook.url).owner(self.hook.to_string()).body(self.event.clone());
        let request = request.webhook(context.id, &hook.secret.into()).retries(0);
        let answer = request.timeout(Duration::from_secs(15)).send().await?;
        if answer.status() == StatusCode::GONE {
            store.execute("DELETE FROM hooks WHERE id = $1", values![self.hook]).await?;
            return Ok(JobOutcome::Cancel("the customer wants no more".to_owned()));
        }
        answer.success().await?;
        Ok(JobOutcome::Done)
    }
}

fn main() -> ExitCode {
    Perennial::new().name("webhooks").host::<Webhooks>().main()
}
