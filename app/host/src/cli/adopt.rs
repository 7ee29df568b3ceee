//! `perennial adopt`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use perennial_store::pool::sql;
use perennial_workers::Jobs;
use perennial_workers::admission::Admission;
use serde_json::json;

use crate::adopt::AdoptSource;
use crate::boot::open;
use crate::command::{CommandContext, block_on, print};
use crate::config::{StoreConfig, stores};
use crate::data_dir::{DataDir, SecretFile};

/// Time limit for a migration step of the embedded store.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Args, Debug)]
pub(super) struct Adopt {
    /// File of the embedded store, with its keys beside it; no server may use it now
    file: PathBuf,
}

impl Adopt {
    pub(super) fn run(&self, context: &CommandContext) -> anyhow::Result<()> {
        block_on(self.adopt(context))?
    }

    async fn adopt(&self, context: &CommandContext) -> anyhow::Result<()> {
        let config = &context.config;
        if !matches!(config.store, StoreConfig::Postgres(_)) {
            bail!(
                "the settings name an embedded store: wanted store.url = postgres://.., where everything is to go"
            );
        }
        let directory = self.file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or_else(|| Path::new("."));
        let directory =
            directory.canonicalize().with_context(|| format!("{} is not there", directory.display()))?;
        // The locks keep other processes away from both, and the migration brings the file up to date.
        let is_ours = config.data_dir.canonicalize().is_ok_and(|ours| ours == directory);
        let from = DataDir::lock(&directory)?;
        bring_up_to_date(context, &from, &self.file).await?;
        let (_ours, store) = if is_ours {
            (None, context.open_store(&from, &config.store).await?)
        } else {
            let (ours, store) = context.open_alone().await?;
            (Some(ours), store)
        };
        let done = move_all(context, &directory, &self.file, &store).await;
        store.close().await;
        done
    }
}

/// Brings the tables of the embedded store up to date.
async fn bring_up_to_date(context: &CommandContext, data_dir: &DataDir, file: &Path) -> anyhow::Result<()> {
    let file = file.canonicalize().with_context(|| format!("{} is not there", file.display()))?;
    let name = stores::SQLITE;
    let embedded =
        StoreConfig::Sqlite { name, file, readers: 1, wait: PATIENCE, statement_timeout: PATIENCE };
    context.open_store(data_dir, &embedded).await?.close().await;
    Ok(())
}

async fn move_all(
    context: &CommandContext,
    directory: &Path,
    file: &Path,
    store: &sql::Store,
) -> anyhow::Result<()> {
    let sql::Store::Postgres(postgres) = store else { bail!("wanted a Postgres server") };
    let (queue, _) = open::queue(&context.config, store).await?;
    let jobs = Jobs::new(queue, Admission::new(context.config.bounds));
    let source = AdoptSource::open(file)?;
    let bar = ProgressBar::new(source.rows()?);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} rows  {msg}")?);
    let keys = keys(&context.files, directory)?;
    let moved = source.move_to(postgres, &jobs, &keys, |table, rows| {
        bar.set_message(table.to_owned());
        bar.inc(rows as u64);
    });
    let moved = moved.await.context("nothing was moved")?;
    bar.finish_and_clear();
    if context.json {
        let told = json!({ "tables": moved.tables.iter().cloned().collect::<BTreeMap<_, _>>(), "jobs": moved.jobs, "left_behind": moved.unknown,
                           "paused_queues": moved.paused.queues, "paused_schedules": moved.paused.schedules });
        return print(&format!("{told}\n"));
    }
    let mut text = String::new();
    for (table, rows) in moved.tables.iter().filter(|(_, rows)| *rows > 0) {
        text.push_str(&format!("{rows:>12}  {table}\n"));
    }
    text.push_str(&format!("{:>12}  jobs, to be done\n", moved.jobs));
    for table in &moved.unknown {
        text.push_str(&format!("The table {table:?} is not of this program, and was left behind\n"));
    }
    for queue in &moved.paused.queues {
        text.push_str(&format!("The queue {queue} was paused: perennial jobs pause {queue}\n"));
    }
    for schedule in &moved.paused.schedules {
        text.push_str(&format!("The schedule {schedule} was paused: perennial cron pause {schedule}\n"));
    }
    print(&format!(
        "{text}Everything is there, the keys too. {} is as it was: keep it until all is well.\n",
        file.display()
    ))
}

/// Reads the secret files of the modules, and returns the name of each in a shared store with its text.
fn keys(files: &[SecretFile], directory: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut keys = Vec::new();
    for SecretFile { file, name, .. } in files {
        let file = directory.join(file);
        match std::fs::read_to_string(&file) {
            Ok(pem) => keys.push((name.clone(), pem.trim_end().to_owned())),
            // A site that was never served has no file.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", file.display())),
        }
    }
    if let (true, [first, ..]) = (keys.is_empty(), files) {
        bail!("there is no {} beside the file: wanted the directory that the server has used", first.label);
    }
    Ok(keys)
}
