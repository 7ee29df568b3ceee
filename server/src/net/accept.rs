//! The accept loop: one task per connection, the limits, and the kernel's backlog at shutdown.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::bind::{AcceptedStream, Listener};
use super::proxy::{self, is_trusted};
use super::refusal::ConnectionRefusal;
use super::refusals::refused;
use super::socket::Peek;
use super::{Config, Connections, Peer, Protocol, Socket, Sockets, tls};
use crate::metrics;
use perennial_runtime::backoff::Backoff;
use perennial_runtime::drain::Drain;

/// Pause after a failed accept. The cause (such as no file descriptor left) lasts, and a busy loop would not help.
const RETRY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));

/// Maximum number of refusals that are sent at once; further clients are turned away without one.
const REFUSALS: usize = 64;
/// Time limit for sending one refusal.
const REFUSAL: Duration = Duration::from_secs(1);

/// At shutdown, time for which connections whose handshake has begun are still accepted after new ones are stopped.
const LATE: Duration = Duration::from_millis(500);

/// Minimum interval between two log messages about the reached connection limit.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Time that a connection may take to end when it has to make room.
const ROOM: Duration = Duration::from_millis(100);

/// Pause between two accepts while memory is nearly used up.
const TRICKLE: Duration = Duration::from_millis(200);

/// How a connection over the limit is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case")]
pub enum AtLimit {
    /// It waits in the kernel's queue until another one ends.
    Queue,
    /// It is sent a refusal, and closed.
    Reject,
}

/// The state that all listeners of a server share.
#[derive(Clone, Debug)]
pub(crate) struct AcceptHost<P> {
    pub(crate) config: Arc<Config>,
    pub(crate) connections: Connections,
    pub(crate) drain: Drain,
    pub(crate) protocol: P,
    pub(crate) sockets: Sockets,
}

/// Accepts connections until the soft phase of the drain, then waits for every connection to end.
pub(crate) async fn run<P: Protocol>(listener: Listener, host: AcceptHost<P>) {
    let mut running = JoinSet::new();
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    let mut limit = Limit::new(host.config.name);
    let mut failures = 0;
    loop {
        while running.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = host.drain.soft() => break,
        };
        match accepted {
            Ok(accepted) => {
                failures = 0;
                match slot(&host, &mut limit).await {
                    AcceptSlot::Taken(slot) => {
                        host.begin(&mut running, accepted, listener.tls(), slot, &refusals);
                    }
                    AcceptSlot::None => {
                        host.refuse(&mut running, accepted, listener.tls(), &refusals, "limit");
                    }
                }
            }
            Err(error) => {
                failures += 1;
                let pause = RETRY.jittered(failures);
                warn!(%error, address = listener.address(), ?pause, "accept failed");
                // The cause may be a lack of descriptors, and a closed connection frees one.
                host.connections.make_room();
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = host.drain.soft() => break,
                }
            }
        }
        if host.config.pressure.is_high() {
            tokio::select! {
                () = tokio::time::sleep(TRICKLE) => {}
                () = host.drain.soft() => {}
            }
        }
    }
    let (address, tls) = (listener.address(), listener.tls().cloned());
    host.sockets.close();
    let handed_over = host.sockets.are_handed_over();
    if !handed_over && listener.refuse_new() {
        // Connections whose handshake has begun reach the queue now, and not between the last accept and the close.
        let late = tokio::time::sleep(LATE);
        tokio::pin!(late);
        loop {
            tokio::select! {
                biased;
                () = host.drain.hard() => break,
                () = &mut late => break,
                Ok(accepted) = listener.accept() => {
                    host.begin(&mut running, accepted, tls.as_ref(), None, &refusals);
                }
            }
        }
    }
    match listener.close(handed_over) {
        Ok(backlog) => {
            for accepted in backlog {
                // The limit does not apply: the kernel has told these clients that they are connected.
                host.begin(&mut running, accepted, tls.as_ref(), None, &refusals);
            }
        }
        Err(error) => warn!(%error, address, "the listener's backlog was lost"),
    }
    while running.join_next().await.is_some() {}
}

/// Whether the connection limit is reached, for the log and the metrics.
#[derive(Debug)]
struct Limit {
    listener: &'static str,
    reached: bool,
    told: Option<Instant>,
}

impl Limit {
    fn new(listener: &'static str) -> Self {
        metrics::at_limit(listener, false);
        Self { listener, reached: false, told: None }
    }

    fn is(&mut self, reached: bool) {
        if self.reached != reached {
            self.reached = reached;
            metrics::at_limit(self.listener, reached);
        }
        if reached && self.told.is_none_or(|told| told.elapsed() >= TELL_AGAIN) {
            self.told = Some(Instant::now());
            let listener = self.listener;
            warn!(listener, "the connection limit is reached: idle connections are closed for new ones");
        }
    }
}

enum AcceptSlot {
    Taken(Option<OwnedSemaphorePermit>),
    None,
}

