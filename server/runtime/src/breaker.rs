//! A circuit breaker for each dependency that has a name: when it fails again and again, nobody asks it for a
//! while, and then one at a time asks whether it is back.
//!
//! ```text
//!            failures in a row               time is up
//!  Closed ─────────────────────► Open ─────────────────► Probing
//!    ▲                             ▲      one asks, the     │ │
//!    │                             └───── it fails ─────────┘ │
//!    └──────────────────────────── it succeeds ──────────────┘
//! ```
//!
//! It guards what a job or an endpoint does ([`Breaker::call`]). A job whose error has [`Open`] among its causes is snoozed,
//! not failed; an endpoint answers 503 with `Retry-After`.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::metrics;

/// When to open, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How many failures in a row open it.
    pub failures: u32,
    /// How long it stays open, by how often it was opened in a row.
    pub pause: Backoff,
}

impl Default for Config {
    fn default() -> Self {
        Self { failures: 5, pause: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)) }
    }
}

/// The dependency is not asked for now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{dependency} is not asked for now: it has failed too often")]
pub struct Open {
    /// Which dependency.
    pub dependency: &'static str,
    /// When asking again makes sense.
    pub retry_after: Duration,
}

/// Why a call did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError<E> {
    /// It was not made.
    #[error("not called")]
    Open(#[source] Open),
    /// It failed.
    #[error(transparent)]
    Failed(#[from] E),
}

/// Where a breaker stands, for those who look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BreakerStatus {
    /// Which dependency.
    pub dependency: &'static str,
    /// closed, open or probing.
    pub state: &'static str,
    /// Failures in a row.
    pub failures: u32,
    /// For how long nobody asks.
    pub open_for_ms: u64,
}

/// The breaker of one dependency. A cheap handle.
#[derive(Clone)]
pub struct Breaker(Arc<BreakerCell>);

struct BreakerCell {
    dependency: &'static str,
    config: Config,
    state: Mutex<CircuitState>,
}

#[derive(Clone, Copy, Debug)]
enum CircuitState {
    Closed { failures: u32 },
    Open { until: Instant, opened: u32 },
    Probing { opened: u32 },
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Breaker").field(&self.status()).finish()
    }
}

impl Breaker {
    /// A closed one.
    pub fn new(dependency: &'static str, config: Config) -> Self {
        Self(Arc::new(BreakerCell {
            dependency,
            config,
            state: Mutex::new(CircuitState::Closed { failures: 0 }),
        }))
    }

    /// Makes a call, unless the breaker is open; every error counts as a failure of the dependency.
    ///
    /// # Errors
    /// [`CallError::Open`] when the call was not made, else what it failed with.
    pub async fn call<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, CallError<E>> {
        let permit = self.permit().map_err(CallError::Open)?;
        let result = call.await;
        permit.judge(result.is_ok());
        Ok(result?)
    }

    /// Leave to ask the dependency once. If what is returned drops unjudged, as when a caller goes away, it
    /// counts neither way.
    ///
    /// # Errors
    /// [`Open`] when it should not be asked.
    pub fn permit(&self) -> Result<BreakerPermit, Open> {
        let mut state = self.lock();
        let now = Instant::now();
        let refuse = |retry_after| Err(Open { dependency: self.0.dependency, retry_after });
        match *state {
            CircuitState::Closed { .. } => Ok(BreakerPermit { breaker: self.clone(), probing: None }),
            CircuitState::Open { until, .. } if now < until => refuse(until - now),
            CircuitState::Open { opened, .. } => {
                *state = CircuitState::Probing { opened };
                Ok(BreakerPermit { breaker: self.clone(), probing: Some(opened) })
            }
            // Somebody asks just now.
            CircuitState::Probing { .. } => refuse(self.0.config.pause.base),
        }
    }

