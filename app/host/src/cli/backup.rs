//! `perennial backup`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::backup::BackupSource;
use crate::command::CommandContext;
use crate::command::output::done;

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  perennial backup /var/backups/perennial-$(date +%F)")]
pub(super) struct Backup {
    /// Directory for the copy, which must not exist yet
    directory: PathBuf,
}

impl Backup {
    /// Copies the store in this process, also while a server runs, so that a long copy delays no request.
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        context.check_access()?;
        let files = context.files.clone();
        let originals: Vec<String> = files.iter().map(|file| file.name.clone()).collect();
        let copied = BackupSource::of(&context.config, files, context.directories.clone())?
            .copy_to(&self.directory)?;
        let remark = match originals.as_slice() {
            [] => String::new(),
            names => format!("; there is no other copy of {}", names.join(", ")),
        };
        let program = crate::program_name();
        let words = format!(
            "{}: {} ({} bytes)\nTo restore it, start with it as data_dir{remark}.\nIt sends nothing until `{program} resume` says that it takes the place of the original.\n",
            copied.directory.display(),
            copied.files.join(", "),
            copied.bytes
        );
        let told = json!({ "directory": copied.directory, "files": copied.files, "bytes": copied.bytes });
        done(context.json, &told, &words)
    }
}
