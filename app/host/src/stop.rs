//! The stop, from top to bottom: the one place that knows the order.

use std::fmt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use perennial_runtime::drain::{Phase, Trigger};
use perennial_runtime::health::Health;
use perennial_runtime::signal::{ProcessSignal, Signals};
use perennial_runtime::tasks::{Death, Tasks};
use perennial_workers::limits::Reached;
use tracing::{error, info, warn};

use crate::boot::App;
use crate::config::Phases;
use crate::supervisor;

/// Interval at which the tasks and jobs that still run are logged.
const TELL: Duration = Duration::from_secs(3);
/// A signal this soon after the first is the same signal, sent twice.
const ECHO: Duration = Duration::from_millis(300);

/// Why the process stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// A signal asked the process to stop.
    ProcessSignal(ProcessSignal),
    /// A successor has the sockets and waits for the lock.
    Succession,
    /// A limit of the process has been reached (`process.max_*`).
    Limit(Reached),
    /// A critical task died.
    Death(Death),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ProcessSignal(ProcessSignal::Terminate) => f.write_str("SIGTERM"),
            Self::ProcessSignal(ProcessSignal::Quit) => f.write_str("SIGQUIT"),
            Self::ProcessSignal(ProcessSignal::Interrupt) => f.write_str("SIGINT"),
            Self::ProcessSignal(ProcessSignal::Reload) => f.write_str("SIGHUP"),
            Self::ProcessSignal(ProcessSignal::Succeed) => f.write_str("SIGUSR2"),
            Self::Succession => f.write_str("succession"),
            Self::Limit(reached) => write!(f, "process.max_* reached: {reached}"),
            Self::Death(death) => write!(f, "{} died: {}", death.task, death.reason),
        }
    }
}

/// How the stop went.
#[derive(Debug)]
pub(crate) struct StopReport {
    /// Jobs that did not end in the soft phase.
    #[cfg_attr(not(feature = "testing"), expect(dead_code, reason = "the log has them, too"))]
    pub(crate) cancelled: Vec<String>,
    /// Tasks that had to be aborted.
    pub(crate) aborted: Vec<&'static str>,
    /// The critical task that died.
    pub(crate) death: Option<Death>,
    /// True when every part closed in time.
    pub(crate) closed: bool,
}

impl StopReport {
    /// Returns true when nothing died or had to be aborted, and everything was closed.
    pub(crate) fn is_in_order(&self) -> bool {
        self.aborted.is_empty() && self.death.is_none() && self.closed
    }

    /// The exit code of the process: 0 when the stop was in order, else 1.
    pub(crate) fn code(&self) -> ExitCode {
        if self.is_in_order() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Stops the process.
pub(crate) async fn stop(
    app: App,
    phases: Phases,
    health: &Health,
    trigger: &Trigger,
    signals: &mut Signals,
    reason: Reason,
) -> StopReport {
    let began = Instant::now();
    if reason != Reason::Succession {
        supervisor::stopping(&reason.to_string());
    }
    info!(
        reason = %reason,
        notice_s = phases.notice.as_secs_f64(),
        soft_s = phases.soft.as_secs_f64(),
        hard_s = phases.hard.as_secs_f64(),
        "draining"
    );
    health.draining();
    trigger.advance(Phase::Notice);
    if matches!(
        reason,
        Reason::ProcessSignal(ProcessSignal::Terminate | ProcessSignal::Quit) | Reason::Limit(_)
    ) {
        trigger.linger(phases.idle.min(phases.soft / 2));
    }
    // The notice is for load balancers. It is skipped when a developer presses Ctrl-C, when a successor has the
    // sockets, or when nothing can be served any more.
    let notice = match reason {
        Reason::ProcessSignal(ProcessSignal::Terminate | ProcessSignal::Quit) | Reason::Limit(_) => {
            phases.notice
        }
        _ => Duration::ZERO,
    };
    let patient = tokio::select! {
        () = tokio::time::sleep(notice) => true,
        () = impatience(signals, began) => false,
    };
    if patient {
        info!("closing the listeners");
        trigger.advance(Phase::Soft);
    }
    let soft = if reason == Reason::Succession { phases.succession } else { phases.soft };
    let finished = patient
        && tokio::select! {
            () = app.tasks.ended() => true,
            () = tell(&app) => false,
            () = tokio::time::sleep(soft) => false,
            () = impatience(signals, began) => false,
        };
    let cancelled = if finished { Vec::new() } else { busy(&app) };
    if !finished {
        warn!(tasks = app.tasks.running().join(", "), "cancelling what still runs");
    }
    trigger.advance(Phase::Hard);
    let finished = tokio::time::timeout(phases.hard, app.tasks.ended()).await.is_ok();
    let aborted = if finished { Vec::new() } else { abort(&app.tasks).await };

    // This includes a critical task that died during the drain.
    let death = app.tasks.death();
    let closed = app.close().await;
    let report = StopReport { cancelled, aborted, death, closed };
    if report.is_in_order() {
        info!("stopped");
    } else {
        let StopReport { aborted, death, .. } = &report;
        error!(aborted = aborted.join(", "), ?death, closed, "stopped, but not as it should be");
    }
    report
}

/// The jobs that run, by kind and id.
fn busy(app: &App) -> Vec<String> {
    app.workers.busy().iter().map(|busy| format!("{} {}", busy.kind, busy.id)).collect()
}

/// Returns when a second signal asks the process to stop without waiting any longer.
async fn impatience(signals: &mut Signals, began: Instant) {
    // Some senders signal the process and its group, which includes the process again.
    loop {
        let signal = signals.next().await;
        let stops =
            matches!(signal, ProcessSignal::Terminate | ProcessSignal::Quit | ProcessSignal::Interrupt);
        if stops && began.elapsed() >= ECHO {
            break;
        }
    }
    warn!("a second signal: not waiting any longer");
}

/// Logs the tasks and jobs that still run, every few seconds. Never returns.
async fn tell(app: &App) {
    loop {
        tokio::time::sleep(TELL).await;
        info!(
            tasks = app.tasks.running().join(", "),
            jobs = busy(app).join(", "),
            "waiting for what still runs"
        );
    }
}

async fn abort(tasks: &Tasks) -> Vec<&'static str> {
    let aborted = tasks.abort();
    // A task that blocks its thread cannot be aborted; the process ends anyway.
    let _ = tokio::time::timeout(Duration::from_secs(1), tasks.ended()).await;
    aborted
}
