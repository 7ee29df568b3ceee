//! Sockets: where to listen, who may connect, how many, and for how long.
//!
//! ```text
//! listen.rs       addresses as settings
//! bind.rs         open sockets, or take over those of a predecessor
//! accept.rs       one task a connection, the limits, the backlog at the end
//!   proxy.rs        whom a proxy speaks for
//!   tls.rs          handshake, ALPN, certificates that are renewed
//!   connection.rs   one connection: what it does, since when, and its end
//!   socket.rs       its bytes
//!   watch.rs        all of them: every deadline, by one task that looks around
//!   refusals.rs     what could not be served at all: counted, and told to the log
//! ```
//!
//! What is spoken on a connection is a `Protocol`: HTTP in [`crate::http`], anything in [`crate::tcp`].

mod accept;
mod bind;
pub(crate) mod connection;
mod listen;
pub(crate) mod proxy;
pub(crate) mod refusal;
pub(crate) mod refusals;
pub(crate) mod socket;
pub mod tls;
pub(crate) mod watch;

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
pub(crate) use bind::{Bound, bind};
pub use connection::{Connection, Peer};
pub use listen::Listen;
pub use proxy::ForwardedHeader;
pub use refusal::ConnectionRefusal;
use socket::{Peek, Socket};
pub use watch::{ConnectionView, Connections, network};

/// Where to listen, and what one client may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the listener is called in metrics: `public`, `admin`.
    pub name: &'static str,
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// Who may connect to the Unix sockets that are made here.
    pub unix: UnixAccess,
    /// Certificate and key, needed by `https` addresses.
    pub tls: Option<tls::Config>,
    /// Whether other processes may listen on the same addresses (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// How many connections may be open at once.
    pub max_connections: usize,
    /// How many of them from one address; 0 is no limit. Trusted proxies have none.
    pub max_per_address: usize,
    /// What happens to one more than `max_connections`.
    pub at_limit: AtLimit,
    /// Whether a proxy in `trusted_proxies` begins each connection with a PROXY protocol header, version 2.
    pub proxy_protocol: bool,
    /// Networks whose word on who the client is counts.
    pub trusted_proxies: Arc<[IpNet]>,
    /// The header that they say it in.
    pub forwarded_header: ForwardedHeader,
    /// How long a connection may take for what.
    pub timeouts: Timeouts,
    /// When memory is nearly used up, nothing new is accepted, and what has not shown who it is has to hurry.
    pub pressure: Pressure,
}

impl Config {
    /// The defaults, for a listener called `name`.
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

/// Who may connect to a Unix socket: whoever may write to its file.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnixAccess {
    /// The mode of the file; as the process's umask says, without.
    pub mode: Option<u32>,
    /// The group that it belongs to.
    pub group: Option<u32>,
}

/// How long a connection may take for what.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until the first request may begin: a PROXY header, TLS, the first byte, an HTTP/2 preface.
    pub handshake: Duration,
    /// For a request head, from its first byte.
    pub head: Duration,
    /// Between two requests.
    pub idle: Duration,
    /// Without taking any of the bytes that are there for it.
    pub write: Duration,
    /// From its beginning, give or take a tenth, until it is asked to end; zero is for ever.
    pub age: Duration,
}

/// What is spoken on connections.
pub(crate) trait Protocol: Clone + Send + Sync + 'static {
    /// Serves a connection whose first bytes are still in the socket, to its end.
    fn plain<S: Peek>(&self, socket: Socket<S>) -> impl Future<Output = ()> + Send;

    /// Serves a connection after the handshake, to its end.
    fn secure<S: Peek>(&self, stream: Box<TlsStream<Socket<S>>>) -> impl Future<Output = ()> + Send;

    /// What is said to a client that is turned away at the limit.
    fn refusal(&self) -> &'static [u8];

    /// What is said to a client that speaks this protocol without TLS on a port with TLS; empty when that cannot be told.
    fn wants_tls(&self) -> &'static [u8];

    /// Returns true when these are the first bytes of a client that speaks this protocol without TLS.
    fn is_plain(&self, first: &[u8]) -> bool;
}

/// How often the files of a certificate are looked at.
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
        // Those that were upgraded are in nobody's loop.
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
    /// Reads the certificate again if its files have changed. One that cannot be used changes nothing.
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
