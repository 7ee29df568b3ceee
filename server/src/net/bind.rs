//! Open sockets: bound here, or taken over from a predecessor or from systemd.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tracing::warn;

use super::{Config, Connections, Listen, UnixAccess, tls};

/// Number of failed accepts after which the backlog is no longer emptied at shutdown.
const MAX_FAILURES: usize = 1000;
/// Maximum number of connections in the kernel's accept queue.
const BACKLOG: u32 = 4096;

/// Why a server could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}")]
    Address {
        /// The address as it is written in the settings.
        address: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The certificate or the key cannot be used.
    #[error("cannot serve https")]
    Tls(#[from] tls::Error),
}

/// An open socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp { socket: TcpListener, address: SocketAddr, tls: Option<tls::Identity>, origin: OpenedSockets },
    Unix { socket: UnixListener, address: String, origin: OpenedSockets },
}

/// The process that opened a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenedSockets {
    /// This process: when it closes the socket, no other process has it open.
    Here,
    /// A predecessor or a supervisor, which may go on using the socket.
    Elsewhere,
}

/// An accepted connection from which no bytes have been read yet.
pub(super) enum AcceptedStream {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

/// An inherited descriptor is not a listening socket.
#[derive(Debug, thiserror::Error)]
#[error("the inherited descriptor {index} is no listening socket, and no socket for datagrams")]
pub struct InheritedError {
    /// Index of the descriptor, counted from 0.
    pub index: usize,
    source: io::Error,
}

/// Listening sockets that were open when the process began (`LISTEN_FDS`, see `sd_listen_fds(3)`). A cheap
/// handle.
///
/// An address in the settings is not bound anew if an inherited socket has it. An address with port 0 takes the socket
/// on the same IP address that has the name of the listener in `LISTEN_FDNAMES`.
#[derive(Clone, Debug, Default)]
pub struct Inherited(Arc<Mutex<VecDeque<(String, BoundSocket)>>>);

#[derive(Debug)]
enum BoundSocket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
    Udp(std::net::UdpSocket),
}

impl Inherited {
    /// Takes over the sockets that the environment lists.
    ///
    /// # Errors
    /// When a descriptor is not a listening socket.
    pub fn from_environment() -> Result<Self, InheritedError> {
        if let Ok(count) = std::env::var("LISTEN_FDS")
            && count.parse::<u32>().is_err()
        {
            warn!("LISTEN_FDS is no number: no sockets are inherited");
        }
        let mut descriptors = listenfd::ListenFd::from_env();
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let mut sockets = VecDeque::new();
        for index in 0..descriptors.len() {
            let name = names.next().unwrap_or_default();
            let failed = |source| InheritedError { index, source };
            let tcp = match descriptors.take_tcp_listener(index) {
                Ok(Some(tcp)) if !SockRef::from(&tcp).is_listener().unwrap_or(true) => {
                    return Err(failed(io::Error::other("it is bound, but does not listen")));
                }
                Ok(tcp) => tcp.map(BoundSocket::Tcp),
                // Not TCP.
                Err(_) => match descriptors.take_unix_listener(index) {
                    Ok(unix) => unix.map(BoundSocket::Unix),
                    // Not Unix either.
                    Err(_) => descriptors.take_udp_socket(index).map_err(failed)?.map(BoundSocket::Udp),
                },
            };
            sockets.extend(tcp.map(|socket| (name, socket)));
        }
        Ok(Self(Arc::new(Mutex::new(sockets))))
    }

    /// Returns the names and addresses of the inherited sockets that no listener has taken.
    pub fn left(&self) -> Vec<String> {
        let sockets = self.0.lock();
        sockets
            .iter()
            .map(|(name, socket)| match socket {
                BoundSocket::Tcp(socket) => format!("{name} {}", place_of(socket.local_addr())),
                BoundSocket::Udp(socket) => format!("{name} {} (UDP)", place_of(socket.local_addr())),
                BoundSocket::Unix(socket) => format!("{name} {}", name_of(socket)),
            })
            .collect()
    }

    fn take(&self, fits: impl Fn(&str, &BoundSocket) -> bool) -> Option<BoundSocket> {
        let mut sockets = self.0.lock();
        let index = sockets.iter().position(|(name, socket)| fits(name, socket))?;
        sockets.remove(index).map(|(_, socket)| socket)
    }

    /// Takes the Unix socket with this name, whether it listens or not.
    pub fn take_unix(&self, name: &str) -> Option<std::os::unix::net::UnixListener> {
        self.unix(|given, _| given == name)
    }

