//! CPU and memory limits that the cgroup of the process sets (versions 1 and 2), such as the limits of a pod.
//!
//! Without a quota, the processors of the machine are the limit.

use std::convert::Infallible;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::warn;

use crate::drain::Drain;
use crate::health::Condition;
use crate::metrics;
use crate::pulse::pulse;

/// Bounds of the pause between two checks of the used memory. The less memory is left, the shorter the pause.
const LOOK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// Growth of the used memory that the checks notice in time, in bytes per second.
const FASTEST: u64 = 256 << 20;
/// Bounds of the pause between two requests to the allocator to give back free memory.
const TRIM: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Pause between two requests that are admitted under high pressure.
const TRICKLE: Duration = Duration::from_millis(100);
/// Reason in `/readyz` when high pressure lasts.
const SHEDDING: &str = "shedding: memory is nearly used up";
/// Time of high pressure after which `/readyz` reports it.
const TOLD_AFTER: Duration = Duration::from_secs(5);
/// How far below the mark the used memory must fall before the pressure ends, in hundredths of the limit.
const RELIEF: u64 = 5;

/// The files of one cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
}

impl Cgroup {
    /// The cgroup that is mounted at `root`, which is `/sys/fs/cgroup` outside of tests.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Number of processors that the cgroup may keep busy: its quota, rounded up. `None` without a quota.
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

    /// The memory limit in bytes. `None` without a limit.
    pub fn memory_limit(&self) -> Option<u64> {
        let limit = self.number("memory.max").or_else(|| self.number("memory/memory.limit_in_bytes"))?;
        // Version 1 reports a huge number when there is no limit.
        (limit < 1 << 60).then_some(limit)
    }

    /// Used memory that the kernel cannot simply reclaim, in bytes: without the page cache.
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
        // Shared memory counts as cache, but cannot be reclaimed.
        Some(used.saturating_sub(of(cache).saturating_sub(of(shared))))
    }

    fn read(&self, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.root.join(file)).ok()?.trim().to_owned())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.parse().ok()
    }
}

/// Number of threads worth having: the processors of the machine, or the quota of the cgroup if that is lower.
pub fn processors(cgroup: &Cgroup) -> NonZeroUsize {
    let machine = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let quota = cgroup.processors().and_then(NonZeroUsize::new);
    quota.map_or(machine, |quota| quota.min(machine))
}

/// Memory pressure, which is high while memory is nearly used up. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Pressure(Arc<PressureState>);

#[derive(Debug, Default)]
struct PressureState {
    is_high: AtomicBool,
    /// When a request was last admitted under high pressure.
    trickled: Mutex<Option<Instant>>,
    /// The condition that reports in `/readyz` that the pressure lasts.
    condition: OnceLock<Condition>,
}

impl Pressure {
    /// Returns true when no work that takes more memory should begin.
    pub fn is_high(&self) -> bool {
        self.0.is_high.load(Ordering::Relaxed)
    }

    /// Returns true when a request may begin. A few may begin even under high pressure: without any, nothing would show
    /// that there is room again.
    pub fn admits(&self) -> bool {
        !self.is_high() || self.trickles(Instant::now())
    }

