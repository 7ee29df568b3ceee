//! The status of a pool.

use serde::Serialize;

/// The connections of a pool at one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PoolStatus {
    /// Maximum number of connections.
    pub max: usize,
    /// Number of connections.
    pub size: usize,
    /// Number of idle connections.
    pub available: usize,
    /// Number of callers that wait for a connection.
    pub waiting: usize,
    /// Age of the oldest idle connection at the last check, in milliseconds.
    pub oldest_ms: u64,
}