    fn tcp(&self, listener: &str, address: SocketAddr) -> Option<std::net::TcpListener> {
        let socket = self.take(|name, socket| match socket {
            BoundSocket::Tcp(socket) => fits(socket.local_addr(), address, name == listener),
            BoundSocket::Unix(_) | BoundSocket::Udp(_) => false,
        });
        match socket {
            Some(BoundSocket::Tcp(socket)) => Some(socket),
            _ => None,
        }
    }

    /// Takes the socket for datagrams at an address, or with the name of the listener when the port is 0.
    pub(crate) fn udp(&self, listener: &str, address: SocketAddr) -> Option<std::net::UdpSocket> {
        let socket = self.take(|name, socket| match socket {
            BoundSocket::Udp(socket) => fits(socket.local_addr(), address, name == listener),
            BoundSocket::Unix(_) | BoundSocket::Tcp(_) => false,
        });
        match socket {
            Some(BoundSocket::Udp(socket)) => Some(socket),
            _ => None,
        }
    }

    fn unix(
        &self,
        fits: impl Fn(&str, &std::os::unix::net::UnixListener) -> bool,
    ) -> Option<std::os::unix::net::UnixListener> {
        let taken =
            self.take(|name, socket| matches!(socket, BoundSocket::Unix(socket) if fits(name, socket)));
        match taken? {
            BoundSocket::Unix(socket) => Some(socket),
            BoundSocket::Tcp(_) | BoundSocket::Udp(_) => None,
        }
    }
}

/// Returns the address of a Unix socket: its path, or its name in the abstract namespace.
fn name_of(socket: &std::os::unix::net::UnixListener) -> String {
    let Ok(address) = socket.local_addr() else { return "unix".to_owned() };
    let path = address.as_pathname().map(|path| format!("unix:{}", path.display()));
    let name = || address.as_abstract_name().map(|name| format!("unix:@{}", String::from_utf8_lossy(name)));
    path.or_else(name).unwrap_or_else(|| "unix".to_owned())
}

/// Returns the address of a socket as text.
fn place_of(address: io::Result<SocketAddr>) -> String {
    address.map_or_else(|error| error.to_string(), |address| address.to_string())
}

/// Returns true when an inherited socket at `open` is for the address `wanted`. An address with port 0 takes a socket
/// that has the name of its listener.
fn fits(open: io::Result<SocketAddr>, wanted: SocketAddr, has_name: bool) -> bool {
    open.is_ok_and(|open| {
        is_same_place(open, wanted) || (wanted.port() == 0 && open.ip() == wanted.ip() && has_name)
    })
}

/// Returns true when a socket at `open` is at the address `wanted`. The unspecified addresses of IPv4 and IPv6 are the
/// same place: supervisors write `[::]` where settings have `0.0.0.0`.
fn is_same_place(open: SocketAddr, wanted: SocketAddr) -> bool {
    let is_any = |at: SocketAddr| at.ip().is_unspecified();
    open == wanted || (is_any(open) && is_any(wanted) && open.port() == wanted.port())
}

/// The open sockets of a server.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(super) listeners: Vec<Listener>,
    pub(super) config: Config,
    connections: Connections,
    sockets: Sockets,
}

impl Bound {
    pub(crate) fn addresses(&self) -> Vec<String> {
        self.listeners.iter().map(Listener::address).collect()
    }

    pub(crate) fn sockets(&self) -> Sockets {
        self.sockets.clone()
    }

    pub(crate) fn connections(&self) -> Connections {
        self.connections.clone()
    }
}

/// The listening sockets of a server, for a successor to inherit, and its certificate. A cheap handle.
#[derive(Clone, Debug)]
pub struct Sockets(Arc<SharedSockets>);

#[derive(Debug)]
struct SharedSockets {
    name: &'static str,
    descriptors: Mutex<Vec<OwnedFd>>,
    handed_over: AtomicBool,
    identity: Option<tls::Identity>,
}

impl Sockets {
    /// Makes the handle for descriptors of a listener without TLS.
    pub(crate) fn of(name: &'static str, descriptors: Vec<OwnedFd>) -> Self {
        let handed_over = AtomicBool::new(false);
        let descriptors = Mutex::new(descriptors);
        Self(Arc::new(SharedSockets { name, descriptors, handed_over, identity: None }))
    }

    /// Descriptors of the listening sockets, each with the listener's name, for a successor to inherit.
    ///
    /// # Errors
    /// When the system has no more descriptors.
    pub fn share(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        let descriptors = self.0.descriptors.lock();
        descriptors.iter().map(|descriptor| Ok((self.0.name, descriptor.try_clone()?))).collect()
    }

    /// Marks the sockets as handed over: a successor accepts from them, also the connections in their backlog.
    pub fn handed_over(&self) {
        self.0.handed_over.store(true, Ordering::Release);
    }

