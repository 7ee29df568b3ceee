//! What a supervisor that started the process is told, as systemd wants it (`sd_notify(3)`, `Type=notify`): when it is
//! ready, reloads or stops, and that it is alive. Without a supervisor nothing is said.

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

/// Boot has ended.
pub(crate) fn ready(addresses: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("serving on {addresses}"))]);
}

/// Settings are read again; [`ready`] follows.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// They have been read.
pub(crate) fn reloaded() {
    tell(&[NotifyState::Ready]);
}

/// The process leaves.
pub(crate) fn stopping(reason: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(&format!("draining: {reason}"))]);
}

/// Another process is the one to watch from now on.
pub(crate) fn succeeded_by(process: u32) {
    tell(&[NotifyState::MainPid(process), NotifyState::Status("a successor takes over")]);
}

/// Says that the process is alive, for as long as the serving threads run tasks: half as often as the supervisor wants to hear
/// it at the latest.
///
/// # Errors
/// Never: the type is that of a task.
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

/// What cannot be said is no reason to stop, nor to say so at every turn of the watchdog.
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

/// Tells a socket of the abstract namespace, which has a name and no path (`unix(7)`).
fn tell_abstract(name: &str, what: &[NotifyState<'_>]) -> io::Result<()> {
    let address = SocketAddr::from_abstract_name(name)?;
    let lines: String = what.iter().map(|line| format!("{line}\n")).collect();
    UnixDatagram::unbound()?.send_to_addr(lines.as_bytes(), &address).map(drop)
}
