//! The byte stream of a connection, which can be peeked without taking bytes.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

use super::connection::{Connection, ConnectionPhase, Peer};
use super::reaper::{ConnectionPermit, TooMany};

/// Maximum number of bytes that a client may have sent before it could know that nothing more is read: the capacity of
/// the socket buffers on both sides.
const ON_ITS_WAY: usize = 4 << 20;

/// A socket whose first bytes can be peeked without taking them.
pub(crate) trait Peek: AsyncRead + AsyncWrite + AsFd + Send + Sync + Unpin + 'static {
    /// Waits for the first byte, copies the bytes that have arrived into `buffer`, and returns their number; 0 means
    /// the end of the stream.
    fn peek(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send;
}

impl Peek for TcpStream {
    fn peek(&self, buffer: &mut [u8]) -> impl Future<Output = io::Result<usize>> + Send {
        Self::peek(self, buffer)
    }
}

impl Peek for UnixStream {
    async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let peek = || Ok(rustix::net::recv(self, &mut *buffer, rustix::net::RecvFlags::PEEK)?.1);
        self.async_io(Interest::READABLE, peek).await
    }
}

/// A byte stream that may be parked: it waits for the next bytes without a buffer.
pub(crate) trait ParkedBytes: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Whether streams of this type can be parked.
    const CAN: bool;

    /// Waits until bytes have arrived or the stream has ended. Returns true when bytes have arrived.
    fn arrival(&mut self) -> impl Future<Output = bool> + Send;

    /// Puts back bytes that were read; the next read returns them first.
    fn put_back(&mut self, bytes: &[u8]);

    /// Returns true when unread bytes are waiting. It asks the kernel, not the reactor.
    fn unread(&self) -> bool;
}

impl<S: Peek> ParkedBytes for Socket<S> {
    const CAN: bool = true;

    async fn arrival(&mut self) -> bool {
        !self.taken.is_empty() || self.io.peek(&mut [0]).await.is_ok_and(|length| length > 0)
    }

    fn put_back(&mut self, bytes: &[u8]) {
        self.put_back(bytes);
    }

    fn unread(&self) -> bool {
        !self.taken.is_empty() || rustix::io::ioctl_fionread(&self.io).is_ok_and(|bytes| bytes > 0)
    }
}

/// A TLS stream cannot be peeked, and its buffers outweigh what parking would save.
impl<S: Peek> ParkedBytes for Box<TlsStream<Socket<S>>> {
    const CAN: bool = false;

    async fn arrival(&mut self) -> bool {
        true
    }

    fn put_back(&mut self, _bytes: &[u8]) {}

    fn unread(&self) -> bool {
        self.get_ref().0.unread()
    }
}

/// The byte stream of a connection. It holds the connection permit: an upgraded socket is counted until its new owner
/// drops it.
#[derive(Debug)]
pub(crate) struct Socket<S> {
    io: S,
    /// Bytes that were put back, in reverse order: the last one is read next.
    taken: Vec<u8>,
    /// Number of bytes that were read and dropped since the sending side was shut down.
    dropped: usize,
    seat: ConnectionPermit,
}

impl<S> Socket<S> {
    pub(super) fn new(io: S, seat: ConnectionPermit) -> Self {
        Self { io, taken: Vec::new(), dropped: 0, seat }
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        self.seat.connection()
    }

    /// Sets the client that a proxy has named, and counts the connection for the client's address.
    pub(super) fn set_client(&mut self, client: Peer) -> Result<(), TooMany> {
        self.seat.limit(client)?;
        self.connection().set_proxied(client);
        Ok(())
    }

    /// Puts back bytes that were read; the next read returns them first.
    pub(crate) fn put_back(&mut self, bytes: &[u8]) {
        self.taken.extend(bytes.iter().rev());
    }
}

impl<S: Peek> Socket<S> {
    pub(crate) async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.taken.is_empty() {
            let bytes = buffer.iter_mut().zip(self.taken.iter().rev());
            return Ok(bytes.map(|(to, from)| *to = *from).count());
        }
        self.io.peek(buffer).await
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        while buffer.remaining() > 0
            && let Some(byte) = self.taken.pop()
        {
            buffer.put_slice(&[byte]);
        }
        if buffer.filled().len() > before {
            return Poll::Ready(Ok(()));
        }
        let this = &mut *self;
        let connection = this.seat.connection();
        connection.unless_cut_for_its_owner(context)?;
        ready!(Pin::new(&mut this.io).poll_read(context, buffer))?;
        connection.has_read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.connection().unless_stuck(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, buffers);
        self.connection().unless_stuck(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    /// Ends in stages (RFC 9112, section 9.6): shuts down the sending side, then reads and drops the client's bytes
    /// until the client ends too, or has sent more than can have been on the way. A socket that is closed with unread
    /// bytes is reset, and a reset overtakes the last answer.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let connection = this.seat.connection();
        if connection.phase() == ConnectionPhase::Upgraded {
            // The owner of an upgraded connection may shut down the sending side and go on reading.
            return Pin::new(&mut this.io).poll_shutdown(context);
        }
        if connection.phase() != ConnectionPhase::Closing {
            ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
            connection.close_begins();
        }
        let mut dropped = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut dropped);
            match ready!(Pin::new(&mut this.io).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() && this.dropped < ON_ITS_WAY => {
                    connection.has_read(buffer.filled().len());
                    this.dropped += buffer.filled().len();
                }
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}
