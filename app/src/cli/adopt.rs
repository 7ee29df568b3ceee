//! `perennial adopt`.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use perennial_store::pool::sql;
use perennial_workers::Jobs;
use perennial_workers::admission::Admission;
use serde_json::json;

use super::{block_on, load, open_alone, open_store, print, read};
use crate::adopt::Source;
use crate::boot;
use crate::config::{Config, Store};
use crate::data_dir::DataDir;
use crate::module::Blueprint;
use crate::push;
use crate::settings::{Settings, Sources};

/// How long the embedded store may take for a step of its tables.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Args, Debug)]
pub(super) struct Adopt {
    /// The file of the embedded store, which no server may use: its keys stand beside it
    file: PathBuf,
}

impl Adopt {
    pub(super) fn run(&self, json: bool, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        block_on(self.adopt(json, &settings, config, modules))?
    }

    async fn adopt(
        &self,
        json: bool,
        settings: &Settings,
        config: Config,
        modules: &[Blueprint],
    ) -> anyhow::Result<()> {
        if !matches!(config.store, Store::Postgres(_)) {
            bail!(
                "the settings name an embedded store: wanted store.url = postgres://.., where everything is to go"
            );
        }
        let directory = self.file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or_else(|| Path::new("."));
        let directory =
            directory.canonicalize().with_context(|| format!("{} is not there", directory.display()))?;
        // Nobody else uses either, and the file is as new as the program.
        let is_ours = config.data_dir.canonicalize().is_ok_and(|ours| ours == directory);
        let from = DataDir::lock(&directory)?;
        bring_up_to_date(&from, &self.file, modules).await?;
        let (_ours, store) = if is_ours {
            (None, open_store(&from, &config.store, modules).await?)
        } else {
            let (ours, store) = open_alone(&config, modules).await?;
            (Some(ours), store)
        };
        let done = move_all(json, settings, &directory, &self.file, &config, &store).await;
        store.close().await;
        done
    }
}

/// Has the embedded store have the tables that this program knows.
async fn bring_up_to_date(data_dir: &DataDir, file: &Path, modules: &[Blueprint]) -> anyhow::Result<()> {
    let file = file.canonicalize().with_context(|| format!("{} is not there", file.display()))?;
    let embedded = Store::Sqlite { file, readers: 1, wait: PATIENCE, statement_timeout: PATIENCE };
    open_store(data_dir, &embedded, modules).await?.close().await;
    Ok(())
}

async fn move_all(
    json: bool,
    settings: &Settings,
    directory: &Path,
    file: &Path,
    config: &Config,
    store: &sql::Store,
) -> anyhow::Result<()> {
    let sql::Store::Postgres(postgres) = store else { bail!("wanted a Postgres server") };
    let (queue, _) = boot::open_queue(config, store).await?;
    let jobs = Jobs::new(queue, Admission::new(config.bounds));
    let source = Source::open(file)?;
    let bar = ProgressBar::new(source.rows()?);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} rows  {msg}")?);
    let keys = keys(settings, directory)?;
    let moved = source.move_to(postgres, &jobs, &keys, |table, rows| {
        bar.set_message(table.to_owned());
        bar.inc(rows as u64);
    });
    let moved = moved.await.context("nothing was moved")?;
    bar.finish_and_clear();
    if json {
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

/// The VAPID keys of all sites, each with its name in a store that is shared.
fn keys(settings: &Settings, directory: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut keys = Vec::new();
    for (file, name) in push::vapid_files(settings) {
        let file = directory.join(file);
        match std::fs::read_to_string(&file) {
            Ok(pem) => keys.push((name, pem.trim_end().to_owned())),
            // A site that was never served.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", file.display())),
        }
    }
    if keys.is_empty() {
        bail!("there is no VAPID key beside the file: wanted the directory that the server has used");
    }
    Ok(keys)
}
