//! The parts that commands of the host and of modules are made of.
//!
//! A command may run while a server runs on the data directory, or while none does. [`CommandContext::with_backend`]
//! finds out which, and calls the same routes in both cases.

pub mod arguments;
mod backend;
mod client;
pub mod moment;
pub mod output;

use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::Resettable;
use clap::{ArgMatches, Args};
use perennial_runtime::drain::Drain;
use perennial_store::pool::sql::{self, Tables};

pub use backend::{AdminBackend, Offline};
pub use client::{Client, Refused, ServerAnswer};

use crate::addresses::{Addresses, url};
use crate::boot::open;
use crate::config::{Config, StoreConfig};
use crate::data_dir::{self, API_KEY, DataDir, SecretFile};
use crate::settings::Settings;

/// A command of a module. The type has its arguments, and the docstring of the type is its description.
pub trait Command: Args + 'static {
    /// Name of the command on the command line.
    const NAME: &'static str;

    /// Runs the command. An error ends the program with exit code 1, and an error of settings or arguments (a
    /// [`clap::Error`]) with 2.
    ///
    /// # Errors
    /// The message for the person at the terminal.
    fn run(self, context: &CommandContext) -> anyhow::Result<()>;
}

/// A companion that runs beside the server when a flag of `serve` asks for it, such as a peer for trials.
pub trait Companion: Args + Send + 'static {
    /// The flag, which is shown as the source of the settings that it stands for.
    const FLAG: &'static str;

    /// Returns true when the command line asks for the companion.
    fn is_wanted(&self) -> bool;

    /// Opens the resources of the companion, before the final settings of the server are read.
    ///
    /// # Errors
    /// When the companion cannot be opened; the server is not started then.
    fn open(self, context: &CommandContext) -> impl Future<Output = anyhow::Result<Beside>> + Send;
}

/// An open companion.
pub struct Beside {
    /// Settings that the server needs for the companion. A list is appended to the current value; any other value
    /// replaces it.
    pub settings: Vec<(String, toml::Value)>,
    /// Describes the companion on the terminal. It is called after the settings have been found valid.
    pub announce: Box<dyn FnOnce() + Send>,
    /// Runs the companion until the drain is hard, which is after the server has ended.
    pub run: RunBeside,
}

/// Type of [`Beside::run`].
pub type RunBeside = Box<dyn FnOnce(Drain) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

type Define = fn(clap::Command) -> clap::Command;
type RunCommand = fn(&ArgMatches, &CommandContext) -> anyhow::Result<()>;
type Opening<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Beside>> + Send + 'a>>;

/// A command whose type is erased.
#[derive(Clone, Copy, Debug)]
struct CommandEntry {
    /// Parent command, such as `keys`.
    group: Option<&'static str>,
    name: &'static str,
    define: Define,
    run: RunCommand,
}

/// A companion whose type is erased.
#[derive(Clone, Copy)]
pub(crate) struct CompanionEntry {
    pub(crate) flag: &'static str,
    define: Define,
    /// Returns true if the command line asks for the companion.
    pub(crate) is_wanted: fn(&ArgMatches) -> Result<bool, clap::Error>,
    /// Opens it.
    pub(crate) open: for<'a> fn(&ArgMatches, &'a CommandContext) -> Result<Opening<'a>, clap::Error>,
}

impl std::fmt::Debug for CompanionEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.flag)
    }
}

/// The commands of a module.
#[derive(Clone, Debug, Default)]
pub struct Commands {
    entries: Vec<CommandEntry>,
    companion: Option<CompanionEntry>,
}

impl Commands {
    /// Adds `perennial NAME`.
    #[must_use]
    pub fn with<C: Command>(self) -> Self {
        self.add::<C>(None)
    }

    /// Adds `perennial GROUP NAME`; `group` is a command of the host with subcommands, such as `keys`.
    #[must_use]
    pub fn with_in<C: Command>(self, group: &'static str) -> Self {
        self.add::<C>(Some(group))
    }

    fn add<C: Command>(mut self, group: Option<&'static str>) -> Self {
        self.entries.push(CommandEntry {
            group,
            name: C::NAME,
            define: C::augment_args,
            run: |matches, context| C::from_arg_matches(matches)?.run(context),
        });
        self
    }

    /// Adds the flags of a companion to `perennial serve`.
    #[must_use]
    pub fn with_companion<C: Companion>(mut self) -> Self {
        self.companion = Some(CompanionEntry {
            flag: C::FLAG,
            define: C::augment_args,
            is_wanted: |matches| Ok(C::from_arg_matches(matches)?.is_wanted()),
            open: |matches, context| Ok(Box::pin(C::from_arg_matches(matches)?.open(context))),
        });
        self
    }

    /// The companion, if there is one.
    pub(crate) fn companion(&self) -> Option<CompanionEntry> {
        self.companion
    }

