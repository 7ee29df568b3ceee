//! One request and its response, counted while they last and logged when the last byte has been sent.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tracing::{Level, debug, enabled, info, warn};

use super::access::{self, AccessLog};
use super::scope::{RequestScope, RequestStage, milliseconds};
use crate::metrics::Requests;
use crate::net::connection::RunningRequest;
use perennial_runtime::metrics::Counted;
use perennial_runtime::telemetry::JsonLines;

/// Status for "the client left before there was an answer"; nginx made it usual.
const CLIENT_LEFT: u16 = 499;

/// Maximum length of a path in the access log, in bytes: clients choose paths, and must not fill the log.
const LOGGED_PATH: usize = 512;

/// Maximum size of one piece of a response, in bytes: an exchange has ended when its last piece is on its way, and not
/// when the whole response waits in a buffer.
const PIECE: usize = 64 << 10;

/// How the exchanges of a server are counted and logged.
#[derive(Debug)]
pub(super) struct RequestLog {
    pub(super) requests: Requests,
    /// Whether the access log is written at debug level only.
    pub(super) quiet: bool,
    pub(super) access_log: Option<JsonLines>,
    /// Requests that take at least this long are logged as slow.
    pub(super) slow_after: Duration,
}

/// Guard of one running request, which is counted until the guard drops.
#[derive(Debug)]
pub(super) struct InFlight(pub(super) Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Guard of one exchange: however the exchange ends, dropping the guard writes the access log line and the metrics.
#[derive(Debug)]
pub(super) struct Exchange {
    ledger: Arc<RequestLog>,
    scope: RequestScope,
    version: Version,
    status: Option<StatusCode>,
    bytes: u64,
    complete: bool,
    running: RunningRequest,
    _in_flight: InFlight,
    _counted: Counted,
}

impl Exchange {
    pub(super) fn begin(
        ledger: Arc<RequestLog>,
        scope: RequestScope,
        version: Version,
        in_flight: InFlight,
    ) -> Self {
        Self {
            running: RunningRequest::on(scope.connection(), &scope),
            _counted: ledger.requests.count(),
            _in_flight: in_flight,
            ledger,
            scope,
            version,
            status: None,
            bytes: 0,
            complete: false,
        }
    }

    /// Follows the response to its last byte.
    pub(super) fn respond(mut self, response: http::Response<Body>) -> http::Response<FollowedBody> {
        self.status = Some(response.status());
        self.running.answered();
        self.scope.set_stage(RequestStage::Response);
        self.scope.spent().response = self.scope.began().elapsed();
        if is_stream(&response) {
            self.scope.is_a_stream();
        }
        response.map(|body| {
            self.complete = body.is_end_stream();
            FollowedBody { body, exchange: Some(self), given: None, rest: Bytes::new() }
        })
    }

    /// Logs where the time of a slow request was spent.
    fn log_slow(&self, took: Duration, route: &str) {
        let spent = self.scope.spent();
        let waits: Vec<String> =
            spent.waits.iter().map(|(what, took)| format!("{what} {} ms", milliseconds(*took))).collect();
        let waited = spent.body + spent.waits.iter().map(|(_, took)| *took).sum::<Duration>();
        warn!(
            request_id = self.scope.id().as_str(),
            trace_id = self.scope.trace().id(),
            route,
            took_ms = milliseconds(took),
            body_ms = milliseconds(spent.body),
            waits = waits.join(", "),
            handler_ms = milliseconds(spent.response.saturating_sub(waited)),
            client_ms = milliseconds(spent.client),
            answered = self.status.is_some(),
            "slow request"
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let took = self.scope.began().elapsed();
        let status = self.status.map_or(CLIENT_LEFT, |status| status.as_u16());
        let route = self.scope.route().unwrap_or("unmatched");
        self.ledger.requests.ended(route, self.scope.method(), status, took);
        // `tracing` fixes the level of an event at compile time, so each level has an event of its own.
        macro_rules! line {
            ($level:ident) => {
                $level!(
                    target: "access",
                    request_id = self.scope.id().as_str(),
                    trace_id = self.scope.trace().id(),
                    method = self.scope.method(),
                    path = self.scope.path(),
                    route,
                    status,
                    bytes = self.bytes,
                    complete = self.complete,
                    took_ms = milliseconds(took),
                    version = ?self.version,
                    peer = %self.scope.connection().peer(),
                    client = self.scope.forwarded_client().map(tracing::field::display),
                    "request"
                )
            };
        }
        match &self.ledger.access_log {
            _ if self.ledger.quiet => line!(debug),
            None => line!(info),
            Some(log) if enabled!(target: "access", Level::INFO) => access::write(
                log,
                &AccessLog {
                    request_id: self.scope.id().as_str(),
                    trace_id: self.scope.trace().id(),
                    method: self.scope.method(),
                    path: self.scope.path(),
                    route,
                    status,
                    bytes: self.bytes,
                    complete: self.complete,
                    took_ms: milliseconds(took),
                    version: self.version,
                    peer: self.scope.connection().peer(),
                    client: self.scope.forwarded_client(),
                },
            ),
            Some(_) => {}
        }
        // A stream lasts as long as its client wants; only its beginning can be slow.
        let slow = match self.scope.has_a_stream() && self.status.is_some() {
            true => self.scope.spent().response,
            false => took,
        };
        if slow >= self.ledger.slow_after {
            self.log_slow(took, route);
        }
    }
}

/// Returns true when a response has no end of its own: events for a page, or another protocol on the connection.
fn is_stream(response: &http::Response<Body>) -> bool {
    let events = |media_type: &http::HeaderValue| media_type.as_bytes().starts_with(b"text/event-stream");
    response.status() == StatusCode::SWITCHING_PROTOCOLS
        || response.headers().get(http::header::CONTENT_TYPE).is_some_and(events)
}

/// Returns the part of a path that is logged.
pub(super) fn logged(path: &str) -> String {
    match path.get(..path.floor_char_boundary(LOGGED_PATH)) {
        Some(start) if start.len() < path.len() => format!("{start}…"),
        _ => path.to_owned(),
    }
}

/// Returns the name of a method in labels and log lines. Clients choose methods, so the set of names is fixed.
pub(super) fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

pin_project! {
    /// A response body whose end is the end of its exchange.
    pub(super) struct FollowedBody {
        #[pin]
        body: Body,
        // None for the response to a request that was shed: it has no exchange.
        exchange: Option<Exchange>,
        // Time at which the last part was given to hyper, until hyper asks for the next one.
        given: Option<Instant>,
        // Rest of a part that is given in pieces.
        rest: Bytes,
    }
}

/// Returns the first piece of a frame, and puts the remaining bytes into `rest`.
fn piece(frame: Frame<Bytes>, rest: &mut Bytes) -> Frame<Bytes> {
    match frame.into_data() {
        Ok(mut data) => {
            if data.len() > PIECE {
                *rest = data.split_off(PIECE);
            }
            Frame::data(data)
        }
        Err(trailers) => trailers,
    }
}

impl FollowedBody {
    /// Wraps the body of a response that is not followed.
    pub(super) fn plain(body: Body) -> Self {
        Self { body, exchange: None, given: None, rest: Bytes::new() }
    }
}

impl HttpBody for FollowedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut this = self.project();
        let Some(exchange) = this.exchange else { return this.body.poll_frame(context) };
        // hyper asks for the next part when it has room for it: the client or the kernel has taken the last one.
        exchange.scope.set_stalled(false);
        if let Some(given) = this.given.take() {
            exchange.scope.spent().client += given.elapsed();
        }
        let frame = if this.rest.is_empty() {
            std::task::ready!(this.body.as_mut().poll_frame(context))
        } else {
            Some(Ok(Frame::data(std::mem::take(this.rest))))
        };
        let frame = frame.map(|frame| frame.map(|frame| piece(frame, this.rest)));
        if let Some(Ok(frame)) = &frame {
            exchange.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        // hyper asks for no frame after the last one of a body that knows its length.
        exchange.complete = frame.is_none() || (this.rest.is_empty() && this.body.is_end_stream());
        if !exchange.complete {
            *this.given = Some(Instant::now());
        }
        // The last part waits for room, too; in HTTP/2 it waits inside hyper.
        exchange.scope.set_stalled(frame.is_some());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        if rest > 0 {
            let upper = hint.upper();
            hint.set_lower(hint.lower() + rest);
            if let Some(upper) = upper {
                hint.set_upper(upper + rest);
            }
        }
        hint
    }
}
