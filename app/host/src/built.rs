//! Version, commit, build time and features of this binary.

use std::time::Instant;

use jiff::Timestamp;
use serde::Serialize;

use crate::program;

/// The version of the package.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit that was built; empty if it was not known.
pub(crate) const COMMIT: &str = env!("PERENNIAL_COMMIT");
/// Time of the build, in seconds since 1970.
const BUILT_AT: &str = env!("PERENNIAL_BUILT_AT");

/// Answer of `GET /build`.
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
    /// Describes the binary of this process, which started at `began`.
    pub(crate) fn of(began: Instant) -> Self {
        Self {
            name: program::name(),
            version: &program::identity().version,
            commit: COMMIT,
            built_at: BUILT_AT.parse().ok().and_then(|seconds| Timestamp::from_second(seconds).ok()),
            features: features(),
            pid: std::process::id(),
            uptime_seconds: began.elapsed().as_secs(),
        }
    }
}

/// Features of the package that are compiled in.
fn features() -> Vec<&'static str> {
    let all = [("reference", cfg!(feature = "reference"))];
    all.into_iter().filter_map(|(name, is_on)| is_on.then_some(name)).collect()
}
