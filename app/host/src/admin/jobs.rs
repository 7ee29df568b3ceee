//! Routes with which operators list jobs and act on them.
//!
//! | route | what |
//! |---|---|
//! | `GET /queues` | the waiting and running jobs of each queue, the age of the oldest one, and whether it is paused |
//! | `POST /queues/pause`, `/queues/resume` | `{"queue"}`: pauses or resumes a queue |
//! | `GET /jobs?kind=&queue=&state=&reason=&cursor=&limit=` | jobs in the order of their ids |
//! | `GET /jobs/{id}` | one job with its payload and its last errors |
//! | `POST /jobs` | `{"kind", "job": {"payload", ..}}`: enqueues a job of any kind, as `POST /jobs/{kind}` does |
//! | `POST /jobs/retry`, `/jobs/discard` | `{"id"?, "kind"?, "queue"?, "state"?, "reason"?}`: acts on ended jobs |
//! | `POST /jobs/cancel` | `{"id"}`: cancels a job that has not ended |

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::routing::{get, post};
use axum::{Extension, Router};
use perennial_server::http::problem::FieldError;
use perennial_workers::job_admin::{JobFilter, JobView};
use perennial_workers::queue::Depth;
use perennial_workers::worker::Status;
use perennial_workers::{Crontab, JobAdmin, Jobs, Queue, Registry};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::api::{Json, Path, Query, Result, not_found, within_page};
use crate::jobs::{Enqueued, JobRequest};

/// Maximum number of jobs in one answer.
const PAGE: usize = 1000;
/// Owner of the unique keys of jobs that are enqueued here.
const OWNER: &str = "admin";

/// State of the routes, an extension of each request. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct JobAdminState {
    pub(crate) jobs: Jobs,
    /// Kinds and queues of this process; empty for a store that no server runs on.
    pub(crate) registry: Arc<Registry>,
    /// Worker of this process, if it has one.
    pub(crate) worker: Option<Status>,
    pub(crate) crontab: Crontab,
}

impl JobAdminState {
    /// Makes the state for a store that no server runs on. It has no kinds, no worker, and no schedules of its own.
    pub(crate) fn alone(jobs: Jobs) -> Self {
        let crontab = Crontab::new(jobs.store().clone(), jobs.admission().clone(), Vec::new());
        Self { jobs, registry: Arc::default(), worker: None, crontab }
    }
}

/// Routes with which operators read.
pub(crate) fn admin_read<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/queues", get(queues)).route("/jobs", get(list)).route("/jobs/{id}", get(show))
}

/// Routes with which operators change state.
pub(crate) fn admin_write<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/queues/pause", post(pause))
        .route("/queues/resume", post(resume))
        .route("/jobs", post(enqueue))
        .route("/jobs/retry", post(retry))
        .route("/jobs/discard", post(discard))
        .route("/jobs/cancel", post(cancel))
}

#[derive(Debug, Serialize)]
struct QueueView {
    queue: String,
    paused: bool,
    slots: usize,
    busy: usize,
    #[serde(flatten)]
    depth: Depth,
    /// Number of dead and cancelled jobs that are kept.
    ended: u64,
}

/// Names of the queues that this process serves, and of the queues that the store has as paused or with ended jobs.
fn names(registry: &Registry, paused: &[String], ended: &[(String, u64)]) -> BTreeSet<String> {
    let mut names: BTreeSet<_> = registry.lanes().iter().map(|lane| lane.name.to_string()).collect();
    names.extend(paused.iter().chain(ended.iter().map(|(queue, _)| queue)).cloned());
    names
}

