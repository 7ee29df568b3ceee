//! Sockets: open them, accept on them, and at the end accept what the kernel still holds before closing.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::conn::{self, Host, Peer};
use super::{BindError, Listen};
use crate::backoff::Backoff;

/// How many connections the kernel holds for us.
const BACKLOG: u32 = 4096;

/// After a failed accept (no file descriptor left, say): the condition lasts, a busy loop would not help.
const RETRY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));

/// An open socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp { socket: TcpListener, address: SocketAddr, tls: Option<Tls> },
    Unix { socket: UnixListener, address: String },
}

/// The acceptor of a TLS listener.
#[derive(Clone)]
pub(super) struct Tls(pub(super) TlsAcceptor);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// A connection that nothing has been read from yet.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

/// Opens the sockets of one address: a name may stand for several.
pub(super) async fn bind(listen: &Listen, tls: Option<&TlsAcceptor>) -> Result<Vec<Listener>, BindError> {
    let failed = |source| BindError::Address { address: listen.to_string(), source };
    match listen {
        Listen::Http(address) => tcp(address, None).await.map_err(failed),
        Listen::Https(address) => {
            let acceptor = tls.cloned().ok_or_else(|| {
                failed(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "https needs server.tls.cert_file and key_file",
                ))
            })?;
            tcp(address, Some(Tls(acceptor))).await.map_err(failed)
        }
        Listen::Unix(path) => Ok(vec![unix(path).map_err(failed)?]),
    }
}

async fn tcp(name: &str, tls: Option<Tls>) -> io::Result<Vec<Listener>> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host(name).await?.collect();
    addresses.sort_unstable();
    addresses.dedup();
    if name.ends_with(":0") {
        // Each would get a port of its own; whoever asks for any port wants one.
        addresses.truncate(1);
    }
    addresses
        .into_iter()
        .map(|address| {
            let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            // A restart must not wait for the last one's connections in TIME_WAIT.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            let socket = socket.listen(BACKLOG)?;
            Ok(Listener::Tcp { address: socket.local_addr()?, socket, tls: tls.clone() })
        })
        .collect()
}

fn unix(path: &Path) -> io::Result<Listener> {
    // The file of a process that was killed is in the way; that of one that listens is its own.
    let is_socket = path.symlink_metadata().is_ok_and(|file| file.file_type().is_socket());
    if is_socket && StdUnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let socket = UnixListener::bind(path)?;
    Ok(Listener::Unix { socket, address: Listen::Unix(path.to_owned()).to_string() })
}

impl Listener {
    /// The address in use, in the form in which it is written in settings.
    pub(super) fn address(&self) -> String {
        match self {
            Self::Tcp { address, tls: Some(_), .. } => format!("https://{address}"),
            Self::Tcp { address, tls: None, .. } => address.to_string(),
            Self::Unix { address, .. } => address.clone(),
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp { socket, .. } => {
                socket.accept().await.map(|(stream, peer)| Accepted::Tcp(stream, peer))
            }
            Self::Unix { socket, .. } => socket.accept().await.map(|(stream, _)| Accepted::Unix(stream)),
        }
    }

    fn tls(&self) -> Option<Tls> {
        match self {
            Self::Tcp { tls, .. } => tls.clone(),
            Self::Unix { .. } => None,
        }
    }

    /// Closes the socket after taking what the kernel has already accepted for us: closing it first would
    /// reset those connections.
    fn close(self) -> io::Result<Vec<Accepted>> {
        let mut backlog = Vec::new();
        match self {
            Self::Tcp { socket, .. } => {
                let socket = socket.into_std()?;
                while let Ok((stream, peer)) = socket.accept() {
                    stream.set_nonblocking(true)?;
                    backlog.push(Accepted::Tcp(TcpStream::from_std(stream)?, peer));
                }
            }
            Self::Unix { socket, address } => {
                let socket = socket.into_std()?;
                while let Ok((stream, _)) = socket.accept() {
                    stream.set_nonblocking(true)?;
                    backlog.push(Accepted::Unix(UnixStream::from_std(stream)?));
                }
                let _ = std::fs::remove_file(address.trim_start_matches("unix:"));
            }
        }
        Ok(backlog)
    }
}

/// Accepts until the drain says stop, then waits for every connection to end.
pub(super) async fn run(listener: Listener, host: Host, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    let tls = listener.tls();
    let mut failures = 0;
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = host.drain.soft() => break,
        };
        match accepted {
            Ok(accepted) => {
                failures = 0;
                // At the limit this one waits here, and the ones behind it in the kernel's queue.
                let slot = tokio::select! {
                    slot = Arc::clone(&slots).acquire_owned() => slot.ok(),
                    () = host.drain.soft() => None,
                };
                connections.spawn(serve(accepted, tls.clone(), host.clone(), slot));
            }
            Err(error) => {
                failures += 1;
                let pause = RETRY.jittered(failures);
                warn!(%error, address = listener.address(), ?pause, "accept failed");
                tokio::time::sleep(pause).await;
            }
        }
    }
    let address = listener.address();
    match listener.close() {
        Ok(backlog) => {
            for accepted in backlog {
                // Taken whatever the limit says: these clients were told that they are connected.
                connections.spawn(serve(accepted, tls.clone(), host.clone(), None));
            }
        }
        Err(error) => warn!(%error, address, "the listener's backlog was lost"),
    }
    while connections.join_next().await.is_some() {}
}

async fn serve(accepted: Accepted, tls: Option<Tls>, host: Host, _slot: Option<OwnedSemaphorePermit>) {
    match accepted {
        Accepted::Tcp(stream, peer) => {
            // Answers are written whole; waiting for more to send would only delay them.
            let _ = stream.set_nodelay(true);
            conn::serve(stream, Peer::Tcp(peer), tls, host).await;
        }
        Accepted::Unix(stream) => conn::serve(stream, Peer::Unix, None, host).await,
    }
}
