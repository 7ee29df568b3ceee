//! The steps around every request, in order, with the reason for each.

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, MatchedPath};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderValue, Request, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use ipnet::IpNet;
use tower::{Layer, Service};
use tracing::{Instrument, info_span};

use super::body::{BodyTimeouts, Leftover, RequestBody};
use super::exchange::{Exchange, FollowedBody, InFlight, RequestLog, logged, method_label};
use super::problem::Problem;
use super::scope::{Begun, REQUEST_ID, RequestId, RequestScope, Services};
use super::target::{self, Target};
use super::timed::Timed;
use super::trace::{TRACERESPONSE, Trace};
use super::{Config, ErrorReaders};
use crate::metrics::{self, Requests};
use crate::net::Connection;
use crate::net::connection::{OpenBody, ShutdownMode, Spoken};
use crate::net::proxy::{ForwardedHeader, forwarded_for, is_trusted};
use perennial_runtime::cgroup::Pressure;
use perennial_runtime::drain::Phase;

/// The steps around a router.
pub(super) struct Stack {
    router: Router,
    request_timeout: Duration,
    body_limit: usize,
    body_timeouts: BodyTimeouts,
    trust_request_id: bool,
    trusted_proxies: Arc<[IpNet]>,
    forwarded_header: ForwardedHeader,
    max_requests: usize,
    pressure: Pressure,
    in_flight: Arc<AtomicUsize>,
    ledger: Arc<RequestLog>,
    readers: Option<ErrorReaders>,
    services: Arc<Services>,
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stack")
    }
}

impl Stack {
    pub(super) fn new(
        router: Router,
        config: &Config,
        readers: Option<ErrorReaders>,
        services: Arc<Services>,
    ) -> Self {
        Self {
            // The only step inside the router: which pattern matched is known nowhere else. The limits of this stack stand
            // in for the limit of the extractors.
            router: router.layer(RouteLabel).layer(DefaultBodyLimit::disable()),
            request_timeout: config.request_timeout,
            body_limit: config.body_limit,
            body_timeouts: BodyTimeouts { idle: config.body_idle_timeout, total: config.body_timeout },
            trust_request_id: config.trust_request_id,
            trusted_proxies: Arc::clone(&config.net.trusted_proxies),
            forwarded_header: config.net.forwarded_header,
            max_requests: config.max_requests,
            pressure: config.net.pressure.clone(),
            in_flight: Arc::default(),
            ledger: Arc::new(RequestLog {
                requests: Requests::new(config.net.name),
                quiet: config.quiet,
                access_log: config.access_log.clone(),
                slow_after: config.slow_after,
            }),
            readers,
            services,
        }
    }

    /// Answers one request.
    pub(super) async fn handle(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        connection: Arc<Connection>,
        leftover: Option<Leftover>,
    ) -> Result<http::Response<FollowedBody>, Infallible> {
        // Shedding comes before all steps that cost time or memory. A queue of requests would only delay all of them.
        let Some(in_flight) = self.enter() else { return Ok(self.shed(request, &connection, leftover)) };

        // The scope comes next: all later steps can name the request.
        let began = Instant::now();
        let id = if self.trust_request_id { RequestId::from_client(request.headers()) } else { None };
        let id = id.unwrap_or_default();
        let version = request.version();
        let scope = RequestScope::new(Begun {
            trace: Trace::of(request.headers(), id.as_str()),
            id,
            began,
            time_limit: self.request_timeout,
            body_limit: self.body_limit,
            method: method_label(request.method()),
            path: logged(request.uri().path()),
            client: self.forwarded(&request, &connection),
            connection: Arc::clone(&connection),
            services: Arc::clone(&self.services),
        });
        let origin = self.readers.as_ref().and_then(|_| request.headers().get(header::ORIGIN).cloned());
        let target = target::check(&mut request);
        request.extensions_mut().insert(scope.clone());

        // The exchange is counted and logged however the steps below end, and also if they are dropped.
        let exchange = Exchange::begin(Arc::clone(&self.ledger), scope.clone(), version, in_flight);

        let span = info_span!("request", request_id = scope.id().as_str(), trace_id = scope.trace().id());
        let mut response = match target {
            Target::Route => self.respond(request, leftover, &scope).instrument(span).await,
            Target::Server => ([(header::ALLOW, target::METHODS)], StatusCode::NO_CONTENT).into_response(),
            Target::Refused(problem) => {
                // A client that writes such a request may mean something else by its next bytes.
                connection.tell(ShutdownMode::Last);
                problem.into_response()
            }
        };
        if let Some(origin) = origin {
            self.let_read(origin, &mut response);
        }
        response.headers_mut().insert(REQUEST_ID, scope.id().header());
        response.headers_mut().extend(scope.trace().header().map(|trace| (TRACERESPONSE, trace)));
        if let Some(added) = scope.added_headers() {
            response.headers_mut().extend(added.clone());
        }

        // A client of a draining process should connect anew, to another process. A client whose connection is about
        // to end should not find that out by its next request.
        self.say_if_last(&connection, version, &mut response);
        Ok(exchange.respond(response))
    }

