//! HTTP on one connection: detects the version, serves requests, and ends when it is asked to.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use hyper::body::Incoming;
use hyper::rt::bounds::Http2ServerConnExec;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::Config;
use super::body::Leftover;
use super::exchange::FollowedBody;
use super::explained::Explained;
use super::stack::Stack;
use crate::net::Protocol;
use crate::net::connection::{Connection, ConnectionPhase, ShutdownMode, Spoken};
use crate::net::refusal::ConnectionRefusal;
use crate::net::refusals::refused;
use crate::net::socket::{ParkedBytes, Peek, Socket};

/// The first bytes of an HTTP/2 client (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Maximum number of HTTP/2 streams that a client may reset before they are accepted; then its connection ends
/// (CVE-2023-44487).
const MAX_RESETS: usize = 20;
/// Maximum number of HTTP/2 streams that the server resets because of a client's errors; then its connection ends
/// (CVE-2025-8671).
const MAX_ERRORS: usize = 128;

/// HTTP as a protocol of [`crate::net`].
#[derive(Clone, Debug)]
pub(super) struct Http {
    pub(super) stack: Arc<Stack>,
    pub(super) config: Arc<Config>,
}

impl Protocol for Http {
    async fn plain<S: Peek>(&self, mut socket: Socket<S>) {
        let connection = Arc::clone(socket.connection());
        if !has_come(&mut socket, &connection).await {
            return close(socket, &connection).await;
        }
        match connection.unless_cut(detect(&mut socket)).await {
            // Boxed, because a future is as large as its largest state.
            Some(Ok(First::Http2)) => Box::pin(self.http2(socket, &connection)).await,
            Some(Ok(First::Tls)) => {
                let detail = "the client began a TLS handshake";
                refused(&connection, ConnectionRefusal::TlsOnPlainPort, &detail);
                close(socket, &connection).await;
            }
            Some(Ok(First::Http1)) => Box::pin(self.http1(socket, &connection, ConnectionPhase::Head)).await,
            Some(Err(error)) => {
                debug!(peer = %connection.peer(), %error, "no request came on this connection");
            }
            None => {}
        }
    }

    async fn secure<S: Peek>(&self, stream: Box<TlsStream<Socket<S>>>) {
        let (socket, tls) = stream.get_ref();
        let connection = Arc::clone(socket.connection());
        // The bytes so far were the handshake.
        connection.useful();
        if tls.alpn_protocol() == Some(b"h2") {
            Box::pin(self.http2(stream, &connection)).await;
        } else {
            Box::pin(self.http1(stream, &connection, ConnectionPhase::Idle)).await;
        }
    }

    fn refusal(&self) -> &'static [u8] {
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    }

    fn wants_tls(&self) -> &'static [u8] {
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\ncontent-length: 70\r\nconnection: close\r\n\r\n{\"title\":\"Bad Request\",\"status\":400,\"detail\":\"this port speaks https\"}"
    }

    fn is_plain(&self, first: &[u8]) -> bool {
        // A TLS record begins with 22, a method with a letter.
        first.first().is_some_and(u8::is_ascii_alphabetic)
    }
}

/// The kind of a connection without TLS, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Http1,
    Http2,
    /// A TLS handshake, on the wrong port.
    Tls,
}

/// Distinguishes HTTP/2 with prior knowledge from HTTP/1.1, and from TLS, by the first bytes. The bytes stay in the
/// socket; if one peek is not enough, they are read and put back.
async fn detect<S: Peek>(socket: &mut Socket<S>) -> io::Result<First> {
    let mut first = [0; PREFACE.len()];
    let mut length = socket.peek(&mut first).await?;
    if length > 0 && length < PREFACE.len() && first[..length] == PREFACE[..length] {
        // The socket stays readable, so that further peeks would spin.
        length = 0;
        while length < PREFACE.len() && first[..length] == PREFACE[..length] {
            let more = socket.read(&mut first[length..]).await?;
            if more == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            length += more;
        }
        socket.put_back(&first[..length]);
    }
    match length {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        // The record of a ClientHello (RFC 8446, section 5.1).
        _ if first[0] == 22 && (length < 2 || first[1] == 3) => Ok(First::Tls),
        _ if first[..length] == *PREFACE => Ok(First::Http2),
        _ => Ok(First::Http1),
    }
}

impl Http {
    async fn http1<I: ParkedBytes>(&self, mut io: I, connection: &Arc<Connection>, phase: ConnectionPhase) {
        connection.speak(Spoken::Http1);
        connection.enter(phase);
        loop {
            match self.requests(io, connection).await {
                Http1End::Closed => return,
                // A parked connection keeps no state of hyper, whose buffers are most of a connection's memory.
                Http1End::Resting(rested) => io = rested,
            }
            if !has_come(&mut io, connection).await {
                return close(io, connection).await;
            }
            connection.has_rested();
        }
    }

