//! Stores behind bounded waits.

pub mod postgres;
pub mod redis;
pub mod sql;
pub mod sqlite;

/// The tables of one part of the program, in the steps in which they came to be.
#[derive(Clone, Copy, Debug)]
pub struct Migrations {
    /// Whose tables these are.
    pub module: &'static str,
    /// SQL, the oldest first. A step that was ever released is never changed.
    pub steps: &'static [&'static str],
}
