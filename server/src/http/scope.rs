//! What lives for one request, and dies with it.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath};
use http::{HeaderMap, HeaderName, HeaderValue, request::Parts};
use uuid::Uuid;

use super::conn::Connection;

/// The header that carries a request id, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is taken over from a client, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// The state of one request: a cheap handle, found in its extensions and by extraction.
#[derive(Clone, Debug)]
pub struct Scope(Arc<State>);

#[derive(Debug)]
struct State {
    id: RequestId,
    deadline: Instant,
    connection: Arc<Connection>,
    route: OnceLock<MatchedPath>,
}

impl Scope {
    pub(super) fn new(id: RequestId, deadline: Instant, connection: Arc<Connection>) -> Self {
        Self(Arc::new(State { id, deadline, connection, route: OnceLock::new() }))
    }

    /// The id that stands in the log, in the response and, if it is trusted, in the request.
    pub fn id(&self) -> &RequestId {
        &self.0.id
    }

    /// When the request is answered with 503 if it has no response yet.
    pub fn deadline(&self) -> Instant {
        self.0.deadline
    }

    /// The connection that the request came on.
    pub fn connection(&self) -> &Connection {
        &self.0.connection
    }

    pub(super) fn shared_connection(&self) -> Arc<Connection> {
        Arc::clone(&self.0.connection)
    }

    /// The pattern of the route that matched, once it has.
    pub fn route(&self) -> Option<&str> {
        self.0.route.get().map(MatchedPath::as_str)
    }

    pub(super) fn set_route(&self, route: MatchedPath) {
        let _ = self.0.route.set(route);
    }
}

impl<S: Sync> FromRequestParts<S> for Scope {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let scope = parts.extensions.get::<Self>().cloned();
        #[expect(clippy::expect_used, reason = "the stack puts it there before any router runs")]
        Ok(scope.expect("a request without a scope"))
    }
}

/// The name of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// A new one: UUID version 7, so that ids sort by time.
    pub fn new() -> Self {
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        let text = Uuid::now_v7().hyphenated().encode_lower(&mut text);
        #[expect(clippy::expect_used, reason = "hexadecimal digits and hyphens")]
        Self(HeaderValue::from_str(text).expect("a UUID is a header value"))
    }

    /// The client's own, if it is one that can stand in a log line: up to 128 letters, digits and `-_.:/+=`.
    pub(super) fn from_client(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(REQUEST_ID)?;
        let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte);
        let bytes = value.as_bytes();
        let good = !bytes.is_empty() && bytes.len() <= MAX_REQUEST_ID && bytes.iter().all(harmless);
        good.then(|| Self(value.clone()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl Default for RequestId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_client(value: &str) -> Option<RequestId> {
        let headers = HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(value).unwrap())]);
        RequestId::from_client(&headers)
    }

    #[test]
    fn a_client_may_not_write_into_the_log() {
        assert_eq!(from_client("job-42:7").unwrap().as_str(), "job-42:7");
        for bad in ["", "a b", "a\tb", "<x>", "\"", &"x".repeat(129)] {
            assert_eq!(from_client(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn new_ids_sort_by_time() {
        let ids: Vec<_> = (0..100).map(|_| RequestId::new().to_string()).collect();
        assert!(ids.is_sorted());
    }
}
