//! The HTTP server: bind first, then serve until drained.
//!
//! ```text
//! accept.rs   sockets, one task a connection, the backlog at the end
//!   tls.rs      handshake and ALPN, inside the connection's task
//!   conn.rs     HTTP/1.1 or HTTP/2 on one connection, told to leave when the drain says so
//!     stack.rs    what surrounds every request: scope, log, panic, deadline, body limit
//!       scope.rs    what lives for one request
//!       router        axum: routing and extraction
//! ```

mod accept;
mod body;
mod conn;
mod exchange;
mod listen;
pub mod problem;
pub mod scope;
mod stack;
pub mod tls;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::drain::Drain;

use accept::Listener;
pub use conn::Peer;
pub use listen::Listen;
use stack::Stack;

/// How to listen and what one client may ask for.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the listener is called in metrics: `public`, `admin`.
    pub name: &'static str,
    /// Whether its access log is only for debugging.
    pub quiet: bool,
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// Certificate and key, needed by `https` addresses.
    pub tls: Option<tls::Config>,
    /// How many connections may be open at once. More wait in the kernel's backlog.
    pub max_connections: usize,
    /// How long a new connection may stay silent, and how long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long a request head may take, and how long a connection may be idle before the next one.
    pub idle_timeout: Duration,
    /// How long a handler may take until it has a response.
    pub request_timeout: Duration,
    /// The longest request body, in bytes.
    pub body_limit: usize,
    /// Whether a client's `X-Request-Id` is taken over.
    pub trust_request_id: bool,
}

/// Why a server could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be had.
    #[error("cannot listen on {address}")]
    Address {
        /// The address as it was written.
        address: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The certificate or the key cannot be used.
    #[error("cannot serve https")]
    Tls(#[from] tls::Error),
}

/// A server whose sockets are open, so that its addresses are known and a bad port has failed already.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    config: Config,
}

impl Server {
    /// Opens the sockets and reads the certificate.
    ///
    /// # Errors
    /// When an address cannot be had, or `https` lacks a usable certificate.
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let mut listeners = Vec::new();
        for listen in &config.listen {
            listeners.extend(accept::bind(listen, tls.as_ref()).await?);
        }
        Ok(Self { listeners, config })
    }

    /// The addresses in use, in the form in which they are written in settings.
    pub fn addresses(&self) -> Vec<String> {
        self.listeners.iter().map(Listener::address).collect()
    }

    /// Serves `router` until the drain has begun and every connection has ended.
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn run(self, router: axum::Router, drain: Drain) -> Result<(), Infallible> {
        let stack = Arc::new(Stack::new(router, &self.config, drain.clone()));
        let slots = Arc::new(Semaphore::new(self.config.max_connections));
        let config = Arc::new(self.config);
        let loops = self.listeners.into_iter().map(|listener| {
            let host = conn::Host { stack: stack.clone(), config: Arc::clone(&config), drain: drain.clone() };
            accept::run(listener, host, Arc::clone(&slots))
        });
        futures_util::future::join_all(loops).await;
        Ok(())
    }
}
