//! A circuit breaker for each named dependency: after repeated failures it blocks all calls for a while, and then lets
//! one call at a time probe whether the dependency is back.
//!
//! ```text
//!            failures in a row               time is up
//!  Closed ─────────────────────► Open ─────────────────► Probing
//!    ▲                             ▲                        │ │
//!    │                             └──── probe fails ───────┘ │
//!    └─────────────────────────── probe succeeds ────────────┘
//! ```
//!
//! Jobs and endpoints make their calls through [`Breaker::call`]. A job whose error has [`Open`] among its causes is
//! snoozed, not failed; an endpoint answers 503 with `Retry-After`.

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

/// Settings of a circuit breaker.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Number of failures in a row that open the circuit breaker.
    pub failures: u32,
    /// Time that the circuit breaker stays open, by the number of times that it has opened in a row.
    pub pause: Backoff,
}

impl Default for Config {
    fn default() -> Self {
        Self { failures: 5, pause: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)) }
    }
}

/// The call was not made because the circuit breaker is open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the circuit breaker of {dependency} is open: too many failures in a row")]
pub struct Open {
    /// Name of the dependency.
    pub dependency: &'static str,
    /// Time until a new call makes sense.
    pub retry_after: Duration,
}

/// Error of [`Breaker::call`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError<E> {
    /// The call was not made.
    #[error("not called")]
    Open(#[source] Open),
    /// The call was made and failed.
    #[error(transparent)]
    Failed(#[from] E),
}

/// State of a circuit breaker at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BreakerStatus {
    /// Name of the dependency.
    pub dependency: &'static str,
    /// `closed`, `open` or `probing`.
    pub state: &'static str,
    /// Number of failures in a row.
    pub failures: u32,
    /// Time until the next call is allowed, in milliseconds.
    pub open_for_ms: u64,
}

/// The circuit breaker of one dependency. A cheap handle.
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
    /// Creates a closed circuit breaker, whose gauge is there from now on.
    pub fn new(dependency: &'static str, config: Config) -> Self {
        metrics::breaker_open(dependency, false);
        Self(Arc::new(BreakerCell {
            dependency,
            config,
            state: Mutex::new(CircuitState::Closed { failures: 0 }),
        }))
    }

    /// Makes a call unless the circuit breaker is open. Every error counts as a failure of the dependency.
    ///
    /// # Errors
    /// [`CallError::Open`] when the call was not made, and [`CallError::Failed`] when it failed.
    pub async fn call<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, CallError<E>> {
        let permit = self.permit().map_err(CallError::Open)?;
        let result = call.await;
        permit.judge(result.is_ok());
        Ok(result?)
    }

    /// Returns a permit for one call to the dependency. A permit that drops without [`BreakerPermit::judge`], for
    /// example because the caller goes away, counts neither as a success nor as a failure.
    ///
    /// # Errors
    /// [`Open`] when the dependency must not be called.
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
            // Another call is the probe.
            CircuitState::Probing { .. } => refuse(self.0.config.pause.base),
        }
    }

    /// The current state.
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
            info!(dependency = self.0.dependency, "circuit breaker is closed: the dependency answers again");
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
            // The call began before the circuit breaker opened.
            CircuitState::Open { .. } => return,
        };
        let pause = self.0.config.pause.jittered(opened);
        *state = CircuitState::Open { until: Instant::now() + pause, opened };
        warn!(dependency = self.0.dependency, ?pause, "circuit breaker is open: too many failures in a row");
        metrics::breaker_open(self.0.dependency, true);
    }
}

/// A permit for one call to a dependency.
#[derive(Debug)]
#[must_use = "say how it went"]
pub struct BreakerPermit {
    breaker: Breaker,
    /// Number of times that the circuit breaker has opened in a row, if this call is the probe.
    probing: Option<u32>,
}

impl BreakerPermit {
    /// Records whether the call succeeded.
    pub fn judge(mut self, succeeded: bool) {
        self.probing = None;
        if succeeded { self.breaker.succeeded() } else { self.breaker.failed() }
    }
}

impl Drop for BreakerPermit {
    fn drop(&mut self) {
        // The probe has no result: the next call is the probe.
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
        // The dropped probe has no result: the next call may probe.
        breaker.permit().unwrap().judge(false);
        let open = breaker.permit().unwrap_err();
        assert!(open.retry_after >= 10 * SECOND && open.retry_after <= 20 * SECOND, "{open:?}");
    }
}
