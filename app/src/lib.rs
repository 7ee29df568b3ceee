//! Perennial: a long-lived application server.
//!
//! It boots once and then serves: requests, jobs and web push run as tasks of one process, over shared pools,
//! and leave together when SIGTERM comes. The binary hosts web push; other applications are hosted by writing
//! a [`module::Module`] and a `main` of three lines. Without the feature `push` nothing of web push is compiled.
//!
//! ARCHITECTURE.md in the repository has the map and the walk of one push and of one SIGTERM.

pub use perennial_host::*;
#[cfg(feature = "push")]
pub use perennial_push::{self as push, sink};

/// Listeners. As long as there are applications that look for them here, also the parts of the runtime and the stores.
pub mod server {
    pub use perennial_runtime::{
        backoff, breaker, cgroup, cpu, drain, health, pulse, signal, tasks, telemetry,
    };
    pub use perennial_server::{http, metrics, net, tcp, udp};
    pub use perennial_store::{cache, pool, transact, values};
}

/// Compiles the examples of the README and of the page for applications.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
#[cfg_attr(all(feature = "push", feature = "testing"), doc = include_str!("../../docs/your-own-application.md"))]
struct Readme;
