//! Whether a push service is sent to now: what it asked for, and what its answers say about us. A circuit breaker
//! (M. Nygard, Release It!, chapter 5).
//!
//! ```text
//!              asked to wait, or failures of many subscriptions with no success between
//!   closed ──────────────────────────────────────────────────────────────────────────► open
//!    ▲                                                                                  │ the wait is over
//!    │ it succeeds                                                                      ▼
//!    └────────────────────────────────────────────────────────────────────────── half open ──► open, for longer
//! ```
//!
//! One subscription stops nothing: what fails for one of them is its own affair until the same fails for
//! several, and nothing succeeds between.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::verdict::MAX_RETRY_AFTER;

/// How many distinct subscriptions in a row open it: asked to wait, unreachable, our key refused.
const THROTTLED: usize = 20;
const UNREACHABLE: usize = 5;
const UNAUTHORIZED: usize = 20;
/// The first wait when none was asked for, which doubles with each probe that fails, and the longest.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const UNAUTHORIZED_WAIT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// How many probes of distinct subscriptions are refused before the wait for an operator doubles.
const PROBES: usize = 3;
/// A probe that has not ended after this time is lost.
const PROBE: Duration = Duration::from_secs(60);

/// Why a push service is not sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It asked us to wait.
    Throttled,
    /// Nobody answers at its addresses.
    Unreachable,
    /// It refuses a key for every subscription: the key or the contact is wrong.
    Unauthorized,
}

impl Cause {
    /// A word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Unreachable => "unreachable",
            Self::Unauthorized => "unauthorized",
        }
    }

    /// The cause that a word stands for.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Throttled, Self::Unreachable, Self::Unauthorized]
            .into_iter()
            .find(|cause| cause.as_str() == word)
    }

    fn after(self) -> usize {
        match self {
            Self::Throttled => THROTTLED,
            Self::Unreachable => UNREACHABLE,
            Self::Unauthorized => UNAUTHORIZED,
        }
    }
}

/// Whether a message may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// Yes.
    Free,
    /// Yes, and its outcome decides about the others.
    Probe,
    /// No, not for this long.
    Held(Duration, Cause),
}

/// What the outcome of a message says about the push service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// It has accepted the message, or said that the subscription has ended.
    Success,
    /// It answers, and accepts nothing.
    Answered,
    /// It asks to wait, perhaps for so long.
    Throttled(Option<Duration>),
    /// It refuses the key.
    Unauthorized,
    /// There is no connection to it.
    Unreachable,
    /// It does not answer.
    Silent,
    /// Nothing.
    Nothing,
}

impl Signal {
    /// The failure that this is, and the wait that was asked for; none when it is no failure.
    fn failure(self) -> Option<(Cause, Option<Duration>)> {
        match self {
            Self::Unauthorized => Some((Cause::Unauthorized, None)),
            Self::Throttled(after) => Some((Cause::Throttled, after)),
            Self::Unreachable | Self::Silent => Some((Cause::Unreachable, None)),
            Self::Success | Self::Answered | Self::Nothing => None,
        }
    }

    /// Why a push service is held that says only this.
    pub(crate) fn cause(self) -> Option<Cause> {
        self.failure().map(|(cause, _)| cause)
    }
}

/// See the module. Time is an argument.
#[derive(Debug, Default)]
pub(crate) struct CircuitBreaker {
    state: BreakerState,
    /// The subscriptions that failed since the last success, by a hash of their endpoints, for each cause.
    failed: [HashSet<u64>; 3],
    /// How often it was opened since the last success: each time for longer.
    openings: u32,
    audience: BreakerAudience,
}

/// The three states, each with its evidence.
#[derive(Debug, Default)]
enum BreakerState {
    /// Messages go.
    #[default]
    Closed,
    /// No message goes until the wait is over.
    Open(Hold),
    /// A probe went at this time, and has not ended.
    HalfOpen(Hold, Instant),
}

/// Why no messages go.
#[derive(Clone, Debug)]
struct Hold {
    until: Instant,
    cause: Cause,
    evidence: Evidence,
    /// The subscriptions that were refused as probes of this hold.
    probed: HashSet<u64>,
}

/// Who has said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Evidence {
    /// An operator or another process.
    Told,
    /// Failures that were counted here.
    Counted,
}

/// Whose messages it is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum BreakerAudience {
    /// Those of every subscription.
    #[default]
    All,
    /// Those of subscriptions that nothing was delivered to yet: the first refusals may be those of a few strangers, and so
    /// it asks again soon.
    Unproven,
}

impl BreakerState {
    fn hold(&self) -> Option<&Hold> {
        match self {
            Self::Closed => None,
            Self::Open(hold) | Self::HalfOpen(hold, _) => Some(hold),
        }
    }
}

impl CircuitBreaker {
    /// One for subscriptions that nothing was delivered to yet.
    pub(crate) fn of_unproven() -> Self {
        Self { audience: BreakerAudience::Unproven, ..Self::default() }
    }

