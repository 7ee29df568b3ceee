//! `GET /process`: processor time, memory, threads and open files of the process.

use std::time::Instant;

use axum::Json;
use serde::Serialize;

/// Resources that the process uses. A value that the system does not tell is absent.
#[derive(Debug, Default, Serialize)]
pub(super) struct ProcessView {
    pid: u32,
    uptime_seconds: u64,
    /// Processor time since the start of the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    processor_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resident_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    open_files: Option<usize>,
}

/// Reads the resources of this process, which started at `began`.
pub(super) fn view(began: Instant) -> Json<ProcessView> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok();
    let stat = stat.as_deref().and_then(Stat::parse);
    Json(ProcessView {
        pid: std::process::id(),
        uptime_seconds: began.elapsed().as_secs(),
        processor_seconds: stat
            .as_ref()
            .map(|stat| ratio(stat.ticks, rustix::param::clock_ticks_per_second())),
        resident_bytes: stat.as_ref().map(|stat| stat.pages * rustix::param::page_size() as u64),
        threads: stat.as_ref().map(|stat| stat.threads),
        open_files: std::fs::read_dir("/proc/self/fd").ok().map(Iterator::count),
    })
}

#[expect(clippy::cast_precision_loss, reason = "seconds of a process")]
fn ratio(ticks: u64, per_second: u64) -> f64 {
    ticks as f64 / per_second.max(1) as f64
}

/// The fields that are read from `/proc/self/stat` (proc(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// Processor time in user and in system mode, in clock ticks.
    ticks: u64,
    threads: u64,
    pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name of the process comes first, in parentheses, and may contain any characters.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self { ticks: number(14)? + number(15)?, threads: number(20)?, pages: number(24)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_process_may_have_anything_in_it() {
        let text = "42 (a b) c) S 1 42 42 0 -1 4194304 100 0 0 0 700 50 0 0 20 0 11 0 12345 1000000 2500 18446744073709551615";
        assert_eq!(Stat::parse(text), Some(Stat { ticks: 750, threads: 11, pages: 2500 }));
        assert_eq!(Stat::parse("nonsense"), None);
    }
}
