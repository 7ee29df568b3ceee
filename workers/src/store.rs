//! The stores of jobs.

pub mod sqlite;
