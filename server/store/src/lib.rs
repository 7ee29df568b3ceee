//! Stores in which every wait is bounded, and caches in front of them.
//!
//! | module | contents |
//! |---|---|
//! | [`pool`] | SQLite, Postgres and Redis: pools, one API for statements on both SQL stores, migrations |
//! | [`cache`] | caches with one load at a time for each key, and invalidation on all replicas |
//! | [`table`] | a table in memory with a time to live for each entry, and counters |
//! | [`metrics`] | the metrics of pools, stores and caches |

pub mod cache;
pub mod metrics;
pub mod pool;
pub mod table;
