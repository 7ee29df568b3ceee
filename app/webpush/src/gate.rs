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

use crate::verdict::MAX_RETRY_AFTER;

/// Of so many distinct subscriptions in a row: being asked to wait, not being reachable, refusing our key.
const THROTTLED: usize = 20;
const UNREACHABLE: usize = 5;
const UNAUTHORIZED: usize = 20;
/// The first wait when none was asked for, which doubles with each probe that fails, and the longest.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
const UNAUTHORIZED_WAIT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// So many probes of distinct subscriptions are refused before the wait for an operator doubles.
const PROBES: usize = 3;
/// A probe that has not ended by then is lost.
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
pub(crate) enum Admission {
    /// Yes.
    Open,
    /// Yes, and what comes of it decides about the others.
    Probe,
    /// No, not for this long.
    Held(Duration, Cause),
}

/// What came of a message, as far as it is about the push service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It does what it is there for.
    Well,
    /// It answers.
    Answers,
    /// It asks to wait, perhaps for so long.
    Asks(Option<Duration>),
    /// It refuses the key.
    Refuses,
    /// There is no connection to it.
    Away,
    /// It does not answer.
    Silent,
    /// Nothing.
    Nothing,
}

/// See the module. Time is an argument.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    hold: Option<Hold>,
    /// The subscriptions that failed since the last success, by a hash of their endpoints, for each cause.
    failed: [HashSet<u64>; 3],
    /// How many holds there were since the last success.
    holds: u32,
    /// The subscriptions that were probes of this hold.
    probed: HashSet<u64>,
    /// Whether it is held for what many have said here.
    by_many: bool,
    /// Whether only subscriptions that nothing was delivered to yet are held: others of them may well be taken.
    of_unproven: bool,
}

#[derive(Clone, Copy, Debug)]
struct Hold {
    until: Instant,
    cause: Cause,
    /// When a probe was let through.
    probe: Option<Instant>,
}

/// Why a failure would close a gate, and what wait was asked for; none when it is no failure of that kind.
fn failure(news: News) -> Option<(Cause, Option<Duration>)> {
    match news {
        News::Refuses => Some((Cause::Unauthorized, None)),
        News::Asks(after) => Some((Cause::Throttled, after)),
        News::Away | News::Silent => Some((Cause::Unreachable, None)),
        News::Well | News::Answers | News::Nothing => None,
    }
}

impl Gate {
    /// One for subscriptions that nothing was delivered to yet: the first refusals may be those of a few strangers, and so it
    /// asks again soon.
    pub(crate) fn of_unproven() -> Self {
        Self { of_unproven: true, ..Self::default() }
    }

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

    /// A message that was no probe went well. If the gate has closed meanwhile, it was sent before that, and says nothing new.
    pub(crate) fn well(&mut self) {
        if self.hold.is_none_or(|hold| hold.cause == Cause::Unreachable) {
            self.open();
        }
    }

    /// What came of a message to the subscription `who`. True when this closed the gate.
    pub(crate) fn note(&mut self, news: News, probe: bool, who: u64, now: Instant) -> bool {
        let held_for = self.hold.map(|hold| hold.cause);
        let (cause, asked) = match news {
            News::Well => {
                if probe {
                    self.open();
                } else {
                    self.well();
                }
                return false;
            }
            News::Answers => {
                self.failed[Cause::Throttled as usize].clear();
                self.failed[Cause::Unreachable as usize].clear();
                match held_for {
                    Some(Cause::Unauthorized) => self.lose_probe(probe),
                    Some(Cause::Throttled) if !probe => {}
                    _ => self.open_but_for_refusals(),
                }
                return false;
            }
            News::Nothing => {
                self.lose_probe(probe);
                return false;
            }
            News::Refuses if probe && held_for != Some(Cause::Unauthorized) => {
                // It answers. Whether it refuses everybody is for others to say.
                self.open_but_for_refusals();
                self.failed[Cause::Unauthorized as usize].insert(who);
                return false;
            }
            failed => match failure(failed) {
                Some(failure) => failure,
                None => return false,
            },
        };
        let failed = &mut self.failed[cause as usize];
        if failed.len() < cause.after() {
            failed.insert(who);
        }
        if !probe && (failed.len() < cause.after() || held_for.is_some()) {
            return false;
        }
        if probe && cause == Cause::Unauthorized {
            // One that was refused before, or is hostile, may have been the probe.
            self.probed.insert(who);
            if self.probed.len() < PROBES {
                self.hold = None;
                self.hold(WAIT.0, cause, now);
                return false;
            }
        }
        // What one subscription is asked for is believed for as long as it takes to ask another.
        let most = if probe { WAIT.1 } else { MAX_RETRY_AFTER };
        let wait = asked.unwrap_or_default().min(most).max(self.backoff(cause));
        self.holds += 1;
        self.probed.clear();
        self.by_many = true;
        self.hold = None;
        self.hold(wait, cause, now);
        held_for.is_none()
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
        self.by_many = false;
        self.probed.clear();
        self.failed.iter_mut().for_each(HashSet::clear);
    }

