//! `perennial subscriptions`: imports and exports by the million.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::{Args, Subcommand};
use http::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::api::import;
use crate::commands::dumps::{self, DumpFormat, DumpRow, Unusable};
use crate::offline::transfer;
use perennial_host::command::output::say;
use perennial_host::command::{self, AdminBackend, CommandContext, Offline, block_on};
use perennial_host::sites;

/// Size of the lines that are sent at once, in bytes: less than the admin listener takes in one body.
const CHUNK: usize = 900 << 10;
/// Maximum number of refused lines that are shown: at a terminal, and in a file.
const SHOWN: (usize, usize) = (20, 10_000);

/// Import and export subscriptions, by the million
#[derive(Args, Debug)]
pub(super) struct SubscriptionsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Store subscriptions, one JSON object per line, as `export` writes them; known subscriptions are updated.
    /// Fails when a line was refused; all other lines are stored
    #[command(after_help = "Examples:
  perennial subscriptions import subscriptions.jsonl
  perennial subscriptions import --from laravel --dry-run push_subscriptions.csv
  perennial subscriptions import --from pywebpush --ids - < subscriptions.json")]
    Import(ImportArgs),
    /// Write all subscriptions, one JSON object per line
    Export {
        /// The file; - is standard output
        #[arg(default_value = "-")]
        file: PathBuf,
        /// The site of the subscriptions
        #[arg(long, default_value = sites::DEFAULT)]
        site: String,
    },
}

#[derive(Args, Debug)]
struct ImportArgs {
    /// The file; - is standard input
    file: PathBuf,
    /// The site of the subscriptions
    #[arg(long, default_value = sites::DEFAULT)]
    site: String,
    /// The sender that wrote the dump; without this, lines as `export` writes them
    #[arg(long, value_name = "SENDER")]
    from: Option<DumpFormat>,
    /// Store nothing; only count the subscriptions of each push service
    #[arg(long)]
    dry_run: bool,
    /// Print the number of each line and the id of its subscription
    #[arg(long)]
    ids: bool,
}

impl command::Command for SubscriptionsArgs {
    const NAME: &'static str = "subscriptions";

    fn run(self, context: &CommandContext) -> anyhow::Result<()> {
        if matches!(self.what, What::Import(_)) {
            // An import may come before the first start.
            context.make_data_dir()?;
        }
        let routes = async |offline: Offline| {
            let transfer = transfer(context.settings(), &offline).await?;
            Ok(import::admin_write(Arc::new(transfer)))
        };
        block_on(context.with_backend(routes, async |backend| match &self.what {
            What::Import(import) => import.run(backend).await,
            What::Export { file, site } => export(backend, file, site).await,
        }))?
    }
}

impl ImportArgs {
    async fn run(&self, backend: &AdminBackend) -> anyhow::Result<()> {
        let (input, length): (Box<dyn Read>, u64) = if self.file.as_os_str() == "-" {
            (Box::new(std::io::stdin()), 0)
        } else {
            let file =
                File::open(&self.file).with_context(|| format!("{} cannot be read", self.file.display()))?;
            let length = file.metadata()?.len();
            (Box::new(file), length)
        };
        let bar = bar(length, "{bar:40} {bytes}/{total_bytes} {msg}")?;
        // The bar counts the bytes that were read, also those of refused lines.
        let mut input = BufReader::with_capacity(1 << 20, bar.wrap_read(input));
        let mut lines: Box<dyn Iterator<Item = anyhow::Result<InputLine>>> = match self.from {
            None => {
                dumps::skip_byte_order_mark(&mut input)?;
                Box::new(own_lines(input))
            }
            Some(format) => Box::new(dumps::read(format, input)?.map(|row| Ok(InputLine::from(row)))),
        };
        let mut told = ImportReport { bar, shown: 0, is_key_told: false };
        let mut sums = Sums::default();
        loop {
            let chunk = Chunk::next(&mut lines)?;
            if chunk.is_empty() {
                break;
            }
            sums.inactive += chunk.inactive;
            sums.refused += chunk.bad.len() as u64;
            for (number, why) in &chunk.bad {
                told.refused(*number, why);
            }
            self.store(backend, chunk, &mut sums, &mut told).await?;
        }
        told.bar.finish_and_clear();
        sums.tell(self.dry_run);
        if sums.refused > 0 {
            bail!(
                "{} refused",
                if sums.refused == 1 {
                    "1 line was".to_owned()
                } else {
                    format!("{} lines were", sums.refused)
                }
            );
        }
        Ok(())
    }

