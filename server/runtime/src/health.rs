//! Answers of the health probes.
//!
//! * **Live** means: the main runtime still runs tasks. It never depends on a store or on a peer.
//! * **Ready** means: every condition that a component registered is met, the heartbeat is fresh, and no drain
//!   has begun.
//! * **Started** means: boot has ended.
//!
//! The heartbeat is a task on the main runtime; the probes are answered from another runtime, so that a main runtime
//! with all workers blocked is still detected.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{info, warn};

use crate::drain::Drain;
use crate::pulse::pulse;

/// Bounds of the interval between two beats of the heartbeat.
const BEAT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Time limits for a silent heartbeat.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Time without a beat after which the process is not ready.
    pub unready_after: Duration,
    /// Time without a beat after which the process is not live.
    pub stall_after: Duration,
}

/// The state behind the probes. A cheap handle.
#[derive(Clone, Debug)]
pub struct Health(Arc<HealthState>);

#[derive(Debug)]
struct HealthState {
    config: Config,
    born: Instant,
    last_beat_ms: AtomicU64,
    started: AtomicBool,
    draining: AtomicBool,
    unmet: Mutex<BTreeMap<&'static str, Unmet>>,
}

/// A condition that does not hold.
#[derive(Clone, Debug)]
struct Unmet {
    reason: String,
    policy: ReadinessPolicy,
}

/// Effect on readiness of a dependency that is not available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadinessPolicy {
    /// The process is not ready. A dependency that all replicas share makes all of them unready.
    Required,
    /// The process stays ready and refuses requests that need the dependency. The probe still names the dependency.
    Degraded,
}

/// The error for a text that names no [`ReadinessPolicy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted required or degraded")]
pub struct NoPolicy;

impl FromStr for ReadinessPolicy {
    type Err = NoPolicy;

    fn from_str(word: &str) -> Result<Self, NoPolicy> {
        match word {
            "required" => Ok(Self::Required),
            "degraded" => Ok(Self::Degraded),
            _ => Err(NoPolicy),
        }
    }
}

impl Health {
    /// Creates the state of a process that has not started and has no conditions.
    pub fn new(config: Config) -> Self {
        Self(Arc::new(HealthState {
            config,
            born: Instant::now(),
            last_beat_ms: AtomicU64::new(0),
            started: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            unmet: Mutex::default(),
        }))
    }

    /// Registers a required condition for readiness. It is unmet for `reason` until [`Condition::met`] is called.
    pub fn condition(&self, name: &'static str, reason: &str) -> Condition {
        let condition = Condition { health: self.clone(), name, policy: ReadinessPolicy::Required };
        condition.unmet(reason);
        condition
    }

    /// Registers a dependency of the process. It counts as available until [`Condition::unmet`] is called.
    pub fn dependency(&self, name: &'static str, policy: ReadinessPolicy) -> Condition {
        Condition { health: self.clone(), name, policy }
    }

    /// Records that boot has ended.
    pub fn started(&self) {
        self.0.started.store(true, Ordering::Release);
    }

    /// Records that the process is about to stop: it is not ready from now on.
    pub fn draining(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    /// Returns true when boot has ended.
    pub fn has_started(&self) -> bool {
        self.0.started.load(Ordering::Acquire)
    }

    /// Checks that the main runtime still runs tasks.
    ///
    /// # Errors
    /// The reason why the process is not live.
    pub fn live(&self) -> Result<(), String> {
        self.fresh_within(self.0.config.stall_after)
    }

    /// Checks that requests should be sent to this process. Returns the unmet conditions with
    /// [`ReadinessPolicy::Degraded`].
    ///
    /// # Errors
    /// Every reason why the process is not ready.
    pub fn ready(&self) -> Result<Vec<String>, Vec<String>> {
        let mut reasons = Vec::new();
        if self.0.draining.load(Ordering::Acquire) {
            reasons.push("draining".to_owned());
        }
        if !self.has_started() {
            reasons.push("starting".to_owned());
        }
        reasons.extend(self.fresh_within(self.0.config.unready_after).err());
        let unmet = self.0.unmet.lock();
        let of = |policy: ReadinessPolicy| {
            let unmet = unmet.iter().filter(move |(_, unmet)| unmet.policy == policy);
            unmet.map(|(name, unmet)| format!("{name}: {}", unmet.reason))
        };
        reasons.extend(of(ReadinessPolicy::Required));
        if reasons.is_empty() { Ok(of(ReadinessPolicy::Degraded).collect()) } else { Err(reasons) }
    }

    fn fresh_within(&self, limit: Duration) -> Result<(), String> {
        // There may be no beat before the end of boot, which `has_started` reports.
        if !self.has_started() {
            return Ok(());
        }
        let last = Duration::from_millis(self.0.last_beat_ms.load(Ordering::Acquire));
        let age = self.0.born.elapsed().saturating_sub(last);
        if age <= limit {
            return Ok(());
        }
        Err(format!("the main runtime has run no task for {:.1} s", age.as_secs_f64()))
    }

    /// Records beats of the runtime that it is spawned on, until the hard phase of the drain.
    ///
    /// # Errors
    /// Never; every task returns a `Result`.
    pub async fn heartbeat(self, drain: Drain) -> Result<(), Infallible> {
        // Several beats fit into the shorter limit, so that one late beat has no effect.
        let beat = (self.0.config.unready_after.min(self.0.config.stall_after) / 4).clamp(BEAT.0, BEAT.1);
        loop {
            let age = u64::try_from(self.0.born.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.0.last_beat_ms.store(age, Ordering::Release);
            tokio::select! {
                () = pulse(beat) => {}
                () = drain.hard() => return Ok(()),
            }
        }
    }
}

/// One condition for readiness, held by the component that observes it.
#[derive(Clone, Debug)]
pub struct Condition {
    health: Health,
    name: &'static str,
    policy: ReadinessPolicy,
}

impl Condition {
    /// Records that the condition is met.
    pub fn met(&self) {
        let mut unmet = self.health.0.unmet.lock();
        if unmet.remove(self.name).is_some() {
            info!(condition = self.name, "met");
        }
    }

    /// Records that the condition is not met, and the reason.
    pub fn unmet(&self, reason: &str) {
        let new = Unmet { reason: reason.to_owned(), policy: self.policy };
        let mut unmet = self.health.0.unmet.lock();
        let before = unmet.insert(self.name, new);
        // Unmet conditions are normal during boot and not logged.
        if self.health.has_started() && before.is_none_or(|before| before.reason != reason) {
            warn!(condition = self.name, reason, "not met");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> Health {
        Health::new(Config { unready_after: Duration::from_secs(5), stall_after: Duration::from_secs(30) })
    }

    #[test]
    fn readiness_names_every_reason() {
        let health = health();
        let store = health.condition("store", "opening");
        assert_eq!(health.ready(), Err(vec!["starting".into(), "store: opening".into()]));
        health.started();
        store.met();
        assert_eq!(health.ready(), Ok(vec![]));
        let cache = health.dependency("cache", ReadinessPolicy::Degraded);
        cache.unmet("refused");
        assert_eq!(health.ready(), Ok(vec!["cache: refused".into()]));
        store.unmet("disk full");
        health.draining();
        assert_eq!(health.ready(), Err(vec!["draining".into(), "store: disk full".into()]));
        assert_eq!(health.live(), Ok(()), "a store that is away never makes the process unhealthy");
    }
}
