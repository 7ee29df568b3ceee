//! Layers around the handlers of routes: one service for all of them.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::response::Response;
use http::Request;
use tower::Service;

use super::scope::RequestScope;

/// An answer that is being made.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

/// The work of a layer around a handler.
pub trait Around {
    /// Answers a request; `handle` calls the handler. A request has no scope outside the host, in a test of the router
    /// alone.
    fn around<F>(&self, scope: Option<RequestScope>, handle: impl FnOnce() -> F) -> Answering
    where
        F: Future<Output = Result<Response, Infallible>> + Send + 'static;
}

/// The service of a layer around a handler.
#[derive(Clone, Debug)]
pub struct Surrounded<L, S> {
    layer: L,
    inner: S,
}

impl<L, S> Surrounded<L, S> {
    /// Puts a layer around a handler.
    pub fn new(layer: L, inner: S) -> Self {
        Self { layer, inner }
    }
}

impl<L, S, B> Service<Request<B>> for Surrounded<L, S>
where
    L: Around,
    S: Service<Request<B>, Response = Response, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Answering {
        let scope = request.extensions().get::<RequestScope>().cloned();
        let Self { layer, inner } = self;
        layer.around(scope, || inner.call(request))
    }
}