    /// Opens, and remembers who was refused: that it answers is no success.
    fn open_but_for_refusals(&mut self) {
        let refused = std::mem::take(&mut self.failed[Cause::Unauthorized as usize]);
        self.open();
        self.failed[Cause::Unauthorized as usize] = refused;
    }

    /// A probe, if it was one, ended without saying anything: the next may be one.
    pub(crate) fn lose_probe(&mut self, probe: bool) {
        if let Some(hold) = &mut self.hold
            && probe
        {
            hold.probe = None;
        }
    }

    /// Whether one more failure of the subscription `who` makes as many as it takes; they are not counted any more then.
    pub(crate) fn is_reached(&mut self, news: News, who: u64) -> bool {
        let Some((cause, _)) = failure(news) else { return false };
        let failed = &mut self.failed[cause as usize];
        failed.insert(who);
        let is_reached = failed.len() >= cause.after();
        if is_reached {
            failed.clear();
        }
        is_reached
    }

    /// Holds it for what the last of many failures says.
    pub(crate) fn close(&mut self, news: News, now: Instant) {
        let Some((cause, asked)) = failure(news) else { return };
        let wait = asked.unwrap_or_default().min(MAX_RETRY_AFTER).max(self.backoff(cause));
        self.holds += 1;
        self.by_many = true;
        self.hold(wait, cause, now);
    }

    /// It answers, whatever it says.
    pub(crate) fn is_there(&mut self) {
        self.failed[Cause::Unreachable as usize].clear();
        if self.hold.is_some_and(|hold| hold.cause == Cause::Unreachable) {
            self.open_but_for_refusals();
        }
    }

    /// Whether failures were counted here, or another process told so, rather than an operator or nobody.
    pub(crate) fn is_by_many(&self) -> bool {
        self.by_many
    }

    /// Whether there is nothing that a success would have to clear.
    pub(crate) fn is_new(&self) -> bool {
        self.hold.is_none() && self.holds == 0 && self.failed.iter().all(HashSet::is_empty)
    }

    /// How long ago the wait of a hold was over, and why it was held.
    pub(crate) fn ended(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.hold.filter(|hold| hold.until <= now)?;
        Some((now - hold.until, hold.cause))
    }

    /// For how long it is still held, and why.
    pub(crate) fn held(&self, now: Instant) -> Option<(Duration, Cause)> {
        let hold = self.hold.filter(|hold| hold.until > now)?;
        Some((hold.until - now, hold.cause))
    }

