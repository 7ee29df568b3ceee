//! An egress proxy.

use std::process::Stdio;

use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::{eventually, free_port};

/// A running tinyproxy, which connects to any port.
#[derive(Debug)]
pub struct TinyProxy {
    /// Port on 127.0.0.1 on which the proxy listens.
    pub port: u16,
    directory: TempDir,
    _child: Child,
}

impl TinyProxy {
    /// Starts the proxy.
    pub async fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let port = free_port();
        let log = directory.path().join("log");
        let config = format!(
            "Port {port}\nListen 127.0.0.1\nTimeout 600\nMaxClients 100\nLogLevel Info\nLogFile \"{}\"\n",
            log.display()
        );
        let file = directory.path().join("tinyproxy.conf");
        std::fs::write(&file, config).unwrap();
        let child = Command::new("tinyproxy")
            .arg("-d")
            .arg("-c")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("tinyproxy is installed: tests/run does that");
        eventually("tinyproxy listens", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok().then_some(())
        })
        .await;
        Self { port, directory, _child: child }
    }

    /// Log of the requests to the proxy.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}
