//! The HTTP server: bind first, then serve until drained. Its sockets are those of [`crate::net`].
//!
//! ```text
//! conn.rs     HTTP/1.1 or HTTP/2 on one connection
//!   stack.rs    the steps around every request: shedding, scope, log, panic, deadline, body limit
//!     target.rs   the target and the host of a request
//!     scope.rs    the state of one request
//!     body.rs     the request body         exchange.rs  the response body, and the access log
//!     timed.rs    the time for which a handler keeps its thread
//!     around.rs   the service of layers around handlers
//!     detach.rs   routes whose work continues without their client
//!     limits.rs   routes with limits of their own
//!     router      axum: routing and extraction
//! problem.rs  errors as RFC 9457
//! ```

mod access;
pub mod around;
mod body;
mod conn;
pub mod detach;
mod exchange;
mod explained;
pub mod limits;
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

pub use body::BodyError;
use conn::Http;
use scope::Services;
use stack::Stack;

/// Settings of an HTTP server: its sockets, its log, and the limits of a client.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sockets and connections.
    pub net: net::Config,
    /// Whether the access log is written at debug level only.
    pub quiet: bool,
    /// Destination of the access log; `None` writes it as events of `tracing`.
    pub access_log: Option<JsonLines>,
    /// Maximum number of requests that run at once. Further requests are answered with 503.
    pub max_requests: usize,
    /// Maximum size of an HTTP/1.1 request head, in bytes; the value must be at least 8 KiB.
    pub head_limit: usize,
    /// Time limit for a handler to produce a response.
    pub request_timeout: Duration,
    /// Time limit for one wait of a handler for a part of a request body.
    pub body_idle_timeout: Duration,
    /// Time limit for a whole request body, from the handler's first wait for it.
    pub body_timeout: Duration,
    /// Maximum size of a request body, in bytes.
    pub body_limit: usize,
    /// Whether the `X-Request-Id` of a client becomes the id of its request.
    pub trust_request_id: bool,
    /// Requests that take at least this long are logged, with the places where their time was spent.
    pub slow_after: Duration,
    /// Handlers that keep their thread for at least this long are logged and counted.
    pub slow_poll: Duration,
    /// Limits of one HTTP/2 connection.
    pub http2: Http2Config,
}

impl Config {
    /// Returns the defaults, with the sockets of `net`.
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

/// Limits of one HTTP/2 connection.
#[derive(Clone, Copy, Debug)]
pub struct Http2Config {
    /// Maximum number of concurrent streams.
    pub streams: u32,
    /// Maximum size of the headers of one request, in bytes.
    pub header_list: u32,
    /// Maximum number of bytes of one response that wait in memory for the client.
    pub send_buffer: usize,
    /// Interval of the PINGs that ask a silent client whether it is there.
    pub ping_every: Duration,
    /// Time limit for the answer to a PING.
    pub ping_timeout: Duration,
}

/// A server whose sockets are open: its addresses are known, and a bad port has failed already.
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

/// Decides whether pages of an origin may read error responses.
pub type ErrorReaders = Arc<dyn Fn(&http::HeaderValue) -> bool + Send + Sync>;

impl Server {
    /// Opens the sockets, or takes those of `inherited` that have the same addresses, and reads the certificate.
    ///
    /// # Errors
    /// When an address cannot be bound, or `https` lacks a usable certificate.
    pub async fn bind(config: Config, inherited: &Inherited) -> Result<Self, BindError> {
        let bound = net::bind(config.net.clone(), inherited, net::tls::HTTP).await?;
        Ok(Self { bound, config, readers: None })
    }

    /// Lets pages of these origins read all error responses, also those from outside the router.
    ///
    /// The policy of a router never sees a request that is refused before the router, for example because its body is
    /// too long. Without this setting a page could only tell that something went wrong.
    #[must_use]
    pub fn errors_readable_by(self, readers: ErrorReaders) -> Self {
        Self { readers: Some(readers), ..self }
    }

    /// Returns the addresses in use, in the form that the settings have.
    pub fn addresses(&self) -> Vec<String> {
        self.bound.addresses()
    }

    /// Returns a handle to the server's connections, and to the requests on them.
    pub fn connections(&self) -> Connections {
        self.bound.connections()
    }

    /// Returns a handle to the server's sockets, to hand them over, and to the certificate, to read it again.
    pub fn sockets(&self) -> Sockets {
        self.bound.sockets()
    }

    /// Serves `router` until the drain has begun and every connection has ended. `cpu` has the threads that
    /// [`scope::RequestScope::cpu`] uses.
    ///
    /// # Errors
    /// Never; the return type is that of a task.
    pub async fn run(self, router: axum::Router, cpu: Option<Cpu>, drain: Drain) -> Result<(), Infallible> {
        let config = Arc::new(self.config);
        let detached = TaskTracker::new();
        let services =
            Services { drain: drain.clone(), cpu, detached: detached.clone(), slow_poll: config.slow_poll };
        let stack = Arc::new(Stack::new(router, &config, self.readers, Arc::new(services)));
        let protocol = Http { stack, config };
        net::serve(self.bound, protocol, &drain).await;
        // Without a connection no new work is detached.
        detached.close();
        detached.wait().await;
        Ok(())
    }
}