    pub(crate) fn are_handed_over(&self) -> bool {
        self.0.handed_over.load(Ordering::Acquire)
    }

    /// Closes the descriptors for a successor: a socket stays open as long as any descriptor of it is open.
    pub(crate) fn close(&self) {
        self.0.descriptors.lock().clear();
    }

    pub(super) fn identity(&self) -> Option<&tls::Identity> {
        self.0.identity.as_ref()
    }
}

/// Opens the sockets of a server, which offers these protocols over TLS.
pub(crate) async fn bind(config: Config, inherited: &Inherited, alpn: tls::Alpn) -> Result<Bound, BindError> {
    let identity = config.tls.clone().map(|tls| tls::Identity::read(tls, alpn)).transpose()?;
    let listeners = listeners(&config, inherited, identity.as_ref()).await?;
    let share = |listener: &Listener| {
        let address = listener.address();
        listener.share().map_err(|source| BindError::Address { address, source })
    };
    let descriptors = Mutex::new(listeners.iter().map(share).collect::<Result<_, _>>()?);
    let shared =
        SharedSockets { name: config.name, descriptors, handed_over: AtomicBool::new(false), identity };
    let connections = Connections::new(&config);
    Ok(Bound { listeners, config, connections, sockets: Sockets(Arc::new(shared)) })
}

/// Opens the listeners for all addresses in `config`. A host name may stand for several addresses.
async fn listeners(
    config: &Config,
    inherited: &Inherited,
    identity: Option<&tls::Identity>,
) -> Result<Vec<Listener>, BindError> {
    let mut listeners = Vec::new();
    for listen in &config.listen {
        let failed = |source| BindError::Address { address: listen.to_string(), source };
        match listen {
            Listen::Http(address) => {
                listeners.extend(tcp(config, inherited, address, None).await.map_err(failed)?);
            }
            Listen::Https(address) => {
                let missing = || {
                    io::Error::new(io::ErrorKind::InvalidInput, "TLS needs server.tls.cert_file and key_file")
                };
                let identity = identity.cloned().ok_or_else(missing).map_err(failed)?;
                listeners.extend(tcp(config, inherited, address, Some(identity)).await.map_err(failed)?);
            }
            Listen::Unix(path) => listeners.push(unix(config, inherited, path).map_err(failed)?),
        }
    }
    Ok(listeners)
}

/// Returns the addresses that a name stands for, each once.
pub(crate) async fn addresses_of(name: &str) -> io::Result<Vec<SocketAddr>> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host(name).await?.collect();
    addresses.sort_unstable();
    addresses.dedup();
    if name.ends_with(":0") {
        // Each address would get a port of its own, but port 0 asks for a single port.
        addresses.truncate(1);
    }
    Ok(addresses)
}

async fn tcp(
    config: &Config,
    inherited: &Inherited,
    name: &str,
    tls: Option<tls::Identity>,
) -> io::Result<Vec<Listener>> {
    addresses_of(name)
        .await?
        .into_iter()
        .map(|address| {
            let (socket, origin) = match inherited.tcp(config.name, address) {
                Some(socket) => {
                    socket.set_nonblocking(true)?;
                    (TcpListener::from_std(socket)?, OpenedSockets::Elsewhere)
                }
                None => (open(address, config.reuse_port)?, OpenedSockets::Here),
            };
            Ok(Listener::Tcp { address: socket.local_addr()?, socket, tls: tls.clone(), origin })
        })
        .collect()
}

