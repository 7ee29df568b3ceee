//! A circuit breaker (M. Nygard, Release It!, chapter 5). It decides whether messages are sent to a push service
//! now, by the waits that the service asked for and by its answers.
//!
//! ```text
//!              asked to wait, or failures of many subscriptions with no success between
//!   closed ──────────────────────────────────────────────────────────────────────────► open
//!    ▲                                                                                  │ the wait is over
//!    │ it succeeds                                                                      ▼
//!    └────────────────────────────────────────────────────────────────────────── half open ──► open, for longer
//! ```
//!
//! One subscription alone opens nothing: its failure is its own until the same fails for several subscriptions and
//! nothing succeeds between.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::verdict::MAX_RETRY_AFTER;

/// Number of distinct subscriptions in a row that open it: asked to wait, unreachable, our key refused.
const THROTTLED: usize = 20;
const UNREACHABLE: usize = 5;
const UNAUTHORIZED: usize = 20;
/// First and longest wait when the service asked for none. The wait doubles with each probe that fails.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const UNAUTHORIZED_WAIT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// Number of probes of distinct subscriptions that are refused before the wait for an operator doubles.
const PROBES: usize = 3;
/// A probe that has not ended after this time is lost.
const PROBE: Duration = Duration::from_secs(60);

/// Reason why messages to a push service are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::EnumString)]
#[strum(serialize_all = "snake_case")]
pub enum Cause {
    /// The service asked us to wait.
    Throttled,
    /// The service does not answer at its addresses.
    Unreachable,
    /// The service refuses a key for every subscription: the key or the contact is wrong.
    Unauthorized,
}

impl Cause {
    /// The word for the cause.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The cause for a word of [`Cause::as_str`]; `None` for other words.
    pub fn parse(word: &str) -> Option<Self> {
        word.parse().ok()
    }

    fn after(self) -> usize {
        match self {
            Self::Throttled => THROTTLED,
            Self::Unreachable => UNREACHABLE,
            Self::Unauthorized => UNAUTHORIZED,
        }
    }
}

/// Decision about one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// The message may be sent.
    Free,
    /// The message may be sent, and its outcome decides about the others.
    Probe,
    /// The message is held for this long.
    Held(Duration, Cause),
}

/// Meaning of a message's outcome for the push service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The service has accepted the message, or said that the subscription has ended.
    Success,
    /// The service answers but does not accept the message.
    Answered,
    /// The service asks to wait, for this time when it names one.
    Throttled(Option<Duration>),
    /// The service refuses the key.
    Unauthorized,
    /// There is no connection to the service.
    Unreachable,
    /// The service does not answer.
    Silent,
    /// The outcome says nothing about the service.
    Nothing,
}

impl Signal {
    /// Cause of a failure and the wait that was asked for; `None` when the signal is no failure.
    fn failure(self) -> Option<(Cause, Option<Duration>)> {
        match self {
            Self::Unauthorized => Some((Cause::Unauthorized, None)),
            Self::Throttled(after) => Some((Cause::Throttled, after)),
            Self::Unreachable | Self::Silent => Some((Cause::Unreachable, None)),
            Self::Success | Self::Answered | Self::Nothing => None,
        }
    }

    /// Cause of a failure; `None` when the signal is no failure.
    pub(crate) fn cause(self) -> Option<Cause> {
        self.failure().map(|(cause, _)| cause)
    }
}

/// The circuit breaker of one push service: see the module. The caller passes the time.
#[derive(Debug, Default)]
pub(crate) struct CircuitBreaker {
    state: BreakerState,
    /// The subscriptions that failed since the last success, by a hash of their endpoints, for each cause.
    failed: [HashSet<u64>; 3],
    /// Number of openings since the last success; each one lasts longer.
    openings: u32,
    held_for: HeldFor,
}

/// The three states, each with its evidence.
#[derive(Debug, Default)]
enum BreakerState {
    /// Messages are sent.
    #[default]
    Closed,
    /// No message is sent until the wait is over.
    Open(Hold),
    /// A probe was sent at this time, and has not ended.
    HalfOpen(Hold, Instant),
}

