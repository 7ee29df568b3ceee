//! Jobs and schedules on three stores. A file per promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

mod cron;
mod jobs;
mod schedules;
