//! Operating it: the command line, moving in and on, servers that fail, and what the documents say. A file per promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

mod adopt;
mod chaos;
mod cli;
mod drills;
mod kubernetes;
mod moving;
mod openapi;
mod operators;
mod pools;
mod readme;
mod rollout;
mod settings;
mod stores;
