//! Notifications to the supervisor that started the process, as systemd wants them (`sd_notify(3)`, `Type=notify`): the
//! process is ready, reloads, stops, or is alive. Without a supervisor, nothing is sent.

use std::convert::Infallible;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use perennial_runtime::drain::Drain;
use perennial_runtime::health::Health;
use sd_notify::NotifyState;
use tracing::warn;

/// Tells the supervisor that boot has ended, and which addresses are served.
pub(crate) fn ready(addresses: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("serving on {addresses}"))]);
}

/// Tells the supervisor that the settings are read again; [`reloaded`] follows.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// Tells the supervisor that the settings have been read.
pub(crate) fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// Tells the supervisor that the process stops, and why.
pub(crate) fn stopping(reason: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(&format!("draining: {reason}"))]);
}

/// Tells the supervisor that `process`, the successor, is the main process from now on.
pub(crate) fn succeeded_by(process: u32) {
    tell(&[NotifyState::MainPid(process), NotifyState::Status("a successor takes over")]);
}

/// Tells the supervisor that the process is alive, twice in each watchdog period, as long as the serving threads run
/// tasks.
///
/// # Errors
/// Never: a task has to return a result.
pub(crate) async fn watchdog(health: Health, drain: Drain) -> Result<(), Infallible> {
    let Some(every) = sd_notify::watchdog_enabled().map(|period| period / 2) else {
        drain.hard().await;
        return Ok(());
    };
    loop {
        match health.live() {
            Ok(()) => tell(&[NotifyState::Watchdog]),
            Err(reason) => warn!(reason, "the supervisor is not told that the process is alive"),
        }
        tokio::select! {
            () = tokio::time::sleep(every.max(Duration::from_millis(10))) => {}
            () = drain.hard() => return Ok(()),
        }
    }
}

/// Sends a message to the supervisor. A failure does not stop the process; it is logged once until a message succeeds.
fn tell(what: &[NotifyState<'_>]) {
    static HAS_FAILED: AtomicBool = AtomicBool::new(false);
    let told = match std::env::var("NOTIFY_SOCKET").ok().as_deref().and_then(|name| name.strip_prefix('@')) {
        Some(name) => tell_abstract(name, what),
        None => sd_notify::notify(what),
    };
    match told {
        Err(error) if !HAS_FAILED.swap(true, Ordering::Relaxed) => {
            warn!(%error, "the supervisor cannot be told");
        }
        Err(_) => {}
        Ok(()) => HAS_FAILED.store(false, Ordering::Relaxed),
    }
}

/// Sends a message to a socket of the abstract namespace, which has a name and no path (`unix(7)`).
fn tell_abstract(name: &str, what: &[NotifyState<'_>]) -> io::Result<()> {
    let address = SocketAddr::from_abstract_name(name)?;
    let lines: String = what.iter().map(|line| format!("{line}\n")).collect();
    UnixDatagram::unbound()?.send_to_addr(lines.as_bytes(), &address).map(drop)
}
