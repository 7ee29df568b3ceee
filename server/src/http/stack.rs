//! What surrounds every request, in order, with the reason beside each step.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::MatchedPath;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderValue, Request, StatusCode, Version, header};
use http_body::Body as _;
use http_body_util::Limited;
use hyper::body::Incoming;
use tower::{Layer, Service};
use tracing::{Instrument, info_span};

use super::Config;
use super::body::{Leftover, RequestBody};
use super::conn::Connection;
use super::exchange::{Exchange, FollowedBody, Listener};
use super::problem::Problem;
use super::scope::{REQUEST_ID, RequestId, Scope};
use crate::drain::{Drain, Phase};
use crate::metrics;

/// The steps around a router.
#[derive(Debug)]
pub(super) struct Stack {
    router: Router,
    request_timeout: Duration,
    body_limit: usize,
    trust_request_id: bool,
    listener: Listener,
    drain: Drain,
}

impl Stack {
    pub(super) fn new(router: Router, config: &Config, drain: Drain) -> Self {
        Self {
            // The only step inside the router: which pattern matched is known nowhere else.
            router: router.layer(RouteLabel),
            request_timeout: config.request_timeout,
            body_limit: config.body_limit,
            trust_request_id: config.trust_request_id,
            listener: Listener { name: config.name, quiet: config.quiet },
            drain,
        }
    }

    /// Answers one request.
    pub(super) async fn handle(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        connection: Arc<Connection>,
    ) -> Result<http::Response<FollowedBody>, Infallible> {
        // The scope comes first: everything after it may say which request it speaks of.
        let began = Instant::now();
        let id = if self.trust_request_id { RequestId::from_client(request.headers()) } else { None };
        let id = id.unwrap_or_default();
        let scope = Scope::new(id, began + self.request_timeout, connection);
        request.extensions_mut().insert(scope.clone());

        // The exchange is counted and logged however the steps below end, and also if they never do.
        let version = request.version();
        // HTTP/2 resets one stream for a body that nobody reads, and that overtakes nothing.
        let leftover = (version < Version::HTTP_2).then(|| scope.connection().leftover.clone());
        let method = request.method().clone();
        let exchange =
            Exchange::begin(self.listener, scope.clone(), method, request.uri().path(), version, began);

        let span = info_span!("request", request_id = scope.id().as_str());
        let mut response = self.respond(request, leftover).instrument(span).await;
        response.headers_mut().insert(REQUEST_ID, scope.id().header());

        // A client of a draining process should connect anew, to another one; and one whose connection the
        // handler has closed should not find that out by its next request.
        let closing = self.drain.phase() >= Phase::Soft || scope.connection().is_closing();
        if version < Version::HTTP_2 && closing {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(exchange.respond(response))
    }

    async fn respond(&self, request: Request<Incoming>, leftover: Option<Leftover>) -> Response {
        let (parts, body) = request.into_parts();
        let body = RequestBody::new(body, leftover);
        // A body that announces itself as too long is refused before it is read.
        if body.size_hint().lower() > self.body_limit as u64 {
            return body_too_long(self.body_limit);
        }
        // One that does not is cut off at the limit; the extractor that reads it answers.
        let request = Request::from_parts(parts, Body::new(Limited::new(body, self.body_limit)));

        // A panic is the bug of one handler: this request gets a 500, the connection lives on.
        let answer = AssertUnwindSafe(self.router.clone().call(request)).catch_unwind();
        let mut answer = pin!(answer);

        // Most handlers never wait, and a timer costs more than they do: it is armed at the first pause.
        let answer = match futures_util::poll!(answer.as_mut()) {
            Poll::Ready(answer) => answer,
            Poll::Pending => match tokio::time::timeout(self.request_timeout, answer).await {
                Ok(answer) => answer,
                Err(_elapsed) => return took_too_long(self.request_timeout),
            },
        };
        match answer {
            Ok(Ok(response)) => explained(response),
            Err(_panic) => {
                metrics::handler_panicked();
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the handler failed; the log has the reason")
                    .into_response()
            }
        }
    }
}

fn body_too_long(limit: usize) -> Response {
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have at most {limit} bytes"))
        .into_response()
}

/// An error without a word becomes a problem: what a router says of a path or a method that it does not have.
fn explained(response: Response) -> Response {
    let status = response.status();
    let silent = response.body().is_end_stream() && !response.headers().contains_key(header::CONTENT_TYPE);
    if !silent || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let detail = match status {
        StatusCode::NOT_FOUND => "there is nothing at this path",
        StatusCode::METHOD_NOT_ALLOWED => "this path does not have this method",
        _ => "",
    };
    // What else it said stays: which methods there are, for one.
    let (silence, _) = response.into_parts();
    let mut problem = Problem::new(status, detail).into_response();
    for (name, value) in silence.headers.iter().filter(|(name, _)| **name != header::CONTENT_LENGTH) {
        problem.headers_mut().append(name, value.clone());
    }
    problem
}

fn took_too_long(limit: Duration) -> Response {
    let seconds = limit.as_secs_f64();
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, format!("no answer within {seconds} s"))
        .retry_after(Duration::from_secs(1))
        .into_response()
}

/// Tells the scope which route matched.
#[derive(Clone, Copy, Debug)]
struct RouteLabel;

impl<S> Layer<S> for RouteLabel {
    type Service = Labelled<S>;

    fn layer(&self, inner: S) -> Labelled<S> {
        Labelled(inner)
    }
}

#[derive(Clone, Debug)]
struct Labelled<S>(S);

impl<S, B> Service<Request<B>> for Labelled<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        let extensions = request.extensions();
        if let (Some(scope), Some(route)) = (extensions.get::<Scope>(), extensions.get::<MatchedPath>()) {
            scope.set_route(route.clone());
        }
        self.0.call(request)
    }
}
