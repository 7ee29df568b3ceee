//! How full a pool is.

use serde::Serialize;

/// The connections of a pool at one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolStatus {
    /// The most connections.
    pub max: usize,
    /// How many there are.
    pub size: usize,
    /// How many of them nobody uses.
    pub available: usize,
    /// How many callers wait for one.
    pub waiting: usize,
    /// How old the oldest is that nobody used at the last look, in milliseconds.
    pub oldest_ms: u64,
}
