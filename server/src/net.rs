//! Sockets: addresses, access, connection limits and deadlines.
//!
//! ```text
//! listen.rs       addresses as settings
//! bind.rs         open sockets, or take over those of a predecessor
//! accept.rs       one task per connection, the limits, the backlog at shutdown
//!   proxy.rs        the client that a proxy forwards for
//!   tls.rs          handshake, ALPN, certificate renewal
//!   connection.rs   one connection: its phase, since when, and its end
//!   socket.rs       the bytes of a connection
//!   reaper.rs       all connections: one task that checks every deadline
//!   refusals.rs     connections that could not be served: counted and logged
//! ```
//!
//! A connection is served by a `Protocol`: HTTP in [`crate::http`], any other in [`crate::tcp`].

mod accept;
mod bind;
pub(crate) mod connection;
mod listen;
pub(crate) mod proxy;
pub(crate) mod reaper;
pub(crate) mod refusal;
pub(crate) mod refusals;
pub(crate) mod socket;
pub mod tls;

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use perennial_runtime::cgroup::Pressure;
use perennial_runtime::drain::Drain;

use accept::AcceptHost;
pub use accept::AtLimit;
pub use bind::{BindError, Inherited, InheritedError, Sockets};
pub(crate) use bind::{Bound, addresses_of, bind};
pub use connection::{Connection, Peer};
pub use listen::{Listen, NoListen};
pub use proxy::ForwardedHeader;
pub use reaper::{ConnectionView, Connections, network};
pub use refusal::ConnectionRefusal;
use socket::{Peek, Socket};

/// Settings of a listener: addresses, access, limits and deadlines.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the listener in metrics: `public`, `admin`.
    pub name: &'static str,
    /// Addresses to listen on.
    pub listen: Vec<Listen>,
    /// Permissions of the Unix sockets that this process creates.
    pub unix: UnixAccess,
    /// Certificate and key, needed by `https` addresses.
    pub tls: Option<tls::Config>,
    /// Whether other processes may listen on the same addresses (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// Maximum number of open connections.
    pub max_connections: usize,
    /// Maximum number of open connections from one address; 0 means no limit. Trusted proxies have no limit.
    pub max_per_address: usize,
    /// How a connection over `max_connections` is handled.
    pub at_limit: AtLimit,
    /// Whether a proxy in `trusted_proxies` begins each connection with a PROXY protocol header, version 2.
    pub proxy_protocol: bool,
    /// Networks of the proxies whose statements about the client's address are believed.
    pub trusted_proxies: Arc<[IpNet]>,
    /// Header in which trusted proxies name the client.
    pub forwarded_header: ForwardedHeader,
    /// Time limits of a connection.
    pub timeouts: Timeouts,
    /// Memory pressure. While memory is nearly used up, connections are accepted slowly, and a client that has not
    /// identified itself gets a short deadline.
    pub pressure: Pressure,
}

impl Config {
    /// Returns the defaults for a listener called `name`.
    pub fn new(name: &'static str, listen: Vec<Listen>) -> Self {
        let seconds = Duration::from_secs;
        Self {
            name,
            listen,
            unix: UnixAccess::default(),
            tls: None,
            reuse_port: false,
            max_connections: 10_000,
            max_per_address: 0,
            at_limit: AtLimit::Queue,
            proxy_protocol: false,
            trusted_proxies: Arc::default(),
            forwarded_header: ForwardedHeader::XForwardedFor,
            timeouts: Timeouts {
                handshake: seconds(10),
                head: seconds(15),
                idle: seconds(75),
                write: seconds(30),
                age: seconds(3600),
            },
            pressure: Pressure::default(),
        }
    }
}

/// Permissions of a Unix socket's file. A client may connect when it may write to the file.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnixAccess {
    /// Mode of the file; `None` leaves it to the umask of the process.
    pub mode: Option<u32>,
    /// Id of the group that the file belongs to; `None` leaves it to the system.
    pub group: Option<u32>,
}

/// Time limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Time until the first request may begin: a PROXY header, TLS, the first byte, an HTTP/2 preface.
    pub handshake: Duration,
    /// Time for a request head, from its first byte.
    pub head: Duration,
    /// Time between two requests; on raw TCP, time without a byte in either direction.
    pub idle: Duration,
    /// Time in which the client takes none of the bytes that wait for it.
    pub write: Duration,
    /// Age, plus or minus a tenth, at which the connection is asked to end; zero means never.
    pub age: Duration,
}

/// A protocol that is spoken on connections.
pub(crate) trait Protocol: Clone + Send + Sync + 'static {
    /// Serves a connection to its end. Its first bytes are still in the socket.
    fn plain<S: Peek>(&self, socket: Socket<S>) -> impl Future<Output = ()> + Send;

    /// Serves a connection to its end, after the TLS handshake.
    fn secure<S: Peek>(&self, stream: Box<TlsStream<Socket<S>>>) -> impl Future<Output = ()> + Send;

    /// Answer to a client that is turned away at the connection limit.
    fn refusal(&self) -> &'static [u8];

    /// Answer to a client that speaks this protocol without TLS on a port with TLS; empty when the protocol has none.
    fn wants_tls(&self) -> &'static [u8];

    /// Returns true when these are the first bytes of a client that speaks this protocol without TLS.
    fn is_plain(&self, first: &[u8]) -> bool;
}

/// Interval at which the certificate files are checked for changes.
const RENEW_EVERY: Duration = Duration::from_secs(10);

/// Serves all sockets until the drain has begun and every connection has ended.
pub(crate) async fn serve<P: Protocol>(bound: Bound, protocol: P, drain: &Drain) {
    let (sockets, connections) = (bound.sockets(), bound.connections());
    let config = Arc::new(bound.config);
    let pressure = config.pressure.clone();
    let loops = bound.listeners.into_iter().map(|listener| {
        let host = AcceptHost {
            config: Arc::clone(&config),
            connections: connections.clone(),
            drain: drain.clone(),
            protocol: protocol.clone(),
            sockets: sockets.clone(),
        };
        accept::run(listener, host)
    });
    let ended = async {
        futures_util::future::join_all(loops).await;
        // Upgraded connections outlive the tasks of the accept loops.
        connections.emptied().await;
    };
    let renewed = async {
        if sockets.identity().is_none() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            sockets.renew_certificate();
        }
    };
    tokio::select! {
        () = connections.watch(drain, &pressure, ended) => {}
        () = renewed => {}
    }
}

impl Sockets {
    /// Reads the certificate again if its files have changed. If the new one cannot be used, the old one stays.
    pub fn renew_certificate(&self) {
        match self.identity().map(tls::Identity::refresh) {
            Some(Ok(true)) => info!("the certificate was read again, for new connections"),
            Some(Err(error)) => {
                let error = std::error::Error::source(&error)
                    .map_or_else(|| error.to_string(), |why| format!("{error}: {why}"));
                warn!(error, "the new certificate cannot be used; the old one stays");
            }
            Some(Ok(false)) | None => {}
        }
    }
}