    /// Adds the definitions of these commands to the command line of the host.
    pub(crate) fn define(&self, mut host: clap::Command) -> clap::Command {
        for CommandEntry { group, name, define, .. } in &self.entries {
            let command = define(clap::Command::new(*name));
            host = match group {
                Some(group) => host.mut_subcommand(group, |group| group.subcommand(command)),
                None => host.subcommand(command),
            };
        }
        match self.companion {
            Some(companion) => host.mut_subcommand("serve", |serve| {
                // The docstring of the flags would replace the description of the command.
                let (about, long) = (serve.get_about().cloned(), serve.get_long_about().cloned());
                let serve = (companion.define)(serve).about(about.unwrap_or_default());
                serve.long_about(long.map_or(Resettable::Reset, Resettable::Value))
            }),
            None => host,
        }
    }

    /// Returns the command that the command line asks for, if it is one of these.
    pub(crate) fn asked<'a>(&self, matches: &'a ArgMatches) -> Option<(RunCommand, &'a ArgMatches)> {
        let (first, within) = matches.subcommand()?;
        let second = within.subcommand();
        self.entries.iter().find_map(|entry| match (entry.group, second) {
            (None, _) if entry.name == first => Some((entry.run, within)),
            (Some(group), Some((name, matches))) if (group, entry.name) == (first, name) => {
                Some((entry.run, matches))
            }
            _ => None,
        })
    }
}

/// Context of a command: the settings, the running server, and the store while no server runs.
#[derive(Clone, Debug)]
pub struct CommandContext {
    /// Whether the answer is JSON, for programs.
    pub json: bool,
    pub(crate) settings: Settings,
    pub(crate) config: Arc<Config>,
    /// Tables of the host and of all modules.
    pub(crate) tables: Vec<Tables>,
    /// The secret files of all modules.
    pub(crate) files: Vec<SecretFile>,
    /// The directories of all modules, within the data directory.
    pub(crate) directories: Vec<&'static str>,
}

impl CommandContext {
    /// Calls `ask` with the admin backend: the running server or, while none runs, the routes that `routes` makes on
    /// the store.
    ///
    /// # Errors
    /// When no admin backend can be opened, and the errors of `ask`.
    pub async fn with_backend<T>(
        &self,
        routes: impl AsyncFnOnce(Offline) -> anyhow::Result<axum::Router>,
        ask: impl AsyncFnOnce(&AdminBackend) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let backend = AdminBackend::open(self, routes).await?;
        let asked = ask(&backend).await;
        backend.close().await;
        asked
    }

    /// Checks that this user may look into the data directory.
    ///
    /// # Errors
    /// When it belongs to another user.
    pub fn check_access(&self) -> anyhow::Result<()> {
        data_dir::check_access(&self.config.data_dir)
    }

    /// Returns true when a server runs on the data directory.
    pub fn is_running(&self) -> bool {
        data_dir::is_locked(&self.config.data_dir)
    }

    /// The settings in effect.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The directory of keys and other files, which may not exist yet.
    pub fn data_dir(&self) -> &Path {
        &self.config.data_dir
    }

    /// A listener that other machines can reach, if there is one.
    pub fn reachable(&self) -> Option<String> {
        let everywhere = [&self.config.server.net.listen, &self.config.admin.net.listen];
        let reachable = everywhere.into_iter().flatten().find(|listen| !listen.is_loopback());
        reachable.map(ToString::to_string)
    }

    /// Makes a client of the public interface. It calls the server at `url`, or else the server that runs on the data
    /// directory, with the API key in `key_file`, or else the first API key.
    ///
    /// # Errors
    /// When no server runs, or the key cannot be read.
    pub fn client(
        &self,
        url: Option<&str>,
        key_file: Option<&Path>,
        timeout: Duration,
    ) -> anyhow::Result<Client> {
        let key_file = key_file.map_or_else(|| self.config.data_dir.join(API_KEY), Path::to_owned);
        let key = std::fs::read_to_string(&key_file)
            .with_context(|| format!("the API key in {} cannot be read", key_file.display()))?;
        let base = match url {
            Some(url) => url.to_owned(),
            None => self.running()?.context("the server has only a Unix socket; give --url")?,
        };
        Client::new(&base, Some(key.trim().to_owned()), timeout)
    }

    /// Returns the URL of the server that runs on the data directory; `None` if it listens on Unix sockets only.
    ///
    /// # Errors
    /// When no server runs.
    pub fn running(&self) -> anyhow::Result<Option<String>> {
        Ok(url(&Addresses::of_running(&self.config.data_dir)?.server))
    }

