//! `perennial serve`: two runtimes, and their tasks.
//!
//! The *control* runtime is this thread. It handles signals, serves the admin listener, and stops the process: it goes
//! on when every thread of the other runtime is blocked. The *serving* runtime has all other threads: it boots, and
//! then runs requests and jobs.

use std::io::{IsTerminal, Write};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgMatches, Args};
use parking_lot::Mutex;
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::health::Health;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::signal::{ProcessSignal, Signals};
use perennial_runtime::tasks::Tasks;
use perennial_runtime::telemetry::Telemetry;
use perennial_server::net::Sockets;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{error, info, warn};

use super::report;
use crate::admin::Booted;
use crate::boot::{self, App, BootPlan};
use crate::command::Beside;
use crate::config::{self, Config};
use crate::control::Control;
use crate::handover::{self, Inheritance};
use crate::http_client;
use crate::module::{Blueprint, Configured, load, read};
use crate::program;
use crate::settings::{Reader, Settings, Sources};
use crate::stop::{Reason, stop};
use crate::supervisor;

/// Time limit for the threads of the serving runtime to end, after all tasks on them have ended.
const THREADS: Duration = Duration::from_secs(1);

#[derive(Args, Debug, Default)]
pub(super) struct Serve {
    /// Run no jobs and no schedules, and so send nothing, until `perennial resume`
    #[arg(long)]
    paused: bool,
}

impl Serve {
    /// Serves; `matches` has the whole command line.
    pub(super) fn run(&self, matches: &ArgMatches, sources: &Sources, modules: &[Blueprint]) -> ExitCode {
        let control = match Builder::new_current_thread().enable_all().build() {
            Ok(control) => control,
            Err(error) => return report(&error.into()),
        };
        let served = control.block_on(async {
            // Until the handlers are installed, SIGTERM kills the process at once.
            let signals = Signals::install().context("the signal handlers cannot be installed")?;
            match self.open_companion(matches, sources, modules).await? {
                Some((sources, beside)) => self.serve_beside(&sources, modules, beside, signals).await,
                None => Ok(prepare(self, sources, modules)?.run(signals).await),
            }
        });
        match served {
            Ok((code, serving)) => {
                if let Some(serving) = serving {
                    serving.shutdown_timeout(THREADS);
                }
                code
            }
            Err(error) => report(&error),
        }
    }

    /// Opens the companion that a flag asks for, and returns it with the sources, which then have its settings.
    async fn open_companion(
        &self,
        matches: &ArgMatches,
        sources: &Sources,
        modules: &[Blueprint],
    ) -> anyhow::Result<Option<(Sources, Beside)>> {
        let Some(("serve", matches)) = matches.subcommand() else { return Ok(None) };
        for companion in modules.iter().filter_map(|module| (module.commands)().companion()) {
            if !(companion.is_wanted)(matches)? {
                continue;
            }
            let context = super::context(false, sources, modules)?;
            let beside = (companion.open)(matches, &context)?.await?;
            let needed = Some((companion.flag, beside.settings.clone()));
            return Ok(Some((Sources { companion: needed, ..sources.clone() }, beside)));
        }
        Ok(None)
    }

    /// Serves with a companion, which ends after the server.
    async fn serve_beside(
        &self,
        sources: &Sources,
        modules: &[Blueprint],
        beside: Beside,
        signals: Signals,
    ) -> anyhow::Result<ServeResult> {
        let prepared = prepare(self, sources, modules)?;
        (beside.announce)();
        let (trigger, drain) = drain::channel();
        let mut companion = JoinSet::new();
        companion.spawn((beside.run)(drain));
        let served = prepared.run(signals).await;
        trigger.advance(Phase::Hard);
        companion.shutdown().await;
        Ok(served)
    }
}

/// The exit code, and the serving runtime, which must not be dropped on another runtime.
type ServeResult = (ExitCode, Option<Runtime>);