/// End and reason of a time without messages.
#[derive(Clone, Debug)]
struct Hold {
    until: Instant,
    cause: Cause,
    evidence: Evidence,
    /// The subscriptions that were refused as probes of this hold.
    probed: HashSet<u64>,
}

/// Source of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// An operator or another process.
    Told,
    /// Failures that were counted here.
    Counted,
}

/// The subscriptions that a hold is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum HeldFor {
    /// All subscriptions.
    #[default]
    All,
    /// Subscriptions that nothing was delivered to yet. Their first refusals may come from a few strangers, so the
    /// first wait is short.
    Unproven,
}

impl HeldFor {
    /// The word for these subscriptions.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl BreakerState {
    fn hold(&self) -> Option<&Hold> {
        match self {
            Self::Closed => None,
            Self::Open(hold) | Self::HalfOpen(hold, _) => Some(hold),
        }
    }

    fn hold_mut(&mut self) -> Option<&mut Hold> {
        match self {
            Self::Closed => None,
            Self::Open(hold) | Self::HalfOpen(hold, _) => Some(hold),
        }
    }
}

impl CircuitBreaker {
    /// Makes a circuit breaker for subscriptions that nothing was delivered to yet.
    pub(crate) fn of_unproven() -> Self {
        Self { held_for: HeldFor::Unproven, ..Self::default() }
    }