    /// Where it stands.
    pub fn status(&self) -> BreakerStatus {
        let state = *self.lock();
        let (word, failures, open_for) = match state {
            CircuitState::Closed { failures } => ("closed", failures, Duration::ZERO),
            CircuitState::Open { until, opened } => {
                ("open", self.0.config.failures + opened - 1, until.saturating_duration_since(Instant::now()))
            }
            CircuitState::Probing { opened } => {
                ("probing", self.0.config.failures + opened - 1, Duration::ZERO)
            }
        };
        let open_for_ms = u64::try_from(open_for.as_millis()).unwrap_or(u64::MAX);
        BreakerStatus { dependency: self.0.dependency, state: word, failures, open_for_ms }
    }

    fn lock(&self) -> MutexGuard<'_, CircuitState> {
        self.0.state.lock()
    }

    fn succeeded(&self) {
        let mut state = self.lock();
        if matches!(*state, CircuitState::Probing { .. }) {
            info!(dependency = self.0.dependency, "the breaker is closed: it answers again");
            metrics::breaker_open(self.0.dependency, false);
        }
        if !matches!(*state, CircuitState::Open { .. }) {
            *state = CircuitState::Closed { failures: 0 };
        }
    }

    fn failed(&self) {
        let mut state = self.lock();
        let opened = match *state {
            CircuitState::Closed { failures } if failures + 1 < self.0.config.failures => {
                *state = CircuitState::Closed { failures: failures + 1 };
                return;
            }
            CircuitState::Closed { .. } => 1,
            CircuitState::Probing { opened } => opened + 1,
            // A call from before it was opened.
            CircuitState::Open { .. } => return,
        };
        let pause = self.0.config.pause.jittered(opened);
        *state = CircuitState::Open { until: Instant::now() + pause, opened };
        warn!(dependency = self.0.dependency, ?pause, "the breaker is open: it has failed too often");
        metrics::breaker_open(self.0.dependency, true);
    }
}

/// Leave to ask a dependency once.
#[derive(Debug)]
#[must_use = "say how it went"]
pub struct BreakerPermit {
    breaker: Breaker,
    /// How often the breaker was opened, when this is the call that asks whether the dependency is back.
    probing: Option<u32>,
}

impl BreakerPermit {
    /// How it went.
    pub fn judge(mut self, succeeded: bool) {
        self.probing = None;
        if succeeded { self.breaker.succeeded() } else { self.breaker.failed() }
    }
}

impl Drop for BreakerPermit {
    fn drop(&mut self) {
        // Nobody knows: the next one asks.
        if let Some(opened) = self.probing {
            *self.breaker.lock() = CircuitState::Open { until: Instant::now(), opened };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> Breaker {
        Breaker::new("mail", Config { failures: 3, pause: Backoff::new(10 * SECOND, 60 * SECOND) })
    }

    async fn fail(breaker: &Breaker) -> CallError<&'static str> {
        breaker.call(async { Err::<(), _>("no") }).await.unwrap_err()
    }

    async fn succeed(breaker: &Breaker) -> Result<(), CallError<&'static str>> {
        breaker.call(async { Ok(()) }).await
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it_and_one_success_closes_it() {
        let breaker = breaker();
        fail(&breaker).await;
        fail(&breaker).await;
        succeed(&breaker).await.unwrap();
        for _ in 0..3 {
            assert_eq!(fail(&breaker).await, CallError::Failed("no"));
        }
        let Err(CallError::Open(open)) = succeed(&breaker).await else { panic!("it is open") };
        assert!(open.retry_after > 4 * SECOND && open.retry_after <= 10 * SECOND, "{open:?}");
        assert_eq!(breaker.status().state, "open");
        tokio::time::sleep(open.retry_after).await;
        succeed(&breaker).await.unwrap();
        assert_eq!(breaker.status().state, "closed");
    }

    #[tokio::test(start_paused = true)]
    async fn one_asks_at_a_time_and_the_pause_grows() {
        let breaker = breaker();
        for _ in 0..3 {
            fail(&breaker).await;
        }
        tokio::time::sleep(10 * SECOND).await;
        let probe = breaker.permit().unwrap();
        breaker.permit().unwrap_err();
        drop(probe);
        // Who went away has found out nothing: the next one may.
        breaker.permit().unwrap().judge(false);
        let open = breaker.permit().unwrap_err();
        assert!(open.retry_after >= 10 * SECOND && open.retry_after <= 20 * SECOND, "{open:?}");
    }
}
