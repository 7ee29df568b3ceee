//! The host: it reads settings, boots, knows sites and keys, answers operators, and stops everything.
//!
//! An application is a [`module::Module`], and its `main` is three lines. ARCHITECTURE.md in the repository has the
//! map, and the walks of a request and of one SIGTERM.

pub mod access;
mod addresses;
mod admin;
mod adopt;
pub mod api;
mod backup;
mod boot;
mod built;
pub mod capacity;
mod cli;
pub mod command;
mod config;
mod cron;
pub mod data_dir;
mod handover;
mod jobs;
pub mod maintenance;
pub mod module;
mod openapi;
mod pause;
pub mod settings;
pub mod sites;
mod stop;
mod supervisor;

use std::process::ExitCode;

// Crates for modules, in the versions that the host has.
pub use perennial_runtime as runtime;
pub use perennial_store as store;
pub use perennial_store::pool::sql;
pub use perennial_store::{transact, values};
pub use perennial_workers as workers;
pub use {anyhow, axum, clap, rusqlite, toml};

use module::{Blueprint, Module};

/// The program: a host, and the modules that it hosts.
#[derive(Clone, Debug, Default)]
pub struct Perennial {
    modules: Vec<Blueprint>,
}

impl Perennial {
    /// Makes a host that has no modules yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hosts a module.
    #[must_use]
    pub fn host<M: Module>(mut self) -> Self {
        self.modules.push(Blueprint::of::<M>());
        self
    }

    /// Runs the command of the command line, and returns the exit code of the program.
    pub fn main(self) -> ExitCode {
        cli::main(&self.modules)
    }
}
