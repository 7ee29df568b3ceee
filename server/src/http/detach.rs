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

use axum::response::Response;
use tower::Layer;

use super::around::{Answering, Around, Surrounded};
use super::scope::RequestScope;

/// Layer for a route whose work continues when the client leaves.
#[derive(Clone, Copy, Debug)]
pub struct Detach;

impl<S> Layer<S> for Detach {
    type Service = Surrounded<Self, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Surrounded::new(*self, inner)
    }
}

impl Around for Detach {
    fn around<F>(&self, scope: Option<RequestScope>, handle: impl FnOnce() -> F) -> Answering
    where
        F: Future<Output = Result<Response, Infallible>> + Send + 'static,
    {
        let answer = handle();
        match scope {
            Some(scope) => Box::pin(async move { scope.detach(answer).await }),
            None => Box::pin(answer),
        }
    }
}