    fn trickles(&self, now: Instant) -> bool {
        let mut last = self.0.trickled.lock();
        let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= TRICKLE);
        if is_due {
            *last = Some(now);
        }
        is_due
    }

    /// Sets the condition that reports pressure that lasts.
    pub fn tell(&self, condition: Condition) {
        let _ = self.0.condition.set(condition);
    }

    /// Watches the memory of `cgroup` until the soft phase of the drain. The pressure becomes high at `percent` of the
    /// limit, and ends when a bit less than that is used. Shortly before the mark, the allocator is asked to give free
    /// memory back to the system: it would keep that memory otherwise, and the pressure would never end. Without a
    /// limit there is nothing to watch.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn watch(self, cgroup: Cgroup, percent: u64, drain: Drain) -> Result<(), Infallible> {
        let Some(limit) = cgroup.memory_limit() else {
            drain.soft().await;
            return Ok(());
        };
        let mut trims = Trims::default();
        let mut high_since = None;
        loop {
            let mut used = cgroup.memory_used();
            if let Some(before) = used
                && is_over(before, limit, percent.saturating_sub(RELIEF))
                && trims.are_due(Instant::now())
            {
                let _ = tokio::task::spawn_blocking(perennial_heap::give_back).await;
                used = cgroup.memory_used();
                trims.gave(before.saturating_sub(used.unwrap_or(before)), limit, Instant::now());
            }
            if let Some(used) = used {
                metrics::memory(used, limit);
            }
            // An unknown usage counts as 0.
            self.update(used.unwrap_or_default(), limit, percent);
            match (self.is_high(), high_since) {
                (true, None) => high_since = Some(Instant::now()),
                (true, Some(since)) if since.elapsed() >= TOLD_AFTER => {
                    self.0.condition.get().inspect(|condition| condition.unmet(SHEDDING));
                }
                (true, Some(_)) => {}
                (false, _) => {
                    high_since = None;
                    self.0.condition.get().inspect(|condition| condition.met());
                }
            }
            tokio::select! {
                () = pulse(pause(used.unwrap_or_default(), limit, percent)) => {}
                () = drain.soft() => return Ok(()),
            }
        }
    }

    fn update(&self, used: u64, limit: u64, percent: u64) {
        let was_high = self.is_high();
        let is_high = is_over(used, limit, if was_high { percent.saturating_sub(RELIEF) } else { percent });
        self.0.is_high.store(is_high, Ordering::Relaxed);
        if is_high != was_high {
            metrics::shedding(is_high);
            warn!(used, limit, shedding = is_high, "shedding under memory pressure has begun or ended");
        }
    }
}

fn is_over(used: u64, limit: u64, percent: u64) -> bool {
    used / 100 >= limit / 10_000 * percent
}

/// Pause until the next check: the less memory is left, the shorter the pause.
fn pause(used: u64, limit: u64, percent: u64) -> Duration {
    let left = (limit / 100).saturating_mul(percent).saturating_sub(used);
    Duration::from_millis(left.saturating_mul(1000) / FASTEST).clamp(LOOK.0, LOOK.1)
}

/// Schedule of the requests to the allocator to give back free memory: at most one per second, and fewer while they
/// bring nothing.
#[derive(Debug, Default)]
struct Trims {
    next: Option<Instant>,
    fruitless: u32,
}

impl Trims {
    fn are_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    fn gave(&mut self, bytes: u64, limit: u64, now: Instant) {
        self.fruitless = if bytes < limit / 100 { self.fruitless + 1 } else { 0 };
        let pause = TRIM.0.saturating_mul(2_u32.saturating_pow(self.fruitless.saturating_sub(1)));
        self.next = Some(now + pause.min(TRIM.1));
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
    #[test]
    fn a_trickle_is_always_admitted() {
        let (pressure, now) = (Pressure::default(), Instant::now());
        assert!([pressure.admits(), pressure.admits()] == [true, true], "all, while there is memory");
        pressure.update(95 * 10_000, 1_000_000, 90);
        let at = [0, 1, 99, 100, 101, 200].map(|ms| pressure.trickles(now + Duration::from_millis(ms)));
        assert_eq!(at, [true, false, false, true, false, true]);
    }

    #[test]
    fn the_allocator_is_asked_more_rarely_while_it_gives_nothing() {
        let (mut trims, mut now) = (Trims::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..9 {
            assert!(trims.are_due(now));
            trims.gave(0, 1 << 30, now);
            let next = trims.next.unwrap();
            pauses.push((next - now).as_secs());
            now = next;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        trims.gave(1 << 29, 1 << 30, now);
        assert_eq!(trims.next, Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn looks_are_frequent_where_little_is_left() {
        let gib = 1_u64 << 30;
        assert_eq!(pause(gib / 2, 2 * gib, 90), LOOK.1);
        assert_eq!(pause(gib * 89 / 100, gib, 90), LOOK.0);
        assert_eq!(pause(gib * 99 / 100, gib, 90), LOOK.0);
    }
}
