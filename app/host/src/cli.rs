//! The command line.

mod adopt;
mod backup;
mod check;
mod cron;
mod dev;
mod health;
mod jobs;
mod keys;
mod new;
mod pages;
mod resume;
mod serve;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use axum::{Extension, Router};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::admin::jobs::JobAdminState;
use crate::admin::{self, schedules};
use crate::boot::open;
use crate::command::output::done;
use crate::command::{CommandContext, Offline, block_on};
use crate::module::{self, Blueprint};
use crate::program;
use crate::settings::{Problems, Sources, masked_words};

#[cfg(feature = "testing")]
pub(crate) use keys::make_keys;

/// A long-lived application server: requests, jobs and web push in one process.
#[derive(Debug, Parser)]
#[command(
    name = "perennial",
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
    command: Option<HostCommand>,
}

/// Sources of settings, for every command.
#[derive(Args, Clone, Debug)]
struct SettingsArgs {
    /// A TOML file with settings
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting; may be given several times
    #[arg(long, global = true, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Print answers and errors as JSON; a list has one object per line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum HostCommand {
    /// Serve until SIGTERM or Ctrl-C (the default command)
    Serve(serve::Serve),
    /// Check the settings, and print the value and the source of each
    Check(check::Check),
    /// Make, show and change VAPID and API keys
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Bring the tables of the store up to date, and do nothing else
    #[command(after_help = "Example:\n  perennial migrate --config /etc/perennial.toml")]
    Migrate,
    /// Move everything from an embedded store to the Postgres server that the settings name
    Adopt(adopt::Adopt),
    /// Let paused jobs and schedules run: in a server that was started with --paused, or on a store that is a copy
    Resume(resume::ResumeArgs),
    /// Copy the embedded store and the keys, also while a server runs
    Backup(backup::Backup),
    /// Ask the running server whether it is ready; the exit code is 0 if it is
    Health(health::HealthArgs),
    /// List jobs, enqueue or cancel one, retry or discard ended ones, and pause queues
    #[command(subcommand)]
    Jobs(jobs::JobsCommand),
    /// List schedules, run one now, pause and resume them
    #[command(subcommand)]
    Cron(cron::Cron),
    /// Make the project of an application of your own
    New(new::New),
    /// Build and run a project, anew whenever its files change
    Dev(dev::Dev),
    /// Show the activity of the running server, updated every second
    Top(top::Top),
    /// Print a completion script for a shell
    #[command(display_order = 1000)]
    Completions(pages::Completions),
    /// Print or write the manual pages
    #[command(display_order = 1000)]
    Man(pages::Man),
}

/// The command line: the host's commands, and those of the modules.
fn definition(modules: &[Blueprint]) -> clap::Command {
    let scopes = format!("Scopes of the key: {}; all of them by default", module::scopes(modules).words());
    let host = Cli::command().mut_subcommand("keys", |keys| {
        keys.mut_subcommand("add", |add| add.mut_arg("scopes", |argument| argument.help(scopes)))
    });
    let identity = program::identity();
    let command = modules.iter().fold(host, |command, module| (module.commands)().define(command));
    let command = command.name(&*identity.name).bin_name(&*identity.name).version(&*identity.version);
    let command = if identity.about.is_empty() { command } else { command.about(&*identity.about) };
    with_own_name(command)
}

/// Puts the name of the program into the examples of a command and of those below it.
fn with_own_name(mut command: clap::Command) -> clap::Command {
    if let Some(help) = command.get_after_help().map(ToString::to_string) {
        command = command.after_help(program::in_its_name(&help).into_owned());
    }
    command.mut_subcommands(with_own_name)
}

/// Runs the command of the command line. Exit codes: 0 success, 1 failure, 2 wrong arguments or settings.
pub(crate) fn main(modules: &[Blueprint], defaults: Vec<(String, toml::Value)>) -> ExitCode {
    let matches = match definition(modules).try_get_matches() {
        Ok(matches) => matches,
        Err(error) if error.use_stderr() && error.to_string().contains("://") => {
            eprint!("{}", masked_words(&error.to_string()));
            return ExitCode::from(2);
        }
        Err(error) => error.exit(),
    };
    let settings = SettingsArgs::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let json = settings.json;
    let (file, set) = (settings.config, settings.set);
    let sources = Sources { file, set, program: defaults, ..Sources::from_environment() };
    let of_module = modules.iter().find_map(|module| (module.commands)().asked(&matches));
    let result = match of_module {
        Some((run, matches)) => {
            context(json, &sources, modules).map_err(Into::into).and_then(|context| run(matches, &context))
        }
        None => {
            let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
            match cli.command.unwrap_or(HostCommand::Serve(serve::Serve::default())) {
                HostCommand::Serve(serve) => return serve.run(&matches, &sources, modules),
                HostCommand::Check(check) => return check.run(json, &sources, modules),
                HostCommand::Completions(completions) => completions.run(definition(modules)),
                HostCommand::Man(man) => man.run(definition(modules)),
                HostCommand::New(new) => new.run(json),
                HostCommand::Dev(dev) => dev.run(),
                command => context(json, &sources, modules)
                    .map_err(Into::into)
                    .and_then(|context| command.run(&context, modules)),
            }
        }
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

/// Reads all settings for a command.
pub(crate) fn context(
    json: bool,
    sources: &Sources,
    modules: &[Blueprint],
) -> Result<CommandContext, Problems> {
    let settings = module::load(sources, modules);
    let (config, _) = module::read(&settings, modules)?;
    let files = modules.iter().flat_map(|module| (module.files)(&settings)).collect();
    let tables = open::tables(modules.iter().map(|module| module.tables));
    let directories = module::directories(modules);
    Ok(CommandContext { json, settings, config: config.into(), tables, files, directories })
}

/// Prints an error for a person, and returns the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(misused) = error.downcast_ref::<clap::Error>() {
        let _ = misused.print();
        return ExitCode::from(2);
    }
    eprintln!("{}: {error:#}", program::name());
    exit_code(error)
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<Problems>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

impl HostCommand {
    fn run(self, context: &CommandContext, modules: &[Blueprint]) -> anyhow::Result<()> {
        match self {
            Self::Keys(keys) => keys.run(context, modules),
            Self::Migrate => migrate(context),
            Self::Adopt(adopt) => adopt.run(context),
            Self::Resume(resume) => resume.run(context),
            Self::Backup(backup) => backup.run(context),
            Self::Health(health) => health.run(context),
            Self::Jobs(jobs) => jobs.run(context),
            Self::Cron(cron) => cron.run(context),
            Self::Top(top) => top.run(context),
            Self::Serve(_)
            | Self::Check(_)
            | Self::Completions(_)
            | Self::Man(_)
            | Self::New(_)
            | Self::Dev(_) => Ok(()),
        }
    }
}

/// Makes the routes for jobs and schedules, on the store.
async fn books(offline: Offline) -> anyhow::Result<Router> {
    let routes = admin::jobs::admin_read().merge(admin::jobs::admin_write());
    let routes = routes.merge(schedules::admin_read()).merge(schedules::admin_write());
    Ok(routes.layer(Extension(JobAdminState::alone(offline.jobs))))
}

/// Runs the migrations, which a boot does first, so that the boots of many replicas find them done.
fn migrate(context: &CommandContext) -> anyhow::Result<()> {
    block_on(async {
        let (_data_dir, store) = context.open_alone().await?;
        store.close().await;
        done(context.json, &serde_json::json!({ "migrated": true }), "the tables are up to date\n")
    })?
}
