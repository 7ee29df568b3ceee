//! `perennial check`.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::report;
use crate::command;
use crate::module::{Blueprint, load, read};
use crate::settings::{Problems, Shown, Sources};

#[derive(Args, Debug)]
pub(super) struct Check {
    /// Print only settings that differ from their defaults
    #[arg(long)]
    changed: bool,
}

impl Check {
    /// Prints the settings with their sources, and a summary. The exit code is 2 with errors, and 0 with warnings only.
    pub(super) fn run(&self, json: bool, sources: &Sources, modules: &[Blueprint]) -> ExitCode {
        let settings = load(sources, modules);
        let (errors, warnings): (Vec<String>, Vec<String>) = match read(&settings, modules) {
            Ok((config, _)) => (Vec::new(), config.notes.into_iter().collect()),
            Err(Problems(problems)) => {
                (problems.iter().map(ToString::to_string).collect(), settings.notes().cloned().collect())
            }
        };
        let mut shown = settings.show();
        shown.retain(|shown| shown.changed || !self.changed);
        let code = if errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(2) };
        match print(json, &shown, &errors, &warnings) {
            Ok(()) => code,
            Err(error) => report(&error),
        }
    }
}

fn print(json: bool, shown: &[Shown], errors: &[String], warnings: &[String]) -> anyhow::Result<()> {
    if json {
        let all = json!({ "settings": shown, "errors": errors, "warnings": warnings });
        return command::print(&format!("{all:#}\n"));
    }
    command::print(&table(shown))?;
    let mut err = std::io::stderr().lock();
    for error in errors {
        writeln!(err, "error: {error}")?;
    }
    for warning in warnings {
        writeln!(err, "warning: {warning}")?;
    }
    writeln!(err, "{}, {}", count(errors.len(), "error"), count(warnings.len(), "warning"))?;
    Ok(())
}

/// A line for each setting, with its source beside it.
fn table(shown: &[Shown]) -> String {
    let lines: Vec<String> = shown.iter().map(|shown| format!("{} = {}", shown.key, shown.value)).collect();
    let width = lines.iter().map(String::len).filter(|width| *width < 70).max().unwrap_or_default();
    let lines = lines.iter().zip(shown);
    lines.map(|(line, shown)| format!("{line:<width$}  # {}\n", shown.source)).collect()
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
