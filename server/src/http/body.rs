//! Request bodies that are too long, arrive too slowly, or are not read to their end.
//!
//! The length is checked when the handler reads: the announced one before the first byte, and then what has come.
//!
//! A body that has arrived with its head is read without a clock. Otherwise a wait for a part of the body lasts at most
//! `body_idle_timeout`, and all waits end when `body_timeout` has passed since the first one.
//!
//! When a request is answered before its body has arrived (it is too long, or of the wrong type), a closed connection
//! with unread bytes is reset, and the reset overtakes the answer: the client learns nothing. So the rest of the body
//! goes back to its connection, which reads and drops it for a moment.

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

/// Time for which the rest of an unread body is read and dropped.
const LINGER: Duration = Duration::from_secs(2);
/// Maximum number of bytes of an unread body that are read and dropped.
const LINGER_BYTES: usize = 16 << 20;

/// The rest of the body of a connection's current request. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftover(Arc<BodyProgress>);

#[derive(Debug, Default)]
struct BodyProgress {
    body: Mutex<Option<(Incoming, OpenBody)>>,
    came: Notify,
    any: AtomicBool,
}

impl Leftover {
    /// Returns true when a body was not read to its end: the next bytes on the connection may belong to it.
    pub(super) fn had_any(&self) -> bool {
        self.0.any.load(Ordering::Relaxed)
    }

    /// Records that a body is not read to its end and its rest is not waited for: the connection must not take the rest
    /// for a request.
    fn is_given_up(&self) {
        self.0.any.store(true, Ordering::Relaxed);
    }

    /// Passes a body to [`Self::drop_all`].
    pub(super) fn drop_later(&self, body: Incoming, open: OpenBody) {
        if !body.is_end_stream() {
            self.0.any.store(true, Ordering::Relaxed);
            *self.0.body.lock() = Some((body, open));
            self.0.came.notify_one();
        }
    }

    /// Reads and drops the rests of bodies as they arrive. Never returns.
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

/// Time limits of a body.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyTimeouts {
    /// Time between two parts.
    pub(super) idle: Duration,
    /// Time from the first wait to the end.
    pub(super) total: Duration,
}

/// Why a part of a body cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke off.
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    /// The body came too slowly.
    #[error("the body came too slowly")]
    TooSlow,
    /// The body is longer than `server.body_limit`, or than the limit of its route.
    #[error("the body is too long")]
    TooLong,
}

/// A request body that passes its unread rest to its connection.
#[derive(Debug)]
pub(super) struct RequestBody {
    body: Option<Incoming>,
    /// Counts the body at its connection, until its end has arrived.
    open: Option<OpenBody>,
    /// Whether the client sends the body only after the first poll asks for it (`Expect`).
    is_kept_back: bool,
    leftover: Option<Leftover>,
    scope: RequestScope,
    timeouts: BodyTimeouts,
    /// Number of bytes that have been read.
    length: u64,
    /// Whether the body has failed: nothing follows.
    has_failed: bool,
    wait: Option<Wait>,
}

/// A wait for a part of the body, together with the waits before it.
#[derive(Debug)]
struct Wait {
    first: Instant,
    /// Start of the current wait, if there is one.
    since: Option<Instant>,
    limit: Pin<Box<Sleep>>,
}

impl RequestBody {
    pub(super) fn new(
        body: Incoming,
        headers: &HeaderMap,
        leftover: Option<Leftover>,
        scope: RequestScope,
        timeouts: BodyTimeouts,
    ) -> Self {
        let is_kept_back = headers.contains_key(header::EXPECT);
        let open = (!body.is_end_stream()).then(|| OpenBody::on(scope.shared_connection()));
        Self {
            open,
            body: Some(body),
            is_kept_back,
            leftover,
            scope,
            timeouts,
            length: 0,
            has_failed: false,
            wait: None,
        }
    }

    /// Waits for a part that has not arrived; ready when a time limit is reached.
    fn poll_limit(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let (timeouts, now) = (self.timeouts, Instant::now());
        let wait = self.wait.get_or_insert_with(|| Wait {
            first: now,
            since: None,
            limit: Box::pin(tokio::time::sleep(Duration::ZERO)),
        });
        if wait.since.is_none() {
            wait.since = Some(now);
            let total = self.scope.body_time_limit().unwrap_or(timeouts.total);
            wait.limit.as_mut().reset((now + timeouts.idle).min(wait.first + total).into());
            self.scope.set_stage(RequestStage::Body);
        }
        wait.limit.as_mut().poll(context)
    }

    /// Ends the wait, because a part or the end of the body has arrived.
    fn came(&mut self) {
        self.scope.connection().useful();
        if let Some(since) = self.wait.as_mut().and_then(|wait| wait.since.take()) {
            self.scope.spent().body += since.elapsed();
            self.scope.set_stage(RequestStage::Handler);
        }
    }

    /// Returns true when the body is longer than its limit: what has come, and what is announced to come.
    fn is_too_long(&self) -> bool {
        let rest = self.body.as_ref().map_or(0, |body| body.size_hint().lower());
        self.length.saturating_add(rest) > self.scope.body_limit() as u64
    }

    /// Refuses a body that is too long.
    fn refuse(&mut self) -> BodyError {
        self.has_failed = true;
        self.scope.body_is_too_long();
        BodyError::TooLong
    }

    /// Gives the body up, and counts which time limit was reached.
    fn cut(&mut self) -> BodyError {
        let idle = self
            .wait
            .as_ref()
            .and_then(|wait| wait.since)
            .is_some_and(|since| since.elapsed() >= self.timeouts.idle);
        // The rest of the body is not waited for.
        self.open = None;
        self.has_failed = true;
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
        if self.has_failed {
            return Poll::Ready(None);
        }
        if self.is_too_long() {
            return Poll::Ready(Some(Err(self.refuse())));
        }
        self.is_kept_back = false;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(context) else {
            std::task::ready!(self.poll_limit(context));
            return Poll::Ready(Some(Err(self.cut())));
        };
        self.came();
        if let Some(Ok(data)) = frame.as_ref().map(|frame| frame.as_ref().map(Frame::data_ref)) {
            self.length += data.map_or(0, |data| data.len() as u64);
            if self.is_too_long() {
                return Poll::Ready(Some(Err(self.refuse())));
            }
        }
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
                // The client keeps the body until it is asked for it (RFC 9110, section 10.1.1).
                true => leftover.is_given_up(),
                false => leftover.drop_later(body, open),
            }
        }
    }
}