    fn backoff(&self, cause: Cause) -> Duration {
        let (first, last) = match cause {
            Cause::Unauthorized if self.of_unproven => (2 * WAIT.0, UNAUTHORIZED_WAIT.1),
            Cause::Unauthorized => UNAUTHORIZED_WAIT,
            Cause::Throttled | Cause::Unreachable => WAIT,
        };
        first.saturating_mul(2_u32.saturating_pow(self.holds.min(16))).min(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn asked(seconds: u32) -> News {
        News::Asks(Some(SECOND * seconds))
    }

    fn throttled(now: Instant, seconds: u32) -> Gate {
        let mut gate = Gate::default();
        for who in 0..20 {
            gate.note(asked(seconds), false, who, now);
        }
        gate
    }

    #[test]
    fn one_subscription_stops_nobody_and_many_stop_the_lane() {
        let now = Instant::now();
        for (news, needed) in [(asked(9), 20), (News::Silent, 5), (News::Refuses, 20)] {
            let mut gate = Gate::default();
            for _ in 0..1000 {
                gate.note(news, false, 7, now);
            }
            assert_eq!(gate.admit(now), Admission::Open, "a hostile one");
            for who in 100..100 + needed - 2 {
                assert!(!gate.note(news, false, who, now));
            }
            assert_eq!(gate.admit(now), Admission::Open);
            assert!(gate.note(news, false, 99, now), "{news:?}");
            assert!(matches!(gate.admit(now), Admission::Held(..)));
        }
    }

    #[test]
    fn a_success_between_forgives_them_all() {
        let now = Instant::now();
        let mut gate = Gate::default();
        for who in 0..1000 {
            gate.note(News::Refuses, false, who, now);
            if who % 10 == 0 {
                gate.well();
            }
        }
        assert_eq!(gate.admit(now), Admission::Open);
    }

    #[test]
    fn an_answer_that_is_no_success_forgives_no_refusal() {
        let now = Instant::now();
        let mut gate = Gate::default();
        let closed = (0..20).map(|who| {
            gate.note(News::Answers, false, 1000 + who, now);
            gate.note(News::Refuses, false, who, now)
        });
        assert_eq!(closed.filter(|closed| *closed).count(), 1);
        assert!(matches!(gate.admit(now), Admission::Held(_, Cause::Unauthorized)));
    }

    #[test]
    fn a_success_that_was_under_way_does_not_end_a_wait() {
        let now = Instant::now();
        let mut gate = throttled(now, 30);
        gate.well();
        gate.note(News::Answers, false, 8, now);
        assert!(matches!(gate.admit(now), Admission::Held(_, Cause::Throttled)));
    }

    #[test]
    fn a_wait_ends_with_one_probe_that_decides() {
        let start = Instant::now();
        let mut gate = throttled(start, 30);
        assert_eq!(gate.admit(start + SECOND), Admission::Held(29 * SECOND, Cause::Throttled));
        let later = start + 31 * SECOND;
        assert_eq!(gate.admit(later), Admission::Probe);
        assert_eq!(gate.admit(later), Admission::Held(SECOND, Cause::Throttled), "only one");
        gate.note(asked(10), true, 77, later);
        assert_eq!(gate.admit(later + SECOND), Admission::Held(9 * SECOND, Cause::Throttled));
        let later = later + 11 * SECOND;
        assert_eq!(gate.admit(later), Admission::Probe);
        gate.note(News::Well, true, 78, later);
        assert_eq!(gate.admit(later), Admission::Open);
    }

    #[test]
    fn a_hostile_probe_stops_nobody_for_long() {
        let now = Instant::now();
        let mut gate = throttled(now, 1);
        let later = now + 2 * SECOND;
        assert_eq!(gate.admit(later), Admission::Probe);
        gate.note(News::Refuses, true, 66, later);
        assert_eq!(gate.admit(later), Admission::Open, "it answers, and refuses one");

        let mut gate = throttled(now, 1);
        assert_eq!(gate.admit(later), Admission::Probe);
        gate.note(asked(3600), true, 66, later);
        assert_eq!(
            gate.held(later),
            Some((60 * SECOND, Cause::Throttled)),
            "one is not believed for an hour"
        );

        let mut gate = Gate::default();
        (0..20).for_each(|who| assert!(gate.note(News::Refuses, false, who, now) == (who == 19)));
        let mut later = now + 31 * SECOND;
        for who in 0..2 {
            assert_eq!(gate.admit(later), Admission::Probe);
            gate.note(News::Refuses, true, who, later);
            assert_eq!(gate.held(later), Some((SECOND, Cause::Unauthorized)), "another one is asked soon");
            later += SECOND;
        }
        assert_eq!(gate.admit(later), Admission::Probe);
        gate.note(News::Refuses, true, 2, later);
        assert_eq!(gate.held(later), Some((60 * SECOND, Cause::Unauthorized)));
    }

    #[test]
    fn waits_that_nobody_asked_for_double_to_a_limit() {
        let mut now = Instant::now();
        let mut gate = Gate::default();
        for who in 0..5 {
            gate.note(News::Silent, false, who, now);
        }
        let mut waits = Vec::new();
        for _ in 0..8 {
            let Admission::Held(wait, Cause::Unreachable) = gate.admit(now) else { panic!("open") };
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(gate.admit(now), Admission::Probe);
            gate.note(News::Silent, true, 1, now);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_probe_that_never_ends_is_followed_by_another() {
        let now = Instant::now();
        let mut gate = Gate::default();
        gate.hold(SECOND, Cause::Unauthorized, now);
        assert_eq!(gate.admit(now + SECOND), Admission::Probe);
        assert!(matches!(gate.admit(now + 2 * SECOND), Admission::Held(..)));
        gate.note(News::Answers, true, 1, now + 2 * SECOND);
        assert_eq!(gate.admit(now + 2 * SECOND), Admission::Probe);
        gate.lose_probe(true);
        assert_eq!(gate.admit(now + 2 * SECOND), Admission::Probe);
        assert_eq!(gate.admit(now + 2 * SECOND + PROBE), Admission::Probe);
    }

    #[test]
    fn no_wait_is_longer_than_an_hour_and_an_operator_may_end_it() {
        let now = Instant::now();
        let mut gate = throttled(now, 100_000);
        assert_eq!(gate.held(now), Some((MAX_RETRY_AFTER, Cause::Throttled)));
        assert_eq!(gate.held(now + MAX_RETRY_AFTER), None, "it is over, and nothing to remember");
        gate.open();
        assert_eq!(gate.admit(now), Admission::Open);
    }
}
