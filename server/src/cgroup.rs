//! What the cgroup of the process lets it have, both versions: the limits of a pod.
//!
//! Where there is no limit, the machine is one.

use std::convert::Infallible;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::warn;

use crate::drain::Drain;
use crate::metrics;

/// How often to look how much memory is used.
const LOOK: Duration = Duration::from_millis(200);
/// How far below the mark it must fall again, in hundredths of the limit.
const RELIEF: u64 = 5;

/// The files of one cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container is mounted at `root`: `/sys/fs/cgroup` outside of tests.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// How many processors it may keep busy: its quota, rounded up, if it has one.
    pub fn processors(&self) -> Option<usize> {
        let (quota, period) = match self.read("cpu.max") {
            Some(text) => {
                let (quota, period) = text.split_once(' ')?;
                (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?)
            }
            None => (self.number("cpu/cpu.cfs_quota_us")?, self.number("cpu/cpu.cfs_period_us")?),
        };
        usize::try_from(quota.div_ceil(period.max(1))).ok().filter(|processors| *processors > 0)
    }

    /// How much memory it may have, in bytes, if that is limited.
    pub fn memory_limit(&self) -> Option<u64> {
        let limit = self.number("memory.max").or_else(|| self.number("memory/memory.limit_in_bytes"))?;
        // What version 1 says for none.
        (limit < 1 << 60).then_some(limit)
    }

    /// How much memory it has that cannot simply be taken away, in bytes: without the page cache.
    pub fn memory_used(&self) -> Option<u64> {
        let (used, statistics, cache, shared) = match self.number("memory.current") {
            Some(used) => (used, self.read("memory.stat")?, "file", "shmem"),
            None => {
                let used = self.number("memory/memory.usage_in_bytes")?;
                (used, self.read("memory/memory.stat")?, "total_cache", "total_shmem")
            }
        };
        let of = |name: &str| {
            let line = statistics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|number| number.parse::<u64>().ok()).unwrap_or_default()
        };
        // What is shared between processes counts as cache, and cannot be dropped.
        Some(used.saturating_sub(of(cache).saturating_sub(of(shared))))
    }

    fn read(&self, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.root.join(file)).ok()?.trim().to_owned())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.parse().ok()
    }
}

/// How many threads are worth having: as many as processors, of the machine or of the cgroup.
pub fn processors(cgroup: &Cgroup) -> NonZeroUsize {
    let machine = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let quota = cgroup.processors().and_then(NonZeroUsize::new);
    quota.map_or(machine, |quota| quota.min(machine))
}

/// Whether memory is nearly used up. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Pressure(Arc<AtomicBool>);

impl Pressure {
    /// Whether nothing should be begun that takes more of it.
    pub fn is_high(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Looks at `cgroup` until nothing new is taken: pressure is high from `percent` of its limit on, and until a bit less than
    /// that is used. Without a limit there is nothing to look at.
    ///
    /// # Errors
    /// Never: the type is that of a task.
    pub async fn watch(self, cgroup: Cgroup, percent: u64, drain: Drain) -> Result<(), Infallible> {
        let Some(limit) = cgroup.memory_limit() else {
            drain.soft().await;
            return Ok(());
        };
        loop {
            if let Some(used) = cgroup.memory_used() {
                metrics::memory(used, limit);
                self.update(used, limit, percent);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = drain.soft() => return Ok(()),
            }
        }
    }

    fn update(&self, used: u64, limit: u64, percent: u64) {
        let was_high = self.is_high();
        let mark = if was_high { percent.saturating_sub(RELIEF) } else { percent };
        let is_high = used / 100 >= limit / 10_000 * mark;
        self.0.store(is_high, Ordering::Relaxed);
        if is_high != was_high {
            warn!(used, limit, shedding = is_high, "memory is nearly used up, or is not any more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> (Cgroup, PathBuf) {
        let root =
            std::env::temp_dir().join(format!("perennial-cgroup-{}-{}", std::process::id(), files.len()));
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        (Cgroup::at(&root), root)
    }

    #[test]
    fn limits_of_version_2() {
        let (of, root) = cgroup(&[
            ("cpu.max", "150000 100000"),
            ("memory.max", "1000000"),
            ("memory.current", "900000"),
            ("memory.stat", "anon 100000\nfile 700000\nkernel 5\nshmem 50000\nfile_mapped 9"),
        ]);
        assert_eq!(
            (of.processors(), of.memory_limit(), of.memory_used()),
            (Some(2), Some(1_000_000), Some(250_000))
        );
        fs::write(root.join("cpu.max"), "max 100000").unwrap();
        fs::write(root.join("memory.max"), "max").unwrap();
        assert_eq!((of.processors(), of.memory_limit()), (None, None));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn limits_of_version_1() {
        let (of, root) = cgroup(&[
            ("cpu/cpu.cfs_quota_us", "50000"),
            ("cpu/cpu.cfs_period_us", "100000"),
            ("memory/memory.limit_in_bytes", "2000000"),
            ("memory/memory.usage_in_bytes", "1500000"),
            ("memory/memory.stat", "cache 1\ntotal_cache 500000\ntotal_shmem 0"),
        ]);
        assert_eq!(
            (of.processors(), of.memory_limit(), of.memory_used()),
            (Some(1), Some(2_000_000), Some(1_000_000))
        );
        fs::write(root.join("cpu/cpu.cfs_quota_us"), "-1").unwrap();
        fs::write(root.join("memory/memory.limit_in_bytes"), "9223372036854771712").unwrap();
        assert_eq!((of.processors(), of.memory_limit()), (None, None));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn pressure_falls_later_than_it_rose() {
        let pressure = Pressure::default();
        let at = |used: u64| {
            pressure.update(used * 10_000, 1_000_000, 90);
            pressure.is_high()
        };
        assert_eq!([at(89), at(90), at(86), at(84), at(89)], [false, true, true, false, false]);
    }
}