    /// Serves requests until the connection ends, or is to be parked.
    async fn requests<I: ParkedBytes>(&self, io: I, connection: &Arc<Connection>) -> Http1End<I> {
        let leftover = Leftover::default();
        let service = service_fn(|request| {
            let (stack, connection) = (Arc::clone(&self.stack), Arc::clone(connection));
            stack.handle(request, connection, Some(leftover.clone()))
        });
        let served = http1::Builder::new()
            // `net::reaper` has a deadline for the head.
            .header_read_timeout(None)
            .max_buf_size(self.config.head_limit)
            .serve_connection(TokioIo::new(Explained::new(io)), service)
            .with_upgrades();
        let mut served = Box::new(served);
        let may_rest = || match connection.told() {
            // The caller closes the connection, or serves the bytes that the kernel has.
            ShutdownMode::Leave => connection.is_between_requests(),
            ShutdownMode::Stay | ShutdownMode::Last => {
                I::CAN && connection.is_resting() && !leftover.had_any()
            }
            ShutdownMode::Cut => false,
        };
        let driven = tokio::select! {
            driven = drive(Pin::new(&mut *served), connection, may_rest) => driven,
            () = leftover.drop_all() => Driven::Ended,
        };
        match driven {
            Driven::Ended => drop(served),
            Driven::Resting => {
                if let Some(parts) = served.into_parts() {
                    let mut io = parts.io.into_inner().into_inner();
                    io.put_back(&parts.read_buf);
                    return Http1End::Resting(io);
                }
            }
        }
        // The bytes of an upgraded connection belong to its new owner now.
        if !matches!(connection.phase(), ConnectionPhase::Closing | ConnectionPhase::Closed) {
            connection.enter(ConnectionPhase::Upgraded);
        }
        Http1End::Closed
    }

    async fn http2<I>(&self, io: I, connection: &Arc<Connection>)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        connection.speak(Spoken::Http2);
        let service = service_fn(|request| {
            let (stack, connection) = (Arc::clone(&self.stack), Arc::clone(connection));
            stack.handle(request, connection, None)
        });
        let limits = &self.config.http2;
        let streams = Streams::default();
        let served = http2::Builder::new(streams.clone())
            .timer(TokioTimer::new())
            .keep_alive_interval(limits.ping_every)
            .keep_alive_timeout(limits.ping_timeout)
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(limits.header_list)
            .max_send_buf_size(limits.send_buffer)
            .max_pending_accept_reset_streams(MAX_RESETS)
            .max_local_error_reset_streams(MAX_ERRORS)
            .serve_connection(TokioIo::new(io), service);
        let mut served = Box::pin(served);
        drive(served.as_mut(), connection, || false).await;
        drop(served);
        streams.end().await;
    }
}

/// How the service of an HTTP/1.1 connection ended.
enum Http1End<I> {
    Closed,
    Resting(I),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driven {
    Ended,
    Resting,
}

/// Waits for the next request of a parked connection. Returns false if there will be none: the client has closed the
/// connection, or it was asked to leave and no bytes have arrived. Bytes that the kernel has are served, also when the
/// reactor has not reported them yet.
async fn has_come<I: ParkedBytes>(io: &mut I, connection: &Connection) -> bool {
    let leaving = poll_fn(|context| match connection.poll_told(context) {
        ShutdownMode::Leave | ShutdownMode::Cut => Poll::Ready(()),
        ShutdownMode::Stay | ShutdownMode::Last => Poll::Pending,
    });
    let has_come = tokio::select! {
        biased;
        arrived = io.arrival(), if I::CAN => arrived,
        () = leaving => false,
    };
    if has_come || connection.told() == ShutdownMode::Cut || !io.unread() {
        return has_come;
    }
    // The yield lets the reactor report the bytes. Without it the next poll finds none, and the connection parks again.
    tokio::task::yield_now().await;
    true
}

/// Shuts down the sending side, and waits for the client to end too.
async fn close<I: ParkedBytes>(mut io: I, connection: &Connection) {
    let _ = connection.unless_cut(io.shutdown()).await;
}

/// Runs a connection until it ends by itself, is asked to end, or may be parked.
async fn drive<C: ServedRequest>(
    mut served: Pin<&mut C>,
    connection: &Connection,
    may_rest: impl Fn() -> bool,
) -> Driven {
    let mut leaving = false;
    let end = poll_fn(|context| {
        let told = connection.poll_told(context);
        if told == ShutdownMode::Leave && !leaving {
            leaving = true;
            served.as_mut().tell();
        }
        // The poll comes before the cut, so that finished answers are still sent.
        match served.as_mut().poll(context) {
            Poll::Pending if told == ShutdownMode::Cut => Poll::Ready(Ok(Driven::Ended)),
            Poll::Pending if may_rest() => Poll::Ready(Ok(Driven::Resting)),
            polled => polled.map_ok(|()| Driven::Ended),
        }
    });
    end.await.unwrap_or_else(|error: hyper::Error| {
        if let Some(refusal) = refusal(&error) {
            refused(connection, refusal, &error);
        }
        debug!(peer = %connection.peer(), %error, "the connection ended with an error");
        Driven::Ended
    })
}

/// Returns the refusal if hyper's error is a request head that could not be parsed. hyper has answered it.
fn refusal(error: &hyper::Error) -> Option<ConnectionRefusal> {
    let is_target = || error.to_string().contains("URI");
    match () {
        () if error.is_parse_too_large() && is_target() => Some(ConnectionRefusal::LongTarget),
        () if error.is_parse_too_large() => Some(ConnectionRefusal::LongHead),
        () if error.is_parse() => Some(ConnectionRefusal::BadHead),
        () => None,
    }
}

/// The tasks of one HTTP/2 connection, one per stream. They end with the connection.
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

/// A connection of HTTP/1.1 or HTTP/2.
trait ServedRequest: Future<Output = hyper::Result<()>> {
    /// Tells the peer that there will be no further answers: `Connection: close`, or GOAWAY.
    fn tell(self: Pin<&mut Self>);
}

impl<I, S> ServedRequest for http1::UpgradeableConnection<I, S>
where
    I: Read + Write + Send + Unpin + 'static,
    S: HttpService<Incoming, ResBody = FollowedBody>,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
{
    /// Does nothing: each answer has `Connection: close`, and [`Http::http1`] closes a connection between requests.
    /// hyper would close it even if a request has arrived.
    fn tell(self: Pin<&mut Self>) {}
}

impl<I, S> ServedRequest for http2::Connection<I, S, Streams>
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
