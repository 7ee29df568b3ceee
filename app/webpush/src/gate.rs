//! Whether a push service is sent to now: what it asked for, and what its answers say about us.
//!
//! ```text
//!            asked to wait, or failures of many subscriptions with no success between
//!   open ──────────────────────────────────────────────────────────────────────────► held
//!    ▲                                                                                │ the wait is over
//!    │ it succeeds                                                                    ▼
//!    └────────────────────────────────────────────────────────────────────────── one probe ──► held, for longer
//! ```
//!
//! One subscription stops nobody: what fails for one of them is its own affair until the same fails for
//! several, and nothing succeeds between.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::verdict::{MAX_RETRY_AFTER, Verdict};

/// Of so many distinct subscriptions in a row: being asked to wait, not being reachable, refusing our key.
const THROTTLED: usize = 3;
const UNREACHABLE: usize = 5;
const UNAUTHORIZED: usize = 20;
/// The first wait when none was asked for, which doubles with each probe that fails, and the longest.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const UNAUTHORIZED_WAIT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// A probe that has not ended by then is lost.
const PROBE: Duration = Duration::from_secs(60);

/// Why a push service is not sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It asked us to wait.
    Throttled,
    /// Nobody answers at its addresses.
    Unreachable,
    /// It refuses our key for every subscription: the key or the contact is wrong.
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
pub(crate) enum Admission {
    /// Yes.
    Open,
    /// Yes, and what comes of it decides about the others.
    Probe,
    /// No, not for this long.
    Held(Duration, Cause),
}

/// See the module. Time is an argument.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    hold: Option<Hold>,
    /// The subscriptions that failed since the last success, by a hash of their endpoints, for each cause.
    failed: [HashSet<u64>; 3],
    /// How many holds there were since the last success.
    holds: u32,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    until: Instant,
    cause: Cause,
    /// When a probe was let through.
    probe: Option<Instant>,
}

impl Gate {
    /// Whether nothing keeps messages back.
    pub(crate) fn is_open(&self) -> bool {
        self.hold.is_none()
    }

    /// Asks for one message.
    pub(crate) fn admit(&mut self, now: Instant) -> Admission {
        let Some(hold) = &mut self.hold else { return Admission::Open };
        if hold.until > now {
            return Admission::Held(hold.until - now, hold.cause);
        }
        match hold.probe {
            Some(sent) if now.duration_since(sent) < PROBE => Admission::Held(WAIT.0, hold.cause),
            _ => {
                hold.probe = Some(now);
                Admission::Probe
            }
        }
    }

    /// What came of a message to the subscription `who`. True when this closed the gate.
    pub(crate) fn note(&mut self, verdict: Verdict, answered: bool, who: u64, now: Instant) -> bool {
        let (cause, asked) = match verdict {
            Verdict::Delivered | Verdict::Gone => {
                self.open();
                return false;
            }
            // It answers, and does not mind being asked.
            Verdict::TooLarge | Verdict::Rejected => {
                self.failed[Cause::Throttled as usize].clear();
                self.failed[Cause::Unreachable as usize].clear();
                if self.hold.is_some_and(|hold| hold.probe.is_some() && hold.cause != Cause::Unauthorized) {
                    self.open();
                }
                return false;
            }
            Verdict::Unauthorized => (Cause::Unauthorized, None),
            Verdict::Retry { after, throttled } if throttled || after.is_some() => (Cause::Throttled, after),
            Verdict::Retry { .. } if !answered => (Cause::Unreachable, None),
            Verdict::Retry { .. } => {
                self.failed[Cause::Unreachable as usize].clear();
                self.lose_probe(now);
                return false;
            }
            Verdict::Forbidden | Verdict::Unresolvable | Verdict::Held(_) => {
                self.lose_probe(now);
                return false;
            }
        };
        let failed = &mut self.failed[cause as usize];
        if failed.len() < cause.after() {
            failed.insert(who);
        }
        let was_probe = self.hold.is_some_and(|hold| hold.probe.is_some() && hold.until <= now);
        if !was_probe && failed.len() < cause.after() {
            return false;
        }
        let was_open = self.hold.is_none();
        let wait = asked.unwrap_or_default().max(self.backoff(cause));
        if was_open || was_probe {
            self.holds += 1;
        }
        self.hold(wait, cause, now);
        was_open
    }

    /// Holds it for at least this long.
    pub(crate) fn hold(&mut self, wait: Duration, cause: Cause, now: Instant) {
        let until = now + wait.min(MAX_RETRY_AFTER);
        match &mut self.hold {
            Some(hold) if hold.until >= until => {}
            _ => self.hold = Some(Hold { until, cause, probe: None }),
        }
    }

