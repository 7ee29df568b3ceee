//! What a cache has done.

use serde::Serialize;

/// How a cache stands, and what it has done since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CacheStatus {
    /// How many entries there are,
    pub entries: u64,
    /// and how many bytes they take, of how many.
    pub bytes: u64,
    /// The most bytes.
    pub max_bytes: u64,
    /// How often what was asked for was there, or about to be.
    pub hits: u64,
    /// How often it was not.
    pub misses: u64,
    /// How many of these loads failed,
    pub failed: u64,
    /// and how often what was there before was given instead.
    pub stale: u64,
    /// How many entries were removed for want of room,
    pub evicted: u64,
    /// since their time was over,
    pub expired: u64,
    /// and because somebody said that they had changed.
    pub forgotten: u64,
}
