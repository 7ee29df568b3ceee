//! One build by cargo.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// The result of a build.
pub(super) enum Built {
    /// The path of the program.
    Program(PathBuf),
    /// The messages of the compiler.
    Failed(String),
}

/// Builds the program of a package. Dropping the future stops cargo.
pub(super) async fn run(directory: &Path, bin: Option<&str>) -> anyhow::Result<Built> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--message-format=json-diagnostic-rendered-ansi"]);
    cargo.args(bin.iter().flat_map(|bin| ["--bin", bin]));
    cargo.current_dir(directory).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut cargo = cargo.spawn().context("cargo cannot be started: is Rust installed?")?;
    let output = cargo.stdout.take().context("cargo has no output")?;
    let mut lines = BufReader::new(output).lines();
    let (mut messages, mut programs) = (String::new(), Vec::new());
    while let Some(line) = lines.next_line().await? {
        let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
        match message["reason"].as_str() {
            Some("compiler-message") => {
                let rendered = message["message"]["rendered"].as_str().unwrap_or_default();
                let _ = write!(std::io::stderr(), "{rendered}");
                if message["message"]["level"] == "error" {
                    messages.push_str(&without_colours(rendered));
                }
            }
            Some("compiler-artifact") => programs.extend(program_of(&message)),
            _ => {}
        }
    }
    if !cargo.wait().await?.success() {
        let unknown = "cargo has failed: the terminal says why.";
        return Ok(Built::Failed(if messages.is_empty() { unknown.to_owned() } else { messages }));
    }
    match programs.as_slice() {
        [program] => Ok(Built::Program(program.clone())),
        [] => bail!("the package in {} has no program: it needs a src/main.rs", directory.display()),
        _ => bail!("the package in {} has several programs: name one with --bin", directory.display()),
    }
}

/// The path of the program that cargo has made.
fn program_of(artifact: &Value) -> Option<PathBuf> {
    let is_program = artifact["target"]["kind"].as_array()?.iter().any(|kind| kind == "bin");
    artifact["executable"].as_str().filter(|_| is_program).map(PathBuf::from)
}

/// Removes the sequences that colour a text on a terminal (ECMA-48, SGR).
fn without_colours(text: &str) -> String {
    let mut parts = text.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |plain, part| {
        let rest =
            part.strip_prefix('[').and_then(|part| part.split_once('m')).map_or(part, |(_, rest)| rest);
        plain + rest
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_plain_in_the_browser() {
        let coloured = "\u{1b}[1m\u{1b}[91merror[E0425]\u{1b}[0m: no such \u{1b}[1;34mvalue\u{1b}[0m\n";
        assert_eq!(without_colours(coloured), "error[E0425]: no such value\n");
    }
}