    /// Returns true when no messages are held.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, BreakerState::Closed)
    }

    /// Decides about one message. The first message after the wait is the probe.
    pub(crate) fn admit(&mut self, now: Instant) -> Passage {
        let hold = match &self.state {
            BreakerState::Closed => return Passage::Free,
            BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _) if hold.until > now => {
                return Passage::Held(hold.until - now, hold.cause);
            }
            BreakerState::HalfOpen(hold, sent) if now.duration_since(*sent) < PROBE => {
                return Passage::Held(WAIT.0, hold.cause);
            }
            BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _) => hold.clone(),
        };
        self.state = BreakerState::HalfOpen(hold, now);
        Passage::Probe
    }

    /// Records the success of a message that was no probe. When the circuit breaker has opened meanwhile, the
    /// message was sent before and proves nothing, except that the service can be reached.
    pub(crate) fn succeeded(&mut self) {
        if self.cause().is_none_or(|cause| cause == Cause::Unreachable) {
            self.reset();
        }
    }

    /// Records the outcome of a message to the subscription `who`. Returns true when it opened the circuit breaker.
    pub(crate) fn record(&mut self, signal: Signal, probe: bool, who: u64, now: Instant) -> bool {
        match signal {
            Signal::Success if probe => self.reset(),
            Signal::Success => self.succeeded(),
            Signal::Answered => self.record_answer(probe),
            Signal::Nothing => self.lose_probe(probe),
            Signal::Unauthorized if probe && self.cause() != Some(Cause::Unauthorized) => {
                // The service answers. Other subscriptions show whether it refuses the key for all.
                self.reset_but_for_refusals();
                self.failed[Cause::Unauthorized as usize].insert(who);
            }
            Signal::Unauthorized | Signal::Throttled(_) | Signal::Unreachable | Signal::Silent => {
                return self.record_failure(signal, probe, who, now);
            }
        }
        false
    }

    /// Records an answer that is no success.
    fn record_answer(&mut self, probe: bool) {
        self.failed[Cause::Throttled as usize].clear();
        self.failed[Cause::Unreachable as usize].clear();
        match self.cause() {
            Some(Cause::Unauthorized) => self.lose_probe(probe),
            Some(Cause::Throttled) if !probe => {}
            _ => self.reset_but_for_refusals(),
        }
    }

    fn record_failure(&mut self, signal: Signal, probe: bool, who: u64, now: Instant) -> bool {
        let Some((cause, asked)) = signal.failure() else { return false };
        let was_closed = self.is_closed();
        let failed = &mut self.failed[cause as usize];
        if failed.len() < cause.after() {
            failed.insert(who);
        }
        if !probe && (failed.len() < cause.after() || !was_closed) {
            return false;
        }
        if probe && cause == Cause::Unauthorized && self.probe_refused(who, now) {
            return false;
        }
        // A wait that was asked of a single subscription is limited, so that another one is asked soon.
        let most = if probe { WAIT.1 } else { MAX_RETRY_AFTER };
        self.trip_for(cause, asked.unwrap_or_default().min(most), now);
        was_closed
    }

    /// Records a refused probe. The probe may have been a subscription that was refused before or is hostile:
    /// returns true when another one is to be probed soon.
    fn probe_refused(&mut self, who: u64, now: Instant) -> bool {
        let Some(hold) = self.state.hold_mut() else { return false };
        hold.probed.insert(who);
        if hold.probed.len() >= PROBES {
            return false;
        }
        let again = Hold { until: now + WAIT.0, cause: Cause::Unauthorized, ..hold.clone() };
        self.state = BreakerState::Open(again);
        true
    }

    /// Opens the circuit breaker after counted failures: for at least `asked`, and each time for longer.
    fn trip_for(&mut self, cause: Cause, asked: Duration, now: Instant) {
        let until = now + asked.max(self.backoff(cause)).min(MAX_RETRY_AFTER);
        self.openings += 1;
        self.state =
            BreakerState::Open(Hold { until, cause, evidence: Evidence::Counted, probed: HashSet::new() });
    }

    /// Opens the circuit breaker for at least `wait`, by order of an operator or another process. A longer hold stays.
    pub(crate) fn hold(&mut self, wait: Duration, cause: Cause, now: Instant) {
        let until = now + wait.min(MAX_RETRY_AFTER);
        let (evidence, probed) = match &self.state {
            BreakerState::Closed => (Evidence::Told, HashSet::new()),
            BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _) if hold.until >= until => return,
            BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _) => {
                (hold.evidence, hold.probed.clone())
            }
        };
        self.state = BreakerState::Open(Hold { until, cause, evidence, probed });
    }

    /// Closes the circuit breaker and forgets all failures.
    pub(crate) fn reset(&mut self) {
        self.state = BreakerState::Closed;
        self.openings = 0;
        self.failed.iter_mut().for_each(HashSet::clear);
    }

    /// Closes the circuit breaker but keeps the refused subscriptions: an answer is no success.
    fn reset_but_for_refusals(&mut self) {
        let refused = std::mem::take(&mut self.failed[Cause::Unauthorized as usize]);
        self.reset();
        self.failed[Cause::Unauthorized as usize] = refused;
    }

    /// Records that a message ended without a result. When it was the probe, the next message may be the probe.
    pub(crate) fn lose_probe(&mut self, probe: bool) {
        if probe && let BreakerState::HalfOpen(hold, _) = &self.state {
            self.state = BreakerState::Open(hold.clone());
        }
    }

    /// Counts one more failure of the subscription `who`. Returns true, and clears the count, when these are enough.
    pub(crate) fn is_reached(&mut self, signal: Signal, who: u64) -> bool {
        let Some(cause) = signal.cause() else { return false };
        let failed = &mut self.failed[cause as usize];
        failed.insert(who);
        let is_reached = failed.len() >= cause.after();
        if is_reached {
            failed.clear();
        }
        is_reached
    }

    /// Opens the circuit breaker by the last of many failures, for no less than the current hold.
    pub(crate) fn trip(&mut self, signal: Signal, now: Instant) {
        let Some((cause, asked)) = signal.failure() else { return };
        self.hold(asked.unwrap_or_default().max(self.backoff(cause)), cause, now);
        self.openings += 1;
        if let Some(hold) = self.state.hold_mut() {
            hold.evidence = Evidence::Counted;
        }
    }

    /// Records that the service answered an unproven subscription in any way: it can be reached.
    pub(crate) fn is_there(&mut self) {
        self.failed[Cause::Unreachable as usize].clear();
        if self.cause() == Some(Cause::Unreachable) {
            self.reset_but_for_refusals();
        }
    }

    /// Returns true when the hold comes from failures counted here, not from an operator or another process.
    pub(crate) fn is_by_many(&self) -> bool {
        self.state.hold().is_some_and(|hold| hold.evidence == Evidence::Counted)
    }

    /// Returns true when there is nothing for a success to clear.
    pub(crate) fn is_new(&self) -> bool {
        self.is_closed() && self.openings == 0 && self.failed.iter().all(HashSet::is_empty)
    }

    /// Time since the wait of a hold was over, and the cause of the hold.
    pub(crate) fn ended(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.state.hold().filter(|hold| hold.until <= now)?;
        Some((now - hold.until, hold.cause))
    }

    /// Remaining time of a hold, and its cause.
    pub(crate) fn held(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.state.hold().filter(|hold| hold.until > now)?;
        Some((hold.until - now, hold.cause))
    }

    fn cause(&self) -> Option<Cause> {
        self.state.hold().map(|hold| hold.cause)
    }

    fn backoff(&self, cause: Cause) -> Duration {
        let (first, last) = match (cause, self.held_for) {
            (Cause::Unauthorized, HeldFor::Unproven) => (2 * WAIT.0, UNAUTHORIZED_WAIT.1),
            (Cause::Unauthorized, HeldFor::All) => UNAUTHORIZED_WAIT,
            (Cause::Throttled | Cause::Unreachable, _) => WAIT,
        };
        first.saturating_mul(2_u32.saturating_pow(self.openings.min(16))).min(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn asked(seconds: u32) -> Signal {
        Signal::Throttled(Some(SECOND * seconds))
    }

    fn throttled(now: Instant, seconds: u32) -> CircuitBreaker {
        let mut breaker = CircuitBreaker::default();
        for who in 0..20 {
            breaker.record(asked(seconds), false, who, now);
        }
        breaker
    }

    #[test]
    fn one_subscription_stops_nobody_and_many_stop_all() {
        let now = Instant::now();
        for (signal, needed) in [(asked(9), 20), (Signal::Silent, 5), (Signal::Unauthorized, 20)] {
            let mut breaker = CircuitBreaker::default();
            for _ in 0..1000 {
                breaker.record(signal, false, 7, now);
            }
            assert_eq!(breaker.admit(now), Passage::Free, "a hostile one");
            for who in 100..100 + needed - 2 {
                assert!(!breaker.record(signal, false, who, now));
            }
            assert_eq!(breaker.admit(now), Passage::Free);
            assert!(breaker.record(signal, false, 99, now), "{signal:?}");
            assert!(matches!(breaker.admit(now), Passage::Held(..)));
        }
    }

    #[test]
    fn a_success_between_forgives_them_all() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        for who in 0..1000 {
            breaker.record(Signal::Unauthorized, false, who, now);
            if who % 10 == 0 {
                breaker.succeeded();
            }
        }
        assert_eq!(breaker.admit(now), Passage::Free);
    }

    #[test]
    fn an_answer_that_is_no_success_forgives_no_refusal() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        let closed = (0..20).map(|who| {
            breaker.record(Signal::Answered, false, 1000 + who, now);
            breaker.record(Signal::Unauthorized, false, who, now)
        });
        assert_eq!(closed.filter(|closed| *closed).count(), 1);
        assert!(matches!(breaker.admit(now), Passage::Held(_, Cause::Unauthorized)));
    }

    #[test]
    fn a_success_that_was_under_way_does_not_end_a_wait() {
        let now = Instant::now();
        let mut breaker = throttled(now, 30);
        breaker.succeeded();
        breaker.record(Signal::Answered, false, 8, now);
        assert!(matches!(breaker.admit(now), Passage::Held(_, Cause::Throttled)));
    }

    #[test]
    fn a_wait_ends_with_one_probe_that_decides() {
        let start = Instant::now();
        let mut breaker = throttled(start, 30);
        assert_eq!(breaker.admit(start + SECOND), Passage::Held(29 * SECOND, Cause::Throttled));
        let later = start + 31 * SECOND;
        assert_eq!(breaker.admit(later), Passage::Probe);
        assert_eq!(breaker.admit(later), Passage::Held(SECOND, Cause::Throttled), "only one");
        breaker.record(asked(10), true, 77, later);
        assert_eq!(breaker.admit(later + SECOND), Passage::Held(9 * SECOND, Cause::Throttled));
        let later = later + 11 * SECOND;
        assert_eq!(breaker.admit(later), Passage::Probe);
        breaker.record(Signal::Success, true, 78, later);
        assert_eq!(breaker.admit(later), Passage::Free);
    }

    #[test]
    fn a_hostile_probe_stops_nobody_for_long() {
        let now = Instant::now();
        let mut breaker = throttled(now, 1);
        let later = now + 2 * SECOND;
        assert_eq!(breaker.admit(later), Passage::Probe);
        breaker.record(Signal::Unauthorized, true, 66, later);
        assert_eq!(breaker.admit(later), Passage::Free, "it answers, and refuses one");

        let mut breaker = throttled(now, 1);
        assert_eq!(breaker.admit(later), Passage::Probe);
        breaker.record(asked(3600), true, 66, later);
        assert_eq!(
            breaker.held(later),
            Some((60 * SECOND, Cause::Throttled)),
            "one is not believed for an hour"
        );

        let mut breaker = CircuitBreaker::default();
        (0..20).for_each(|who| assert!(breaker.record(Signal::Unauthorized, false, who, now) == (who == 19)));
        let mut later = now + 31 * SECOND;
        for who in 0..2 {
            assert_eq!(breaker.admit(later), Passage::Probe);
            breaker.record(Signal::Unauthorized, true, who, later);
            assert_eq!(breaker.held(later), Some((SECOND, Cause::Unauthorized)), "another one is asked soon");
            later += SECOND;
        }
        assert_eq!(breaker.admit(later), Passage::Probe);
        breaker.record(Signal::Unauthorized, true, 2, later);
        assert_eq!(breaker.held(later), Some((60 * SECOND, Cause::Unauthorized)));
    }

    #[test]
    fn waits_that_nobody_asked_for_double_to_a_limit() {
        let mut now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        for who in 0..5 {
            breaker.record(Signal::Silent, false, who, now);
        }
        let mut waits = Vec::new();
        for _ in 0..8 {
            let Passage::Held(wait, Cause::Unreachable) = breaker.admit(now) else { panic!("open") };
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(breaker.admit(now), Passage::Probe);
            breaker.record(Signal::Silent, true, 1, now);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_probe_that_never_ends_is_followed_by_another() {
        let now = Instant::now();
        let mut breaker = CircuitBreaker::default();
        breaker.hold(SECOND, Cause::Unauthorized, now);
        assert_eq!(breaker.admit(now + SECOND), Passage::Probe);
        assert!(matches!(breaker.admit(now + 2 * SECOND), Passage::Held(..)));
        breaker.record(Signal::Answered, true, 1, now + 2 * SECOND);
        assert_eq!(breaker.admit(now + 2 * SECOND), Passage::Probe);
        breaker.lose_probe(true);
        assert_eq!(breaker.admit(now + 2 * SECOND), Passage::Probe);
        assert_eq!(breaker.admit(now + 2 * SECOND + PROBE), Passage::Probe);
    }

    #[test]
    fn no_wait_is_longer_than_an_hour_and_an_operator_may_end_it() {
        let now = Instant::now();
        let mut breaker = throttled(now, 100_000);
        assert_eq!(breaker.held(now), Some((MAX_RETRY_AFTER, Cause::Throttled)));
        assert_eq!(breaker.held(now + MAX_RETRY_AFTER), None, "it is over, and nothing to remember");
        breaker.reset();
        assert_eq!(breaker.admit(now), Passage::Free);
    }
}
