//! `perennial check`.

use std::io::Write;

use super::{load, read};
use crate::module::Blueprint;
use crate::settings::Sources;

/// Prints every setting in effect and where it came from.
pub(super) fn check(sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
    let settings = load(sources, modules)?;
    let (config, _) = read(&settings, modules)?;
    let shown = settings.show();
    let width =
        shown.iter().map(|shown| shown.key.len() + shown.value.len() + 3).filter(|width| *width < 70).max();
    let width = width.unwrap_or_default();
    let mut out = std::io::stdout().lock();
    for shown in shown {
        let line = format!("{} = {}", shown.key, shown.value);
        writeln!(out, "{line:<width$}  # {}", shown.source)?;
    }
    for note in &config.notes {
        eprintln!("warning: {note}");
    }
    Ok(())
}
