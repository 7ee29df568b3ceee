//! The HTTP server: bind first, then serve until drained. Its sockets are those of [`crate::net`].
//!
//! ```text
//! conn.rs     HTTP/1.1 or HTTP/2 on one connection
//!   stack.rs    what surrounds every request: shedding, scope, log, panic, deadline, body limit
//!     target.rs   what it is for, and on which host
//!     scope.rs    what lives for one request
//!     body.rs     the request's body       exchange.rs  the response's, and the access log
//!     timed.rs    how long a handler keeps its thread
//!     detach.rs   routes that go on without their client
//!     router      axum: routing and extraction
//! problem.rs  errors as RFC 9457
//! ```

mod access;
mod body;
mod conn;
pub mod detach;
mod exchange;
mod explained;
pub mod problem;
pub mod scope;
mod stack;
mod target;
mod timed;
pub mod trace;

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use crate::net::{self, BindError, Connections, Inherited, Sockets};
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::Drain;
use perennial_runtime::telemetry::JsonLines;

use conn::Http;
use scope::Services;
use stack::Stack;

/// How to listen and what one client may ask for.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sockets and connections.
    pub net: net::Config,
    /// Whether the access log is only for debugging.
    pub quiet: bool,
    /// Where the access log goes directly; to the events of `tracing` if nowhere.
    pub access_log: Option<JsonLines>,
    /// How many requests may run at once. More are answered with 503.
    pub max_requests: usize,
    /// The longest head of an HTTP/1.1 request, in bytes: at least 8 KiB.
    pub head_limit: usize,
    /// How long a handler may take until it has a response.
    pub request_timeout: Duration,
    /// How long a handler may have to wait for a part of a request body.
    pub body_idle_timeout: Duration,
    /// How long it may take, from the first wait, until a request body is there.
    pub body_timeout: Duration,
    /// The longest request body, in bytes.
    pub body_limit: usize,
    /// Whether a client's `X-Request-Id` is taken over.
    pub trust_request_id: bool,
    /// After how long a request is worth a line that says where its time went.
    pub slow_after: Duration,
    /// How long a handler may keep its thread without a word about it.
    pub slow_poll: Duration,
    /// What one HTTP/2 connection may take.
    pub http2: Http2Config,
}

impl Config {
    /// The defaults, on these sockets.
    pub fn new(net: net::Config) -> Self {
        let seconds = Duration::from_secs;
        Self {
            net,
            quiet: false,
            access_log: None,
            max_requests: 10_000,
            head_limit: 16 << 10,
            request_timeout: seconds(30),
            body_idle_timeout: seconds(15),
            body_timeout: seconds(60),
            body_limit: 1 << 20,
            trust_request_id: false,
            slow_after: seconds(1),
            slow_poll: Duration::from_millis(100),
            http2: Http2Config {
                streams: 100,
                header_list: 16 << 10,
                send_buffer: 64 << 10,
                ping_every: seconds(20),
                ping_timeout: seconds(20),
            },
        }
    }
}

/// What one HTTP/2 connection may take.
#[derive(Clone, Copy, Debug)]
pub struct Http2Config {
    /// How many streams at once.
    pub streams: u32,
    /// How much of request headers, in bytes.
    pub header_list: u32,
    /// How much of one response waits in memory for the client, in bytes.
    pub send_buffer: usize,
    /// How often a silent client is asked whether it is there.
    pub ping_every: Duration,
    /// How long it may take to say so.
    pub ping_timeout: Duration,
}

/// A server whose sockets are open, so that its addresses are known and a bad port has failed already.
pub struct Server {
    bound: net::Bound,
    config: Config,
    readers: Option<ErrorReaders>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("bound", &self.bound).finish_non_exhaustive()
    }
}

/// Says whether pages of an origin may read errors.
pub type ErrorReaders = Arc<dyn Fn(&http::HeaderValue) -> bool + Send + Sync>;

impl Server {
    /// Opens the sockets, or takes those of `inherited` that have the same addresses, and reads the certificate.
    ///
    /// # Errors
    /// When an address cannot be had, or `https` lacks a usable certificate.
    pub async fn bind(config: Config, inherited: &Inherited) -> Result<Self, BindError> {
        Ok(Self { bound: net::bind(config.net.clone(), inherited).await?, config, readers: None })
    }

    /// Lets pages of these origins read errors, whoever answers them: a router's own policy never sees what is refused before
    /// it, as a body that is too long, and a page could only tell that something went wrong.
    #[must_use]
    pub fn errors_readable_by(self, readers: ErrorReaders) -> Self {
        Self { readers: Some(readers), ..self }
    }

    /// The addresses in use, in the form in which they are written in settings.
    pub fn addresses(&self) -> Vec<String> {
        self.bound.addresses()
    }

    /// Its connections, and the requests on them.
    pub fn connections(&self) -> Connections {
        self.bound.connections()
    }

    /// Its sockets, to be handed over, and the certificate, to be read anew.
    pub fn sockets(&self) -> Sockets {
        self.bound.sockets()
    }

    /// Serves `router` until the drain has begun and every connection has ended. `cpu` is what
    /// [`scope::RequestScope::cpu`] uses.
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn run(self, router: axum::Router, cpu: Option<Cpu>, drain: Drain) -> Result<(), Infallible> {
        let config = Arc::new(self.config);
        let detached = TaskTracker::new();
        let services =
            Services { drain: drain.clone(), cpu, detached: detached.clone(), slow_poll: config.slow_poll };
        let stack = Arc::new(Stack::new(router, &config, self.readers, Arc::new(services)));
        let listener = config.net.name;
        let protocol = Http { stack, config: Arc::clone(&config), listener };
        net::serve(self.bound, protocol, &drain).await;
        // Nothing new is detached without a connection.
        detached.close();
        detached.wait().await;
        Ok(())
    }
}
