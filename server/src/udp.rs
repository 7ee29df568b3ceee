//! Datagrams: a handler gets each one, and the host does everything else.
//!
//! The host bounds the number of handlers that run at once, in all and for each address, and the time of each. While
//! all of them run, datagrams wait in the buffer of the kernel, which drops those that do not fit. The sender of a
//! datagram is not proven: any host on the way may write another address into it, so an answer must not be much longer
//! than the question (RFC 8085, section 6).

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::net::UdpSocket;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tracing::{debug, error, warn};

use crate::metrics::{self, DatagramResult};
use crate::net::{BindError, Inherited, Sockets, addresses_of, network};
use perennial_runtime::backoff::Backoff;
use perennial_runtime::drain::Drain;
use perennial_runtime::metrics::Counted;
use perennial_runtime::panics::panic_message;
use perennial_runtime::running::RunningByKey;

/// Maximum length of a datagram, in bytes.
const MAX_DATAGRAM: usize = 65_535;
/// Pause after a failed receive: its cause may last.
const RETRY: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));

/// At shutdown, time for which datagrams are taken that the kernel has received: others may keep coming.
const LATE: Duration = Duration::from_millis(500);

/// A handler of datagrams.
pub trait UdpHandler: Send + Sync + 'static {
    /// Handles one datagram.
    ///
    /// # Errors
    /// When it cannot be answered; the error is logged at debug level.
    fn receive(&self, datagram: Datagram) -> impl Future<Output = io::Result<()>> + Send;
}

/// A datagram, and the way back to its sender.
pub struct Datagram {
    /// The bytes of the datagram.
    pub bytes: Bytes,
    peer: SocketAddr,
    socket: Arc<UdpSocket>,
}

impl fmt::Debug for Datagram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datagram")
            .field("peer", &self.peer)
            .field("length", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl Datagram {
    fn of(bytes: &[u8], peer: SocketAddr, socket: &Arc<UdpSocket>) -> Self {
        Self { bytes: Bytes::copy_from_slice(bytes), peer, socket: Arc::clone(socket) }
    }

    /// The address that the datagram says it is from.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Sends one datagram back.
    ///
    /// # Errors
    /// When the system refuses it, for example because it is too long.
    pub async fn reply(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send_to(bytes, self.peer).await.map(drop)
    }
}

/// Settings of a listener for datagrams.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the listener in metrics.
    pub name: &'static str,
    /// Addresses to listen on, as `host:port`.
    pub listen: Vec<String>,
    /// Maximum number of datagrams that are handled at once.
    pub max_running: usize,
    /// Maximum number of datagrams from one address that are handled at once; 0 means no limit. Others are dropped.
    pub max_per_address: usize,
    /// Time limit for handling one datagram.
    pub timeout: Duration,
}

/// A server of datagrams whose sockets are open.
#[derive(Debug)]
pub struct Server {
    config: Config,
    open: Vec<Arc<UdpSocket>>,
    sockets: Sockets,
}

impl Server {
    /// Opens the sockets, or takes those of `inherited` that have the same addresses.
    ///
    /// # Errors
    /// When an address cannot be bound.
    pub async fn bind(config: Config, inherited: &Inherited) -> Result<Self, BindError> {
        let mut open = Vec::new();
        for address in &config.listen {
            let failed = |source| BindError::Address { address: address.clone(), source };
            open.extend(sockets(config.name, address, inherited).await.map_err(failed)?);
        }
        let share = |socket: &Arc<UdpSocket>| socket.as_fd().try_clone_to_owned();
        let descriptors = open.iter().map(share).collect::<io::Result<Vec<OwnedFd>>>();
        let descriptors =
            descriptors.map_err(|source| BindError::Address { address: config.listen.join(", "), source })?;
        Ok(Self { sockets: Sockets::of(config.name, descriptors), config, open })
    }

    /// Returns the addresses in use, in the form that the settings have.
    pub fn addresses(&self) -> Vec<String> {
        let address = |socket: &Arc<UdpSocket>| socket.local_addr().map(|address| address.to_string());
        self.open.iter().filter_map(|socket| address(socket).ok()).collect()
    }

    /// Returns a handle to the server's sockets, to hand them over.
    pub fn sockets(&self) -> Sockets {
        self.sockets.clone()
    }

