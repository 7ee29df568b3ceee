//! Routes with which operators list schedules and act on them.
//!
//! | route | what |
//! |---|---|
//! | `GET /schedules` | each schedule with its next time and its newest run |
//! | `GET /schedules/{name}/runs?limit=` | the newest runs of a schedule, the newest first |
//! | `POST /schedules/{name}/run` | runs its job now; 409 if an earlier run goes on and the policy forbids another |
//! | `POST /schedules/{name}/pause`, `/resume` | acts in every process; a resumed schedule goes on from now |

use axum::routing::{get, post};
use axum::{Extension, Router};
use http::StatusCode;
use perennial_server::http::problem::Problem;
use perennial_workers::cron::crontab::{Asked, RunView, ScheduleView};
use perennial_workers::schedules::KEPT_RUNS;
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::info;

use super::jobs::JobAdminState;
use crate::api::{Json, Path, Query, Result, not_found, within_page};
use crate::jobs::Enqueued;

/// Routes with which operators read.
pub(crate) fn admin_read<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/schedules", get(list)).route("/schedules/{name}/runs", get(runs))
}

/// Routes with which operators change state.
pub(crate) fn admin_write<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/schedules/{name}/run", post(run))
        .route("/schedules/{name}/pause", post(pause))
        .route("/schedules/{name}/resume", post(resume))
}

async fn list(Extension(books): Extension<JobAdminState>) -> Result<Json<Vec<ScheduleView>>> {
    Ok(Json(books.crontab.list().await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunPage {
    limit: Option<usize>,
}

async fn runs(
    Extension(books): Extension<JobAdminState>,
    Path(name): Path<String>,
    Query(page): Query<RunPage>,
) -> Result<Json<Vec<RunView>>> {
    let limit = within_page(page.limit, 20, KEPT_RUNS)?;
    books.crontab.runs(&name, limit).await?.map(Json).ok_or_else(|| not_found("schedule").into())
}

async fn run(Extension(books): Extension<JobAdminState>, Path(name): Path<String>) -> Result<Json<Enqueued>> {
    match books.crontab.run(&name).await? {
        Asked::Enqueued(id) => {
            info!(schedule = name, job = %id, "run by an operator");
            Ok(Json(Enqueued { id }))
        }
        Asked::Unfinished(jobs) => {
            let jobs = jobs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let detail = format!("an earlier run has not ended, and none may run beside it: {jobs}");
            Err(Problem::new(StatusCode::CONFLICT, detail).into())
        }
        Asked::Busy => {
            let detail = "other processes keep changing the schedule; try again";
            Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail).into())
        }
        Asked::Unknown => Err(not_found("schedule").into()),
    }
}

async fn pause(Extension(books): Extension<JobAdminState>, Path(name): Path<String>) -> Result<Json<Value>> {
    set(&books, &name, true).await
}

async fn resume(Extension(books): Extension<JobAdminState>, Path(name): Path<String>) -> Result<Json<Value>> {
    set(&books, &name, false).await
}

async fn set(books: &JobAdminState, name: &str, paused: bool) -> Result<Json<Value>> {
    if !books.crontab.pause(name, paused).await? {
        return Err(not_found("schedule").into());
    }
    let what = if paused { "paused by an operator" } else { "resumed by an operator" };
    info!(schedule = name, "{what}");
    Ok(Json(json!({})))
}
