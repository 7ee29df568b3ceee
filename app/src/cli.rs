//! The command line.

mod adopt;
mod arguments;
mod backup;
mod check;
mod client;
mod cron;
mod desk;
mod health;
mod jobs;
mod keys;
mod moment;
mod notify;
mod output;
mod pages;
mod resume;
mod serve;
mod sink;
mod subscriptions;
mod top;
mod trial;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use perennial_store::pool::sql;

use crate::boot;
use crate::config::{Config, Store};
use crate::data_dir::{self, DataDir};
use crate::module::{Blueprint, Configured};
use crate::settings::{DEFAULTS, Problems, Reader, Settings, Sources, masked_words};

/// A long-lived application server: requests, jobs and web push in one process.
#[derive(Debug, Parser)]
#[command(
    name = "perennial",
    version,
    after_help = "Examples:
  perennial                             serve from ./perennial-data
  perennial serve --dev                 try everything on this machine
  perennial check --changed             what is set, and where
  perennial notify --all --title Hello  send, and follow to the end
  perennial jobs list --state dead      what was given up, and why"
)]
struct Cli {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Where settings come from, for every command.
#[derive(Args, Clone, Debug)]
struct SettingsArgs {
    /// A TOML file with settings
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting; may be given several times
    #[arg(long, global = true, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Answer in JSON, an object for each line of a list; errors too
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or Ctrl-C (what happens without a command)
    Serve(serve::Serve),
    /// Check the settings and print those in effect, and where each came from
    Check(check::Check),
    /// The keys: VAPID and API
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Bring the tables of the store up to date, and do nothing else
    #[command(after_help = "Example:\n  perennial migrate --config /etc/perennial.toml")]
    Migrate,
    /// Move everything from an embedded store to the Postgres server that the settings name
    Adopt(adopt::Adopt),
    /// Let jobs and schedules run that rest: in a server that was started with --paused, or on a store that is a copy
    Resume(resume::Resume),
    /// Copy the embedded store and the keys, also while a server runs
    Backup(backup::Backup),
    /// Ask the running server whether it is ready; the exit code says it
    Health(health::Health),
    /// Jobs: look at them, and act on those that have ended
    #[command(subcommand)]
    Jobs(jobs::Jobs),
    /// Schedules: look at them, run one now, pause and resume them
    #[command(subcommand)]
    Cron(cron::Cron),
    /// Show what the running server does, each second anew
    Top(top::Top),
    /// Send a notification through the running server, and follow it to the last delivery. Fails when nobody
    /// of its audience could be delivered to
    Notify(Box<notify::Notify>),
    /// Subscriptions, in and out by the million
    #[command(subcommand)]
    Subscriptions(subscriptions::Subscriptions),
    /// A local push service: gives out subscriptions, and prints what it decrypts
    Sink(sink::Sink),
    /// Print a completion script for a shell
    Completions(pages::Completions),
    /// Print or write the manual pages
    Man(pages::Man),
}

/// Does what the command line says. Exit codes: 0 well done, 1 failed, 2 not understood or bad settings.
pub(crate) fn main(modules: &[Blueprint]) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() && error.to_string().contains("://") => {
            eprint!("{}", masked_words(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(error) => error.exit(),
    };
    let json = cli.settings.json;
    let sources = Sources { file: cli.settings.config, set: cli.settings.set, ..Sources::from_environment() };
    let result = match cli.command.unwrap_or(Command::Serve(serve::Serve::default())) {
        Command::Serve(serve) => return serve.run(&sources, modules),
        Command::Check(check) => return check.run(json, &sources, modules),
        Command::Keys(keys) => keys.run(json, &sources, modules),
        Command::Migrate => migrate(json, &sources, modules),
        Command::Adopt(adopt) => adopt.run(json, &sources, modules),
        Command::Resume(resume) => resume.run(json, &sources, modules),
        Command::Backup(backup) => backup.run(json, &sources, modules),
        Command::Health(health) => health.run(json, &sources, modules),
        Command::Jobs(jobs) => jobs.run(json, &sources, modules),
        Command::Cron(cron) => cron.run(json, &sources, modules),
        Command::Notify(notify) => notify.run(json, &sources, modules),
        Command::Subscriptions(subscriptions) => subscriptions.run(&sources, modules),
        Command::Top(top) => top.run(json, &sources, modules),
        Command::Sink(sink) => sink.run(&sources, modules),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if json && !error.is::<clap::Error>() => {
            eprintln!("{}", serde_json::json!({ "error": format!("{error:#}") }));
            exit_code(&error)
        }
        Err(error) => report(&error),
    }
}

/// Prints an error for a person.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(misused) = error.downcast_ref::<clap::Error>() {
        let _ = misused.print();
        return ExitCode::from(2);
    }
    eprintln!("perennial: {error:#}");
    exit_code(error)
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<Problems>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// Merges the sources over the defaults of the host and of every module. What is wrong with them is for [`read`] to say.
fn load(sources: &Sources, modules: &[Blueprint]) -> Settings {
    let defaults: Vec<&str> =
        [DEFAULTS].into_iter().chain(modules.iter().map(|module| module.defaults)).collect();
    Settings::merge(&defaults, sources)
}

/// Reads all settings, those of the modules too.
fn read(settings: &Settings, modules: &[Blueprint]) -> Result<(Config, Vec<Configured>), Problems> {
    let mut reader = Reader::new(settings);
    let mut config = Config::read(&mut reader);
    let configured = modules.iter().map(|module| module.configure(&mut reader)).collect();
    config.notes = reader.take_notes();
    reader.finish()?;
    Ok((config, configured))
}

/// The store, for a command that runs while no server does.
async fn open_alone(config: &Config, modules: &[Blueprint]) -> anyhow::Result<(DataDir, sql::Store)> {
    data_dir::check_access(&config.data_dir)?;
    let data_dir = DataDir::lock(&config.data_dir)?;
    let store = open_store(&data_dir, &config.store, modules).await?;
    Ok((data_dir, store))
}

/// A store in a directory that is locked, its tables up to date.
async fn open_store(data_dir: &DataDir, store: &Store, modules: &[Blueprint]) -> anyhow::Result<sql::Store> {
    let store = boot::open_store(data_dir, store).await?;
    store.migrate(&boot::tables(modules.iter().map(|module| module.tables))).await?;
    Ok(store)
}

/// Does what a boot does first, so that the boots of many replicas find it done.
fn migrate(json: bool, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
    let settings = load(sources, modules);
    let (config, _) = read(&settings, modules)?;
    block_on(async {
        let (_data_dir, store) = open_alone(&config, modules).await?;
        store.close().await;
        output::done(json, &serde_json::json!({ "migrated": true }), "the tables are up to date\n")
    })?
}

/// Prints, for as long as somebody reads.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// A runtime for commands that talk to a server.
fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}
