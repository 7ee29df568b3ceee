//! Stores behind bounded waits, and what need not be asked of them again.
//!
//! | module | what it is |
//! |---|---|
//! | [`pool`] | SQLite, Postgres and Redis: pools, statements that are the same on both, migrations |
//! | [`cache`] | answers that are kept, with one load at a time, and forgotten by all replicas |
//! | [`metrics`] | every metric of these |

pub mod cache;
pub mod metrics;
pub mod pool;
