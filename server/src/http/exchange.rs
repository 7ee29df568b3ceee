//! One request and its response, counted while it lasts and logged when the last byte has gone.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tracing::{debug, info};

use super::conn::OnConnection;
use super::scope::Scope;
use crate::metrics::{self, Counted};

/// What nginx made the usual code for "the client left before there was an answer".
const CLIENT_LEFT: u16 = 499;

/// The longest path in the access log, in bytes: clients choose it, and a log is not theirs to fill.
const LOGGED_PATH: usize = 512;

/// The listener that a request came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listener {
    pub(super) name: &'static str,
    pub(super) quiet: bool,
}

/// The guard of one exchange: whatever way it ends, dropping it writes the access log line and the metrics.
#[derive(Debug)]
pub(super) struct Exchange {
    listener: Listener,
    scope: Scope,
    method: Method,
    path: String,
    version: Version,
    began: Instant,
    status: Option<StatusCode>,
    bytes: u64,
    complete: bool,
    _counted: Counted,
    _on_connection: OnConnection,
}

impl Exchange {
    pub(super) fn begin(
        listener: Listener,
        scope: Scope,
        method: Method,
        path: &str,
        version: Version,
        began: Instant,
    ) -> Self {
        Self {
            _on_connection: OnConnection::new(scope.shared_connection()),
            listener,
            scope,
            method,
            path: logged(path),
            version,
            began,
            status: None,
            bytes: 0,
            complete: false,
            _counted: Counted::new(metrics::requests_in_flight(listener.name)),
        }
    }

    /// Follows the response to its last byte.
    pub(super) fn respond(mut self, response: http::Response<Body>) -> http::Response<FollowedBody> {
        self.status = Some(response.status());
        response.map(|body| {
            self.complete = body.is_end_stream();
            FollowedBody { body, exchange: self }
        })
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let status = self.status.map_or(CLIENT_LEFT, |status| status.as_u16());
        let route = self.scope.route().unwrap_or("unmatched");
        metrics::request_ended(self.listener.name, route, method_label(&self.method), status, took);
        // The level of an event is part of the program, and so there are two.
        macro_rules! line {
            ($level:ident) => {
                $level!(
                    target: "access",
                    request_id = self.scope.id().as_str(),
                    method = method_label(&self.method),
                    path = self.path,
                    route,
                    status,
                    bytes = self.bytes,
                    complete = self.complete,
                    took_ms = milliseconds(took),
                    version = ?self.version,
                    peer = %self.scope.connection().peer,
                    "request"
                )
            };
        }
        if self.listener.quiet { line!(debug) } else { line!(info) }
    }
}

/// As much of a path as is logged.
fn logged(path: &str) -> String {
    match path.get(..path.floor_char_boundary(LOGGED_PATH)) {
        Some(start) if start.len() < path.len() => format!("{start}…"),
        _ => path.to_owned(),
    }
}

/// Milliseconds with three digits after the point.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Methods are chosen by clients; labels and log lines are not.
fn method_label(method: &Method) -> &'static str {
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
        exchange: Exchange,
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
        let frame = std::task::ready!(this.body.as_mut().poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            this.exchange.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        // Nobody asks for a frame after the last one of a body that knows its length.
        this.exchange.complete = frame.is_none() || this.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
