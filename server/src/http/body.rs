//! A request body that is not read to its end.
//!
//! When a request is answered before its body has come in (it is too long, or of the wrong type), a closed
//! connection with unread bytes in it is reset, and the reset overtakes the answer: the client learns
//! nothing. So what is left of the body goes back to its connection, which reads and drops it for a moment.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::Notify;

/// For how long, and how much of, a body is dropped that nobody reads.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 << 20;

/// What is left of the body of a connection's current request. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Leftover(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    body: Mutex<Option<Incoming>>,
    came: Notify,
}

impl Leftover {
    /// Reads and drops what is left of bodies, as it comes. Never returns.
    pub(super) async fn drop_all(&self) {
        loop {
            self.0.came.notified().await;
            let body = self.0.body.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(body) = body {
                let _ = tokio::time::timeout(LINGER, drop_one(body)).await;
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

/// A request body that gives what is left of it to its connection.
#[derive(Debug)]
pub(super) struct RequestBody {
    body: Option<Incoming>,
    ended: bool,
    leftover: Option<Leftover>,
}

impl RequestBody {
    pub(super) fn new(body: Incoming, leftover: Option<Leftover>) -> Self {
        Self { ended: body.is_end_stream(), body: Some(body), leftover }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(context));
        let ended = !matches!(frame, Some(Ok(_))) || body.is_end_stream();
        self.ended = ended;
        Poll::Ready(frame)
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
        if let Some(Leftover(shared)) = &self.leftover
            && !self.ended
        {
            *shared.body.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
            shared.came.notify_one();
        }
    }
}
