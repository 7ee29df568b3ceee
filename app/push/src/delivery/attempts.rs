//! What becomes of one member after an attempt: a pure decision. Time is an argument.

use std::time::Duration;

use perennial_runtime::backoff::Backoff;
use perennial_webpush::Verdict;

use crate::model::outcome::Outcome;

/// Between two attempts for one subscription, unless its push service says otherwise.
pub(super) const RETRY: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(900));
/// For how long a message without a time to live may wait for being tried.
const NOW: Duration = Duration::from_secs(600);
/// The longest that sends wait for a push service that nothing is sent to.
const LONGEST_HOLD: Duration = Duration::from_secs(3600);

/// What the decision depends on besides the verdict.
#[derive(Clone, Copy, Debug)]
pub(super) struct Circumstances {
    /// Number of the attempt, from 0.
    pub(super) attempt: u32,
    /// Most attempts.
    pub(super) attempts: u32,
    /// Time to live of the message; zero means now or never.
    pub(super) ttl: Duration,
    /// Time since the notification was accepted, or due.
    pub(super) age: Duration,
    /// Time until the notification expires; none when it never does.
    pub(super) time_left: Option<Duration>,
    /// The wait of an attempt that was asked for none: drawn once for all that failed together, so that they become one job.
    pub(super) usual: Duration,
}

/// What becomes of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Its outcome is decided.
    Decided(Outcome),
    /// It is tried again after this wait, as this attempt.
    Later(Duration, u32),
}

/// Decides about a member whose push service is at `host`.
pub(super) fn next(verdict: Verdict, host: &str, circumstances: Circumstances) -> Next {
    let Circumstances { attempt, attempts, ttl, age, time_left, usual } = circumstances;
    let (wait, next_attempt, ttl) = match verdict {
        Verdict::Delivered => return Next::Decided(Outcome::Delivered),
        Verdict::Gone => return Next::Decided(Outcome::Gone),
        Verdict::Rejected => return Next::Decided(Outcome::Rejected),
        Verdict::Unauthorized => return Next::Decided(Outcome::Unauthorized),
        Verdict::TooLarge => return Next::Decided(Outcome::TooLarge),
        Verdict::Forbidden => return Next::Decided(Outcome::Forbidden),
        // There never will be such a host (RFC 2606, section 2).
        Verdict::Unresolvable if host.ends_with(".invalid") => return Next::Decided(Outcome::Unreachable),
        Verdict::Unresolvable | Verdict::Retry { after: None, .. } => (usual, attempt + 1, ttl),
        Verdict::Retry { after: Some(after), .. } => (coarse(after.max(RETRY.base)), attempt + 1, ttl),
        // It was not tried. A message for now or never is tried once, if that can be soon.
        Verdict::Held(wait) => {
            (coarse(wait.min(LONGEST_HOLD)), attempt, if ttl.is_zero() { NOW } else { ttl })
        }
    };
    if next_attempt >= attempts {
        return Next::Decided(Outcome::Unreachable);
    }
    let ends_before = time_left.is_some_and(|left| left <= wait);
    let outlives = age + wait < ttl;
    if ends_before || !outlives { Next::Decided(Outcome::Expired) } else { Next::Later(wait, next_attempt) }
}

/// A wait rounded up by at most an eighth: a service that asks each subscription for another wait makes a few
/// jobs, not one for each.
fn coarse(wait: Duration) -> Duration {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let step = (seconds / 8 + 1).next_power_of_two().div_ceil(2).max(1);
    Duration::from_secs(seconds.next_multiple_of(step))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FIRST: Circumstances = Circumstances {
        attempt: 0,
        attempts: 3,
        ttl: Duration::from_secs(3600),
        age: Duration::ZERO,
        time_left: None,
        usual: SECOND,
    };
    const RETRY_SOON: Verdict = Verdict::Retry { after: None, throttled: false };

    #[test]
    fn a_failure_is_tried_again_until_the_attempts_are_used_up() {
        assert_eq!(next(RETRY_SOON, "a.example", FIRST), Next::Later(SECOND, 1));
        let last = Circumstances { attempt: 2, ..FIRST };
        assert_eq!(next(RETRY_SOON, "a.example", last), Next::Decided(Outcome::Unreachable));
        let held = Verdict::Held(SECOND);
        assert_eq!(next(held, "a.example", last), Next::Later(SECOND, 2), "it was not tried");
    }

    #[test]
    fn a_wait_that_was_asked_for_is_kept_and_no_longer_than_the_message_lives() {
        let asked = |seconds| Verdict::Retry { after: Some(SECOND * seconds), throttled: true };
        assert_eq!(next(asked(64), "a.example", FIRST), Next::Later(SECOND * 64, 1));
        assert_eq!(next(asked(0), "a.example", FIRST), Next::Later(RETRY.base, 1));
        assert_eq!(next(asked(3600), "a.example", FIRST), Next::Decided(Outcome::Expired));
        let ends = Circumstances { time_left: Some(SECOND * 30), ..FIRST };
        assert_eq!(next(asked(64), "a.example", ends), Next::Decided(Outcome::Expired));
    }

    #[test]
    fn a_message_for_now_or_never_waits_only_while_it_was_not_tried() {
        let now = Circumstances { ttl: Duration::ZERO, ..FIRST };
        assert_eq!(next(RETRY_SOON, "a.example", now), Next::Decided(Outcome::Expired));
        assert_eq!(next(Verdict::Held(SECOND), "a.example", now), Next::Later(SECOND, 0));
        let late = Circumstances { age: NOW, ..now };
        assert_eq!(next(Verdict::Held(SECOND), "a.example", late), Next::Decided(Outcome::Expired));
    }

    #[test]
    fn a_host_that_never_will_be_is_not_looked_up_again() {
        assert_eq!(next(Verdict::Unresolvable, "a.invalid", FIRST), Next::Decided(Outcome::Unreachable));
        assert_eq!(next(Verdict::Unresolvable, "a.example", FIRST), Next::Later(SECOND, 1));
    }

    #[test]
    fn waits_are_lengthened_by_at_most_an_eighth_to_few_values() {
        let coarse = |seconds| coarse(Duration::from_secs(seconds)).as_secs();
        assert_eq!([1, 2, 15, 17, 63, 65, 3600, 3601].map(coarse), [1, 2, 15, 18, 64, 72, 3840, 3840]);
        for seconds in 0..100_000 {
            let waits = coarse(seconds);
            assert!((seconds..=seconds + seconds / 8).contains(&waits), "{seconds}: {waits}");
        }
        let distinct: BTreeSet<u64> = (0..86_400).map(coarse).collect();
        assert!(distinct.len() < 120, "{}", distinct.len());
    }
}
