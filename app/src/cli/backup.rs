//! `perennial backup`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::done;
use super::{load, read};
use crate::backup::Source;
use crate::data_dir;
use crate::module::Blueprint;
use crate::push;
use crate::settings::Sources;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  perennial backup /var/backups/perennial-$(date +%F)")]
pub(super) struct Backup {
    /// A directory that is not there yet
    directory: PathBuf,
}

impl Backup {
    /// Reads the store itself, also while a server runs: a long copy keeps nobody waiting.
    pub(super) fn run(&self, json: bool, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        data_dir::check_access(&config.data_dir)?;
        let copied = Source::of(&config.data_dir, &config.store, push::vapid_files(&settings))?
            .copy_to(&self.directory)?;
        let words = format!(
            "{}: {} ({} bytes)\nTo restore it, start with it as data_dir; there is no other copy of vapid.pem.\nIt sends nothing until `perennial resume` says that it takes the place of the original.\n",
            copied.directory.display(),
            copied.files.join(", "),
            copied.bytes
        );
        let told = json!({ "directory": copied.directory, "files": copied.files, "bytes": copied.bytes });
        done(json, &told, &words)
    }
}
