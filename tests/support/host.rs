//! The host alone, around a router of the test.

use std::time::Duration;

use axum::Router;
use perennial_runtime::cpu::Cpu;
use perennial_runtime::drain::{self, Phase, Trigger};
use perennial_runtime::tasks::Tasks;
use perennial_server::http::{Config, Server};
use perennial_server::net::{self, Connections, Inherited, Sockets};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::http::Client;
use crate::{eventually, soon};

/// A running server.
#[derive(Debug)]
pub struct Host {
    /// Addresses on which the server listens.
    pub addresses: Vec<String>,
    /// Connections of the server.
    pub connections: Connections,
    /// Sockets of the server.
    pub sockets: Sockets,
    /// Trigger that stops the server.
    pub trigger: Trigger,
    /// Tasks of the server.
    pub tasks: Tasks,
}

/// Default settings on these addresses, with a small limit for bodies.
pub fn config(listen: &[&str]) -> Config {
    let listen = listen.iter().map(|listen| listen.parse().unwrap()).collect();
    Config { body_limit: 1000, ..Config::new(net::Config::new("test", listen)) }
}

/// Default settings on a free port, with a change to the settings of sockets and connections.
pub fn net(change: impl FnOnce(&mut net::Config)) -> Config {
    let mut config = config(&["127.0.0.1:0"]);
    change(&mut config.net);
    config
}

impl Host {
    /// Starts a server.
    pub async fn start(config: Config, router: Router) -> Self {
        Self::start_with(config, router, None).await
    }

    /// Starts a server with threads for processor work.
    pub async fn start_with(config: Config, router: Router, cpu: Option<Cpu>) -> Self {
        let server = Server::bind(config, &Inherited::default()).await.unwrap();
        let (addresses, connections, sockets) = (server.addresses(), server.connections(), server.sockets());
        let (trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain.clone());
        tasks.critical("http", server.run(router, cpu, drain));
        Self { addresses, connections, sockets, trigger, tasks }
    }

    /// Starts a server with the default settings, and returns a client for it.
    pub async fn plain(router: Router) -> (Self, Client) {
        let host = Self::start(config(&["127.0.0.1:0"]), router).await;
        let client = host.client();
        (host, client)
    }

    /// Client of the first address.
    pub fn client(&self) -> Client {
        Client::new(&format!("http://{}", self.addresses[0]))
    }

    /// Opens a connection to the first address.
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.addresses[0]).await.unwrap()
    }

    /// Waits until exactly `count` connections are open.
    pub async fn open(&self, count: usize) {
        eventually(&format!("{count} connections"), || async {
            (self.connections.count() == count).then_some(())
        })
        .await;
    }

    /// Stops the server with a soft drain, and waits for its end.
    pub async fn stop(self) {
        self.trigger.advance(Phase::Soft);
        soon("the server ends", self.tasks.ended()).await;
    }
}

/// Sends bytes. Returns what comes back until the end of the connection, and the time until then.
pub async fn until_closed(stream: &mut TcpStream, bytes: &[u8]) -> (String, Duration) {
    let began = std::time::Instant::now();
    // A client that is cut off may notice it only while it writes.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    (String::from_utf8_lossy(&answer).into_owned(), began.elapsed())
}
