//! Shared parts of the tests: the program as a process, a push service that misbehaves on request, a browser.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

pub mod backend;
pub mod certificates;
pub mod double;
pub mod figures;
pub mod firefox;
pub mod haproxy;
pub mod host;
pub mod http;
pub mod keys;
pub mod kubernetes;
pub mod nginx;
pub mod pgbouncer;
pub mod postgres;
pub mod process;
pub mod readiness;
pub mod redis;
pub mod schedules;
pub mod site;
pub mod stores;
pub mod tinyproxy;
pub mod tools;
pub mod wire;

use std::future::Future;
use std::time::Duration;

/// Maximum time for anything that should happen soon, on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// Returns a port on which no process listens, for servers that cannot choose one themselves.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Returns true when the long versions of the tests are to run: `tests/run --full`.
pub fn full() -> bool {
    std::env::var_os("PERENNIAL_FULL").is_some()
}

/// Waits until `condition` returns a value. Panics with `what` when it does not within [`SOON`].
pub async fn eventually<T, F>(what: &str, condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    eventually_within(SOON, what, condition).await
}

/// Waits like [`eventually`], but for at most `patience`.
pub async fn eventually_within<T, F>(patience: Duration, what: &str, mut condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let began = std::time::Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(began.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Awaits `future` for at most [`SOON`] and returns its value. Panics with `what` when it takes longer.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {SOON:?}: {what}"),
    }
}
