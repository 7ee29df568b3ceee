//! The running program.

use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use command_fds::CommandFdExt;
use command_fds::FdMapping;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::dev::{BUILD, STATE};

/// Number of the first inherited descriptor (`sd_listen_fds(3)`).
const FIRST: i32 = 3;
/// Name of the public listener among the inherited descriptors.
const PUBLIC: &str = "public";
/// Time that a program may take to stop.
const PATIENCE: Duration = Duration::from_secs(10);
/// Settings with which a program makes room soon.
const SOON: [&str; 3] = ["drain.idle=100ms", "drain.soft=3s", "drain.hard=1s"];

/// A program that serves on the socket of this command.
pub(super) struct Program(Child);

impl Program {
    pub(super) fn start(
        program: &Path,
        arguments: impl Iterator<Item = String>,
        directory: &Path,
        listener: &TcpListener,
        state: &Path,
        number: u64,
    ) -> anyhow::Result<Self> {
        let socket = listener.try_clone()?.into();
        let mut command = Command::new(program);
        command.args(arguments);
        for setting in SOON {
            command.args(["--set", setting]);
        }
        command
            .current_dir(directory)
            .stdin(Stdio::null())
            .env(STATE, state)
            .env(BUILD, number.to_string())
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", PUBLIC)
            .env_remove("LISTEN_PID")
            .kill_on_drop(true)
            .fd_mappings(vec![FdMapping { parent_fd: socket, child_fd: FIRST }])
            .context("the socket cannot be shared")?;
        Ok(Self(command.spawn().with_context(|| format!("{} cannot be started", program.display()))?))
    }

    /// Waits until the program answers a request, or has ended, or takes too long.
    pub(super) async fn answers(&mut self, address: &str) {
        let asked = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(b"GET /_dev/reload.js HTTP/1.0\r\n\r\n").await?;
            stream.read(&mut [0; 1]).await
        };
        tokio::select! {
            _ = tokio::time::timeout(PATIENCE, asked) => {}
            _ = self.0.wait() => {}
        }
    }

    /// Waits for the end of the program, and says how it ended.
    pub(super) async fn ended(&mut self) -> String {
        self.0.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Stops the program as Ctrl-C does, so that running requests are answered.
    pub(super) async fn stop(mut self) {
        let pid = self.0.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::INT);
        }
        if tokio::time::timeout(PATIENCE, self.0.wait()).await.is_err() {
            let _ = self.0.kill().await;
        }
    }
}
