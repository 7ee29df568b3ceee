//! The stop, top to bottom: the one place that knows the order.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use perennial_server::drain::{Phase, Trigger};
use perennial_server::health::Health;
use perennial_server::signal::{Signal, Signals};
use perennial_server::tasks::{Death, Tasks};
use tracing::{error, info, warn};

use crate::boot::App;

/// How soon after the first a second signal is the same one, sent twice.
const ECHO: Duration = Duration::from_millis(300);

/// How long each phase of the stop may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Phases {
    /// Requests are served as before, while load balancers learn that this process leaves.
    pub(crate) notice: Duration,
    /// What runs may finish.
    pub(crate) soft: Duration,
    /// What was cancelled may hand back its work.
    pub(crate) hard: Duration,
}

/// Why the process leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Somebody asked it to.
    Signal(Signal),
    /// It cannot go on.
    Death(Death),
}

/// Leaves, and says with which exit code: 0, or 1 when a critical task died or something had to be aborted.
pub(crate) async fn stop(
    app: App,
    phases: Phases,
    health: &Health,
    trigger: &Trigger,
    signals: &mut Signals,
    reason: Reason,
) -> ExitCode {
    let began = Instant::now();
    info!(?reason, ?phases, "draining");
    health.draining();
    trigger.advance(Phase::Notice);
    // Nobody waits for load balancers when a developer presses Ctrl-C, or when nothing can be served any more.
    let notice = if reason == Reason::Signal(Signal::Terminate) { phases.notice } else { Duration::ZERO };
    let patient = tokio::select! {
        () = tokio::time::sleep(notice) => true,
        () = impatience(signals, began) => false,
    };
    if patient {
        info!("closing the listeners");
        trigger.advance(Phase::Soft);
    }
    let finished = patient
        && tokio::select! {
            () = app.tasks.ended() => true,
            () = tokio::time::sleep(phases.soft) => false,
            () = impatience(signals, began) => false,
        };
    if !finished {
        warn!(tasks = ?app.tasks.running(), "cancelling what still runs");
    }
    trigger.advance(Phase::Hard);
    let finished = tokio::time::timeout(phases.hard, app.tasks.ended()).await.is_ok();
    let aborted = if finished { Vec::new() } else { abort(&app.tasks).await };

    app.close().await;
    let died = matches!(reason, Reason::Death(_));
    if aborted.is_empty() && !died {
        info!("stopped");
        ExitCode::SUCCESS
    } else {
        error!(?aborted, ?reason, "stopped, but not as it should be");
        ExitCode::FAILURE
    }
}

/// A second signal does not wait for anybody.
async fn impatience(signals: &mut Signals, began: Instant) {
    // Some senders signal the process and its group, which is the process again.
    while signals.next().await == Signal::Reload || began.elapsed() < ECHO {}
    warn!("a second signal: not waiting any longer");
}

async fn abort(tasks: &Tasks) -> Vec<&'static str> {
    let aborted = tasks.abort();
    // A task that blocks its thread cannot even be aborted; the process ends all the same.
    let _ = tokio::time::timeout(Duration::from_secs(1), tasks.ended()).await;
    aborted
}
