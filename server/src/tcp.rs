//! Protocols other than HTTP: a handler gets the bytes, and the host does everything else.
//!
//! Limits, counts, TLS, the PROXY protocol, the deadlines (for opening, for silence and for a client that takes no
//! bytes) and the drain are those of [`crate::net`]. One thing differs from HTTP: some servers speak first, so a client
//! that has connected is not expected to send anything.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;
use tracing::debug;

use crate::net::connection::{ConnectionPhase, Spoken};
use crate::net::socket::{Peek, Socket};
use crate::net::{self, BindError, Connection, Connections, Inherited, Protocol, Sockets};
use perennial_runtime::drain::Drain;

/// The protocol that is spoken on the connections of a [`Server`].
pub trait TcpHandler: Send + Sync + 'static {
    /// Serves one connection to its end.
    ///
    /// When `drain` reaches the soft phase, the handler should begin no further conversation. In the hard phase, and
    /// after the connection was silent for too long, reads and writes fail.
    ///
    /// # Errors
    /// When a read or a write fails; the error is logged at debug level.
    fn serve(&self, stream: Stream, drain: Drain) -> impl Future<Output = io::Result<()>> + Send;
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// The bytes of one connection.
pub struct Stream {
    bytes: Box<dyn Bytes>,
    connection: Arc<Connection>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl Stream {
    /// The connection, with the client's address.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_shutdown(context)
    }
}

/// A server whose sockets are open.
#[derive(Debug)]
pub struct Server(net::Bound);

impl Server {
    /// Opens the sockets, or takes those of `inherited` that have the same addresses.
    ///
    /// # Errors
    /// When an address cannot be bound, or TLS lacks a usable certificate.
    pub async fn bind(config: net::Config, inherited: &Inherited) -> Result<Self, BindError> {
        Ok(Self(net::bind(config, inherited, &[]).await?))
    }

    /// Returns the addresses in use, in the form that the settings have.
    pub fn addresses(&self) -> Vec<String> {
        self.0.addresses()
    }

    /// Returns a handle to the server's connections.
    pub fn connections(&self) -> Connections {
        self.0.connections()
    }

    /// Returns a handle to the server's sockets, to hand them over, and to the certificate, to read it again.
    pub fn sockets(&self) -> Sockets {
        self.0.sockets()
    }

    /// Serves until the drain has begun and every connection has ended.
    ///
    /// # Errors
    /// Never; the return type is that of a task.
    pub async fn run<H: TcpHandler>(self, handler: H, drain: Drain) -> Result<(), Infallible> {
        let protocol = Tcp { handler: Arc::new(handler), drain: drain.clone() };
        net::serve(self.0, protocol, &drain).await;
        Ok(())
    }
}

#[derive(Debug)]
struct Tcp<H> {
    handler: Arc<H>,
    drain: Drain,
}

impl<H> Clone for Tcp<H> {
    fn clone(&self) -> Self {
        Self { handler: Arc::clone(&self.handler), drain: self.drain.clone() }
    }
}

impl<H: TcpHandler> Tcp<H> {
    async fn serve(&self, bytes: impl Bytes + 'static, connection: Arc<Connection>) {
        connection.speak(Spoken::Tcp);
        connection.enter(ConnectionPhase::Upgraded);
        let stream = Stream { bytes: Box::new(bytes), connection: Arc::clone(&connection) };
        let served = self.handler.serve(stream, self.drain.clone());
        if let Some(Err(error)) = connection.unless_cut(served).await {
            debug!(peer = %connection.peer(), %error, "the connection ended with an error");
        }
    }
}

impl<H: TcpHandler> Protocol for Tcp<H> {
    async fn plain<S: Peek>(&self, socket: Socket<S>) {
        let connection = Arc::clone(socket.connection());
        self.serve(socket, connection).await;
    }

    async fn secure<S: Peek>(&self, stream: Box<TlsStream<Socket<S>>>) {
        let connection = Arc::clone(stream.get_ref().0.connection());
        self.serve(stream, connection).await;
    }

    fn refusal(&self) -> &'static [u8] {
        b""
    }

    fn wants_tls(&self) -> &'static [u8] {
        b""
    }

    fn is_plain(&self, _first: &[u8]) -> bool {
        false
    }
}
