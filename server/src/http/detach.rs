//! Routes whose work goes on when the client leaves.
//!
//! A client that closes its connection drops the future of its request at whatever await it stands. That is
//! what a page that nobody waits for should get; an order that was being placed should not. Which of the two a
//! route wants is written where the route is:
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

/// The layer.
#[derive(Clone, Copy, Debug)]
pub struct Detach;

/// The service of a route that is detached.
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
            // Outside the host, in a test of the router alone.
            None => Box::pin(answer),
        }
    }
}
