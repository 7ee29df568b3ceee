//! The host alone, around a router of the test's own.

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
    /// Where it listens.
    pub addresses: Vec<String>,
    /// Its connections.
    pub connections: Connections,
    /// Its sockets.
    pub sockets: Sockets,
    /// What stops it.
    pub trigger: Trigger,
    /// The task that it runs in.
    pub tasks: Tasks,
}

/// The defaults, on these addresses, with small bodies.
pub fn config(listen: &[&str]) -> Config {
    let listen = listen.iter().map(|listen| listen.parse().unwrap()).collect();
    Config { body_limit: 1000, ..Config::new(net::Config::new("test", listen)) }
}

/// The defaults on a free port, with something else about sockets and connections.
pub fn net(change: impl FnOnce(&mut net::Config)) -> Config {
    let mut config = config(&["127.0.0.1:0"]);
    change(&mut config.net);
    config
}

impl Host {
    /// Starts it.
    pub async fn start(config: Config, router: Router) -> Self {
        Self::start_with(config, router, None).await
    }

    /// Starts it with threads for the processor.
    pub async fn start_with(config: Config, router: Router, cpu: Option<Cpu>) -> Self {
        let server = Server::bind(config, &Inherited::default()).await.unwrap();
        let (addresses, connections, sockets) = (server.addresses(), server.connections(), server.sockets());
        let (trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain.clone());
        tasks.critical("http", server.run(router, cpu, drain));
        Self { addresses, connections, sockets, trigger, tasks }
    }

    /// Starts it with the defaults, and a client for it.
    pub async fn plain(router: Router) -> (Self, Client) {
        let host = Self::start(config(&["127.0.0.1:0"]), router).await;
        let client = host.client();
        (host, client)
    }

    /// A client of the first address.
    pub fn client(&self) -> Client {
        Client::new(&format!("http://{}", self.addresses[0]))
    }

    /// A connection to the first address.
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.addresses[0]).await.unwrap()
    }

    /// Waits until so many connections are open.
    pub async fn open(&self, count: usize) {
        eventually(&format!("{count} connections"), || async {
            (self.connections.count() == count).then_some(())
        })
        .await;
    }

    /// Stops it, as for a drain without a hurry.
    pub async fn stop(self) {
        self.trigger.advance(Phase::Soft);
        soon("the server ends", self.tasks.ended()).await;
    }
}

/// Sends bytes, and returns what comes back until the end of the connection, and after how long that was.
pub async fn until_closed(stream: &mut TcpStream, bytes: &[u8]) -> (String, Duration) {
    let began = std::time::Instant::now();
    // Who is cut off may find that out while writing.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    (String::from_utf8_lossy(&answer).into_owned(), began.elapsed())
}
