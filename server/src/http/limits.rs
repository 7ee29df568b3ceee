//! Limits of one route, instead of the settings that all routes have.
//!
//! ```
//! # use std::time::Duration;
//! # use axum::{Router, routing::{get, post}};
//! # use perennial_server::http::limits;
//! # let (report, upload) = (|| async {}, || async {});
//! Router::<()>::new()
//!     .route("/reports", get(report).layer(limits::time(Duration::from_secs(120))))
//!     .route("/pictures", post(upload).layer(limits::body(20 << 20).within(Duration::from_secs(300))));
//! ```

use std::convert::Infallible;
use std::time::Duration;

use axum::response::Response;
use tower::Layer;

use super::around::{Answering, Around, Surrounded};
use super::scope::RequestScope;
use super::stack::took_too_long;

/// Sets the maximum length of a request body of a route, in bytes, instead of `server.body_limit`. A longer one is
/// answered with 413.
pub fn body(bytes: usize) -> RouteLimit {
    RouteLimit { body: Some(bytes), body_time: None, time: None }
}

/// Sets the time until a handler of a route must have an answer, from the request head, instead of
/// `server.request_timeout`. After that the request is answered with 503. The body of the answer may take longer.
pub fn time(limit: Duration) -> RouteLimit {
    RouteLimit { body: None, body_time: None, time: Some(limit) }
}

/// Layer that sets limits of a route.
#[derive(Clone, Copy, Debug)]
pub struct RouteLimit {
    body: Option<usize>,
    body_time: Option<Duration>,
    time: Option<Duration>,
}

impl RouteLimit {
    /// Sets the time for which a handler of the route may wait for the whole body, instead of `server.body_timeout`. A part
    /// of it still has `server.body_idle_timeout`.
    #[must_use]
    pub fn within(self, limit: Duration) -> Self {
        Self { body_time: Some(limit), ..self }
    }
}

impl<S> Layer<S> for RouteLimit {
    type Service = Surrounded<Self, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Surrounded::new(*self, inner)
    }
}

impl Around for RouteLimit {
    fn around<F>(&self, scope: Option<RequestScope>, handle: impl FnOnce() -> F) -> Answering
    where
        F: Future<Output = Result<Response, Infallible>> + Send + 'static,
    {
        let Some(scope) = scope else { return Box::pin(handle()) };
        if let Some(bytes) = self.body {
            scope.set_body_limit(bytes);
        }
        if let Some(limit) = self.body_time {
            scope.set_body_time_limit(limit);
        }
        let Some(limit) = self.time else { return Box::pin(handle()) };
        scope.set_time_limit(limit);
        let answer = handle();
        // The stack may already wait with the longer limit of all routes, if a layer around this one has waited.
        Box::pin(async move {
            let answered = tokio::time::timeout_at(scope.deadline().into(), answer).await;
            answered.unwrap_or_else(|_elapsed| Ok(took_too_long(limit)))
        })
    }
}
