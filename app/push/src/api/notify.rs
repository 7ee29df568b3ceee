//! `POST /notify`: a notification is checked, stored together with the job that begins it, and only then accepted.
//!
//! ```text
//! request.rs      what is asked, and what is answered
//! check.rs        everything that can be wrong with it
//! idempotency.rs  a repeated request is answered like the first
//! handle.rs       the same from the code of other modules
//! builder.rs      a request as such code makes it
//! ```

mod builder;
mod check;
mod handle;
mod idempotency;
mod request;

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use perennial_host::access::Authorized;
use perennial_host::api::{Json, Result, trace};
use perennial_host::sites::SiteId;
use perennial_server::http::problem::Problem;
use perennial_server::http::scope::RequestScope;
use perennial_store::pool::sql::StoreTransaction;
use perennial_workers::NewJob;
use perennial_workers::queue::Due;
use tracing::info;
use uuid::Uuid;

use super::ApiState;
use crate::metrics;
use crate::model::audience::Audience;
use crate::model::jobs::{Deliver, FanOut};
use crate::model::notification::Stage;
use crate::model::queues::{BULK_QUEUE, PACED_QUEUE, SMALL_QUEUE};
use crate::scopes::NotifyScope;
use crate::store::{Accepted, Idempotency, NewNotification};
pub use builder::Notification;
use check::{Checked, check};
pub(crate) use check::{RATE_WANTED, rate_milli};
pub use handle::PushHandle;
pub(crate) use idempotency::AcceptingKeys;
use idempotency::{fingerprint, idempotency_key};
pub use request::Notified;
use request::{DryRun, NotifyRequest};

/// Sends a notification
///
/// Needs a key with the scope `notify`. After a 202, the notification is stored and will be sent, even if this process
/// crashes; its progress is at `Location`. With an `Idempotency-Key`, repeating the request is safe for 24 hours.
#[utoipa::path(
    post, path = "/notify", operation_id = "notify", request_body = NotifyRequest,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = ACCEPTED, body = Notified), (status = OK, body = DryRun, description = "A dry run"))
)]
pub(crate) async fn notify(
    Authorized { caller, .. }: Authorized<NotifyScope>,
    scope: RequestScope,
    State(api): State<ApiState>,
    headers: HeaderMap,
    Json(request): Json<NotifyRequest>,
) -> Result<Response> {
    let idempotency = idempotency_key(&headers)?.map(|key| Idempotency {
        api_key: caller.key.clone(),
        key,
        fingerprint: fingerprint(&request),
    });
    let _only_one = match &idempotency {
        Some(promise) => Some(api.in_flight.enter(&promise.api_key, &promise.key)?),
        None => None,
    };
    if let Some(promise) = &idempotency
        && let Some(answer) = answered_before(&api, promise).await?
    {
        return Ok(answer);
    }
    if request.dry_run.unwrap_or_default() {
        return Ok(axum::Json(dry(&api, caller.site, request).await?).into_response());
    }
    let prepared = prepare(&api, caller.site, request, Some(trace(&scope)), idempotency, None).await?;
    let accepted = api.store.accept(Arc::clone(&prepared.new)).await?;
    Ok(prepared.answer(&accepted)?.into_response())
}

/// A notification that has passed all checks, to be stored together with the job that begins it.
struct Prepared {
    new: Arc<NewNotification>,
    warnings: Vec<String>,
}

/// Checks a request and counts its audience: within a transaction of the caller, if there is one. `trace` is the trace
/// that the jobs carry.
async fn prepare(
    api: &ApiState,
    site: SiteId,
    request: NotifyRequest,
    trace: Option<String>,
    idempotency: Option<Idempotency>,
    tx: Option<&StoreTransaction>,
) -> Result<Prepared> {
    let id = Uuid::now_v7();
    let mut checked = check(api, site, id, request).await?;
    let size = size(api, site, &mut checked, tx).await?;
    let job = first_job(api, id, &checked, size)?;
    let job = match trace {
        Some(trace) => job.trace(trace),
        None => job,
    };
    api.store.admit(&job)?;
    let direct = is_direct(api, &checked, size);
    let new = NewNotification {
        id,
        site: site.0,
        audience: checked.audience,
        recipients: checked.recipients,
        payload: checked.payload,
        ttl: checked.ttl,
        urgency: checked.urgency.as_str(),
        topic: checked.topic,
        plan: checked.plan,
        is_template: checked.is_template,
        estimate: size.members,
        watermark: size.watermark,
        job,
        direct,
        idempotency,
    };
    Ok(Prepared { new: Arc::new(new), warnings: checked.warnings })
}