async fn queues(Extension(books): Extension<JobAdminState>) -> Result<Json<Vec<QueueView>>> {
    let store = books.jobs.store();
    let (paused, ended) = (store.paused().await?, store.ended().await?);
    let serving = books.worker.as_ref().map(Status::serving).unwrap_or_default();
    let names = names(&books.registry, &paused, &ended);
    let mut views = Vec::with_capacity(names.len());
    for queue in names {
        let served = serving.iter().find(|served| served.queue == queue);
        views.push(QueueView {
            paused: paused.contains(&queue),
            slots: served.map_or(0, |served| served.slots),
            busy: served.map_or(0, |served| served.busy),
            depth: store.measure(queue.as_str().into()).await?,
            ended: ended.iter().find(|(name, _)| *name == queue).map_or(0, |(_, jobs)| *jobs),
            queue,
        });
    }
    Ok(Json(views))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueName {
    queue: String,
}

async fn pause(
    Extension(books): Extension<JobAdminState>,
    Json(QueueName { queue }): Json<QueueName>,
) -> Result<Json<Value>> {
    set(&books, queue, true).await
}

async fn resume(
    Extension(books): Extension<JobAdminState>,
    Json(QueueName { queue }): Json<QueueName>,
) -> Result<Json<Value>> {
    set(&books, queue, false).await
}

/// Pauses or resumes a queue. A queue that does not exist is refused, since pausing or resuming it would seem to work;
/// the names are known only while a server runs.
async fn set(books: &JobAdminState, queue: String, paused: bool) -> Result<Json<Value>> {
    let store = books.jobs.store();
    if !books.registry.lanes().is_empty() {
        let known = names(&books.registry, &store.paused().await?, &store.ended().await?);
        if !known.contains(&queue) {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            return Err(FieldError::new("queue", format!("one of {known}")).into());
        }
    }
    store.pause(queue, paused).await?;
    Ok(Json(json!({})))
}

/// Filter and page of a list of jobs. Flattening a [`JobFilter`] would let unknown fields through.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobPage {
    kind: Option<String>,
    queue: Option<String>,
    state: Option<String>,
    reason: Option<String>,
    cursor: Option<Uuid>,
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
struct JobList {
    jobs: Vec<JobView>,
    /// The `cursor` of the next page, if there may be one.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Uuid>,
}

async fn list(
    Extension(books): Extension<JobAdminState>,
    Query(page): Query<JobPage>,
) -> Result<Json<JobList>> {
    let limit = within_page(page.limit, 100, PAGE)?;
    let state = page.state.as_deref().map(str::parse).transpose();
    let state = state
        .map_err(|error: perennial_workers::state::NoState| FieldError::new("state", error.to_string()))?;
    let filter = JobFilter { id: None, kind: page.kind, queue: page.queue, state, reason: page.reason };
    let jobs = books.jobs.store().list(filter, page.cursor, limit).await?;
    let next = if jobs.len() == limit { jobs.last().map(|last| last.id) } else { None };
    Ok(Json(JobList { jobs, next }))
}

async fn show(Extension(books): Extension<JobAdminState>, Path(id): Path<String>) -> Result<Json<JobView>> {
    let found = match id.parse() {
        Ok(id) => books.jobs.store().show(id).await?,
        Err(_) => None,
    };
    found.map(Json).ok_or_else(|| not_found("job").into())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnyJob {
    kind: String,
    job: JobRequest,
}

async fn enqueue(
    Extension(books): Extension<JobAdminState>,
    Json(asked): Json<AnyJob>,
) -> Result<Json<Enqueued>> {
    let AnyJob { kind, job: request } = asked;
    let known = books.registry.kind(&kind);
    let kind = known.ok_or_else(|| FieldError::new("kind", "a kind of job that this server knows"))?;
    let job = request.job(&kind, OWNER)?.trace(OWNER);
    Ok(Json(Enqueued { id: books.jobs.enqueue(job).await? }))
}

async fn retry(
    Extension(books): Extension<JobAdminState>,
    Json(filter): Json<JobFilter>,
) -> Result<Json<Value>> {
    Ok(Json(json!({ "retried": books.jobs.retry(&filter).await? })))
}

async fn discard(
    Extension(books): Extension<JobAdminState>,
    Json(filter): Json<JobFilter>,
) -> Result<Json<Value>> {
    Ok(Json(json!({ "discarded": books.jobs.discard(&filter).await? })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cancel {
    id: Uuid,
}

async fn cancel(
    Extension(books): Extension<JobAdminState>,
    Json(Cancel { id }): Json<Cancel>,
) -> Result<Json<Value>> {
    const REASON: &str = "cancelled by an operator";
    let cancelled = books.jobs.cancel(id, REASON).await?;
    if let Some(worker) = &books.worker {
        worker.cancel(id, REASON);
    }
    Ok(Json(json!({ "cancelled": cancelled })))
}