    /// Lets the server store a chunk, or only check it.
    async fn store(
        &self,
        backend: &AdminBackend,
        chunk: Chunk,
        sums: &mut Sums,
        told: &mut ImportReport,
    ) -> anyhow::Result<()> {
        if chunk.numbers.is_empty() {
            return Ok(());
        }
        let Self { site, dry_run, ids, .. } = self;
        let path = format!("/subscriptions/import?site={site}&dry_run={dry_run}&ids={ids}");
        let answer = backend.post_lines(&path, Bytes::from(chunk.text)).await?;
        if answer["without_key"].as_u64() > Some(0) && !std::mem::replace(&mut told.is_key_told, true) {
            told.bar.suspend(|| tell_key(&answer));
        }
        sums.add(&answer);
        let of = |line: &Value| {
            let index = usize::try_from(line.as_u64().unwrap_or_default()).unwrap_or_default();
            chunk.numbers.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        for reason in answer["reasons"].as_array().into_iter().flatten() {
            told.refused(of(&reason[0]), reason[1].as_str().unwrap_or_default());
        }
        for stored in answer["ids"].as_array().into_iter().flatten() {
            told.bar.suspend(|| say!("{} {}", of(&stored[0]), stored[1]));
        }
        told.bar.set_message(sums.words());
        Ok(())
    }
}

/// A line of an import and its number, or the reason why it is left out.
struct InputLine {
    number: u64,
    text: Result<Vec<u8>, Unusable>,
}

impl From<DumpRow> for InputLine {
    fn from(row: DumpRow) -> Self {
        Self { number: row.number, text: row.read.map(|line| line.to_string().into_bytes()) }
    }
}

/// Reads lines as `export` writes them. The server reports their errors.
fn own_lines(input: impl BufRead) -> impl Iterator<Item = anyhow::Result<InputLine>> {
    let lines = (1..).zip(input.split(b'\n'));
    lines
        .filter(|(_, line)| line.as_ref().map_or(true, |line| !line.trim_ascii().is_empty()))
        .map(|(number, line)| Ok(InputLine { number, text: Ok(line.context("the file cannot be read")?) }))
}

/// Lines that are sent together.
#[derive(Default)]
struct Chunk {
    text: Vec<u8>,
    /// Number of each line in the input.
    numbers: Vec<u64>,
    bad: Vec<(u64, String)>,
    inactive: u64,
}

impl Chunk {
    /// About [`CHUNK`] bytes of lines; empty at the end.
    fn next(lines: &mut impl Iterator<Item = anyhow::Result<InputLine>>) -> anyhow::Result<Self> {
        let mut chunk = Self::default();
        while chunk.text.len() < CHUNK {
            let Some(line) = lines.next() else { break };
            let InputLine { number, text } = line?;
            match text {
                Ok(text) => {
                    chunk.text.extend_from_slice(&text);
                    chunk.text.push(b'\n');
                    chunk.numbers.push(number);
                }
                Err(Unusable::Inactive) => chunk.inactive += 1,
                Err(Unusable::Bad(why)) => chunk.bad.push((number, why)),
            }
        }
        Ok(chunk)
    }

