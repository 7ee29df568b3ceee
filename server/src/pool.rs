//! Stores behind bounded waits.

mod bounded;
pub mod postgres;
pub mod redis;
pub mod sql;
pub mod sqlite;
mod tls;

use std::error::Error;

pub use bounded::Status;

/// The tables of one part of the program, in the steps in which they came to be.
#[derive(Clone, Copy, Debug)]
pub struct Migrations {
    /// Whose tables these are.
    pub module: &'static str,
    /// SQL, the oldest first. A step that was ever released is never changed.
    pub steps: &'static [&'static str],
}

/// The store was written by a newer version of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store is newer than this program: {module} is at version {found}, known here are {known}")]
pub struct Newer {
    /// Whose migrations.
    pub module: &'static str,
    /// The version in the store.
    pub found: usize,
    /// The newest version that this program knows.
    pub known: usize,
}

impl Migrations {
    /// The steps that a store at version `found` has not seen, each with the version that it makes.
    fn missing(self, found: usize) -> Result<impl Iterator<Item = (i64, &'static str)>, Newer> {
        let Self { module, steps } = self;
        if found > steps.len() {
            return Err(Newer { module, found, known: steps.len() });
        }
        Ok((1..).zip(steps.iter().copied()).skip(found))
    }
}

/// An error with its causes, in one line.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
