//! One connection: find out the protocol, serve requests, leave when the drain says so.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::rt::bounds::Http2ServerConnExec;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::Config;
use super::accept::Tls;
use super::body::Leftover;
use super::exchange::FollowedBody;
use super::stack::Stack;
use crate::drain::Drain;
use crate::metrics::{self, Counted};

/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long until a connection that has sent the beginning of [`PREFACE`] is looked at again: at first, and
/// at last, since the pause doubles.
const PREFACE_POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// How much of a request head is held in memory at most.
const HEAD_LIMIT: usize = 64 * 1024;

/// How long an idle HTTP/1.1 connection stays open once the drain has begun: a request that is on its way
/// is answered, with `Connection: close`, and not cut off.
const LINGER: Duration = Duration::from_millis(500);

/// What all connections of a server share.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) stack: Arc<Stack>,
    pub(super) config: Arc<Config>,
    pub(super) drain: Drain,
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client.
    Tcp(SocketAddr),
    /// A client on the same machine, through a Unix socket.
    Unix,
}

impl Peer {
    /// The client's address, if it has one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip().to_canonical()),
            Self::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// The connection that a request came on, as its handler may see it.
#[derive(Debug)]
pub struct Connection {
    /// Who is at the other end.
    pub peer: Peer,
    close: CancellationToken,
    abort: CancellationToken,
    pub(super) leftover: Leftover,
    /// Between their heads and the last bytes of their responses.
    requests: AtomicUsize,
}

/// One request on a connection, counted while it lasts.
#[derive(Debug)]
pub(super) struct OnConnection(Arc<Connection>);

impl OnConnection {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        connection.requests.fetch_add(1, Ordering::AcqRel);
        Self(connection)
    }
}

impl Drop for OnConnection {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Connection {
    /// Ends the connection once its running requests are answered: `Connection: close`, or GOAWAY.
    pub fn close(&self) {
        self.close.cancel();
    }

    pub(super) fn is_closing(&self) -> bool {
        self.close.is_cancelled()
    }

