//! `perennial dev`: builds an application whenever its files change, and replaces the running program.
//!
//! ```text
//! watch.rs    files that have changed
//! build.rs    cargo, and the messages of the compiler
//! program.rs  the running program
//! page.rs     the page that answers while no program runs
//! ```
//!
//! The listening socket belongs to this command, and each program inherits it: while one program follows another, and
//! while there is none because the code does not compile, connections wait or get a page, and none is refused.

mod build;
mod page;
mod program;
mod watch;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use perennial_runtime::signal::{ProcessSignal, Signals};

use crate::command::block_on;
use crate::command::output::say;
use crate::dev::{BuildStage, BuildState};
use build::Built;
use page::WaitingPage;
use program::Program;
use watch::Snapshot;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  perennial dev
  perennial dev -- --set push.contact=mailto:me@example.com")]
pub(super) struct Dev {
    /// Directory of the project
    #[arg(long, default_value = ".")]
    directory: PathBuf,
    /// Address on which the program serves
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// Program to run, if the package has several
    #[arg(long)]
    bin: Option<String>,
    /// Arguments of `serve`
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Dev {
    /// Builds and runs until Ctrl-C.
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let directory = self.directory.canonicalize();
        let directory = directory.with_context(|| format!("{} is not there", self.directory.display()))?;
        anyhow::ensure!(
            directory.join("Cargo.toml").exists(),
            "{} has no Cargo.toml: `perennial new NAME` makes a project",
            directory.display()
        );
        let listener = TcpListener::bind(&self.listen).with_context(|| {
            format!("another program listens on {}: choose another --listen", self.listen)
        })?;
        block_on(async {
            let signals = Signals::install()?;
            let state = StateFile::create()?;
            let address = listener.local_addr()?.to_string();
            say!("http://{address} is built anew whenever a file of {} changes", directory.display());
            DevLoop { dev: self, directory, address, listener, state, signals }.run().await
        })?
    }
}

/// A session of development.
struct DevLoop<'a> {
    dev: &'a Dev,
    directory: PathBuf,
    address: String,
    listener: TcpListener,
    state: StateFile,
    signals: Signals,
}

/// What answers requests.
enum Answering {
    Page(WaitingPage),
    Program(Program),
}

impl Answering {
    async fn stop(self) {
        match self {
            Self::Page(page) => page.stop().await,
            Self::Program(program) => program.stop().await,
        }
    }

    /// Returns how the program ended. A page never ends by itself.
    async fn ended(&mut self) -> String {
        match self {
            Self::Page(_) => std::future::pending().await,
            Self::Program(program) => program.ended().await,
        }
    }
}

impl DevLoop<'_> {
    async fn run(mut self) -> anyhow::Result<()> {
        let mut answering = Answering::Page(self.page()?);
        let mut number = 0;
        loop {
            let files = Snapshot::of(&self.directory);
            self.state.write(number, BuildStage::Building, "The first build is under way.")?;
            let began = Instant::now();
            let built = tokio::select! {
                built = build::run(&self.directory, self.dev.bin.as_deref()) => built?,
                // The compiler is stopped: what it makes would be old.
                () = files.changed(&self.directory) => continue,
                () = asked_to_stop(&mut self.signals) => break,
            };
            let built_in = began.elapsed();
            answering = match built {
                Built::Program(program) => {
                    number += 1;
                    answering.stop().await;
                    let mut program = self.start(&program, number)?;
                    program.answers(&self.address).await;
                    self.state.write(number, BuildStage::Running, "")?;
                    say!(
                        "build {number} runs: built in {}, and started in {}",
                        seconds(built_in),
                        seconds(began.elapsed() - built_in)
                    );
                    Answering::Program(program)
                }
                Built::Failed(messages) => {
                    self.state.write(number, BuildStage::Failed, &messages)?;
                    answering
                }
            };
            tokio::select! {
                () = files.changed(&self.directory) => {}
                how = answering.ended() => {
                    say!("the program has ended ({how}); it is built anew when a file changes");
                    let reason = format!("The program has ended ({how}): the terminal says why.");
                    self.state.write(number, BuildStage::Failed, &reason)?;
                    answering = Answering::Page(self.page()?);
                    tokio::select! {
                        () = files.changed(&self.directory) => {}
                        () = asked_to_stop(&mut self.signals) => break,
                    }
                }
                () = asked_to_stop(&mut self.signals) => break,
            }
        }
        answering.stop().await;
        Ok(())
    }

    fn page(&self) -> anyhow::Result<WaitingPage> {
        WaitingPage::start(self.listener.try_clone()?, self.state.path().to_owned())
    }

    fn start(&self, program: &Path, number: u64) -> anyhow::Result<Program> {
        let set = format!("server.listen={}", self.address);
        let arguments =
            ["serve".to_owned(), "--set".to_owned(), set].into_iter().chain(self.dev.arguments.clone());
        Program::start(program, arguments, &self.directory, &self.listener, self.state.path(), number)
    }
}

async fn asked_to_stop(signals: &mut Signals) {
    while matches!(signals.next().await, ProcessSignal::Reload | ProcessSignal::Succeed) {}
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The file with the state of the build, which is removed on drop.
struct StateFile(PathBuf);

impl StateFile {
    /// Makes a file that other users cannot have made before.
    fn create() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("perennial-dev-{}.json", uuid::Uuid::now_v7().simple()));
        std::fs::File::create_new(&path).with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// Replaces the state at once, so that no reader sees a part of it.
    fn write(&self, build: u64, stage: BuildStage, messages: &str) -> anyhow::Result<()> {
        let state = BuildState { build, stage, messages: messages.to_owned() };
        let draft = self.0.with_extension("new");
        std::fs::write(&draft, serde_json::to_string(&state)?)?;
        Ok(std::fs::rename(&draft, &self.0)?)
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
