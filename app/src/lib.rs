//! Perennial: a long-lived application server.
//!
//! It boots once and then serves: requests, jobs and web push run as tasks of one process, over shared pools,
//! and leave together when SIGTERM comes. The binary hosts web push; other applications are hosted by writing
//! a [`module::Module`] and a `main` of three lines.
//!
//! ARCHITECTURE.md in the repository has the map and the walk of one push and of one SIGTERM.

pub mod access;
mod addresses;
mod admin;
mod adopt;
pub mod api;
mod backup;
mod boot;
mod built;
mod capacity;
mod cli;
mod config;
mod cron;
pub mod data_dir;
mod jobs;
mod maintenance;
pub mod module;
mod openapi;
mod pause;
pub mod push;
pub mod settings;
pub mod sink;
pub mod sites;
mod stop;
mod succession;
mod supervisor;

use std::process::ExitCode;

// What a module is written with, in the versions that the host has.
pub use perennial_runtime as runtime;
pub use perennial_store as store;
pub use perennial_workers as workers;
pub use {anyhow, axum, rusqlite};

/// Listeners, and as long as there are applications that look for them here, what the runtime and the stores have.
pub mod server {
    pub use perennial_runtime::{
        backoff, breaker, cgroup, cpu, drain, health, pulse, signal, tasks, telemetry,
    };
    pub use perennial_server::{http, metrics, net, tcp};
    pub use perennial_store::{cache, pool, transact, values};
}

use module::{Blueprint, Module};

/// The program: a host, and the modules that it hosts.
#[derive(Clone, Debug, Default)]
pub struct Perennial {
    modules: Vec<Blueprint>,
}

impl Perennial {
    /// A host with nothing to host yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hosts a module.
    #[must_use]
    pub fn host<M: Module>(mut self) -> Self {
        self.modules.push(Blueprint::of::<M>());
        self
    }

    /// Does what the command line says.
    pub fn main(self) -> ExitCode {
        cli::main(&self.modules)
    }
}

/// What the README shows compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
