//! A request body: one that comes too slowly, and one that is not read to its end.
//!
//! A body that has come in with its head is read without a clock. Whoever has to wait for a part of it does so
//! for `body_idle` at most, and until `body_total` has passed since the first wait.
//!
//! When a request is answered before its body has come in (it is too long, or of the wrong type), a closed
//! connection with unread bytes in it is reset, and the reset overtakes the answer: the client learns
//! nothing. So what is left of the body goes back to its connection, which reads and drops it for a moment.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Sleep;

use super::scope::{RequestScope, RequestStage};
use crate::net::connection::OpenBody;

/// For how long, and how much of, a body is dropped that nobody reads.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 << 20;

/// What is left of the body of a connection's current request. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftover(Arc<BodyProgress>);

#[derive(Debug, Default)]
struct BodyProgress {
    body: Mutex<Option<(Incoming, OpenBody)>>,
    came: Notify,
    any: AtomicBool,
}

impl Leftover {
    /// Whether a body was not read to its end. What comes next on the connection may be more of it.
    pub(super) fn had_any(&self) -> bool {
        self.0.any.load(Ordering::Relaxed)
    }

    /// A body is not read to its end, and nothing waits for the rest: the connection must not take that for a request.
    fn is_given_up(&self) {
        self.0.any.store(true, Ordering::Relaxed);
    }

    /// Has a body dropped as it comes.
    pub(super) fn drop_later(&self, body: Incoming, open: OpenBody) {
        if !body.is_end_stream() {
            self.0.any.store(true, Ordering::Relaxed);
            *self.0.body.lock() = Some((body, open));
            self.0.came.notify_one();
        }
    }

    /// Reads and drops what is left of bodies, as it comes. Never returns.
    pub(super) async fn drop_all(&self) {
        loop {
            self.0.came.notified().await;
            let body = self.0.body.lock().take();
            if let Some((body, open)) = body {
                let _ = tokio::time::timeout(LINGER, drop_one(body)).await;
                drop(open);
            }
        }
    }
}

async fn drop_one(mut body: Incoming) {
    let mut dropped = 0;
    while let Some(Ok(frame)) = body.frame().await {
        dropped += frame.data_ref().map_or(0, Bytes::len);
        if dropped > LINGER_BYTES {
            return;
        }
    }
}

/// How slowly a body may come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Between two parts.
    pub(super) idle: Duration,
    /// From the first wait to the end.
    pub(super) total: Duration,
}

/// Why a part of a body cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    #[error("the body came too slowly")]
    TooSlow,
}

/// A request body that gives what is left of it to its connection.
#[derive(Debug)]
pub(super) struct RequestBody {
    body: Option<Incoming>,
    /// Until its end has come.
    open: Option<OpenBody>,
    /// Whether the first look at it asks the client to send it.
    is_kept_back: bool,
    leftover: Option<Leftover>,
    scope: RequestScope,
    pace: Pace,
    wait: Option<Wait>,
}

/// A wait for a part, and the ones before it.
#[derive(Debug)]
struct Wait {
    first: Instant,
    /// Since when, if it is being waited for now.
    since: Option<Instant>,
    limit: Pin<Box<Sleep>>,
}

impl RequestBody {
    pub(super) fn new(
        body: Incoming,
        headers: &HeaderMap,
        leftover: Option<Leftover>,
        scope: RequestScope,
        pace: Pace,
    ) -> Self {
        let is_kept_back = headers.contains_key(header::EXPECT);
        let open = (!body.is_end_stream()).then(|| OpenBody::on(scope.shared_connection()));
        Self { open, body: Some(body), is_kept_back, leftover, scope, pace, wait: None }
    }

    /// Nothing has come: whether that is for too long.
    fn poll_limit(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let (pace, now) = (self.pace, Instant::now());
        let wait = self.wait.get_or_insert_with(|| Wait {
            first: now,
            since: None,
            limit: Box::pin(tokio::time::sleep(Duration::ZERO)),
        });
        if wait.since.is_none() {
            wait.since = Some(now);
            wait.limit.as_mut().reset((now + pace.idle).min(wait.first + pace.total).into());
            self.scope.set_stage(RequestStage::Body);
        }
        wait.limit.as_mut().poll(context)
    }

    /// Something has come.
    fn came(&mut self) {
        self.scope.connection().useful();
        if let Some(since) = self.wait.as_mut().and_then(|wait| wait.since.take()) {
            self.scope.spent().body += since.elapsed();
            self.scope.set_stage(RequestStage::Handler);
        }
    }

    /// Which limit it was that was reached.
    fn cut(&mut self) -> BodyError {
        let idle = self
            .wait
            .as_ref()
            .and_then(|wait| wait.since)
            .is_some_and(|since| since.elapsed() >= self.pace.idle);
        // What is still to come is nothing to wait for.
        self.open = None;
        if let Some(leftover) = &self.leftover {
            leftover.is_given_up();
        }
        self.scope.give_up_body(if idle { "body idle" } else { "body timeout" });
        BodyError::TooSlow
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.is_kept_back = false;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(context) else {
            std::task::ready!(self.poll_limit(context));
            return Poll::Ready(Some(Err(self.cut())));
        };
        self.came();
        let Some(body) = &self.body else { return Poll::Ready(None) };
        if !matches!(frame, Some(Ok(_))) || body.is_end_stream() {
            self.open = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(leftover) = &self.leftover
            && let Some(open) = self.open.take()
            && let Some(body) = self.body.take()
        {
            match self.is_kept_back {
                // The client keeps it until it is asked for it (RFC 9110, section 10.1.1).
                true => leftover.is_given_up(),
                false => leftover.drop_later(body, open),
            }
        }
    }
}
