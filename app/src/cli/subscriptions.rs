//! `perennial subscriptions`: in and out by the million.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Subcommand;
use http::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::desk::Desk;
use super::{block_on, load, read};
use crate::module::Blueprint;
use crate::push;
use crate::settings::Sources;
use crate::sites;

/// How much is sent at once, in bytes: less than the admin listener takes in one body.
const CHUNK: usize = 900 << 10;
/// How many lines that were refused are shown.
const SHOWN: usize = 20;

#[derive(Debug, Subcommand)]
pub(super) enum Subscriptions {
    /// Store subscriptions, one JSON object a line, as `export` writes them; what is known already is brought up to
    /// date. Fails when a line was refused; all others are stored
    Import {
        /// A file; - is standard input
        file: PathBuf,
        /// Into which site
        #[arg(long, default_value = sites::DEFAULT)]
        site: String,
    },
    /// Write all subscriptions, one JSON object a line
    Export {
        /// A file; - is standard output
        #[arg(default_value = "-")]
        file: PathBuf,
        /// Of which site
        #[arg(long, default_value = sites::DEFAULT)]
        site: String,
    },
}

impl Subscriptions {
    pub(super) fn run(&self, sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
        let settings = load(sources, modules);
        let (config, _) = read(&settings, modules)?;
        block_on(async {
            let desk = Desk::open(&config, modules, async |data_dir, store, jobs| {
                let transfer = push::transfer(&settings, &config, &data_dir, &store, jobs).await?;
                Ok(push::import::admin_write(Arc::new(transfer)))
            })
            .await?;
            let done = match self {
                Self::Import { file, site } => import(&desk, file, site).await,
                Self::Export { file, site } => export(&desk, file, site).await,
            };
            desk.close().await;
            done
        })?
    }
}

async fn import(desk: &Desk, file: &Path, site: &str) -> anyhow::Result<()> {
    let (input, length): (Box<dyn Read>, u64) = if file.as_os_str() == "-" {
        (Box::new(std::io::stdin()), 0)
    } else {
        let file = File::open(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let length = file.metadata()?.len();
        (Box::new(file), length)
    };
    let mut input = BufReader::with_capacity(1 << 20, input);
    let bar = bar(length, "{bar:40} {bytes}/{total_bytes} {msg}")?;
    let (mut created, mut updated, mut refused, mut line, mut shown) = (0, 0, 0, 0, 0);
    let mut is_key_told = false;
    loop {
        let chunk = next_chunk(&mut input)?;
        if chunk.is_empty() {
            break;
        }
        let (bytes, lines) = (chunk.len(), chunk.iter().filter(|byte| **byte == b'\n').count());
        let answer =
            desk.post_lines(&format!("/subscriptions/import?site={site}"), Bytes::from(chunk)).await?;
        let count = |name: &str| answer[name].as_u64().unwrap_or_default();
        created += count("created");
        updated += count("updated");
        refused += count("refused");
        if count("without_key") > 0 && !std::mem::replace(&mut is_key_told, true) {
            bar.suspend(|| tell_key(&answer));
        }
        for reason in answer["reasons"].as_array().into_iter().flatten().take(SHOWN - shown) {
            let number = line + reason[0].as_u64().unwrap_or_default();
            bar.suspend(|| eprintln!("line {number}: {}", reason[1].as_str().unwrap_or_default()));
            shown += 1;
        }
        line += lines as u64;
        bar.inc(bytes as u64);
        bar.set_message(format!("{created} created, {updated} updated, {refused} refused"));
    }
    bar.finish_and_clear();
    println!("{}", json!({ "created": created, "updated": updated, "refused": refused }));
    if refused > 0 {
        bail!("{refused} lines were refused");
    }
    Ok(())
}

/// Says which key lines are taken to have been made with that do not name one.
fn tell_key(answer: &serde_json::Value) {
    let key = answer["bound_to"].as_str().unwrap_or_default();
    eprintln!("lines without a key are bound to this one: {key}");
    if answer["is_proven"] != true {
        eprintln!(
            "warning: no push service is known to have accepted anything signed with it. Subscriptions that were made with another key are refused: give that as \"key\" in each line (perennial keys show says where keys are)"
        );
    }
}

/// Whole lines, about [`CHUNK`] bytes of them; empty at the end.
fn next_chunk(input: &mut impl BufRead) -> anyhow::Result<Vec<u8>> {
    let mut chunk = Vec::with_capacity(CHUNK + 4096);
    while chunk.len() < CHUNK {
        if input.read_until(b'\n', &mut chunk)? == 0 {
            break;
        }
    }
    Ok(chunk)
}

async fn export(desk: &Desk, file: &Path, site: &str) -> anyhow::Result<()> {
    let path = format!("/subscriptions/export?site={site}");
    let mut out: Box<dyn Write> = if file.as_os_str() == "-" {
        Box::new(BufWriter::new(std::io::stdout()))
    } else {
        // Whoever can read it could change and delete subscriptions.
        let made = File::options().create(true).truncate(true).write(true).mode(0o600).open(file);
        let file = made.with_context(|| format!("{} cannot be written", file.display()))?;
        Box::new(BufWriter::new(file))
    };
    let bar = bar(0, "{spinner} {pos} subscriptions")?;
    let mut cursor = 0;
    loop {
        let page = desk.call(Method::POST, &path, Some(&json!({ "cursor": cursor }))).await?;
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

/// A bar for whoever looks at a terminal.
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
    fn chunks_are_whole_lines() {
        let line = format!("{}\n", "x".repeat(999));
        let text = line.repeat(5000);
        let mut input = text.as_bytes();
        let mut sizes = Vec::new();
        loop {
            let chunk = next_chunk(&mut input).unwrap();
            if chunk.is_empty() {
                break;
            }
            assert_eq!(chunk.len() % 1000, 0);
            sizes.push(chunk.len());
        }
        assert_eq!(sizes.iter().sum::<usize>(), 5_000_000);
        assert_eq!(sizes.len(), 6);
    }
}