    fn is_empty(&self) -> bool {
        self.numbers.is_empty() && self.bad.is_empty() && self.inactive == 0
    }
}

/// Messages to the terminal so far.
struct ImportReport {
    bar: ProgressBar,
    shown: usize,
    is_key_told: bool,
}

impl ImportReport {
    fn refused(&mut self, number: u64, why: &str) {
        let most = if std::io::stderr().is_terminal() { SHOWN.0 } else { SHOWN.1 };
        if self.shown < most {
            self.bar.suspend(|| eprintln!("line {number}: {why}"));
        } else if self.shown == most {
            self.bar.suspend(|| eprintln!("and others; with 2> refused.txt there are up to {}", SHOWN.1));
        }
        self.shown += 1;
    }
}

/// Results of all chunks.
#[derive(Default)]
struct Sums {
    created: u64,
    updated: u64,
    usable: u64,
    refused: u64,
    inactive: u64,
    services: BTreeMap<String, u64>,
}

impl Sums {
    fn add(&mut self, answer: &Value) {
        let count = |name: &str| answer[name].as_u64().unwrap_or_default();
        self.created += count("created");
        self.updated += count("updated");
        self.usable += count("usable");
        self.refused += count("refused");
        for (service, number) in answer["services"].as_object().into_iter().flatten() {
            *self.services.entry(service.clone()).or_default() += number.as_u64().unwrap_or_default();
        }
    }

    fn words(&self) -> String {
        format!("{} created, {} updated, {} refused", self.created, self.updated, self.refused)
    }

    fn tell(&self, dry_run: bool) {
        let Self { created, updated, usable, refused, inactive, services } = self;
        let mut told = if dry_run {
            json!({ "usable": usable, "refused": refused, "services": services })
        } else {
            json!({ "created": created, "updated": updated, "refused": refused })
        };
        if *inactive > 0 {
            told["inactive"] = (*inactive).into();
        }
        say!("{told}");
    }
}

/// Prints the key that is taken for lines that name none.
fn tell_key(answer: &serde_json::Value) {
    let key = answer["bound_to"].as_str().unwrap_or_default();
    eprintln!("lines without a key are bound to this one: {key}");
    if answer["is_proven"] != true {
        eprintln!(
            "warning: no push service is known to have accepted anything signed with it. Subscriptions that were made with another key are refused: give that as \"key\" in each line (perennial keys show says where keys are)"
        );
    }
}

async fn export(backend: &AdminBackend, file: &Path, site: &str) -> anyhow::Result<()> {
    let path = format!("/subscriptions/export?site={site}");
    let mut out: Box<dyn Write> = if file.as_os_str() == "-" {
        Box::new(BufWriter::new(std::io::stdout()))
    } else {
        // A reader of the file could change and delete subscriptions.
        let made = File::options().create(true).truncate(true).write(true).mode(0o600).open(file);
        let file = made.with_context(|| format!("{} cannot be written", file.display()))?;
        Box::new(BufWriter::new(file))
    };
    let bar = bar(0, "{spinner} {pos} subscriptions")?;
    let mut cursor = 0;
    loop {
        let page = backend.call(Method::POST, &path, Some(&json!({ "cursor": cursor }))).await?;
        let lines = page["subscriptions"].as_array().map(Vec::as_slice).unwrap_or_default();
        for line in lines {
            writeln!(out, "{line}")?;
        }
        bar.inc(lines.len() as u64);
        match page["next"].as_i64() {
            Some(next) => cursor = next,
            None => break,
        }
    }
    out.flush()?;
    bar.finish_and_clear();
    Ok(())
}

/// A progress bar, which is shown only at a terminal.
fn bar(length: u64, template: &str) -> anyhow::Result<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return Ok(ProgressBar::hidden());
    }
    Ok(ProgressBar::new(length).with_style(ProgressStyle::with_template(template)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_lines_and_know_where_they_came_from() {
        let line = "x".repeat(999);
        let text = format!("{line}\n\n").repeat(5000);
        let mut lines = own_lines(text.as_bytes());
        let (mut sizes, mut numbers) = (Vec::new(), Vec::new());
        loop {
            let chunk = Chunk::next(&mut lines).unwrap();
            if chunk.is_empty() {
                break;
            }
            assert_eq!(chunk.text.len() % 1000, 0);
            sizes.push(chunk.text.len());
            numbers.extend(chunk.numbers);
        }
        assert_eq!((sizes.iter().sum::<usize>(), sizes.len()), (5_000_000, 6));
        assert!(numbers.into_iter().eq((0..5000).map(|index| 2 * index + 1)), "empty lines count, too");
    }
}