    /// Makes the data directory if it is missing: a command may run before the first start.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn make_data_dir(&self) -> anyhow::Result<()> {
        Ok(DataDir::make(&self.config.data_dir)?)
    }

    /// Locks the data directory and opens the store, for a command that runs while no server does.
    ///
    /// # Errors
    /// When a server runs, when the directory belongs to another user, or when the store cannot be opened.
    pub async fn open_alone(&self) -> anyhow::Result<(DataDir, sql::Store)> {
        self.check_access()?;
        let data_dir = DataDir::lock(&self.config.data_dir)?;
        let store = self.open_store(&data_dir, &self.config.store).await?;
        Ok((data_dir, store))
    }

    /// Opens a store in a locked directory, and brings its tables up to date.
    pub(crate) async fn open_store(
        &self,
        data_dir: &DataDir,
        store: &StoreConfig,
    ) -> anyhow::Result<sql::Store> {
        let store = open::store(data_dir, store).await?;
        store.migrate(&self.tables).await?;
        Ok(store)
    }
}

/// Prints text to standard output. A closed pipe is not an error.
///
/// # Errors
/// When the text cannot be written for another reason.
pub fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Runs a future on a runtime of its own, for a command that talks to a server.
///
/// # Errors
/// When the runtime cannot be made.
pub fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

/// Makes a client of the admin listener of the server that runs on a data directory, with the admin token if it can be
/// read.
///
/// # Errors
/// When no server runs.
pub fn admin_client(data_dir: &Path, timeout: Duration) -> anyhow::Result<Client> {
    let base = Addresses::of_running(data_dir)?.admin_url()?;
    let token = std::fs::read_to_string(data_dir.join(data_dir::ADMIN_TOKEN)).ok();
    Client::new(&base, token.map(|token| token.trim().to_owned()), timeout)
}

#[cfg(test)]
mod tests {
    use clap::{FromArgMatches, Parser, Subcommand};

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "host")]
    struct Host {
        #[command(subcommand)]
        command: Option<OfHost>,
    }

    #[derive(Debug, Subcommand)]
    enum OfHost {
        /// Serve until SIGTERM
        Serve {
            #[arg(long)]
            paused: bool,
        },
        /// Keys of the host
        #[command(subcommand)]
        Keys(OfKeys),
    }

    #[derive(Debug, Subcommand)]
    enum OfKeys {
        /// List them
        List,
    }

    /// Greet
    #[derive(Args, Debug)]
    struct Greet {
        name: String,
    }

    impl Command for Greet {
        const NAME: &'static str = "greet";

        fn run(self, _context: &CommandContext) -> anyhow::Result<()> {
            anyhow::bail!("hello {}", self.name)
        }
    }

    /// Rotate a key
    #[derive(Args, Debug)]
    struct Rotate {}

    impl Command for Rotate {
        const NAME: &'static str = "rotate";

        fn run(self, _context: &CommandContext) -> anyhow::Result<()> {
            Ok(())
        }
    }

    /// Flags of a trial
    #[derive(Args, Debug)]
    struct Trial {
        /// Try it
        #[arg(long)]
        dev: bool,
    }

    impl Companion for Trial {
        const FLAG: &'static str = "--dev";

        fn is_wanted(&self) -> bool {
            self.dev
        }

        async fn open(self, _context: &CommandContext) -> anyhow::Result<Beside> {
            anyhow::bail!("there is nothing to try")
        }
    }

    fn commands() -> Commands {
        Commands::default().with::<Greet>().with_in::<Rotate>("keys").with_companion::<Trial>()
    }

    fn parse(words: &[&str]) -> ArgMatches {
        let host = commands().define(<Host as clap::CommandFactory>::command());
        host.try_get_matches_from([&["host"], words].concat()).unwrap()
    }

    #[test]
    fn commands_of_a_module_are_found_beside_and_within_those_of_the_host() {
        let is_of_module = |words: &[&str]| commands().asked(&parse(words)).is_some();
        assert!(is_of_module(&["greet", "ada"]) && is_of_module(&["keys", "rotate"]));
        assert!(!is_of_module(&["keys", "list"]) && !is_of_module(&["serve"]) && !is_of_module(&[]));
        let host = Host::from_arg_matches(&parse(&["keys", "list"])).unwrap();
        assert!(matches!(host.command, Some(OfHost::Keys(OfKeys::List))));
    }

    #[test]
    fn the_flags_of_a_companion_join_serve_and_leave_its_description() {
        let matches = parse(&["serve", "--paused", "--dev"]);
        let (_, serve) = matches.subcommand().unwrap();
        assert!(Trial::from_arg_matches(serve).unwrap().is_wanted());
        let host = Host::from_arg_matches(&matches).unwrap();
        assert!(matches!(host.command, Some(OfHost::Serve { paused: true })));
        let mut host = commands().define(<Host as clap::CommandFactory>::command());
        let help = host.render_help().to_string();
        assert!(help.contains("Serve until SIGTERM") && help.contains("Greet"), "{help}");
    }
}
