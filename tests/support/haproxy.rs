//! A load balancer that hides no failure: it has no retries and no health checks.

use std::process::Stdio;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::{eventually, free_port};

/// Maximum number of servers.
pub const SLOTS: usize = 32;

/// A running haproxy, without servers.
#[derive(Debug)]
pub struct Haproxy {
    /// Port on 127.0.0.1 on which haproxy listens.
    pub port: u16,
    directory: TempDir,
    _child: Child,
}

impl Haproxy {
    /// Starts haproxy.
    pub async fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let (port, control) = (free_port(), directory.path().join("control"));
        let config = format!(
            "global\n  stats socket {} mode 600 level admin\n\
             defaults\n  mode http\n  retries 0\n  timeout connect 2s\n  timeout client 30s\n  timeout server 30s\n\
             frontend public\n  bind 127.0.0.1:{port}\n  default_backend pods\n\
             backend pods\n  balance roundrobin\n  server-template pod 1-{SLOTS} 127.0.0.1:1 disabled\n",
            control.display()
        );
        let file = directory.path().join("haproxy.cfg");
        std::fs::write(&file, config).unwrap();
        let child = Command::new("haproxy")
            .arg("-db")
            .arg("-f")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("haproxy is installed: tests/run does that");
        eventually("haproxy listens", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok().then_some(())
        })
        .await;
        Self { port, directory, _child: child }
    }

    /// Adds the server on this port of 127.0.0.1 to the rotation. Slots are counted from 1.
    pub async fn add(&self, slot: usize, port: u16) {
        self.tell(&format!("set server pods/pod{slot} addr 127.0.0.1 port {port}")).await;
        self.tell(&format!("set server pods/pod{slot} state ready")).await;
    }

    /// Sends no new requests to the server in this slot.
    pub async fn remove(&self, slot: usize) {
        self.tell(&format!("set server pods/pod{slot} state maint")).await;
    }

    async fn tell(&self, command: &str) {
        let mut control = UnixStream::connect(self.directory.path().join("control")).await.unwrap();
        control.write_all(format!("{command}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        control.read_to_string(&mut answer).await.unwrap();
        let is_refused = ["No such", "Unknown", "Invalid", "error"].iter().any(|word| answer.contains(word));
        assert!(!is_refused, "{command}: {answer}");
    }
}