/// Everything that must be valid before anything is changed.
struct Prepared {
    sources: Sources,
    modules: Vec<Blueprint>,
    settings: Settings,
    config: Config,
    configured: Vec<Configured>,
    telemetry: Arc<Telemetry>,
    metrics: Metrics,
    serving: Runtime,
}

fn prepare(command: &Serve, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<Prepared> {
    let settings = load(sources, modules);
    let (mut config, configured) = read(&settings, modules)?;
    let telemetry = Arc::new(Telemetry::install(&config.telemetry)?);
    config.server.access_log = telemetry.json_lines();
    config.paused = command.paused;
    let metrics = Metrics::install()?;
    perennial_server::metrics::describe();
    perennial_store::metrics::describe();
    perennial_workers::metrics::describe();
    http_client::describe();
    raise_file_limit();
    for note in &config.notes {
        warn!(note, "a setting needs attention");
    }
    let serving = Builder::new_multi_thread()
        .worker_threads(config.threads)
        .thread_name("serving")
        .enable_all()
        .build()
        .context("the threads cannot be started")?;
    let (sources, modules) = (sources.clone(), modules.to_vec());
    Ok(Prepared { sources, modules, settings, config, configured, telemetry, metrics, serving })
}

impl Prepared {
    /// Serves until there is a reason to stop.
    async fn run(self, mut signals: Signals) -> ServeResult {
        let Self { sources, modules, settings, config, configured, telemetry, metrics, serving } = self;
        let health = Health::new(config.health);
        let running = Arc::new(Mutex::new(settings));
        // Tasks with this drain go on while everything else stops.
        let (last, at_last) = drain::channel();
        let control = Control {
            background: Tasks::new(at_last.clone()),
            drain: at_last,
            health: health.clone(),
            metrics,
            telemetry: Arc::clone(&telemetry),
            running: Arc::clone(&running),
        };
        let opened = async {
            let inheritance = Inheritance::take()?;
            let admin = control.open_admin(&config, &inheritance, serving.handle()).await?;
            anyhow::Ok((inheritance, admin))
        };
        let (inheritance, admin) = match opened.await {
            Ok(opened) => opened,
            Err(error) => return (failed(&error), Some(serving)),
        };
        let phases = config.phases;
        let plan = BootPlan::new(config, &modules, &running.lock(), inheritance, admin.addresses);
        let (trigger, drain) = drain::channel();
        let booting = serving.spawn(boot::boot(plan, configured, health.clone(), drain));
        let code = match booted(booting, &mut signals).await {
            Err(code) => code,
            Ok((app, booted)) => {
                admin.known.booted(booted);
                health.started();
                supervisor::ready(&app.addresses.server.join(", "));
                greet(&app);
                let reload = || {
                    supervisor::reloading();
                    app.sockets.iter().for_each(Sockets::renew_certificate);
                    reload(&sources, &modules, &running, &telemetry);
                    supervisor::reloaded();
                };
                let sockets = [app.sockets.clone(), vec![admin.sockets]].concat();
                let reason = serve_until(&app, &control.background, &sockets, &mut signals, reload).await;
                if reason == Reason::Succession {
                    sockets.iter().for_each(Sockets::handed_over);
                }
                stop(app, phases, &health, &trigger, &mut signals, reason).await.code()
            }
        };
        last.advance(Phase::Hard);
        if tokio::time::timeout(THREADS, control.background.ended()).await.is_err() {
            warn!(tasks = ?control.background.abort(), "left behind");
        }
        (code, Some(serving))
    }
}

/// Waits until boot has ended. A signal before that, or an error, ends the process with the returned exit code.
async fn booted(
    mut booting: JoinHandle<anyhow::Result<(App, Booted)>>,
    signals: &mut Signals,
) -> Result<(App, Booted), ExitCode> {
    let booted = tokio::select! {
        booted = &mut booting => booted,
        signal = first_stop(signals) => {
            info!(?signal, "stopped while booting");
            booting.abort();
            return Err(ExitCode::SUCCESS);
        }
    };
    match booted {
        Err(panic) => Err(failed(&panic.into())),
        Ok(booted) => booted.map_err(|error| failed(&error)),
    }
}

/// Reports that boot failed, even if the filter of the log lets no errors through.
fn failed(error: &anyhow::Error) -> ExitCode {
    if !tracing::enabled!(tracing::Level::ERROR) {
        eprintln!("{}: boot failed: {error:#}", program::name());
    }
    error!(error = format!("{error:#}"), "boot failed");
    ExitCode::FAILURE
}

/// Waits for a reason to stop.
async fn serve_until(
    app: &App,
    background: &Tasks,
    sockets: &[Sockets],
    signals: &mut Signals,
    reload: impl Fn(),
) -> Reason {
    let terminal = Terminal::now();
    let mut reached = pin!(app.limits.reached(&app.workers));
    loop {
        tokio::select! {
            death = app.tasks.died() => return Reason::Death(death),
            death = background.died() => return Reason::Death(death),
            reached = &mut reached => return Reason::Limit(reached),
            signal = signals.next() => match signal {
                // The terminal that the process was started on has been closed.
                ProcessSignal::Reload if terminal.has_gone() => return Reason::ProcessSignal(ProcessSignal::Interrupt),
                ProcessSignal::Reload => reload(),
                ProcessSignal::Succeed => {
                    // A signal to stop does not wait for the successor, which then ends, too.
                    let begun = tokio::select! {
                        begun = handover::begin(sockets) => begun,
                        signal = first_stop(signals) => return Reason::ProcessSignal(signal),
                        death = app.tasks.died() => return Reason::Death(death),
                        death = background.died() => return Reason::Death(death),
                    };
                    match begun {
                        Ok(()) => return Reason::Succession,
                        Err(error) => error!(error = format!("{error:#}"), "no successor; going on"),
                    }
                }
                signal => return Reason::ProcessSignal(signal),
            },
        }
    }
}

/// Whether standard error was a terminal at the start.
#[derive(Clone, Copy, Debug)]
struct Terminal(bool);

impl Terminal {
    fn now() -> Self {
        Self(std::io::stderr().is_terminal())
    }

    /// Returns true when standard error was a terminal and no longer is: a terminal that is closed sends SIGHUP, too.
    fn has_gone(self) -> bool {
        self.0 && !std::io::stderr().is_terminal()
    }
}

async fn first_stop(signals: &mut Signals) -> ProcessSignal {
    loop {
        match signals.next().await {
            ProcessSignal::Reload | ProcessSignal::Succeed => {
                info!("nothing can be reloaded or handed over now");
            }
            signal => return signal,
        }
    }
}

/// Handles SIGHUP: reads the settings again, applies the ones that can be applied, and logs the others.
fn reload(sources: &Sources, modules: &[Blueprint], running: &Mutex<Settings>, telemetry: &Telemetry) {
    let settings = load(sources, modules);
    let mut reader = Reader::new(&settings);
    let config = config::telemetry(&mut reader);
    if let Err(problems) = reader.finish() {
        if !tracing::enabled!(tracing::Level::ERROR) {
            eprintln!("{}: nothing was reloaded: {problems}", program::name());
        }
        return error!(%problems, "nothing was reloaded");
    }
    telemetry.set_filter(&config.filter);
    let mut running = running.lock();
    running.take_over("telemetry.log", &settings);
    info!(needs_a_restart = ?settings.changed_from(&running), "reloaded telemetry.log");
}

/// Prints the announcements if standard output is a terminal. They are in no log.
fn greet(app: &App) {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        for line in &app.announcements {
            let _ = writeln!(out, "{line}");
        }
    }
}

/// Raises the limit of open files: every connection is an open file, and the usual limit of 1024 is too low for a
/// server.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "the limit of open files stays as it is");
    }
}