    /// Whether nothing keeps messages back.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, BreakerState::Closed)
    }

    /// Asks for one message.
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

    /// A message that was no probe succeeded. Where it has opened meanwhile, the message was sent before, and says nothing
    /// new, unless that no connection was had.
    pub(crate) fn succeeded(&mut self) {
        if self.cause().is_none_or(|cause| cause == Cause::Unreachable) {
            self.reset();
        }
    }

    /// The outcome of a message to the subscription `who`. True when this opened it.
    pub(crate) fn record(&mut self, signal: Signal, probe: bool, who: u64, now: Instant) -> bool {
        match signal {
            Signal::Success if probe => self.reset(),
            Signal::Success => self.succeeded(),
            Signal::Answered => self.record_answer(probe),
            Signal::Nothing => self.lose_probe(probe),
            Signal::Unauthorized if probe && self.cause() != Some(Cause::Unauthorized) => {
                // It answers. Whether it refuses everybody is for others to say.
                self.reset_but_for_refusals();
                self.failed[Cause::Unauthorized as usize].insert(who);
            }
            Signal::Unauthorized | Signal::Throttled(_) | Signal::Unreachable | Signal::Silent => {
                return self.record_failure(signal, probe, who, now);
            }
        }
        false
    }

    /// It answers, which is no success.
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
        // What one subscription is asked for is believed for as long as it takes to ask another.
        let most = if probe { WAIT.1 } else { MAX_RETRY_AFTER };
        self.trip_for(cause, asked.unwrap_or_default().min(most), now);
        was_closed
    }

    /// A probe was refused. One that was refused before, or is hostile, may have been the probe: true when another one is to
    /// be asked soon.
    fn probe_refused(&mut self, who: u64, now: Instant) -> bool {
        let (BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _)) = &mut self.state else {
            return false;
        };
        hold.probed.insert(who);
        if hold.probed.len() >= PROBES {
            return false;
        }
        let again = Hold { until: now + WAIT.0, cause: Cause::Unauthorized, ..hold.clone() };
        self.state = BreakerState::Open(again);
        true
    }

    /// Opens it for what was counted: for at least `asked`, and each time for longer.
    fn trip_for(&mut self, cause: Cause, asked: Duration, now: Instant) {
        let until = now + asked.max(self.backoff(cause)).min(MAX_RETRY_AFTER);
        self.openings += 1;
        self.state =
            BreakerState::Open(Hold { until, cause, evidence: Evidence::Counted, probed: HashSet::new() });
    }

    /// Opens it for at least this long, since an operator or another process says so.
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

    /// Closes it, and forgets everything that speaks against the push service.
    pub(crate) fn reset(&mut self) {
        self.state = BreakerState::Closed;
        self.openings = 0;
        self.failed.iter_mut().for_each(HashSet::clear);
    }

    /// Closes it, and remembers who was refused: that it answers is no success.
    fn reset_but_for_refusals(&mut self) {
        let refused = std::mem::take(&mut self.failed[Cause::Unauthorized as usize]);
        self.reset();
        self.failed[Cause::Unauthorized as usize] = refused;
    }

    /// A probe, if it was one, ended without saying anything: the next message may be one.
    pub(crate) fn lose_probe(&mut self, probe: bool) {
        if probe && let BreakerState::HalfOpen(hold, _) = &self.state {
            self.state = BreakerState::Open(hold.clone());
        }
    }

    /// Whether one more failure of the subscription `who` makes as many as it takes; they are not counted any more then.
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

    /// Opens it for what the last of many failures says, for no less than it is held already.
    pub(crate) fn trip(&mut self, signal: Signal, now: Instant) {
        let Some((cause, asked)) = signal.failure() else { return };
        let until = now + asked.unwrap_or_default().max(self.backoff(cause)).min(MAX_RETRY_AFTER);
        self.openings += 1;
        match &mut self.state {
            BreakerState::Open(hold) | BreakerState::HalfOpen(hold, _) if hold.until >= until => {
                hold.evidence = Evidence::Counted;
            }
            state => {
                let probed = state.hold().map(|hold| hold.probed.clone()).unwrap_or_default();
                *state = BreakerState::Open(Hold { until, cause, evidence: Evidence::Counted, probed });
            }
        }
    }

    /// It answers an unproven subscription, whatever it says.
    pub(crate) fn is_there(&mut self) {
        self.failed[Cause::Unreachable as usize].clear();
        if self.cause() == Some(Cause::Unreachable) {
            self.reset_but_for_refusals();
        }
    }

    /// Whether failures were counted here, rather than an operator or another process having said so.
    pub(crate) fn is_by_many(&self) -> bool {
        self.state.hold().is_some_and(|hold| hold.evidence == Evidence::Counted)
    }

    /// Whether there is nothing that a success would have to clear.
    pub(crate) fn is_new(&self) -> bool {
        self.is_closed() && self.openings == 0 && self.failed.iter().all(HashSet::is_empty)
    }

    /// How long ago the wait of a hold was over, and why it was held.
    pub(crate) fn ended(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.state.hold().filter(|hold| hold.until <= now)?;
        Some((now - hold.until, hold.cause))
    }

    /// For how long it is still held, and why.
    pub(crate) fn held(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.state.hold().filter(|hold| hold.until > now)?;
        Some((hold.until - now, hold.cause))
    }

    fn cause(&self) -> Option<Cause> {
        self.state.hold().map(|hold| hold.cause)
    }

    fn backoff(&self, cause: Cause) -> Duration {
        let (first, last) = match (cause, self.audience) {
            (Cause::Unauthorized, BreakerAudience::Unproven) => (2 * WAIT.0, UNAUTHORIZED_WAIT.1),
            (Cause::Unauthorized, BreakerAudience::All) => UNAUTHORIZED_WAIT,
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
