//! Names that modules give to their pools, listeners and targets. Each is a part of settings, a label of metrics, and the
//! name of a task or of a condition.

use std::collections::HashMap;

/// Names of tasks and conditions of the host.
const RESERVED: [&str; 11] = [
    "admin",
    "caches",
    "cron",
    "heartbeat",
    "http",
    "jobs",
    "memory",
    "pause",
    "public",
    "watchdog",
    "workers",
];

/// Checks the names of all things of one kind: `named` has a module and a name for each. The error names the module, or
/// both modules that have the same name; `of_host` are the names that the host has itself.
pub(crate) fn check<'a>(
    kind: &str,
    of_host: &[&'static str],
    named: impl Iterator<Item = (&'a str, &'static str)>,
) -> Result<(), String> {
    let mut owners: HashMap<&str, &str> = of_host.iter().map(|name| (*name, "the host")).collect();
    for (module, name) in named {
        check_one(module, kind, name)?;
        if let Some(other) = owners.insert(name, module) {
            return Err(format!("{other} and {module} both have a {kind} called {name}: rename one of them"));
        }
    }
    Ok(())
}

fn check_one(module: &str, kind: &str, name: &str) -> Result<(), String> {
    let is_valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    if RESERVED.contains(&name) {
        return Err(format!(
            "the module {module} has a {kind} called {name}, as a part of the host is: rename it"
        ));
    }
    if !name.is_empty() && name.chars().all(is_valid) {
        return Ok(());
    }
    Err(format!("the module {module} has a {kind} called {name:?}: wanted a-z, 0-9, dashes and underscores"))
}
