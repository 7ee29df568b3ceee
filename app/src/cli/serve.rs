//! `perennial serve`: two runtimes, and who does what on them.
//!
//! The *control* runtime is this thread. It handles signals, answers the admin listener, and stops the
//! process: it goes on when every thread of the other one is blocked. The *serving* runtime has all the
//! others: it boots, and then runs requests and jobs.

use std::io::{IsTerminal, Write};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use parking_lot::Mutex;
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::health::Health;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::signal::{Signal, Signals};
use perennial_runtime::tasks::Tasks;
use perennial_runtime::telemetry::{Telemetry, has_colours};
use perennial_server::http::Server;
use perennial_server::net::Sockets;
use tokio::runtime::{Builder, Runtime};
use tracing::{error, info, warn};

use super::trial::{self, Trial};
use super::{load, read, report};
use crate::admin::{Admin, Booted};
use crate::boot::{self, App};
use crate::config::{self, Config};
use crate::data_dir::DataDir;
use crate::module::{Blueprint, Configured};
use crate::settings::{Reader, Settings, Sources};
use crate::stop::{Reason, stop};
use crate::succession::{self, Inheritance};
use crate::supervisor;

/// How long the threads of the serving runtime may take to end after everything on them has.
const THREADS: Duration = Duration::from_secs(1);

#[derive(Args, Debug, Default)]
pub(super) struct Serve {
    /// Run no jobs and no schedules, and so send nothing, until `perennial resume`
    #[arg(long)]
    paused: bool,
    /// A trial on this machine alone: a push service of its own runs beside the server, with imaginary browsers that
    /// show what they are sent
    #[arg(long)]
    dev: bool,
    /// How many imaginary browsers
    #[arg(long, default_value_t = 3, value_name = "COUNT", requires = "dev")]
    subscribers: usize,
}

/// Where the push service of a trial listens if it can: for messages, and for a Firefox.
const TRIAL_PORTS: (u16, u16) = (8443, 8444);
/// Its certificates, in the data directory.
const TRIAL_DIRECTORY: &str = "dev";

impl Serve {
    pub(super) fn run(&self, sources: &Sources, modules: &[Blueprint]) -> ExitCode {
        serve(self, sources, modules)
    }
}

fn serve(command: &Serve, sources: &Sources, modules: &[Blueprint]) -> ExitCode {
    let control = match Builder::new_current_thread().enable_all().build() {
        Ok(control) => control,
        Err(error) => return report(&error.into()),
    };
    let (code, serving) = control.block_on(async {
        // Until the handlers are there, SIGTERM is sudden death.
        let signals = match Signals::install().context("the signal handlers cannot be installed") {
            Ok(signals) => signals,
            Err(error) => return (report(&error), None),
        };
        if command.dev {
            return match try_out(command, sources, modules, signals).await {
                Ok(served) => served,
                Err(error) => (report(&error), None),
            };
        }
        match prepare(command, sources, modules) {
            Ok(prepared) => prepared.run(signals).await,
            Err(error) => (report(&error), None),
        }
    });
    if let Some(serving) = serving {
        serving.shutdown_timeout(THREADS);
    }
    code
}

/// Serves with a push service beside it, which ends with it. The certificate of that has to be there before the settings are
/// read.
async fn try_out(
    command: &Serve,
    sources: &Sources,
    modules: &[Blueprint],
    signals: Signals,
) -> anyhow::Result<(ExitCode, Option<Runtime>)> {
    let (config, _) = read(&load(sources, modules), modules)?;
    let everywhere = [&config.server.net.listen, &config.admin.net.listen];
    if let Some(listen) = everywhere.into_iter().flatten().find(|listen| !listen.is_loopback()) {
        bail!("--dev is for this machine alone: {listen} can be reached from others");
    }
    let directory = config.data_dir.join(TRIAL_DIRECTORY);
    DataDir::make(&config.data_dir)?;
    let bind =
        async |(push, browsers)| Trial::bind(trial::usual(push), trial::usual(browsers), &directory).await;
    let (trial, bound) = match bind(TRIAL_PORTS).await {
        Ok(bound) => bound,
        // Any others will do, unless a Firefox is to find them again.
        Err(_) => bind((0, 0)).await.context("--dev needs two ports of this machine")?,
    };
    let sources = Sources { trial: Some(trial.ca.clone()), ..sources.clone() };
    let prepared = prepare(command, &sources, modules)?;
    warn_of_trial(&trial);
    let (trigger, drain) = drain::channel();
    let mut beside = tokio::task::JoinSet::new();
    beside.spawn(bound.run(drain));
    let (data_dir, count) = (config.data_dir.clone(), command.subscribers);
    beside.spawn(async move {
        if count > 0
            && let Err(error) = trial.subscribe(&data_dir, count).await
        {
            error!(error = format!("{error:#}"), "the imaginary browsers could not be subscribed");
        }
    });
    let served = prepared.run(signals).await;
    trigger.advance(Phase::Hard);
    beside.shutdown().await;
    Ok(served)
}

