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

/// A local push service: gives out subscriptions, and prints what it decrypts
#[derive(Args, Debug)]
#[command(after_help = "For everything in one process, see perennial serve --dev. Examples:
  perennial sink
  perennial sink --subscribers 3")]
pub(super) struct SinkArgs {
    /// Where messages are sent to, with TLS
    #[arg(long, default_value = "127.0.0.1:8443", value_name = "ADDRESS", value_parser = address)]
    listen: SocketAddr,
    /// Where a Firefox connects
    #[arg(long, default_value = "127.0.0.1:8444", value_name = "ADDRESS", value_parser = address)]
    browsers: SocketAddr,
    /// Where the certificates are put
    #[arg(long, default_value = "./perennial-sink", value_name = "DIRECTORY")]
    directory: PathBuf,
    /// Subscribe so many imaginary browsers at the server that runs on data_dir, or will in two minutes
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
