//! Stores, each behind bounded waits.

pub mod sqlite;
