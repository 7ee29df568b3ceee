//! Listeners by name: a module serves a protocol of its own, on TCP or on datagrams.
//!
//! ```
//! # use perennial_host::listeners::Listener;
//! const LISTENERS: &[Listener] = &[Listener::tcp("lines", "127.0.0.1:7000")];
//! ```
//!
//! Each has a section of settings, `[listeners.lines]`. Its sockets are opened with those of the public listener, are
//! handed over with them (SIGUSR2), and stand in `addresses.json`; its connections stand in `/connections`, and are
//! counted and limited like those of HTTP.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use anyhow::bail;
use perennial_runtime::drain::Drain;
use perennial_server::net::{self, Connections, Inherited, Listen, Sockets};
use perennial_server::tcp;
use perennial_server::udp;

pub use perennial_server::tcp::{Stream, TcpHandler};
pub use perennial_server::udp::{Datagram, UdpHandler};

use crate::boot::not_opened;
use crate::capacity::fit;
use crate::config::{Config, DAY, MILLISECOND};
use crate::settings::Reader;

/// Settings of a listener on TCP, with their defaults; `NAME` and `ADDRESS` stand for its name and its address.
const TCP: &str = include_str!("../../../config/tcp.toml");
/// Settings of a listener for datagrams, with their defaults.
const UDP: &str = include_str!("../../../config/udp.toml");

/// Names of the sockets that the host hands over itself.
pub(crate) const OF_HOST: [&str; 3] = ["public", "admin", "predecessor"];

/// A listener that a module names in [`Module::LISTENERS`](crate::module::Module::LISTENERS).
#[derive(Clone, Copy, Debug)]
pub struct Listener {
    name: &'static str,
    /// Default of `listeners.NAME.listen`.
    address: &'static str,
    transport: Transport,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl Listener {
    /// A listener on TCP or a Unix socket, whose default address is `host:port`. The module hands in its handler with
    /// [`Host::listen_tcp`](crate::module::Host::listen_tcp).
    pub const fn tcp(name: &'static str, address: &'static str) -> Self {
        Self { name, address, transport: Transport::Tcp }
    }

    /// A listener for datagrams, whose default address is `host:port`. The module hands in its handler with
    /// [`Host::listen_udp`](crate::module::Host::listen_udp).
    pub const fn udp(name: &'static str, address: &'static str) -> Self {
        Self { name, address, transport: Transport::Udp }
    }

    /// The name.
    pub(crate) const fn name(self) -> &'static str {
        self.name
    }

    /// Settings of the listener with their defaults, as commented TOML.
    pub(crate) fn defaults(self) -> String {
        let template = match self.transport {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        };
        template.replace("NAME", self.name).replace("ADDRESS", self.address)
    }

    /// Reads the settings of the listener. All its other limits are those of the public listener.
    pub(crate) fn read(self, settings: &mut Reader<'_>, server: &net::Config) -> ListenerConfig {
        let key = |name: &str| format!("listeners.{}.{name}", self.name);
        match self.transport {
            Transport::Tcp => {
                let wanted = "host:port, tls://host:port or unix:/path";
                let listen: Vec<Listen> = settings.parse_list(&key("listen"), wanted);
                let is_secure = listen.iter().any(|listen| matches!(listen, Listen::Https(_)));
                if listen.is_empty() || (is_secure && server.tls.is_none()) {
                    let wanted = "at least one address, and server.tls.cert_file for tls:// addresses";
                    settings.refuse::<()>(&key("listen"), wanted);
                }
                let mut timeouts = server.timeouts;
                timeouts.idle = settings.duration(&key("idle_timeout"), MILLISECOND..=DAY);
                timeouts.write = settings.duration(&key("write_timeout"), MILLISECOND..=DAY);
                timeouts.age = Duration::ZERO;
                ListenerConfig::Tcp(net::Config {
                    name: self.name,
                    listen,
                    max_connections: settings.number(&key("max_connections"), 1..=1_000_000),
                    max_per_address: settings.number(&key("max_per_address"), 0..=1_000_000),
                    at_limit: settings.parse(&key("at_limit"), "queue or reject"),
                    proxy_protocol: settings.get(&key("proxy_protocol")),
                    timeouts,
                    ..server.clone()
                })
            }
            Transport::Udp => {
                let is_address = |listen: &Listen| matches!(listen, Listen::Http(_));
                let listen: Vec<Listen> = settings.parse_list(&key("listen"), "host:port");
                if listen.is_empty() || !listen.iter().all(is_address) {
                    settings.refuse::<()>(&key("listen"), "at least one address, all of them host:port");
                }
                ListenerConfig::Udp(udp::Config {
                    name: self.name,
                    listen: listen.iter().map(ToString::to_string).collect(),
                    max_running: settings.number(&key("max_running"), 1..=1_000_000),
                    max_per_address: settings.number(&key("max_per_address"), 0..=1_000_000),
                    timeout: settings.duration(&key("timeout"), MILLISECOND..=DAY),
                })
            }
        }
    }
}