    /// Lets a page read an error response on which no policy of a router has decided.
    fn let_read(&self, origin: HeaderValue, response: &mut Response) {
        let is_error = response.status().is_client_error() || response.status().is_server_error();
        let headers = response.headers_mut();
        let is_decided = headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN);
        if is_error && !is_decided && self.readers.as_ref().is_some_and(|may_read| may_read(&origin)) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.append(header::VARY, HeaderValue::from_static("origin"));
        }
    }

    fn say_if_last<B>(&self, connection: &Connection, version: Version, response: &mut http::Response<B>) {
        let ending = connection.told() >= ShutdownMode::Last || self.services.drain.phase() >= Phase::Soft;
        // An upgrade has another value in the `Connection` header.
        let upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if version < Version::HTTP_2 && ending && !upgrade {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// Counts a request as running; `None` when too many run, or memory is nearly used up.
    fn enter(&self) -> Option<InFlight> {
        let in_flight = InFlight(Arc::clone(&self.in_flight));
        let running = self.in_flight.fetch_add(1, Ordering::Relaxed);
        (running < self.max_requests && self.pressure.admits()).then_some(in_flight)
    }

    /// Refuses a request, as cheaply as possible.
    fn shed(
        &self,
        request: Request<Incoming>,
        connection: &Arc<Connection>,
        leftover: Option<Leftover>,
    ) -> http::Response<FollowedBody> {
        connection.turned_away();
        let version = request.version();
        self.ledger.requests.shed(method_label(request.method()));
        if let Some(leftover) = leftover {
            leftover.drop_later(request.into_body(), OpenBody::on(connection));
        }
        let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests are running")
            .retry_after(Duration::from_secs(1));
        let mut response = problem.into_response();
        self.say_if_last(connection, version, &mut response);
        response.map(FollowedBody::plain)
    }

    /// Returns the client that a trusted proxy names.
    fn forwarded(&self, request: &Request<Incoming>, connection: &Connection) -> Option<IpAddr> {
        let trusted = &*self.trusted_proxies;
        (!trusted.is_empty() && is_trusted(trusted, connection.peer()))
            .then(|| forwarded_for(trusted, self.forwarded_header, request.headers()))
            .flatten()
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        leftover: Option<Leftover>,
        scope: &RequestScope,
    ) -> Response {
        let (parts, body) = request.into_parts();
        let body = RequestBody::new(body, &parts.headers, leftover, scope.clone(), self.body_timeouts);
        let body = if body.is_end_stream() { Body::empty() } else { Body::new(body) };
        let request = Request::from_parts(parts, body);

        // A panic is the bug of one handler: this request gets a 500, the connection lives on.
        let answer = AssertUnwindSafe(self.router.clone().call(request)).catch_unwind();
        let mut answer = pin!(Timed::new(scope.clone(), answer));

        // Most handlers never wait, and a timer costs more than they do, so it is armed at the first wait.
        let answer = match futures_util::poll!(answer.as_mut()) {
            Poll::Ready(answer) => answer,
            Poll::Pending => loop {
                let deadline = scope.deadline();
                match tokio::time::timeout_at(deadline.into(), answer.as_mut()).await {
                    Ok(answer) => break answer,
                    // A layer of the route has given it more time.
                    Err(_elapsed) if scope.deadline() > deadline => {}
                    Err(_elapsed) => return took_too_long(scope.time_limit()),
                }
            },
        };
        match answer {
            // The answer of the handler is replaced, because it could not read the body.
            Ok(Ok(_)) if scope.has_too_long_body() => body_too_long(scope.body_limit()),
            Ok(Ok(_)) if scope.has_given_up_body() => body_too_slow(scope.connection()),
            Ok(Ok(response)) => explained(response),
            Err(_panic) => {
                metrics::handler_panicked();
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the handler failed; the log has the reason")
                    .into_response()
            }
        }
    }
}

/// Answers with 408. In HTTP/1.1 the connection is closed, because the rest of the body may still arrive and would be
/// taken for the next request.
fn body_too_slow(connection: &Connection) -> Response {
    if connection.spoken() == Spoken::Http1 {
        connection.close();
    }
    Problem::new(StatusCode::REQUEST_TIMEOUT, "the body came too slowly").into_response()
}

fn body_too_long(limit: usize) -> Response {
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have at most {limit} bytes"))
        .into_response()
}

/// Turns an error response without a body into a problem, such as the router's answer to an unknown path or method.
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
    // The other headers of the response stay, such as the list of allowed methods.
    let (silence, _) = response.into_parts();
    let mut problem = Problem::new(status, detail).into_response();
    for (name, value) in silence.headers.iter().filter(|(name, _)| **name != header::CONTENT_LENGTH) {
        problem.headers_mut().append(name, value.clone());
    }
    problem
}

/// Answers with 503 to a request whose handler had no answer in time.
pub(super) fn took_too_long(limit: Duration) -> Response {
    let seconds = limit.as_secs_f64();
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, format!("no answer within {seconds} s"))
        .retry_after(Duration::from_secs(1))
        .into_response()
}

/// Layer that tells the scope which route matched.
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
        if let (Some(scope), Some(route)) =
            (extensions.get::<RequestScope>(), extensions.get::<MatchedPath>())
        {
            scope.set_route(route.clone());
        }
        self.0.call(request)
    }
}
