//! Operation: the command line, moving in, upgrades, failing servers, and the documents. There is a
//! file for each promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

mod adopt;
mod chaos;
mod cli;
mod dev;
mod drills;
mod examples;
mod kubernetes;
mod moving;
mod openapi;
mod operators;
mod pools;
mod project;
mod readme;
mod references;
mod rollout;
mod settings;
mod stores;
