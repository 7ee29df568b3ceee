//! For the test of a rollout: the next version, as far as a store can tell. Its tables have grown.

use std::process::ExitCode;

use perennial::access::Scope;
use perennial::anyhow::Result;
use perennial::command::Commands;
use perennial::data_dir::DataDir;
use perennial::http_client::Target;
use perennial::module::{Host, Module, SecretFile};
use perennial::push::Push;
use perennial::settings::{Reader, Settings};
use perennial::sites::Sites;
use perennial::store::pool::sql::Store;

/// Web push with one more migration step.
struct Next(Push);

const STEP: &str = "ALTER TABLE subscriptions ADD COLUMN colour TEXT DEFAULT 'blue';
    ALTER TABLE notifications ADD COLUMN colour TEXT;
    CREATE TABLE colours (name TEXT PRIMARY KEY);";

const fn and_more<const N: usize>(steps: &[&'static str]) -> [&'static str; N] {
    let mut all = [STEP; N];
    let mut index = 0;
    while index < steps.len() {
        all[index] = steps[index];
        index += 1;
    }
    all
}

const SQLITE: usize = Push::MIGRATIONS.len() + 1;
const POSTGRES: usize = Push::POSTGRES_MIGRATIONS.len() + 1;

impl Module for Next {
    const NAME: &'static str = Push::NAME;
    const DEFAULTS: &'static str = Push::DEFAULTS;
    const MIGRATIONS: &'static [&'static str] = &and_more::<SQLITE>(Push::MIGRATIONS);
    const POSTGRES_MIGRATIONS: &'static [&'static str] = &and_more::<POSTGRES>(Push::POSTGRES_MIGRATIONS);

    const SCOPES: &'static [Scope] = Push::SCOPES;
    const TARGETS: &'static [Target] = Push::TARGETS;

    fn commands() -> Commands {
        Push::commands()
    }

    fn files(settings: &Settings) -> Vec<SecretFile> {
        Push::files(settings)
    }

    async fn keys(
        settings: &Settings,
        sites: &Sites,
        data_dir: &DataDir,
        store: &Store,
    ) -> Result<Vec<(String, String)>> {
        Push::keys(settings, sites, data_dir, store).await
    }

    fn configure(settings: &mut Reader<'_>) -> Self {
        Self(Push::configure(settings))
    }

    async fn mount(self, host: &mut Host) -> Result<()> {
        self.0.mount(host).await
    }
}

fn main() -> ExitCode {
    perennial::Perennial::new().host::<Next>().main()
}
