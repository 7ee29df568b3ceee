//! Redis: one server for all tests, with a prefix for each; or one of a test's own, to be hurt.

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

/// What `tests/run` has started: the URL of its server.
const SHARED: &str = "PERENNIAL_TEST_REDIS";

/// A part of a server for a test's own.
#[derive(Debug)]
pub struct Prefix {
    url: String,
    name: String,
    /// Where no server is shared, one of its own.
    _server: Option<Server>,
}

impl Prefix {
    /// A new one.
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

    /// What its keys begin with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `redis://..`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A pool of connections to its server.
    pub async fn connect(&self) -> Redis {
        Redis::open(config(&self.url)).await.unwrap()
    }
}

/// How a server is connected to here.
pub fn config(url: &str) -> Config {
    Config {
        url: url.into(),
        ca_file: None,
        size: 8,
        wait: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(5),
        response_timeout: Duration::from_secs(10),
        max_age: Duration::from_secs(1800),
    }
}

/// A server of a test's own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
    port: u16,
    arguments: Vec<String>,
}

impl Server {
    /// Starts one with these arguments, which keeps what it has when it is started again.
    pub async fn start(arguments: &[&str]) -> Self {
        let (directory, port) = (TempDir::new().unwrap(), free_port());
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let child = spawn(directory.path(), port, &arguments);
        let server = Self { child, directory, port, arguments };
        server.ready().await;
        server
    }

    /// One that has every write on the disk before it answers.
    pub async fn durable() -> Self {
        Self::start(&["--appendonly", "yes", "--appendfsync", "always"]).await
    }

    /// `redis://..`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().expect("it runs").try_into().unwrap()), signal).unwrap();
    }

    /// Kills it and starts it again.
    pub async fn restart(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().await.unwrap();
        self.child = spawn(self.directory.path(), self.port, &self.arguments);
        self.ready().await;
    }

    async fn ready(&self) {
        let url = self.url();
        eventually("Redis answers", || async { Redis::open(config(&url)).await.ok() }).await.close();
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
