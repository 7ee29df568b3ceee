//! `perennial sink`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::signal::{ProcessSignal, Signals};

use super::trial::Trial;
use perennial_host::command::arguments::{address, whole};
use perennial_host::command::output::say;
use perennial_host::command::{self, CommandContext, block_on};

/// Run a local push service, which makes subscriptions and prints the messages that it decrypts
#[derive(Args, Debug)]
#[command(after_help = "For everything in one process, see perennial serve --dev. Examples:
  perennial sink
  perennial sink --subscribers 3")]
pub(super) struct SinkArgs {
    /// The address for messages, with TLS
    #[arg(long, default_value = "127.0.0.1:8443", value_name = "ADDRESS", value_parser = address)]
    listen: SocketAddr,
    /// The address for a Firefox
    #[arg(long, default_value = "127.0.0.1:8444", value_name = "ADDRESS", value_parser = address)]
    browsers: SocketAddr,
    /// The directory of the certificates
    #[arg(long, default_value = "./perennial-sink", value_name = "DIRECTORY")]
    directory: PathBuf,
    /// Subscribe this number of imaginary browsers at the server on data_dir, which may start within two minutes
    #[arg(long, default_value_t = 0, value_name = "COUNT", value_parser = whole::<usize>)]
    subscribers: usize,
}

impl command::Command for SinkArgs {
    const NAME: &'static str = "sink";

    fn run(self, context: &CommandContext) -> anyhow::Result<()> {
        block_on(async {
            let mut signals = Signals::install()?;
            let (trial, bound) = Trial::bind(self.listen, self.browsers, &self.directory).await?;
            explain(&trial);
            let (trigger, drain) = drain::channel();
            let mut serving = tokio::task::JoinSet::new();
            serving.spawn(bound.run(drain));
            if self.subscribers > 0 {
                trial.subscribe(context, self.subscribers).await?;
            }
            while signals.next().await == ProcessSignal::Reload {}
            trigger.advance(Phase::Hard);
            serving.join_all().await;
            Ok(())
        })?
    }
}

fn explain(trial: &Trial) {
    say!("A push service at {}. Start the server so that it sends here:", trial.origin());
    say!("  perennial {}", trial.flags().join(" \\\n            "));
    say!("then subscribe imaginary browsers with --subscribers, or a Firefox with these in about:config:");
    say!("  dom.push.serverURL = {}   dom.push.testing.allowInsecureServerURL = true", trial.browsers);
}
