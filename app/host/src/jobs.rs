//! `POST /jobs/{kind}`: callers with a key enqueue jobs of public kinds.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRef, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use perennial_server::http::problem::FieldError;
use perennial_server::http::scope::RequestScope;
use perennial_workers::job::{Unique, UniqueUntil};
use perennial_workers::queue::Due;
use perennial_workers::registry::JobKind;
use perennial_workers::{Jobs, NewJob, Registry};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::info;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::access::{self, Access, Authorized};
use crate::api::{Json, Path, Result, not_found, trace};
use crate::settings::{Setting, parse_duration};

/// Maximum length of a unique key, in bytes.
const MAX_UNIQUE: usize = 255;

/// State of the routes.
#[derive(Clone, Debug)]
struct JobRoutes {
    jobs: Jobs,
    access: Access,
    registry: Arc<Registry>,
}

impl FromRef<JobRoutes> for Access {
    fn from_ref(known: &JobRoutes) -> Self {
        known.access.clone()
    }
}

/// A job
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct JobRequest {
    /// Payload, as the kind of job wants it
    #[schema(value_type = Object)]
    pub(crate) payload: Box<RawValue>,
    /// Time to wait before the job is due, such as 30s or 1h
    delay: Option<String>,
    /// Unique key: as long as a job of this kind with this key has not ended, its id is answered instead of a new one
    unique: Option<String>,
    /// Priority; jobs with a lower number go first
    #[schema(minimum = -32768, maximum = 32767)]
    priority: Option<i16>,
}

/// A job that was enqueued
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Enqueued {
    pub(crate) id: Uuid,
}

impl JobRequest {
    /// Makes the job. `owner` keeps the unique keys of different callers apart.
    pub(crate) fn job(self, kind: &JobKind, owner: &str) -> Result<NewJob> {
        let mut job = kind.job(self.payload.get())?;
        if let Some(delay) = self.delay {
            job.due =
                Due::In(parse_duration(&delay).ok_or_else(|| FieldError::new("delay", Duration::WANTED))?);
        }
        if let Some(key) = self.unique {
            if key.is_empty() || key.len() > MAX_UNIQUE {
                return Err(FieldError::new("unique", format!("1 to {MAX_UNIQUE} bytes")).into());
            }
            job.unique = Some(Unique { key: format!("{owner}:{key}"), until: UniqueUntil::Ended });
        }
        job.priority = self.priority.unwrap_or(job.priority);
        Ok(job)
    }
}

pub(crate) fn routes(jobs: Jobs, access: Access, registry: Arc<Registry>) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(enqueue)).with_state(JobRoutes { jobs, access, registry })
}

/// Enqueues a job
///
/// Needs a key with the scope `jobs`, and a public kind. After a 202 the job is stored and will run, whatever happens
/// to this process. When too many jobs wait, the answer is 503 with `Retry-After`.
#[utoipa::path(
    post, path = "/jobs/{kind}", operation_id = "enqueueJob", params(("kind" = String, Path)), request_body = JobRequest,
    responses((status = ACCEPTED, body = Enqueued))
)]
async fn enqueue(
    Authorized { caller, .. }: Authorized<access::JobsScope>,
    scope: RequestScope,
    State(known): State<JobRoutes>,
    Path(kind): Path<String>,
    Json(request): Json<JobRequest>,
) -> Result<Response> {
    let kind = known.registry.kind(&kind);
    // A kind that is not public is answered like an unknown kind.
    let kind = kind.filter(|kind| kind.options.public).ok_or_else(|| not_found("kind of job"))?;
    let job = request.job(&kind, &caller.site.0.to_string())?.trace(trace(&scope));
    let id = known.jobs.enqueue(job).await?;
    info!(job = %id, kind = kind.name, "enqueued");
    Ok((StatusCode::ACCEPTED, axum::Json(Enqueued { id })).into_response())
}
