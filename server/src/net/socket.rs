//! The bytes of a connection, and what can be done with them without taking any.

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
use super::watch::{ConnectionPermit, TooMany};

/// How many bytes a client may have sent before it could know that nothing more is read: what the kernels of both sides hold.
const ON_ITS_WAY: usize = 4 << 20;

/// A socket whose first bytes can be looked at without taking them.
pub(crate) trait Peek: AsyncRead + AsyncWrite + AsFd + Send + Sync + Unpin + 'static {
    /// Copies what has arrived into `buffer`, waiting for the first byte. 0 is the end of the stream.
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

/// Bytes that may be waited for without a buffer.
pub(crate) trait ParkedBytes: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Whether they may.
    const CAN: bool;

    /// Waits until something has arrived, or the end has. True if it is not the end.
    fn arrival(&mut self) -> impl Future<Output = bool> + Send;

    /// Puts bytes back that were read, before what comes next.
    fn put_back(&mut self, bytes: &[u8]);

    /// Whether bytes have arrived that nobody has read, as the kernel knows it.
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

/// The bytes of a connection. Its seat at the table is free again when this drops, wherever that is: a socket
/// that was upgraded is counted for as long as its new owner has it.
#[derive(Debug)]
pub(crate) struct Socket<S> {
    io: S,
    /// Bytes that were taken to find out the protocol, the next last.
    taken: Vec<u8>,
    /// How many bytes were dropped since the client was told that nothing more will come.
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

    /// A proxy has said who the client is.
    pub(super) fn set_client(&mut self, client: Peer) -> Result<(), TooMany> {
        self.seat.limit(client)?;
        self.connection().set_proxied(client);
        Ok(())
    }

    /// Puts bytes back that were read, before what comes next.
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

    /// Ends in stages (RFC 9112, section 9.6): says that nothing more will come, and then reads and drops what the client sends,
    /// until it ends too, or has sent more than can have been on its way. A socket that is closed with unread bytes is reset, and a reset overtakes the last answer.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let connection = this.seat.connection();
        if connection.phase() == ConnectionPhase::Upgraded {
            // Its owner may close one side and go on reading.
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
