//! Measures how long a handler keeps its thread.
//!
//! A future that computes instead of waiting stops every other request on its thread, and a clock outside cannot tell
//! which future does so. So each poll of a handler is timed.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use pin_project_lite::pin_project;
use tracing::warn;

use super::scope::{RequestScope, milliseconds};
use crate::metrics;

pin_project! {
    /// A future whose polls are timed.
    pub(super) struct Timed<F> {
        scope: RequestScope,
        #[pin]
        inner: F,
    }
}

impl<F> Timed<F> {
    pub(super) fn new(scope: RequestScope, inner: F) -> Self {
        Self { scope, inner }
    }
}

impl<F: Future> Future for Timed<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let began = Instant::now();
        let polled = this.inner.poll(context);
        let took = began.elapsed();
        if took >= this.scope.services().slow_poll {
            let route = this.scope.route().unwrap_or("unmatched");
            metrics::slow_poll(route);
            warn!(
                route,
                request_id = this.scope.id().as_str(),
                took_ms = milliseconds(took),
                "a handler kept its thread from other requests: move the work to scope.cpu()"
            );
        }
        polled
    }
}