    /// Forgets everything that speaks against it.
    pub(crate) fn open(&mut self) {
        self.hold = None;
        self.holds = 0;
        self.failed.iter_mut().for_each(HashSet::clear);
    }

    /// A probe ended without saying anything: the next may be one.
    pub(crate) fn lose_probe(&mut self, now: Instant) {
        if let Some(hold) = &mut self.hold
            && hold.until <= now
        {
            hold.probe = None;
        }
    }

    /// For how long it is held, and why.
    pub(crate) fn held(&self, now: Instant) -> Option<(Duration, Cause)> {
        self.hold.map(|hold| (hold.until.saturating_duration_since(now), hold.cause))
    }

    fn backoff(&self, cause: Cause) -> Duration {
        let (first, last) = if cause == Cause::Unauthorized { UNAUTHORIZED_WAIT } else { WAIT };
        first.saturating_mul(2_u32.saturating_pow(self.holds.min(16))).min(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn asked(seconds: u64) -> Verdict {
        Verdict::Retry { after: Some(SECOND * u32::try_from(seconds).unwrap()), throttled: true }
    }

    const NOBODY: Verdict = Verdict::Retry { after: None, throttled: false };

    #[test]
    fn one_subscription_stops_nobody_and_many_stop_the_lane() {
        let now = Instant::now();
        for (verdict, answered, needed) in
            [(asked(9), true, 3), (NOBODY, false, 5), (Verdict::Unauthorized, true, 20)]
        {
            let mut gate = Gate::default();
            for _ in 0..1000 {
                gate.note(verdict, answered, 7, now);
            }
            assert_eq!(gate.admit(now), Admission::Open, "a hostile one");
            for who in 100..100 + needed - 2 {
                assert!(!gate.note(verdict, answered, who, now));
            }
            assert_eq!(gate.admit(now), Admission::Open);
            assert!(gate.note(verdict, answered, 99, now), "{verdict:?}");
            assert!(matches!(gate.admit(now), Admission::Held(..)));
        }
    }

    #[test]
    fn a_success_between_forgives_them_all() {
        let now = Instant::now();
        let mut gate = Gate::default();
        for who in 0..1000 {
            gate.note(Verdict::Unauthorized, true, who, now);
            if who % 10 == 0 {
                gate.note(Verdict::Delivered, true, 5000, now);
            }
        }
        assert_eq!(gate.admit(now), Admission::Open);
    }

    #[test]
    fn a_wait_ends_with_one_probe_that_decides() {
        let start = Instant::now();
        let mut gate = Gate::default();
        for who in 0..3 {
            gate.note(asked(30), true, who, start);
        }
        assert_eq!(gate.admit(start + SECOND), Admission::Held(29 * SECOND, Cause::Throttled));
        let later = start + 31 * SECOND;
        assert_eq!(gate.admit(later), Admission::Probe);
        assert_eq!(gate.admit(later), Admission::Held(SECOND, Cause::Throttled), "only one");
        gate.note(asked(10), true, 77, later);
        assert_eq!(gate.admit(later + SECOND), Admission::Held(9 * SECOND, Cause::Throttled));
        let later = later + 11 * SECOND;
        assert_eq!(gate.admit(later), Admission::Probe);
        gate.note(Verdict::Delivered, true, 78, later);
        assert_eq!(gate.admit(later), Admission::Open);
    }

    #[test]
    fn waits_that_nobody_asked_for_double_to_a_limit() {
        let mut now = Instant::now();
        let mut gate = Gate::default();
        for who in 0..5 {
            gate.note(NOBODY, false, who, now);
        }
        let mut waits = Vec::new();
        for _ in 0..8 {
            let Admission::Held(wait, Cause::Unreachable) = gate.admit(now) else { panic!("open") };
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(gate.admit(now), Admission::Probe);
            gate.note(NOBODY, false, 1, now);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_probe_that_never_ends_is_followed_by_another() {
        let now = Instant::now();
        let mut gate = Gate::default();
        gate.hold(SECOND, Cause::Throttled, now);
        assert_eq!(gate.admit(now + SECOND), Admission::Probe);
        assert!(matches!(gate.admit(now + 2 * SECOND), Admission::Held(..)));
        gate.lose_probe(now + 2 * SECOND);
        assert_eq!(gate.admit(now + 2 * SECOND), Admission::Probe);
        assert_eq!(gate.admit(now + 2 * SECOND + PROBE), Admission::Probe);
    }

    #[test]
    fn no_wait_is_longer_than_an_hour_and_an_operator_may_end_it() {
        let now = Instant::now();
        let mut gate = Gate::default();
        gate.hold(SECOND * 100_000, Cause::Throttled, now);
        assert_eq!(gate.held(now), Some((MAX_RETRY_AFTER, Cause::Throttled)));
        gate.open();
        assert_eq!(gate.admit(now), Admission::Open);
    }
}