    /// Ends the connection now, with no answer to anything.
    pub fn abort(&self) {
        self.abort.cancel();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// A socket whose first bytes can be looked at without taking them.
pub(super) trait Socket: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Copies what has arrived into `buffer`, waiting for the first byte. 0 is the end of the stream.
    fn peek(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send;
}

impl Socket for TcpStream {
    fn peek(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send {
        Self::peek(self, buffer)
    }
}

impl Socket for UnixStream {
    async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let peek = || Ok(rustix::net::recv(self, &mut *buffer, rustix::net::RecvFlags::PEEK)?.1);
        self.async_io(Interest::READABLE, peek).await
    }
}

/// Serves one connection to its end.
pub(super) async fn serve<S: Socket>(socket: S, peer: Peer, tls: Option<Tls>, host: Host) {
    let _counted = Counted::new(metrics::connections(host.config.name));
    let limit = host.config.handshake_timeout;
    let opened = async {
        let Some(Tls(acceptor)) = tls else {
            return Ok(Opened::Plain(detect(&socket).await?, socket));
        };
        let stream = acceptor.accept(socket).await?;
        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(Opened::Tls(if h2 { Protocol::Http2 } else { Protocol::Http1 }, Box::new(stream)))
    };
    let opened: io::Result<Opened<S>> = tokio::select! {
        opened = tokio::time::timeout(limit, opened) => opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        // Somebody who has not said anything yet is not waited for.
        () = lingered(&host.drain) => return,
    };
    match opened {
        Ok(Opened::Plain(protocol, stream)) => run(stream, protocol, peer, host).await,
        Ok(Opened::Tls(protocol, stream)) => run(stream, protocol, peer, host).await,
        Err(error) => {
            if error.kind() == io::ErrorKind::TimedOut {
                metrics::connection_cut("handshake timeout");
            }
            debug!(%peer, %error, "no request came on this connection");
        }
    }
}

enum Opened<S> {
    Plain(Protocol, S),
    Tls(Protocol, Box<tokio_rustls::server::TlsStream<S>>),
}

/// Tells HTTP/2 with prior knowledge from HTTP/1.1 by the first bytes, which stay in the socket.
async fn detect<S: Socket>(socket: &S) -> io::Result<Protocol> {
    let mut first = [0; PREFACE.len()];
    let (mut pause, longest) = PREFACE_POLL;
    loop {
        let length = socket.peek(&mut first).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[..length] != PREFACE[..length] {
            return Ok(Protocol::Http1);
        }
        if length == PREFACE.len() {
            return Ok(Protocol::Http2);
        }
        // The socket stays readable, so waiting for readability would spin.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

async fn run<I>(io: I, protocol: Protocol, peer: Peer, host: Host)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connection = Arc::new(Connection {
        peer,
        close: CancellationToken::new(),
        abort: CancellationToken::new(),
        leftover: Leftover::default(),
        requests: AtomicUsize::new(0),
    });
    let service = service_fn({
        let (stack, connection) = (Arc::clone(&host.stack), Arc::clone(&connection));
        move |request| Arc::clone(&stack).handle(request, Arc::clone(&connection))
    });
    let io = TokioIo::new(io);
    match protocol {
        Protocol::Http1 => {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(host.config.idle_timeout)
                .max_buf_size(HEAD_LIMIT)
                .serve_connection(io, service)
                .with_upgrades();
            tokio::select! {
                () = drive(served, protocol, &connection, &host.drain) => {}
                () = connection.leftover.drop_all() => {}
            }
        }
        Protocol::Http2 => {
            let streams = Streams::default();
            let served = http2::Builder::new(streams.clone())
                .timer(TokioTimer::new())
                .keep_alive_interval(host.config.idle_timeout)
                .keep_alive_timeout(host.config.handshake_timeout)
                .serve_connection(io, service);
            drive(served, protocol, &connection, &host.drain).await;
            streams.end().await;
        }
    }
}

/// The end of the time that a connection without a request is given once the drain has begun.
async fn lingered(drain: &Drain) {
    drain.soft().await;
    tokio::select! {
        () = tokio::time::sleep(LINGER) => {}
        () = drain.hard() => {}
    }
}

/// Runs a connection until it ends by itself, or until it is told to.
async fn drive<C>(served: C, protocol: Protocol, connection: &Connection, drain: &Drain)
where
    C: Served,
{
    let mut served = pin!(served);
    let asked = tokio::select! {
        end = served.as_mut() => return ended(end, connection.peer),
        () = connection.abort.cancelled() => return,
        () = connection.close.cancelled() => true,
        () = drain.soft() => false,
    };
    if protocol == Protocol::Http1 && !asked {
        // The stack now answers with `Connection: close`.
        tokio::select! {
            end = served.as_mut() => return ended(end, connection.peer),
            () = connection.abort.cancelled() => return,
            () = lingered(drain) => {}
        }
    }
    served.as_mut().tell();
    // Half a request head is not a request: hyper would wait for the other half.
    let half = async {
        tokio::time::sleep(LINGER).await;
        if connection.requests.load(Ordering::Acquire) > 0 {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        end = served.as_mut() => ended(end, connection.peer),
        () = connection.abort.cancelled() => {}
        () = half => metrics::connection_cut("drain"),
        () = drain.hard() => metrics::connection_cut("drain"),
    }
}

/// The tasks of one HTTP/2 connection, one a stream: they end with it.
#[derive(Clone, Debug, Default)]
struct Streams {
    running: TaskTracker,
    stop: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        self.running.spawn(self.stop.clone().run_until_cancelled_owned(stream));
    }
}

impl Streams {
    async fn end(&self) {
        self.stop.cancel();
        self.running.close();
        self.running.wait().await;
    }
}

/// A connection of either protocol.
trait Served: Future<Output = hyper::Result<()>> {
    /// Says to the peer that there will be no further answers: `Connection: close`, or GOAWAY.
    fn tell(self: Pin<&mut Self>);
}

impl<I, S> Served for http1::UpgradeableConnection<I, S>
where
    I: Read + Write + Send + Unpin + 'static,
    S: HttpService<Incoming, ResBody = FollowedBody>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
{
    fn tell(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Served for http2::Connection<I, S, Streams>
where
    I: Read + Write + Unpin,
    S: HttpService<Incoming, ResBody = FollowedBody>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    Streams: Http2ServerConnExec<S::Future, FollowedBody>,
{
    fn tell(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

fn ended(end: hyper::Result<()>, peer: Peer) {
    if let Err(error) = end {
        debug!(%peer, %error, "the connection ended with an error");
    }
}
