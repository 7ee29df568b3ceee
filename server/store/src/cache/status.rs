//! The status of a cache.

use serde::Serialize;

/// The status of a cache, with counts since the start of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CacheStatus {
    /// Number of entries.
    pub entries: u64,
    /// Size of the entries, in bytes.
    pub bytes: u64,
    /// Maximum size of the entries, in bytes.
    pub max_bytes: u64,
    /// Number of lookups that found an entry, or a load under way.
    pub hits: u64,
    /// Number of lookups that loaded.
    pub misses: u64,
    /// Number of loads that failed.
    pub failed: u64,
    /// Number of previous values that were returned because a load failed.
    pub stale: u64,
    /// Number of entries removed because of the size limit.
    pub evicted: u64,
    /// Number of entries removed because they had expired.
    pub expired: u64,
    /// Number of entries removed because they were forgotten.
    pub forgotten: u64,
}
