//! The state that lives as long as one request.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use axum::extract::{FromRequestParts, MatchedPath};
use http::{HeaderMap, HeaderName, HeaderValue, request::Parts};
use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use super::timed::Timed;
use super::trace::Trace;
use crate::net::Connection;
use perennial_runtime::cpu::{Cpu, CpuError};
use perennial_runtime::drain::Drain;

/// The header that carries a request id, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Maximum length of a request id that is taken over from a client, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// The state of one request. A cheap handle, found in the extensions of the request and by extraction.
#[derive(Clone, Debug)]
pub struct RequestScope(Arc<State>);

#[derive(Debug)]
struct State {
    begun: Begun,
    route: OnceLock<MatchedPath>,
    headers: OnceLock<HeaderMap>,
    stage: AtomicU8,
    /// Whether the client has identified itself.
    is_identified: AtomicBool,
    /// Whether the response has no end of its own.
    is_stream: AtomicBool,
    /// Why the body was given up.
    no_body: OnceLock<&'static str>,
    /// Maximum length of the body, in bytes.
    body_limit: AtomicUsize,
    /// Time that the whole body may take, in nanoseconds, if that differs from the settings; else 0.
    body_time_limit: AtomicU64,
    /// Whether the body is longer than its limit.
    is_too_long: AtomicBool,
    /// Time until there must be a response, from the start of the request, in nanoseconds.
    time_limit: AtomicU64,
    /// Time since which a part of the response waits for the client, by the connection's clock; 0 if none waits.
    stalled: AtomicU64,
    spent: Mutex<TimeSpent>,
}

/// The services that all requests of a server share.
#[derive(Debug)]
pub(super) struct Services {
    pub(super) drain: Drain,
    pub(super) cpu: Option<Cpu>,
    /// Tracker of the work that continues without its client.
    pub(super) detached: TaskTracker,
    pub(super) slow_poll: Duration,
}

/// Where the time of a request was spent.
#[derive(Clone, Debug, Default)]
pub(super) struct TimeSpent {
    /// Time spent on waits for parts of the body.
    pub(super) body: Duration,
    /// Time spent on waits for the client to take parts of the response.
    pub(super) client: Duration,
    /// Time until there was a response.
    pub(super) response: Duration,
    /// Waits that the handler has named, with their total durations.
    pub(super) waits: Vec<(&'static str, Duration)>,
    waiting: Vec<(&'static str, Instant)>,
}

/// The stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum RequestStage {
    /// The handler runs, or waits.
    Handler,
    /// The handler waits for a part of the body.
    Body,
    /// The response is on its way.
    Response,
}

/// Facts that are known when a request begins.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) trace: Trace,
    pub(super) id: RequestId,
    pub(super) began: Instant,
    pub(super) time_limit: Duration,
    pub(super) body_limit: usize,
    pub(super) method: &'static str,
    pub(super) path: String,
    pub(super) connection: Arc<Connection>,
    pub(super) client: Option<IpAddr>,
    pub(super) services: Arc<Services>,
}

impl RequestScope {
    pub(super) fn new(begun: Begun) -> Self {
        let (body_limit, time_limit) = (begun.body_limit.into(), nanoseconds(begun.time_limit).into());
        Self(Arc::new(State {
            begun,
            body_limit,
            body_time_limit: AtomicU64::new(0),
            is_too_long: AtomicBool::new(false),
            time_limit,
            route: OnceLock::new(),
            headers: OnceLock::new(),
            stage: AtomicU8::new(RequestStage::Handler as u8),
            is_identified: AtomicBool::new(false),
            is_stream: AtomicBool::new(false),
            no_body: OnceLock::new(),
            stalled: AtomicU64::new(0),
            spent: Mutex::default(),
        }))
    }

    /// Returns the id of the request. The log and the response have it, and a trusted request header may set it.
    pub fn id(&self) -> &RequestId {
        &self.0.begun.id
    }

    /// Returns the trace that the request belongs to.
    pub fn trace(&self) -> &Trace {
        &self.0.begun.trace
    }