/// Says in red what must not be taken for a server.
fn warn_of_trial(trial: &Trial) {
    let (red, plain) =
        if std::io::stderr().is_terminal() && has_colours() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    eprintln!(
        "{red}This is a trial: it sends to a push service of its own at {}, for this machine alone. Do not serve visitors with it.{plain}",
        trial.origin()
    );
    eprintln!(
        "A Firefox takes part with these in about:config: dom.push.serverURL = {}, dom.push.testing.allowInsecureServerURL = true",
        trial.browsers
    );
}

/// Everything that must be right before anything is touched.
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
    /// Serves until somebody says stop. Returns the runtime too: it must not be dropped in here.
    async fn run(self, mut signals: Signals) -> (ExitCode, Option<Runtime>) {
        let Self { sources, modules, settings, config, configured, telemetry, metrics, serving } = self;
        let inheritance = match Inheritance::take() {
            Ok(inheritance) => inheritance,
            Err(error) => return (failed(&error), Some(serving)),
        };
        let health = Health::new(config.health);
        let (trigger, drain) = drain::channel();
        // What must go on while everything else stops.
        let (last, at_last) = drain::channel();
        let attendants = Tasks::new(at_last.clone());

        let admin = match Server::bind(config.admin.clone(), &inheritance.sockets).await.map_err(|error| {
            inheritance.warn_of_the_rest();
            boot::not_opened(error, "admin.listen")
        }) {
            Ok(admin) => admin,
            Err(error) => return (failed(&error), Some(serving)),
        };
        let running = Arc::new(Mutex::new(settings));
        let admin_sockets = admin.sockets();
        let admin_addresses = admin.addresses();
        let known = Admin::new(
            health.clone(),
            metrics.clone(),
            Arc::clone(&telemetry),
            Arc::clone(&running),
            &config.admin.net.listen,
            admin.connections(),
        );
        attendants.critical("admin", admin.run(known.router(), None, at_last.clone()));
        attendants.contained("metrics upkeep", {
            let at_last = at_last.clone();
            move || metrics.clone().upkeep(at_last.clone())
        });
        {
            let _on_serving = serving.enter();
            let (health, at_last) = (health.clone(), at_last.clone());
            attendants.contained("heartbeat", move || health.clone().heartbeat(at_last.clone()));
        }

        attendants.critical("watchdog", supervisor::watchdog(health.clone(), at_last.clone()));
        let phases = config.phases;
        let tables = boot::tables(modules.iter().map(|module| module.tables));
        let boot =
            boot::boot(config, inheritance, configured, tables, admin_addresses, health.clone(), drain);
        let mut booting = serving.spawn(boot);
        let booted = tokio::select! {
            booted = &mut booting => Some(booted),
            signal = first_stop(&mut signals) => {
                info!(?signal, "stopped while booting");
                None
            }
        };
        let code = match booted {
            None => {
                booting.abort();
                ExitCode::SUCCESS
            }
            Some(Err(panic)) => failed(&panic.into()),
            Some(Ok(Err(error))) => failed(&error),
            Some(Ok(Ok(app))) => {
                known.booted(Booted {
                    access: app.access.clone(),
                    workers: app.workers.clone(),
                    status: app.status.clone(),
                    pools: app.pools.clone(),
                    connections: app.connections.clone(),
                    books: app.books.clone(),
                    keyring: app.keyring.clone(),
                    admin_read: app.admin_read.clone(),
                    admin_write: app.admin_write.clone(),
                });
                health.started();
                supervisor::ready(&app.addresses.join(", "));
                greet(&app);
                let reload = || {
                    supervisor::reloading();
                    app.sockets.renew_certificate();
                    reload(&sources, &modules, &running, &telemetry);
                    supervisor::reloaded();
                };
                let sockets = [app.sockets.clone(), admin_sockets];
                let reason = serve_until(&app, &attendants, &sockets, &mut signals, reload).await;
                if reason == Reason::Succession {
                    sockets.iter().for_each(Sockets::handed_over);
                }
                stop(app, phases, &health, &trigger, &mut signals, reason).await
            }
        };
        last.advance(Phase::Hard);
        if tokio::time::timeout(THREADS, attendants.ended()).await.is_err() {
            warn!(tasks = ?attendants.abort(), "left behind");
        }
        (code, Some(serving))
    }
}

