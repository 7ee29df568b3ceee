//! The HTTP client of modules: pooled connections, deadlines, retries and a circuit breaker for each target.
//!
//! ```
//! # use perennial_host::http_client::{HttpClient, Result, Target};
//! const TARGETS: &[Target] = &[Target::new("mail", "https://api.mail.example/v1"), Target::any("webhooks")];
//!
//! # #[derive(serde::Serialize)] struct Message;
//! # #[derive(serde::Deserialize)] struct Accepted;
//! # async fn send(mail: HttpClient, message: &Message) -> Result<Accepted> {
//! mail.post("/messages").json(message).idempotency("order-17").send().await?.json().await
//! # }
//! ```
//!
//! A target is a server that a module calls, or a kind of calls to URLs that others choose. Each has a section of settings,
//! `[targets.mail]`, metrics by its name and a place in `GET /targets`.
//!
//! ```text
//! config.rs    targets and their settings
//! connect.rs   connections: names, checked addresses, a proxy, TLS
//! request.rs   a request that is being built
//!   webhook.rs   its signature
//! call.rs      the attempts of one call
//!   retry.rs     whether and when there is another attempt
//! answer.rs    the answer and its body
//! error.rs     why there is none
//! ```
//!
//! Redirects are answers like any other and are not followed: a redirect of a stranger's server could lead anywhere.

mod answer;
mod call;
mod config;
mod connect;
mod error;
mod metrics;
mod request;
mod retry;
mod webhook;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use axum::body::Body;
use http::Method;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use perennial_runtime::breaker::{self, Breaker, BreakerStatus};
use perennial_runtime::running::RunningByKey;
use serde::Serialize;
use tokio::sync::Semaphore;

pub use answer::HttpAnswer;
pub use config::Target;
pub(crate) use config::TargetConfig;
use connect::Connector;
pub use error::{Error, Result};
use metrics::CallMetrics;
pub(crate) use metrics::describe;
pub use request::HttpRequest;
use retry::RetryBudget;

/// Time for which an idle connection is kept.
const IDLE: Duration = Duration::from_secs(60);
/// Interval at which an HTTP/2 connection is asked whether the server is there, and time for the answer.
const PING: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

/// Client of one target. A cheap handle.
#[derive(Clone)]
pub struct HttpClient(Arc<ClientInner>);

struct ClientInner {
    config: TargetConfig,
    /// The connections, made by the first call: reading all authorities that sign certificates takes time.
    http: OnceLock<Client<Connector, Body>>,
    /// Permits for calls that run at once.
    calls: Arc<Semaphore>,
    /// Number of running calls by host, where others choose the hosts.
    hosts: RunningByKey<String>,
    /// Only where there is one server: the state of one host must not decide about another.
    breaker: Option<Breaker>,
    retries: RetryBudget,
    metrics: CallMetrics,
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HttpClient").field(&self.0.config.name).finish()
    }
}

/// A target as operators see it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct TargetStatus {
    /// The host of the target; absent where others choose the hosts.
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    /// Number of calls that run.
    running: usize,
    /// Maximum number of calls at once.
    calls: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    breaker: Option<BreakerStatus>,
}

impl HttpClient {
    pub(crate) fn new(config: TargetConfig) -> anyhow::Result<Self> {
        if let Some(file) = &config.ca_file {
            connect::authorities(file).with_context(|| format!("targets.{}.ca_file", config.name))?;
        }
        let breaker = config.base.as_ref().map(|_| Breaker::new(config.name, breaker::Config::default()));
        Ok(Self(Arc::new(ClientInner {
            http: OnceLock::new(),
            calls: Arc::new(Semaphore::new(config.calls)),
            hosts: RunningByKey::default(),
            breaker,
            retries: RetryBudget::default(),
            metrics: CallMetrics::new(config.name),
            config,
        })))
    }

    /// Begins a GET request. `place` is a path, such as `/messages?unread=1`, that is added to the URL of the target; for
    /// a [`Target::any`] it is a whole URL.
    pub fn get(&self, place: impl Into<String>) -> HttpRequest {
        self.request(Method::GET, place)
    }

    /// Begins a POST request, see [`Self::get`].
    pub fn post(&self, place: impl Into<String>) -> HttpRequest {
        self.request(Method::POST, place)
    }

    /// Begins a PUT request, see [`Self::get`].
    pub fn put(&self, place: impl Into<String>) -> HttpRequest {
        self.request(Method::PUT, place)
    }

    /// Begins a DELETE request, see [`Self::get`].
    pub fn delete(&self, place: impl Into<String>) -> HttpRequest {
        self.request(Method::DELETE, place)
    }

    /// Begins a request with any method, see [`Self::get`].
    pub fn request(&self, method: Method, place: impl Into<String>) -> HttpRequest {
        HttpRequest::new(self.clone(), method, place.into())
    }

    /// The connections.
    fn connections(&self) -> Result<&Client<Connector, Body>> {
        let ClientInner { config, http, .. } = &*self.0;
        if let Some(http) = http.get() {
            return Ok(http);
        }
        let connector = Connector::new(config)
            .map_err(|error| Error::Request { target: config.name, reason: format!("{error:#}") })?;
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .http2_keep_alive_interval(PING.0)
            .http2_keep_alive_timeout(PING.1);
        if config.any.as_ref().is_some_and(|any| !any.is_internal) {
            // A stranger has any number of names, each of which would keep a connection.
            builder.pool_max_idle_per_host(0);
        }
        Ok(http.get_or_init(|| builder.build(connector)))
    }

    /// The name of the target.
    pub(crate) fn name(&self) -> &'static str {
        self.0.config.name
    }

    pub(crate) fn status(&self) -> (&'static str, TargetStatus) {
        let ClientInner { config, calls, breaker, .. } = &*self.0;
        let status = TargetStatus {
            host: config.base.as_ref().and_then(|base| base.host()).map(str::to_owned),
            running: config.calls - calls.available_permits(),
            calls: config.calls,
            breaker: breaker.as_ref().map(Breaker::status),
        };
        (config.name, status)
    }
}