    /// Marks the response as a stream: it lasts as long as its client wants, and is not logged as slow.
    pub fn is_a_stream(&self) {
        self.0.is_stream.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_a_stream(&self) -> bool {
        self.0.is_stream.load(Ordering::Relaxed)
    }

    /// Returns the time at which the request is answered with 503 if it has no response yet.
    pub fn deadline(&self) -> Instant {
        self.0.begun.began + self.time_limit()
    }

    /// Returns the time until there must be a response, from the start of the request.
    pub(super) fn time_limit(&self) -> Duration {
        Duration::from_nanos(self.0.time_limit.load(Ordering::Relaxed))
    }

    pub(super) fn set_time_limit(&self, limit: Duration) {
        self.0.time_limit.store(nanoseconds(limit), Ordering::Relaxed);
    }

    pub(super) fn body_limit(&self) -> usize {
        self.0.body_limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_body_limit(&self, bytes: usize) {
        self.0.body_limit.store(bytes, Ordering::Relaxed);
    }

    /// Returns the time that the whole body may take, if that differs from the settings.
    pub(super) fn body_time_limit(&self) -> Option<Duration> {
        let limit = self.0.body_time_limit.load(Ordering::Relaxed);
        (limit > 0).then(|| Duration::from_nanos(limit))
    }

    pub(super) fn set_body_time_limit(&self, limit: Duration) {
        self.0.body_time_limit.store(nanoseconds(limit).max(1), Ordering::Relaxed);
    }

    /// Records that the body is longer than its limit.
    pub(super) fn body_is_too_long(&self) {
        self.0.is_too_long.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_too_long_body(&self) -> bool {
        self.0.is_too_long.load(Ordering::Relaxed)
    }

    /// Returns the connection on which the request came.
    pub fn connection(&self) -> &Connection {
        &self.0.begun.connection
    }

    pub(super) fn shared_connection(&self) -> &Arc<Connection> {
        &self.0.begun.connection
    }

    /// Returns the client's address: the one that trusted proxies name, or else that of the peer. `None` for Unix
    /// sockets without a named client.
    pub fn client(&self) -> Option<IpAddr> {
        self.0.begun.client.or_else(|| self.0.begun.connection.peer().ip())
    }

    /// Returns the client's address that trusted proxies name.
    pub(super) fn forwarded_client(&self) -> Option<IpAddr> {
        self.0.begun.client
    }

    /// Returns the pattern of the route that matched, once one has.
    pub fn route(&self) -> Option<&str> {
        self.0.route.get().map(MatchedPath::as_str)
    }

    /// Adds headers to the response, whatever the handler answers. Meant for layers around handlers; only the first
    /// call has an effect.
    pub fn add_headers(&self, headers: HeaderMap) {
        let _ = self.0.headers.set(headers);
    }

    pub(super) fn added_headers(&self) -> Option<&HeaderMap> {
        self.0.headers.get()
    }

    /// Returns the drain signal: a response without an end should end when the drain begins.
    pub fn drain(&self) -> &Drain {
        &self.0.begun.services.drain
    }

    /// Names the handler's wait until the guard drops, for `/requests` and for the log of slow requests.
    pub fn waiting(&self, what: &'static str) -> WaitingFor {
        self.spent().waiting.push((what, Instant::now()));
        WaitingFor { scope: self.clone(), what }
    }

    /// Runs `work`, which keeps a processor busy, on threads that serve no requests, until the request's deadline.
    ///
    /// # Errors
    /// When too much work is waiting or the server has no such threads, and when the work is not done in time.
    pub async fn cpu<T, F>(&self, work: F) -> Result<T, CpuError>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let _waiting = self.waiting("cpu");
        match &self.0.begun.services.cpu {
            Some(cpu) => cpu.run(self.deadline(), work).await,
            None => Err(CpuError::Full),
        }
    }

    /// Runs `work` to its end even if the client leaves and this future is dropped; the drain waits for it. A panic of
    /// `work` is resumed in the caller. For a whole route see [`super::detach::Detach`].
    pub async fn detach<F>(&self, work: F) -> F::Output
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let timed = Timed::new(self.clone(), work).instrument(Span::current());
        match self.0.begun.services.detached.spawn(timed).await {
            Ok(output) => output,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Returns the request as operators see it.
    pub fn view(&self) -> RequestView {
        let spent = self.spent();
        let waiting = spent.waiting.last();
        RequestView {
            id: self.0.begun.id.to_string(),
            listener: self.0.begun.connection.listener,
            connection: self.0.begun.connection.id,
            method: self.0.begun.method,
            path: self.0.begun.path.clone(),
            route: self.route().map(str::to_owned),
            peer: self.0.begun.connection.peer().to_string(),
            client: self.0.begun.client.map(|client| client.to_string()),
            age_ms: milliseconds(self.0.begun.began.elapsed()),
            stage: self.stage(),
            waiting: waiting.map(|(what, _)| *what),
            waiting_ms: waiting.map(|(_, since)| milliseconds(since.elapsed())),
        }
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Returns how long a part of the response has waited for the client, in milliseconds.
    pub(crate) fn stalled_for(&self, now: u64) -> u64 {
        match self.0.stalled.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        }
    }

    pub(super) fn set_stalled(&self, stalled: bool) {
        let since = if stalled { self.0.begun.connection.clock().now() } else { 0 };
        self.0.stalled.store(since, Ordering::Relaxed);
    }

    /// Gives the body up, because it arrives too slowly, and counts the reason.
    pub(super) fn give_up_body(&self, reason: &'static str) {
        if self.0.no_body.set(reason).is_ok() {
            crate::metrics::connection_cut(reason);
        }
    }

    pub(super) fn has_given_up_body(&self) -> bool {
        self.0.no_body.get().is_some()
    }

    pub(super) fn services(&self) -> &Services {
        &self.0.begun.services
    }

    pub(super) fn set_route(&self, route: MatchedPath) {
        let _ = self.0.route.set(route);
    }

    /// Marks the client as identified: its connection is not among the first to be cut when memory is nearly used up.
    pub fn identify(&self) {
        self.0.is_identified.store(true, Ordering::Relaxed);
    }

    /// Returns true when the request waits for its body and its client has not identified itself.
    pub(crate) fn is_unknown(&self) -> bool {
        self.stage() == RequestStage::Body && !self.0.is_identified.load(Ordering::Relaxed)
    }

    pub(super) fn set_stage(&self, stage: RequestStage) {
        self.0.stage.store(stage as u8, Ordering::Relaxed);
    }

    fn stage(&self) -> RequestStage {
        match self.0.stage.load(Ordering::Relaxed) {
            1 => RequestStage::Body,
            2 => RequestStage::Response,
            _ => RequestStage::Handler,
        }
    }

    pub(super) fn method(&self) -> &'static str {
        self.0.begun.method
    }

    pub(super) fn path(&self) -> &str {
        &self.0.begun.path
    }

    pub(super) fn began(&self) -> Instant {
        self.0.begun.began
    }

    pub(super) fn spent(&self) -> MutexGuard<'_, TimeSpent> {
        self.0.spent.lock()
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Returns milliseconds, rounded to three digits after the point.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Guard of a named wait of a handler; the wait ends when this drops.
#[derive(Debug)]
pub struct WaitingFor {
    scope: RequestScope,
    what: &'static str,
}

impl Drop for WaitingFor {
    fn drop(&mut self) {
        let mut spent = self.scope.spent();
        let Some(index) = spent.waiting.iter().rposition(|(what, _)| *what == self.what) else { return };
        let (what, since) = spent.waiting.remove(index);
        match spent.waits.iter_mut().find(|(known, _)| *known == what) {
            Some((_, total)) => *total += since.elapsed(),
            None => spent.waits.push((what, since.elapsed())),
        }
    }
}

/// A running request as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct RequestView {
    /// Id of the request.
    pub id: String,
    /// Name of the listener that accepted the connection.
    pub listener: &'static str,
    /// Number of the connection in this process.
    pub connection: u64,
    /// Method of the request; `other` for an uncommon one.
    pub method: &'static str,
    /// Path of the request, shortened as in the access log.
    pub path: String,
    /// Pattern of the route that matched.
    pub route: Option<String>,
    /// The remote end of the connection: its address and port, or `unix`.
    pub peer: String,
    /// Address of the client that a trusted proxy names in a header.
    pub client: Option<String>,
    /// Time since the request head arrived, in milliseconds.
    pub age_ms: f64,
    /// Stage of the request.
    pub stage: RequestStage,
    /// Name of the handler's current wait.
    pub waiting: Option<&'static str>,
    /// Duration of the handler's current wait so far, in milliseconds.
    pub waiting_ms: Option<f64>,
}

impl<S: Sync> FromRequestParts<S> for RequestScope {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let scope = parts.extensions.get::<Self>().cloned();
        #[expect(clippy::expect_used, reason = "the stack puts it there before any router runs")]
        Ok(scope.expect("a request without a scope"))
    }
}

/// The id of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// Creates an id: a UUID version 7, so that ids sort by time. It is a name and not a secret, so its random bits do
    /// not come from the system, which would cost more than the rest of a small request.
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut random = [0; 10];
        fastrand::fill(&mut random);
        // The fraction of the millisecond, so that ids of one process sort within it (RFC 9562, section 6.2).
        let fraction = u16::try_from(now.subsec_nanos() % 1_000_000 * 4096 / 1_000_000).unwrap_or_default();
        random[..2].copy_from_slice(&fraction.to_be_bytes());
        let millis = u64::try_from(now.as_millis()).unwrap_or_default();
        let id = uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        let text = id.hyphenated().encode_lower(&mut text);
        #[expect(clippy::expect_used, reason = "hexadecimal digits and hyphens")]
        Self(HeaderValue::from_str(text).expect("a UUID is a header value"))
    }

    /// Returns the client's own id if a log line may contain it: up to 128 letters, digits and `-_.:/+=`.
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
