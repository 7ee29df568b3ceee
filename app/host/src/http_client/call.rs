//! The attempts of one call.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::header::RETRY_AFTER;
use http::{HeaderMap, Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use perennial_runtime::breaker::{Breaker, BreakerPermit};
use perennial_runtime::metrics::Counted;
use perennial_runtime::running::RunningWork;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::debug;

use super::ClientInner;
use super::answer::HttpAnswer;
use super::connect::NotPublic;
use super::error::{Error, Result};
use super::request::{HttpRequest, RequestBody};
use super::retry::{Attempt, Repeatable, pause};

/// Longest `Retry-After` that is believed.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Everything that a running call holds.
pub(super) struct RunningCall {
    _permit: OwnedSemaphorePermit,
    _of_host: Option<RunningWork<String>>,
    _counted: Counted,
}

/// Calls a server until there is an answer, or no further attempt is of use.
pub(super) async fn run(request: HttpRequest, uri: Uri) -> Result<HttpAnswer> {
    let client = request.client.clone();
    let began = Instant::now();
    let result = attempts(request, uri, began).await;
    let status = match &result {
        // A server may answer with any number: only a status that has a name becomes a label.
        Ok(answer) if answer.status().canonical_reason().is_none() => "other".to_owned(),
        Ok(answer) => answer.status().as_str().to_owned(),
        Err(error) => word(error).to_owned(),
    };
    client.0.metrics.ended(&status, began.elapsed());
    result
}

/// The label of an error in metrics.
fn word(error: &Error) -> &'static str {
    match error {
        Error::Request { .. } => "request",
        Error::Forbidden { .. } => "forbidden",
        Error::Busy { .. } => "busy",
        Error::Open(_) => "open",
        Error::Connect { .. } => "connect",
        Error::Timeout { .. } => "timeout",
        Error::Broken { .. } | Error::Status { .. } | Error::TooLong { .. } | Error::Json { .. } => "broken",
    }
}

async fn attempts(mut request: HttpRequest, uri: Uri, began: Instant) -> Result<HttpAnswer> {
    let client = request.client.clone();
    let (inner, http) = (&client.0, client.connections()?);
    let (target, deadline) = (inner.config.name, began + request.timeout);
    let running = enter(inner, request.owner.take(), &uri, deadline).await?;
    inner.retries.called();
    let repeatable = request.repeatable();
    let mut failed = 0;
    loop {
        failed += 1;
        let permit = inner.breaker.as_ref().map(Breaker::permit).transpose()?;
        let sent = http.request(build(&mut request, &uri));
        let (attempt, result) = match tokio::time::timeout_at(deadline, sent).await {
            Ok(Ok(response)) => (answered(&response), Ok(response)),
            Ok(Err(error)) => failure(target, &uri, error),
            Err(_elapsed) => (Attempt::Unknown, Err(Error::Timeout { target, limit: request.timeout })),
        };
        judge(permit, attempt, repeatable, &result);
        let left = deadline.saturating_duration_since(Instant::now());
        let is_final = matches!(&result, Err(Error::Forbidden { .. } | Error::Timeout { .. }));
        let wait = pause(attempt, repeatable, failed, request.retries, left);
        let Some(wait) = wait.filter(|_| !is_final && inner.retries.take()) else {
            let limit = inner.config.max_answer;
            return result.map(|response| {
                let (parts, body) = response.into_parts();
                HttpAnswer::new(target, parts, body, (deadline, request.timeout), limit, running)
            });
        };
        // The connection of an answer that is not wanted is not held during the pause.
        drop(result);
        debug!(target_name = target, ?attempt, ?wait, "a call is tried again");
        inner.metrics.retried();
        tokio::time::sleep(wait).await;
    }
}

/// Waits for a place among the calls that run at once.
async fn enter(
    inner: &Arc<ClientInner>,
    owner: Option<String>,
    uri: &Uri,
    deadline: Instant,
) -> Result<RunningCall> {
    let target = inner.config.name;
    let of_host = match &inner.config.any {
        Some(any) => {
            let host = uri.host().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
            let literal = host.trim_matches(['[', ']']).parse::<IpAddr>().ok();
            if literal.is_some_and(|address| !perennial_addresses::is_allowed(address, &any.networks)) {
                return Err(Error::Forbidden { target, host });
            }
            let owner = owner.unwrap_or(host);
            Some(inner.hosts.enter(owner, any.calls).ok_or(Error::Busy { target })?)
        }
        None => None,
    };
    let permit = tokio::time::timeout_at(deadline, Arc::clone(&inner.calls).acquire_owned()).await;
    let permit = permit.ok().and_then(std::result::Result::ok).ok_or(Error::Busy { target })?;
    Ok(RunningCall { _permit: permit, _of_host: of_host, _counted: inner.metrics.count() })
}

/// Makes the request of an attempt. A body that is a stream is in the first one alone.
fn build(request: &mut HttpRequest, uri: &Uri) -> Request<Body> {
    let body = match &mut request.body {
        RequestBody::Bytes(bytes) => Body::from(bytes.clone()),
        RequestBody::Stream(body) => std::mem::take(body),
    };
    let mut built = Request::new(body);
    *built.method_mut() = request.method.clone();
    *built.uri_mut() = uri.clone();
    *built.headers_mut() = request.headers.clone();
    built
}

fn answered(response: &Response<Incoming>) -> Attempt {
    Attempt::Answered(response.status(), retry_after(response.headers()))
}

/// The seconds of `Retry-After`, at most a day: a server may write any number.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_WAIT))
}

fn failure(target: &'static str, uri: &Uri, error: legacy::Error) -> (Attempt, Result<Response<Incoming>>) {
    if is_forbidden(&error) {
        let host = uri.host().unwrap_or_default().to_owned();
        return (Attempt::NotSent, Err(Error::Forbidden { target, host }));
    }
    match error.is_connect() {
        true => (Attempt::NotSent, Err(Error::Connect { target, source: error.into() })),
        false => (Attempt::Unknown, Err(Error::Broken { target, source: error.into() })),
    }
}

/// Returns true when no address of a name may be connected to.
fn is_forbidden(error: &legacy::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let within = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if within.is_some_and(<dyn std::error::Error + Send + Sync>::is::<NotPublic>) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Tells the circuit breaker how an attempt went.
fn judge(
    permit: Option<BreakerPermit>,
    attempt: Attempt,
    repeatable: Repeatable,
    result: &Result<Response<Incoming>>,
) {
    let Some(permit) = permit else { return };
    match (result, attempt) {
        (Err(Error::Forbidden { .. }), _) => drop(permit),
        // The sender of the body may have left: the failure says nothing about the server.
        (_, Attempt::Unknown) if !repeatable.is_replayable => drop(permit),
        _ => permit.judge(attempt.is_success()),
    }
}
