//! The handover (SIGUSR2): a newer process replaces the running one without a refused connection.
//!
//! ```text
//! predecessor                                successor
//! SIGUSR2: starts its own program again,
//!   with the listening sockets and a line
//!   to speak on                        ───►  settings, admin listener
//!                                      ◄───  "at the lock"
//! stops accepting, sockets stay open;
//! drains, closes the store, ends       ───►  gets the lock, boots on, accepts
//! ```
//!
//! From the first arrow to the last, no connection is refused: new connections wait in the backlog of the kernel. A
//! successor that fails before it is at the lock changes nothing: its predecessor goes on.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, bail};
use command_fds::{CommandFdExt, FdMapping};
use parking_lot::{Mutex, MutexGuard};
use perennial_server::net::{Inherited, Sockets};
use tokio::io::AsyncReadExt;
use tracing::{info, warn};

use crate::data_dir::{self, DataDir};
use crate::supervisor;

/// Name of the socket to the predecessor among the inherited descriptors.
const LINE: &str = "predecessor";
/// Number of the first inherited descriptor (`sd_listen_fds(3)`).
const FIRST: i32 = 3;
/// Time that a successor may take until it is at the lock.
const PATIENCE: Duration = Duration::from_secs(60);
/// Interval at which a successor tries the lock.
const TRY_EVERY: Duration = Duration::from_millis(5);

/// Starts a successor with these sockets, and returns when it waits for the lock.
///
/// # Errors
/// When the successor cannot be started, ends, or takes too long. Then nothing has changed.
pub(crate) async fn begin(sockets: &[Sockets]) -> anyhow::Result<()> {
    // The end of process 1 is the end of its container, and of every successor in it.
    if std::process::id() == 1 {
        bail!("this is process 1 of a container, which would end with it: replace the container instead");
    }
    let (ours, theirs) = UnixStream::pair().context("no line to a successor")?;
    let mut names = Vec::new();
    let mut mappings = Vec::new();
    let mut hand = |name: &'static str, parent_fd: OwnedFd| -> anyhow::Result<()> {
        let child_fd = FIRST + i32::try_from(mappings.len())?;
        names.push(name);
        mappings.push(FdMapping { parent_fd, child_fd });
        Ok(())
    };
    for sockets in sockets {
        for (name, descriptor) in sockets.share().context("the sockets cannot be shared")? {
            hand(name, descriptor)?;
        }
    }
    hand(LINE, theirs.into())?;

    let program = program()?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut command = Command::new(&program);
    command
        .args(arguments)
        .env("LISTEN_FDS", names.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDS_FIRST_FD")
        // The watchdog of a supervisor goes over to the successor.
        .env_remove("WATCHDOG_PID")
        .fd_mappings(mappings)
        .context("the sockets cannot be shared")?;
    let successor = Successor(Some(command.spawn().context("the successor cannot be started")?));
    // The command holds the other end of the socket. While that is open here, the death of the successor would not be
    // noticed.
    drop(command);
    info!(program = %program.display(), "a successor is starting");
    at_the_lock(ours).await?;
    if let Some(process) = successor.0.as_ref().map(Child::id) {
        supervisor::succeeded_by(process);
    }
    successor.release();
    Ok(())
}

/// The path that the program was started from. The file there may be newer by now.
fn program() -> anyhow::Result<PathBuf> {
    let named = std::env::args_os().next().map(PathBuf::from);
    if let Some(named) = named.filter(|named| named.components().count() > 1 && named.exists()) {
        return Ok(named);
    }
    let resolved = std::env::current_exe().context("the program cannot be found")?;
    let replaced = resolved.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
    Ok(replaced.unwrap_or(resolved))
}

/// A successor, which is killed on drop until it is at the lock and has been released.
struct Successor(Option<Child>);

impl Successor {
    fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn at_the_lock(line: UnixStream) -> anyhow::Result<()> {
    line.set_nonblocking(true)?;
    let mut line = tokio::net::UnixStream::from_std(line)?;
    let mut word = [0];
    match tokio::time::timeout(PATIENCE, line.read(&mut word)).await {
        Ok(Ok(1)) => Ok(()),
        Ok(_) => bail!("the successor ended before it could take over; its log says why"),
        Err(_) => bail!("the successor did not get as far as the lock within {} s", PATIENCE.as_secs()),
    }
}

/// The sockets that a process inherits from its predecessor or from systemd. A process that a person starts has none.
#[derive(Debug)]
pub(crate) struct Inheritance {
    pub(crate) sockets: Inherited,
    predecessor: Mutex<Option<UnixStream>>,
}

impl Inheritance {
    /// Takes the descriptors that the environment names.
    pub(crate) fn take() -> anyhow::Result<Self> {
        let sockets = Inherited::from_environment().context("LISTEN_FDS does not say what was inherited")?;
        let predecessor = Mutex::new(sockets.take_unix(LINE).map(line));
        Ok(Self { sockets, predecessor })
    }

    /// Nothing is inherited.
    #[cfg(feature = "testing")]
    pub(crate) fn none() -> Self {
        Self { sockets: Inherited::default(), predecessor: Mutex::new(None) }
    }

    fn predecessor(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.predecessor.lock()
    }

    /// Returns true when there is a predecessor.
    pub(crate) fn succeeds(&self) -> bool {
        self.predecessor().is_some()
    }

    /// Locks the data directory. A predecessor, if there is one, is asked to leave first.
    pub(crate) async fn lock(&self, path: &Path, patience: Duration) -> anyhow::Result<DataDir> {
        let predecessor = self.predecessor().take();
        let Some(mut line) = predecessor else { return Ok(DataDir::lock(path)?) };
        line.write_all(b".").context("the predecessor has gone")?;
        let began = tokio::time::Instant::now();
        loop {
            match DataDir::lock(path) {
                Err(data_dir::Error::InUse { .. }) if began.elapsed() < patience => {
                    tokio::time::sleep(TRY_EVERY).await;
                }
                locked => {
                    info!(waited_ms = u64::try_from(began.elapsed().as_millis())?, "taken over");
                    return Ok(locked?);
                }
            }
        }
    }

    /// Warns of inherited sockets that no listener has taken.
    pub(crate) fn warn_of_the_rest(&self) {
        for socket in self.sockets.left() {
            warn!(socket, "an inherited socket is not among server.listen and admin.listen, and is not used");
        }
    }
}

/// Converts a descriptor that has the type of a listening socket, but is a stream.
fn line(socket: UnixListener) -> UnixStream {
    UnixStream::from(OwnedFd::from(socket))
}