fn open(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for connections of the previous process in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    if reuse_port {
        socket.set_reuseport(true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn unix(config: &Config, inherited: &Inherited, path: &Path) -> io::Result<Listener> {
    let address = Listen::Unix(path.to_owned()).to_string();
    let is_there = |socket: &std::os::unix::net::UnixListener| {
        socket.local_addr().is_ok_and(|at| at.as_pathname() == Some(path))
    };
    if let Some(socket) = inherited.unix(|_, socket| is_there(socket)) {
        socket.set_nonblocking(true)?;
        return Ok(Listener::Unix {
            socket: UnixListener::from_std(socket)?,
            address,
            origin: OpenedSockets::Elsewhere,
        });
    }
    // The socket file of a killed process blocks the bind, and is removed. The file of a listening process is not.
    let is_socket = path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket());
    if is_socket && StdUnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let socket = UnixListener::bind(path)?;
    let UnixAccess { mode, group } = config.unix;
    if let Some(group) = group {
        rustix::fs::chown(path, None, Some(rustix::process::Gid::from_raw(group)))?;
    }
    if let Some(mode) = mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(Listener::Unix { socket, address, origin: OpenedSockets::Here })
}

impl Listener {
    /// Returns the address in use, in the form that the settings have.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp { address, tls: Some(_), .. } => format!("https://{address}"),
            Self::Tcp { address, tls: None, .. } => address.to_string(),
            Self::Unix { address, .. } => address.clone(),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<AcceptedStream> {
        match self {
            Self::Tcp { socket, .. } => {
                socket.accept().await.map(|(stream, peer)| AcceptedStream::Tcp(stream, peer))
            }
            Self::Unix { socket, .. } => {
                socket.accept().await.map(|(stream, _)| AcceptedStream::Unix(stream))
            }
        }
    }

    pub(super) fn tls(&self) -> Option<&tls::Identity> {
        match self {
            Self::Tcp { tls, .. } => tls.as_ref(),
            Self::Unix { .. } => None,
        }
    }

    /// Duplicates the descriptor of the socket, for a successor.
    fn share(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp { socket, .. } => socket.as_fd().try_clone_to_owned(),
            Self::Unix { socket, .. } => socket.as_fd().try_clone_to_owned(),
        }
    }

    /// Makes the kernel take no new connections, while connections whose handshake has begun still arrive. Returns
    /// false where another process opened the socket, or the system cannot do it.
    ///
    /// Without this, a connection whose handshake ends between the last accept and the close of the socket would be
    /// reset, together with its request.
    pub(super) fn refuse_new(&self) -> bool {
        match self {
            Self::Tcp { socket, origin: OpenedSockets::Here, .. } => drop_first_packets(socket),
            Self::Unix { address, origin: OpenedSockets::Here, .. } => {
                std::fs::remove_file(address.trim_start_matches("unix:")).is_ok()
            }
            Self::Tcp { .. } | Self::Unix { .. } => false,
        }
    }

    /// Closes the socket and returns the connections that the kernel has already accepted: closing without taking them
    /// would reset them. After a handover they belong to the successor, and none is taken.
    pub(super) fn close(self, handed_over: bool) -> io::Result<Vec<AcceptedStream>> {
        let mut backlog = Vec::new();
        if handed_over {
            return Ok(backlog);
        }
        match self {
            Self::Tcp { socket, .. } => {
                let socket = socket.into_std()?;
                sweep(|| {
                    let (stream, peer) = socket.accept()?;
                    stream.set_nonblocking(true)?;
                    backlog.push(AcceptedStream::Tcp(TcpStream::from_std(stream)?, peer));
                    Ok(())
                });
            }
            Self::Unix { socket, .. } => {
                let socket = socket.into_std()?;
                sweep(|| {
                    let (stream, _) = socket.accept()?;
                    stream.set_nonblocking(true)?;
                    backlog.push(AcceptedStream::Unix(UnixStream::from_std(stream)?));
                    Ok(())
                });
            }
        }
        Ok(backlog)
    }
}

/// Takes connections until none is left. A failed accept does not end the loop, up to [`MAX_FAILURES`] of them.
fn sweep(mut take: impl FnMut() -> io::Result<()>) {
    let mut failures = 0;
    while failures < MAX_FAILURES {
        match take() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => failures += 1,
        }
    }
}

/// Makes the kernel drop the first packet (SYN) of new connections and let every other packet through: a classic BPF
/// program reads the flags of the TCP header. The client sends a dropped packet again after a second, and finds the
/// socket closed.
#[cfg(target_os = "linux")]
fn drop_first_packets(socket: &TcpListener) -> bool {
    use socket2::{SockFilter, SockRef};
    let program = [
        // ldb [13]; jset #2, drop, pass; drop: ret #0; pass: ret #65535
        SockFilter::new(0x30, 0, 0, 13),
        SockFilter::new(0x45, 0, 1, 0x02),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, 0xffff),
    ];
    SockRef::from(socket).attach_filter(&program).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn drop_first_packets(_socket: &TcpListener) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn any_address_is_any_address() {
        let same = |open: &str, wanted: &str| is_same_place(open.parse().unwrap(), wanted.parse().unwrap());
        assert!(same("[::]:8080", "0.0.0.0:8080") && same("0.0.0.0:8080", "[::]:8080"));
        assert!(same("127.0.0.1:8080", "127.0.0.1:8080"));
        assert!(!same("[::]:8080", "0.0.0.0:8081") && !same("[::]:8080", "127.0.0.1:8080"));
    }

    #[tokio::test]
    async fn what_has_connected_is_taken_and_what_comes_later_is_not_reset() {
        let socket = open("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let address = socket.local_addr().unwrap();
        let listener = Listener::Tcp { socket, address, tls: None, origin: OpenedSockets::Here };
        let mut first = std::net::TcpStream::connect(address).unwrap();
        assert!(listener.refuse_new());
        let late = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        first.write_all(b"x").unwrap();
        assert_eq!(listener.close(false).unwrap().len(), 1);
    }
}