    /// Hands each datagram to the handler until the soft phase of the drain, and then the datagrams that the kernel has
    /// received by then, unless a successor has the sockets. Handlers that run in the hard phase are cut off.
    ///
    /// # Errors
    /// Never; the return type is that of a task.
    pub async fn run<H: UdpHandler>(self, handler: H, drain: Drain) -> Result<(), Infallible> {
        let Self { config, open, sockets } = self;
        let host = Arc::new(Receiving {
            running: Arc::new(Semaphore::new(config.max_running)),
            addresses: RunningByKey::default(),
            metrics: metrics::Datagrams::new(config.name),
            config,
            handler,
        });
        let loops = open.into_iter().map(|socket| Arc::clone(&host).receive(socket, &sockets, &drain));
        let received = futures_util::future::join_all(loops);
        tokio::select! {
            _ = received => {}
            () = drain.hard() => {}
        }
        Ok(())
    }
}

/// Opens the sockets of an address. A host name may stand for several addresses.
async fn sockets(
    listener: &'static str,
    name: &str,
    inherited: &Inherited,
) -> io::Result<Vec<Arc<UdpSocket>>> {
    let open = |address| {
        let socket = match inherited.udp(listener, address) {
            Some(socket) => socket,
            None => std::net::UdpSocket::bind(address)?,
        };
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket).map(Arc::new)
    };
    addresses_of(name).await?.into_iter().map(open).collect()
}

/// The state that all sockets of a server share.
struct Receiving<H> {
    config: Config,
    handler: H,
    running: Arc<Semaphore>,
    addresses: RunningByKey<IpAddr>,
    metrics: metrics::Datagrams,
}

impl<H: UdpHandler> Receiving<H> {
    /// Receives datagrams of one socket, and waits for their handlers.
    async fn receive(self: Arc<Self>, socket: Arc<UdpSocket>, sockets: &Sockets, drain: &Drain) {
        let mut handlers = JoinSet::new();
        let mut buffer = vec![0; MAX_DATAGRAM];
        let mut failures = 0;
        loop {
            while handlers.try_join_next().is_some() {}
            let next = async {
                // A place is taken only for a datagram that is there.
                socket.readable().await?;
                let permit = Arc::clone(&self.running).acquire_owned().await.ok();
                socket.try_recv_from(&mut buffer).map(|received| (permit, received))
            };
            let received = tokio::select! {
                received = next => received,
                () = drain.soft() => break,
            };
            match received {
                Ok((permit, (length, peer))) => {
                    failures = 0;
                    self.handle(&mut handlers, Datagram::of(&buffer[..length], peer, &socket), permit);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    failures += 1;
                    let pause = RETRY.jittered(failures);
                    warn!(listener = self.config.name, %error, ?pause, "receiving a datagram failed");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        sockets.close();
        if !sockets.are_handed_over() {
            let began = Instant::now();
            while began.elapsed() < LATE
                && let Ok((length, peer)) = socket.try_recv_from(&mut buffer)
            {
                let permit = Arc::clone(&self.running).acquire_owned().await.ok();
                self.handle(&mut handlers, Datagram::of(&buffer[..length], peer, &socket), permit);
            }
        }
        while handlers.join_next().await.is_some() {}
    }

    /// Starts the handler of a datagram, unless too many of its address are being handled.
    fn handle(
        self: &Arc<Self>,
        handlers: &mut JoinSet<()>,
        datagram: Datagram,
        permit: Option<OwnedSemaphorePermit>,
    ) {
        let most = match self.config.max_per_address {
            0 => usize::MAX,
            most => most,
        };
        let Some(of_address) = self.addresses.enter(network(datagram.peer.ip()), most) else {
            return self.metrics.ended(DatagramResult::AddressLimit);
        };
        let host = Arc::clone(self);
        let counted: Counted = self.metrics.count();
        handlers.spawn(async move {
            let (peer, listener) = (datagram.peer, host.config.name);
            let handled = AssertUnwindSafe(host.handler.receive(datagram)).catch_unwind();
            let result = match tokio::time::timeout(host.config.timeout, handled).await {
                Ok(Ok(Ok(()))) => DatagramResult::Handled,
                Ok(Ok(Err(error))) => {
                    debug!(listener, %peer, %error, "a datagram could not be handled");
                    DatagramResult::Failed
                }
                Ok(Err(panic)) => {
                    error!(listener, panic = panic_message(&*panic), "the handler of a datagram panicked");
                    DatagramResult::Failed
                }
                Err(_elapsed) => DatagramResult::TooSlow,
            };
            host.metrics.ended(result);
            drop((of_address, counted, permit));
        });
    }
}
