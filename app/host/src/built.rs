//! What this binary is: its version, its commit, when it was built and what is in it.

use std::time::Instant;

use jiff::Timestamp;
use serde::Serialize;

/// The version of the package.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that was built; empty where it was not known.
pub(crate) const COMMIT: &str = env!("PERENNIAL_COMMIT");
/// Seconds since 1970.
const BUILT_AT: &str = env!("PERENNIAL_BUILT_AT");

/// What `GET /build` answers.
#[derive(Debug, Serialize)]
pub(crate) struct BuildView {
    name: &'static str,
    version: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    commit: &'static str,
    built_at: Option<Timestamp>,
    features: Vec<&'static str>,
    pid: u32,
    uptime_seconds: u64,
}

impl BuildView {
    /// Of this process, which began then.
    pub(crate) fn of(began: Instant) -> Self {
        Self {
            name: "perennial",
            version: VERSION,
            commit: COMMIT,
            built_at: BUILT_AT.parse().ok().and_then(|seconds| Timestamp::from_second(seconds).ok()),
            features: features(),
            pid: std::process::id(),
            uptime_seconds: began.elapsed().as_secs(),
        }
    }
}

/// The features of the package that were on.
fn features() -> Vec<&'static str> {
    let all = [("reference", cfg!(feature = "reference"))];
    all.into_iter().filter_map(|(name, is_on)| is_on.then_some(name)).collect()
}
