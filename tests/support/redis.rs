//! Redis: one server for all tests with a prefix for each test, or a server of one test, which the test may break.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use perennial_store::pool::redis::{Config, Redis};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::{eventually, free_port};

/// Variable in which `tests/run` passes the URL of the server that it has started.
const SHARED: &str = "PERENNIAL_TEST_REDIS";

/// A prefix of a server that belongs to one test.
#[derive(Debug)]
pub struct Prefix {
    url: String,
    name: String,
    /// A server of its own, where no server is shared.
    _server: Option<Server>,
}

impl Prefix {
    /// Creates a prefix.
    pub async fn new() -> Self {
        let name = format!("test-{}", Uuid::now_v7().simple());
        match std::env::var(SHARED) {
            Ok(url) => Self { url, name, _server: None },
            Err(_) => {
                let server = Server::start(&[]).await;
                Self { url: server.url(), name, _server: Some(server) }
            }
        }
    }

    /// Prefix of the keys.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// URL of the server, `redis://..`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Opens a pool of connections to the server.
    pub async fn connect(&self) -> Redis {
        Redis::open(config(&self.url)).await.unwrap()
    }
}

/// Settings with which the tests connect to a server.
pub fn config(url: &str) -> Config {
    Config {
        name: "redis",
        may_evict: false,
        url: url.into(),
        ca_file: None,
        size: 8,
        wait: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(5),
        response_timeout: Duration::from_secs(10),
        max_age: Duration::from_secs(1800),
    }
}

/// A server of one test.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
    port: u16,
    arguments: Vec<String>,
}

impl Server {
    /// Starts a server with these arguments. It keeps its directory when it is started again.
    pub async fn start(arguments: &[&str]) -> Self {
        let (directory, port) = (TempDir::new().unwrap(), free_port());
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let child = spawn(directory.path(), port, &arguments);
        let server = Self { child, directory, port, arguments };
        server.ready().await;
        server
    }

    /// Starts a server that writes every change to the disk before it answers.
    pub async fn durable() -> Self {
        Self::start(&["--appendonly", "yes", "--appendfsync", "always"]).await
    }

    /// URL of the server, `redis://..`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Sends a signal to the server.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().expect("it runs").try_into().unwrap()), signal).unwrap();
    }

    /// Kills the server and starts it again.
    pub async fn restart(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().await.unwrap();
        self.child = spawn(self.directory.path(), self.port, &self.arguments);
        self.ready().await;
    }

    async fn ready(&self) {
        let url = self.url();
        let config = Config { may_evict: true, ..config(&url) };
        eventually("Redis answers", || async { Redis::open(config.clone()).await.ok() }).await.close();
    }
}

fn spawn(directory: &Path, port: u16, arguments: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
        .arg("--dir")
        .arg(directory)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}