impl Prepared {
    /// The answer, after the notification was handed to the store.
    fn answer(self, accepted: &Accepted) -> Result<Notified> {
        let Self { new, warnings } = self;
        match *accepted {
            Accepted::Now => {
                metrics::accepted();
                info!(notification = %new.id, job = %new.job.id, audience = new.estimate, "accepted");
                Ok(Notified::new(new.id, new.estimate, Stage::first(new.plan.due_at), warnings))
            }
            Accepted::Before(id, estimate, stage) => Ok(Notified::new(id, estimate, stage, Vec::new())),
            Accepted::Conflict => Err(conflict().into()),
        }
    }
}

/// Answers a request that was accepted before. This comes before all checks: a request that was valid when it was accepted
/// may be invalid now.
async fn answered_before(api: &ApiState, promise: &Idempotency) -> Result<Option<Response>> {
    Ok(match api.store.accepted_before(promise.clone()).await? {
        Some(Accepted::Before(id, estimate, stage)) => {
            Some(Notified::new(id, estimate, stage, Vec::new()).into_response())
        }
        Some(Accepted::Conflict) => return Err(conflict().into()),
        Some(Accepted::Now) | None => None,
    })
}

/// How many members an audience has, and the highest id among all subscriptions of its site: members are those up to it.
#[derive(Clone, Copy, Debug)]
struct Size {
    members: u64,
    watermark: i64,
}

/// Counts the audience. One that takes too long is estimated, with a warning.
async fn size(
    api: &ApiState,
    site: SiteId,
    checked: &mut Checked,
    tx: Option<&StoreTransaction>,
) -> Result<Size> {
    if checked.audience == Audience::Inline {
        let count = checked.recipients.len();
        return Ok(Size { members: count as u64, watermark: i64::try_from(count).unwrap_or(i64::MAX) });
    }
    let (count, watermark) = match tx {
        None => api.audiences.estimate(site, &checked.audience).await?,
        Some(tx) => api.audiences.estimate_in(tx, site, &checked.audience).await?,
    };
    if !count.is_exact {
        let warning = "the audience takes too long to count, so the number shown is an upper bound";
        checked.warnings.push(warning.to_owned());
    }
    Ok(Size { members: count.members, watermark })
}

/// What a dry run answers.
async fn dry(api: &ApiState, site: SiteId, request: NotifyRequest) -> Result<DryRun> {
    let mut checked = check(api, site, Uuid::now_v7(), request).await?;
    let size = size(api, site, &mut checked, None).await?;
    let Checked { audience, needed, warnings, .. } = checked;
    let incomplete = match needed.is_empty() {
        true => None,
        false if audience == Audience::Inline => Some(size.members),
        false => api.store.count_incomplete(site.0, &audience, size.watermark, &needed).await?,
    };
    Ok(DryRun { dry_run: true, audience: size.members, incomplete, warnings })
}

/// Returns true when the notification is one batch, which needs no cutting.
fn is_direct(api: &ApiState, checked: &Checked, size: Size) -> bool {
    checked.audience == Audience::Inline || api.config.is_small(size.members)
}

/// The job that begins the notification: it sends to a small audience, and cuts a big one.
fn first_job(api: &ApiState, id: Uuid, checked: &Checked, size: Size) -> Result<NewJob> {
    let (plan, priority) = (&checked.plan, Deliver::priority(checked.urgency));
    let is_direct = is_direct(api, checked, size);
    let job = if plan.rate_milli.is_some() && is_direct {
        Deliver::job(id, PACED_QUEUE, priority)
    } else if api.config.is_small(size.members) {
        Deliver::job(id, SMALL_QUEUE, priority)
    } else if is_direct {
        Deliver::job(id, BULK_QUEUE, priority)
    } else {
        NewJob::new(&FanOut { notification: id, priority }).map(|job| job.priority(priority))
    };
    let job = job?;
    Ok(match plan.due_at {
        Some(at) => job.due(Due::At(Timestamp::from_millisecond(at).unwrap_or_default())),
        None => job,
    })
}

fn conflict() -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "this Idempotency-Key was used for another request")
}

impl IntoResponse for Notified {
    fn into_response(self) -> Response {
        let location = [(header::LOCATION, format!("/notifications/{}", self.id))];
        (StatusCode::ACCEPTED, location, axum::Json(self)).into_response()
    }
}
