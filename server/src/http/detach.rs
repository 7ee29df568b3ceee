//! Routes whose work continues when the client leaves.
//!
//! When a client closes its connection, the future of its request is dropped at the await where it waits. That is right
//! for a page that is no longer wanted, and wrong for an order that is being placed. Each route chooses where it is
//! defined:
//!
//! ```
//! # use axum::{Router, routing::{get, post}};
//! # use perennial_server::http::detach::Detach;
//! # let (page, order) = (|| async {}, || async {});
//! Router::<()>::new().route("/page", get(page)).route("/orders", post(order).layer(Detach));
//! ```

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::response::Response;
use http::Request;
use tower::{Layer, Service};

use super::scope::RequestScope;

/// Layer for a route whose work continues when the client leaves.
#[derive(Clone, Copy, Debug)]
pub struct Detach;

/// The service of a detached route.
#[derive(Clone, Debug)]
pub struct Detached<S>(S);

impl<S> Layer<S> for Detach {
    type Service = Detached<S>;

    fn layer(&self, inner: S) -> Detached<S> {
        Detached(inner)
    }
}

impl<S, B> Service<Request<B>> for Detached<S>
where
    S: Service<Request<B>, Response = Response, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let scope = request.extensions().get::<RequestScope>().cloned();
        let answer = self.0.call(request);
        match scope {
            Some(scope) => Box::pin(async move { scope.detach(answer).await }),
            // A request has no scope outside the host, in a test of the router alone.
            None => Box::pin(answer),
        }
    }
}