/// Waits for a permit of the connection limit. At the limit an idle connection makes room, so that a client that holds
/// all connections does not keep other clients out.
async fn slot<P>(host: &AcceptHost<P>, limit: &mut Limit) -> AcceptSlot {
    let slots = Arc::clone(host.connections.slots());
    if let Ok(slot) = Arc::clone(&slots).try_acquire_owned() {
        limit.is(false);
        return AcceptSlot::Taken(Some(slot));
    }
    limit.is(true);
    let has_room = host.connections.make_room();
    let freed = async {
        loop {
            match tokio::time::timeout(ROOM, Arc::clone(&slots).acquire_owned()).await {
                Ok(slot) => return slot.ok(),
                // Other connections may have become idle.
                Err(_elapsed) => _ = host.connections.make_room(),
            }
        }
    };
    tokio::select! {
        slot = freed => AcceptSlot::Taken(slot),
        () = tokio::time::sleep(ROOM), if host.config.at_limit == AtLimit::Reject && !has_room => AcceptSlot::None,
        // The accepted connection waits here, and later ones in the kernel's queue.
        () = host.drain.soft() => AcceptSlot::Taken(None),
    }
}

impl<P: Protocol> AcceptHost<P> {
    fn begin(
        &self,
        running: &mut JoinSet<()>,
        accepted: AcceptedStream,
        tls: Option<&tls::Identity>,
        slot: Option<OwnedSemaphorePermit>,
        refusals: &Arc<Semaphore>,
    ) {
        let peer = match &accepted {
            AcceptedStream::Tcp(_, peer) => Peer::Tcp(*peer),
            AcceptedStream::Unix(_) => Peer::Unix,
        };
        let limited = !is_trusted(&self.config.trusted_proxies, peer);
        let Ok(seat) = self.connections.seat(peer, tls.is_some(), limited, slot) else {
            return self.refuse(running, accepted, tls, refusals, "address limit");
        };
        match accepted {
            AcceptedStream::Tcp(stream, _) => {
                // Answers are written whole; waiting for more to send would only delay them.
                let _ = stream.set_nodelay(true);
                // Keepalive finds a peer that has vanished while no bytes are on their way to it.
                let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
                running.spawn(self.clone().serve(Socket::new(stream, seat), tls.cloned()));
            }
            AcceptedStream::Unix(stream) => {
                running.spawn(self.clone().serve(Socket::new(stream, seat), None));
            }
        }
    }

    /// Turns a client away.
    fn refuse(
        &self,
        running: &mut JoinSet<()>,
        accepted: AcceptedStream,
        tls: Option<&tls::Identity>,
        refusals: &Arc<Semaphore>,
        reason: &'static str,
    ) {
        metrics::connection_cut(reason);
        // Over TLS no refusal can be sent without a handshake.
        let words = if tls.is_none() { self.protocol.refusal() } else { b"" };
        if let AcceptedStream::Tcp(stream, _) = accepted
            && let Ok(turn) = Arc::clone(refusals).try_acquire_owned()
        {
            running.spawn(async move {
                let _ = tokio::time::timeout(REFUSAL, say(stream, words)).await;
                drop(turn);
            });
        }
    }

    /// Serves one connection to its end.
    async fn serve<S: Peek>(self, mut socket: Socket<S>, tls: Option<tls::Identity>) {
        let connection = Arc::clone(socket.connection());
        let opened = async {
            if self.config.proxy_protocol && is_trusted(&self.config.trusted_proxies, connection.socket_peer)
            {
                let header = proxy::read_header(&mut socket).await;
                if let Err(error) = &header
                    && error.kind() == io::ErrorKind::InvalidData
                {
                    refused(&connection, ConnectionRefusal::ProxyHeader, error);
                }
                let client = header?;
                if let Some(client) = client
                    && socket.set_client(client).is_err()
                {
                    metrics::connection_cut("address limit");
                    return Err(io::Error::other("too many connections from this address"));
                }
            }
            match tls {
                None => Ok(OpenedStream::Plain(socket)),
                Some(identity) => {
                    let mut first = [0];
                    let length = socket.peek(&mut first).await?;
                    if self.protocol.is_plain(&first[..length]) {
                        return Ok(OpenedStream::WantsTls(socket));
                    }
                    let accepted = identity.acceptor().accept(socket).await;
                    if let Err(error) = &accepted
                        && error.kind() == io::ErrorKind::InvalidData
                    {
                        refused(&connection, ConnectionRefusal::Handshake, error);
                    }
                    Ok(OpenedStream::Secure(Box::new(accepted?)))
                }
            }
        };
        // Boxed: otherwise this future would take its space for as long as the connection lasts.
        let opened: Option<io::Result<OpenedStream<S>>> = Box::pin(connection.unless_cut(opened)).await;
        match opened {
            Some(Ok(OpenedStream::Plain(socket))) => self.protocol.plain(socket).await,
            Some(Ok(OpenedStream::WantsTls(mut socket))) => {
                let detail = "the client speaks without TLS";
                refused(&connection, ConnectionRefusal::PlainOnTlsPort, &detail);
                let say = async {
                    socket.write_all(self.protocol.wants_tls()).await?;
                    socket.shutdown().await
                };
                let _ = connection.unless_cut(say).await;
            }
            Some(Ok(OpenedStream::Secure(stream))) => Box::pin(self.protocol.secure(stream)).await,
            Some(Err(error)) => debug!(peer = %connection.peer(), %error, "the connection failed to open"),
            None => {}
        }
    }
}

enum OpenedStream<S> {
    Plain(Socket<S>),
    Secure(Box<tokio_rustls::server::TlsStream<Socket<S>>>),
    /// The client speaks the protocol without TLS on a port with TLS.
    WantsTls(Socket<S>),
}

/// Sends `words` and closes, without a reset that would overtake them.
async fn say(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    stream.write_all(words).await?;
    stream.shutdown().await?;
    while stream.read(&mut [0; 1024]).await? > 0 {}
    Ok(())
}
