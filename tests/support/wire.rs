//! A proxy between the program and a server that can cut connections, or stop passing bytes without notice.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// State of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Bytes are passed on.
    Whole,
    /// Connections are closed, and new ones are closed at once.
    Cut,
    /// Bytes are read and never passed on; connections are accepted, and no answer comes.
    Dead,
}

/// A TCP proxy. It ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Address on which the proxy listens.
    pub address: SocketAddr,
    wire: watch::Sender<Wire>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    /// Starts a proxy in front of a port of this machine.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (wire, state) = watch::channel(Wire::Whole);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, port, state));
        Self { address, wire, _accepting: accepting }
    }

    /// Sets the state for all present and future connections.
    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn accept(listener: TcpListener, port: u16, wire: watch::Receiver<Wire>) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        connections.spawn(connect(client, port, wire.clone()));
    }
}

async fn connect(client: TcpStream, port: u16, mut wire: watch::Receiver<Wire>) {
    if *wire.borrow() == Wire::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let wire_of = Arc::new(wire.clone());
    tokio::select! {
        () = pass(from_client, to_server, &wire_of) => {}
        () = pass(from_server, to_client, &wire_of) => {}
        _ = wire.wait_for(|wire| *wire == Wire::Cut) => {}
    }
}

/// Passes bytes on until one side ends. Bytes that come while the wire is dead are lost, and the connection hangs.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, wire: &watch::Receiver<Wire>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or_default();
        if *wire.borrow() == Wire::Dead {
            // Neither side learns of the end either.
            return std::future::pending().await;
        }
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