/// Shares the connections that the process can bear: half of them are for the listeners of modules, in equal parts, and the
/// public listener has what these do not want.
pub(crate) fn share_connections(settings: &mut Reader<'_>, config: &mut Config) {
    let head = config.server.head_limit;
    let mut on_tcp: Vec<_> = config.listeners.iter_mut().filter_map(ListenerConfig::tcp).collect();
    let count = on_tcp.len() as u64;
    let mut taken = 0;
    for listener in &mut on_tcp {
        let key = format!("listeners.{}.max_connections", listener.name);
        let part = |visitors: u64| (visitors / 2 / count).max(16);
        let fitting = fit(settings, &key, listener.max_connections, |means| part(means.visitors(head)));
        listener.max_connections = fitting;
        taken += fitting as u64;
    }
    if taken > 0 {
        let wanted = config.server.net.max_connections;
        let left = |visitors: u64| visitors.saturating_sub(taken).max(16);
        config.server.net.max_connections =
            fit(settings, "server.max_connections", wanted, |means| left(means.visitors(head)));
    }
}

/// Settings of a listener.
#[derive(Clone, Debug)]
pub(crate) enum ListenerConfig {
    Tcp(net::Config),
    Udp(udp::Config),
}

impl ListenerConfig {
    fn name(&self) -> &'static str {
        match self {
            Self::Tcp(config) => config.name,
            Self::Udp(config) => config.name,
        }
    }

    fn tcp(&mut self) -> Option<&mut net::Config> {
        match self {
            Self::Tcp(config) => Some(config),
            Self::Udp(_) => None,
        }
    }

    /// Opens the sockets, or takes those of a predecessor.
    pub(crate) async fn open(&self, inherited: &Inherited) -> anyhow::Result<OpenListener> {
        let server = match self {
            Self::Tcp(config) => tcp::Server::bind(config.clone(), inherited).await.map(BoundServer::Tcp),
            Self::Udp(config) => udp::Server::bind(config.clone(), inherited).await.map(BoundServer::Udp),
        };
        let name = self.name();
        let server = server.map_err(|error| not_opened(error, &format!("listeners.{name}.listen")))?;
        Ok(OpenListener { name, server })
    }
}

/// A listener whose sockets are open.
#[derive(Debug)]
pub(crate) struct OpenListener {
    pub(crate) name: &'static str,
    server: BoundServer,
}

#[derive(Debug)]
enum BoundServer {
    Tcp(tcp::Server),
    Udp(udp::Server),
}

impl OpenListener {
    pub(crate) fn addresses(&self) -> Vec<String> {
        match &self.server {
            BoundServer::Tcp(server) => {
                let addresses = server.addresses().into_iter();
                addresses.map(|address| address.replacen("https://", "tls://", 1)).collect()
            }
            BoundServer::Udp(server) => server.addresses(),
        }
    }

    pub(crate) fn sockets(&self) -> Sockets {
        match &self.server {
            BoundServer::Tcp(server) => server.sockets(),
            BoundServer::Udp(server) => server.sockets(),
        }
    }

    /// The connections; `None` for datagrams.
    pub(crate) fn connections(&self) -> Option<Connections> {
        match &self.server {
            BoundServer::Tcp(server) => Some(server.connections()),
            BoundServer::Udp(_) => None,
        }
    }
}

type Serving = Pin<Box<dyn Future<Output = Result<(), Infallible>> + Send>>;
/// Serves a listener with the handler of its module.
pub(crate) type Serve = Box<dyn FnOnce(Drain) -> Serving + Send>;
type ServeTcp = Box<dyn FnOnce(tcp::Server, Drain) -> Serving + Send>;
type ServeUdp = Box<dyn FnOnce(udp::Server, Drain) -> Serving + Send>;

/// The handlers of the listeners, which modules hand in.
#[derive(Default)]
pub(crate) struct ListenerHandlers {
    tcp: BTreeMap<&'static str, ServeTcp>,
    udp: BTreeMap<&'static str, ServeUdp>,
}

impl ListenerHandlers {
    pub(crate) fn tcp(&mut self, name: &'static str, handler: impl TcpHandler) {
        let serve: ServeTcp = Box::new(move |server, drain| Box::pin(server.run(handler, drain)));
        self.tcp.insert(name, serve);
    }

    pub(crate) fn udp(&mut self, name: &'static str, handler: impl UdpHandler) {
        let serve: ServeUdp = Box::new(move |server, drain| Box::pin(server.run(handler, drain)));
        self.udp.insert(name, serve);
    }

    /// Joins each listener with its handler. The error names a listener without a handler, and a handler without a
    /// listener.
    pub(crate) fn join(mut self, open: Vec<OpenListener>) -> anyhow::Result<Vec<(&'static str, Serve)>> {
        let mut joined: Vec<(&'static str, Serve)> = Vec::new();
        for OpenListener { name, server } in open {
            let serve: Option<Serve> = match server {
                BoundServer::Tcp(server) => {
                    self.tcp.remove(name).map(|serve| Box::new(move |drain| serve(server, drain)) as Serve)
                }
                BoundServer::Udp(server) => {
                    self.udp.remove(name).map(|serve| Box::new(move |drain| serve(server, drain)) as Serve)
                }
            };
            let Some(serve) = serve else {
                bail!("the listener {name} has no handler: call host.listen_tcp or host.listen_udp in mount");
            };
            joined.push((name, serve));
        }
        if let Some(name) = self.tcp.keys().chain(self.udp.keys()).next() {
            bail!("the handler {name} has no listener of its kind: name it in LISTENERS of its module");
        }
        Ok(joined)
    }
}
