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
mod control;
mod cron;
pub mod data_dir;
mod dev;
mod handover;
pub mod http_client;
mod jobs;
pub mod limits;
pub mod listeners;
pub mod locks;
pub mod maintenance;
pub mod module;
mod names;
mod openapi;
pub mod passwords;
mod pause;
pub mod pools;
pub mod prelude;
mod program;
pub mod sessions;
pub mod settings;
pub mod sites;
mod stop;
mod supervisor;
mod tables;
#[cfg(feature = "testing")]
pub mod testing;

use std::borrow::Cow;
use std::process::ExitCode;

// Crates for modules, in the versions that the host has.
pub use perennial_runtime as runtime;
pub use perennial_store as store;
pub use perennial_store::pool::sql;
pub use perennial_store::{table, transact, values};
pub use perennial_workers as workers;
pub use {
    anyhow, axum, clap, futures_util, http, jiff, metrics, rusqlite, secrecy, serde, serde_json, tokio,
    tokio_util, toml, tracing, utoipa, uuid,
};

pub use program::name as program_name;

use module::{Blueprint, Module};
use program::Identity;

/// The program: a host, and the modules that it hosts.
#[derive(Clone, Debug, Default)]
pub struct Perennial {
    modules: Vec<Blueprint>,
    identity: Identity,
    /// Defaults of settings that the program changes.
    defaults: Vec<(String, toml::Value)>,
}

impl Perennial {
    /// Makes a host that has no modules yet.
    pub fn new() -> Self {
        <Self as Default>::default()
    }

    /// Hosts a module.
    #[must_use]
    pub fn host<M: Module>(mut self) -> Self {
        self.modules.push(Blueprint::of::<M>());
        self
    }

    /// Hosts a module with all its routes below a prefix: `.host_at::<Push>("/push")`.
    #[must_use]
    pub fn host_at<M: Module>(mut self, prefix: &'static str) -> Self {
        self.modules.push(Blueprint { prefix, ..Blueprint::of::<M>() });
        self
    }

    /// Names the program: in its usage and messages, in `GET /build`, and as the title of `/openapi.json`.
    #[must_use]
    pub fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.identity.name = name.into();
        self
    }

    /// Sets the version of the program, which is otherwise that of Perennial: `env!("CARGO_PKG_VERSION")`.
    #[must_use]
    pub fn version(mut self, version: impl Into<Cow<'static, str>>) -> Self {
        self.identity.version = version.into();
        self
    }

    /// Says in a sentence what the program is, for its usage and `/openapi.json`.
    #[must_use]
    pub fn about(mut self, about: impl Into<Cow<'static, str>>) -> Self {
        self.identity.about = about.into();
        self
    }

    /// Sets the prefix of environment variables that are settings: with `BOOKSHOP`, `BOOKSHOP_SERVER__LISTEN` sets
    /// `server.listen`. Without it, the prefix is `PERENNIAL`.
    #[must_use]
    pub fn env_prefix(mut self, prefix: &str) -> Self {
        self.identity.env_prefix = format!("{}_", prefix.trim_end_matches('_')).into();
        self
    }

    /// Changes the default of a setting, also one of another module: `.default("push.page", false)`.
    #[must_use]
    pub fn default(mut self, key: &str, value: impl Into<toml::Value>) -> Self {
        self.defaults.push((key.to_owned(), value.into()));
        self
    }

    /// Prepares to run the program within a test: see [`testing`].
    #[cfg(feature = "testing")]
    pub fn test(self) -> testing::TestBuilder {
        testing::TestBuilder::new(self)
    }

    /// Runs the command of the command line, and returns the exit code of the program.
    pub fn main(self) -> ExitCode {
        program::identify(&self.identity);
        match module::in_order(&self.modules).and_then(module::without_clashes) {
            Ok(modules) => cli::main(&modules, self.defaults),
            Err(mistake) => {
                eprintln!("{}: {mistake}", program::name());
                ExitCode::FAILURE
            }
        }
    }
}
