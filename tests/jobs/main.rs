//! Jobs and schedules on three stores. There is a file for each promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

mod cron;
mod jobs;
mod schedules;