/// Boot could not be finished. A filter that lets no errors through must not hide that.
fn failed(error: &anyhow::Error) -> ExitCode {
    if !tracing::enabled!(tracing::Level::ERROR) {
        eprintln!("perennial: boot failed: {error:#}");
    }
    error!(error = format!("{error:#}"), "boot failed");
    ExitCode::FAILURE
}

/// Waits for a reason to leave.
async fn serve_until(
    app: &App,
    attendants: &Tasks,
    sockets: &[Sockets],
    signals: &mut Signals,
    reload: impl Fn(),
) -> Reason {
    let terminal = Terminal::now();
    let mut reached = pin!(app.limits.reached(&app.workers));
    loop {
        tokio::select! {
            death = app.tasks.died() => return Reason::Death(death),
            death = attendants.died() => return Reason::Death(death),
            reached = &mut reached => return Reason::Limit(reached),
            signal = signals.next() => match signal {
                // The terminal that it was started on has been closed.
                Signal::Reload if terminal.has_gone() => return Reason::Signal(Signal::Interrupt),
                Signal::Reload => reload(),
                Signal::Succeed => {
                    // Whoever wants it to stop does not wait for a successor, which then ends, too.
                    let begun = tokio::select! {
                        begun = succession::begin(sockets) => begun,
                        signal = first_stop(signals) => return Reason::Signal(signal),
                        death = app.tasks.died() => return Reason::Death(death),
                        death = attendants.died() => return Reason::Death(death),
                    };
                    match begun {
                        Ok(()) => return Reason::Succession,
                        Err(error) => error!(error = format!("{error:#}"), "no successor; going on"),
                    }
                }
                signal => return Reason::Signal(signal),
            },
        }
    }
}

/// Whether there is a person at standard error.
#[derive(Clone, Copy, Debug)]
struct Terminal(bool);

impl Terminal {
    fn now() -> Self {
        Self(std::io::stderr().is_terminal())
    }

    /// Whether there was one and is none any more: a terminal that is closed sends SIGHUP, too.
    fn has_gone(self) -> bool {
        self.0 && !std::io::stderr().is_terminal()
    }
}

async fn first_stop(signals: &mut Signals) -> Signal {
    loop {
        match signals.next().await {
            Signal::Reload | Signal::Succeed => info!("nothing can be reloaded or handed over now"),
            signal => return signal,
        }
    }
}

/// SIGHUP: reads the settings again, applies what can be applied, and says what could not.
fn reload(sources: &Sources, modules: &[Blueprint], running: &Mutex<Settings>, telemetry: &Telemetry) {
    let settings = load(sources, modules);
    let mut reader = Reader::new(&settings);
    let config = config::telemetry(&mut reader);
    if let Err(problems) = reader.finish() {
        if !tracing::enabled!(tracing::Level::ERROR) {
            eprintln!("perennial: nothing was reloaded: {problems}");
        }
        return error!(%problems, "nothing was reloaded");
    }
    telemetry.set_filter(&config.filter);
    let mut running = running.lock();
    running.take_over("telemetry.log", &settings);
    info!(needs_a_restart = ?settings.changed_from(&running), "reloaded telemetry.log");
}

/// Tells a person at a terminal where to go. Whatever is said here is not in any log.
fn greet(app: &App) {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        for line in &app.announcements {
            let _ = writeln!(out, "{line}");
        }
    }
}

/// Every connection is an open file, and the usual limit of 1024 is for programs that are not servers.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "the limit of open files stays as it is");
    }
}
