//! HTTP on one connection: find out the version, serve requests, leave when it is told to.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use hyper::body::Incoming;
use hyper::rt::bounds::Http2ServerConnExec;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::Config;
use super::body::Leftover;
use super::exchange::FollowedBody;
use super::stack::Stack;
use crate::net::Protocol;
use crate::net::connection::{Connection, Peek, Phase, Socket, Spoken, Told};

/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How much of a request head is held in memory at most, in bytes.
const HEAD_LIMIT: usize = 64 * 1024;

/// How many HTTP/2 streams a client may reset before they are looked at, and how many of its errors are
/// answered, until its connection ends (CVE-2023-44487, CVE-2025-8671).
const MAX_RESETS: usize = 20;
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
        match connection.unless_cut(detect(&mut socket)).await {
            Some(Ok(Spoken::Http2)) => self.http2(socket, &connection).await,
            Some(Ok(_)) => self.http1(socket, &connection, Phase::Head).await,
            Some(Err(error)) => {
                debug!(peer = %connection.peer(), %error, "no request came on this connection");
            }
            None => {}
        }
    }

    async fn secure<S>(&self, stream: Box<TlsStream<Socket<S>>>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (socket, tls) = stream.get_ref();
        let connection = Arc::clone(socket.connection());
        // What came so far was the handshake.
        connection.useful();
        if tls.alpn_protocol() == Some(b"h2") {
            self.http2(stream, &connection).await;
        } else {
            self.http1(stream, &connection, Phase::Idle).await;
        }
    }

    fn refusal(&self) -> &'static [u8] {
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    }
}

/// Tells HTTP/2 with prior knowledge from HTTP/1.1 by the first bytes. They stay in the socket, unless it takes
/// more than one look: then they are put back.
async fn detect<S: Peek>(socket: &mut Socket<S>) -> io::Result<Spoken> {
    let mut first = [0; PREFACE.len()];
    let mut length = socket.peek(&mut first).await?;
    if length > 0 && length < PREFACE.len() && first[..length] == PREFACE[..length] {
        // It stays readable, so that looking again would spin.
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
        _ if first[..length] == *PREFACE => Ok(Spoken::Http2),
        _ => Ok(Spoken::Http1),
    }
}

impl Http {
    async fn http1<I>(&self, io: I, connection: &Arc<Connection>, phase: Phase)
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        connection.speak(Spoken::Http1);
        connection.enter(phase);
        let leftover = Leftover::default();
        let service = service_fn(|request| {
            let (stack, connection) = (Arc::clone(&self.stack), Arc::clone(connection));
            stack.handle(request, connection, Some(leftover.clone()))
        });
        let served = http1::Builder::new()
            // The watch has a deadline for it.
            .header_read_timeout(None)
            .max_buf_size(HEAD_LIMIT)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        tokio::select! {
            () = drive(served, connection) => {}
            () = leftover.drop_all() => {}
        }
        // Its bytes belong to somebody else now.
        if connection.phase() != Phase::Closed {
            connection.enter(Phase::Upgraded);
        }
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
        drive(served, connection).await;
        streams.end().await;
    }
}

/// Runs a connection until it ends by itself, or until it is told to.
async fn drive<C: Served>(served: C, connection: &Connection) {
    let mut served = pin!(served);
    let mut leaving = false;
    let end = poll_fn(|context| {
        let told = connection.poll_told(context);
        if told == Told::Leave && !leaving {
            leaving = true;
            served.as_mut().tell();
        }
        // What has been answered already is on its way before a cut.
        match served.as_mut().poll(context) {
            Poll::Pending if told == Told::Cut => Poll::Ready(Ok(())),
            polled => polled,
        }
    });
    if let Err(error) = end.await {
        debug!(peer = %connection.peer(), %error, "the connection ended with an error");
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

/// A connection of either version.
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
