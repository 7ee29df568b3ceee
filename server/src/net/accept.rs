//! Accepting: one task a connection, the limits, and at the end what the kernel still holds.

use std::io;
use std::str::FromStr;
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

/// After a failed accept (no file descriptor left, say): the condition lasts, a busy loop would not help.
const RETRY: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));

/// How many clients are told at once that there is no room; more are turned away without a word.
const REFUSALS: usize = 64;
/// For how long one is told so.
const REFUSAL: Duration = Duration::from_secs(1);

/// For how long connections that were begun before are still accepted once no new ones are, at the end.
const LATE: Duration = Duration::from_millis(500);

/// How often the log says that there are as many connections as may be.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// How long a connection that has to make room may take to end.
const ROOM: Duration = Duration::from_millis(100);

/// While memory is nearly used up, one connection is accepted in so long.
const TRICKLE: Duration = Duration::from_millis(200);

/// What happens to a connection over the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtLimit {
    /// It waits in the kernel's queue until another one ends.
    Queue,
    /// It is told so, and closed.
    Reject,
}

impl FromStr for AtLimit {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "queue" => Ok(Self::Queue),
            "reject" => Ok(Self::Reject),
            _ => Err(()),
        }
    }
}

/// What all listeners of a server share.
#[derive(Clone, Debug)]
pub(crate) struct AcceptHost<P> {
    pub(crate) config: Arc<Config>,
    pub(crate) connections: Connections,
    pub(crate) drain: Drain,
    pub(crate) protocol: P,
    pub(crate) sockets: Sockets,
}

/// Accepts until the drain says stop, then waits for every connection to end.
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
                // It may be for want of a descriptor.
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
        // Those that have begun to connect end up in the queue, and not between the last look at it and its end.
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
                // Taken whatever the limit says: these clients were told that they are connected.
                host.begin(&mut running, accepted, tls.as_ref(), None, &refusals);
            }
        }
        Err(error) => warn!(%error, address, "the listener's backlog was lost"),
    }
    while running.join_next().await.is_some() {}
}

/// Whether there are as many connections as may be, for the log and the metrics.
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
            warn!(listener, "as many connections are open as may be: idle ones make room for new ones");
        }
    }
}

enum AcceptSlot {
    Taken(Option<OwnedSemaphorePermit>),
    None,
}

/// The right to one more connection. Where there are as many as may be, one that is idle makes room: a client that holds them
/// all keeps nobody out.
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
                // Others may have become idle.
                Err(_elapsed) => _ = host.connections.make_room(),
            }
        }
    };
    tokio::select! {
        slot = freed => AcceptSlot::Taken(slot),
        () = tokio::time::sleep(ROOM), if host.config.at_limit == AtLimit::Reject && !has_room => AcceptSlot::None,
        // This one waits here, and the ones behind it in the kernel's queue.
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
                // What a peer that has vanished leaves behind, when nothing of ours is on its way to it.
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
        // Over TLS nothing can be said without a handshake.
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
                    refused(self.config.name, ConnectionRefusal::ProxyHeader, connection.socket_peer, error);
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
                        refused(self.config.name, ConnectionRefusal::Handshake, connection.peer(), error);
                    }
                    Ok(OpenedStream::Secure(Box::new(accepted?)))
                }
            }
        };
        // Boxed, since a future is as large as the largest that it may be, for as long as the connection lasts.
        let opened: Option<io::Result<OpenedStream<S>>> = Box::pin(connection.unless_cut(opened)).await;
        match opened {
            Some(Ok(OpenedStream::Plain(socket))) => self.protocol.plain(socket).await,
            Some(Ok(OpenedStream::WantsTls(mut socket))) => {
                let detail = "the client speaks without TLS";
                refused(self.config.name, ConnectionRefusal::PlainOnTlsPort, connection.peer(), &detail);
                let say = async {
                    socket.write_all(self.protocol.wants_tls()).await?;
                    socket.shutdown().await
                };
                let _ = connection.unless_cut(say).await;
            }
            Some(Ok(OpenedStream::Secure(stream))) => Box::pin(self.protocol.secure(stream)).await,
            Some(Err(error)) => debug!(peer = %connection.peer(), %error, "nothing came on this connection"),
            None => {}
        }
    }
}

enum OpenedStream<S> {
    Plain(Socket<S>),
    Secure(Box<tokio_rustls::server::TlsStream<Socket<S>>>),
    /// A client that speaks the protocol without TLS where there is TLS.
    WantsTls(Socket<S>),
}

/// Says something and closes, without a reset that would overtake what was said.
async fn say(mut stream: TcpStream, words: &[u8]) -> io::Result<()> {
    stream.write_all(words).await?;
    stream.shutdown().await?;
    while stream.read(&mut [0; 1024]).await? > 0 {}
    Ok(())
}
