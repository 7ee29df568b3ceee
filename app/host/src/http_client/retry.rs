//! Whether and when there is another attempt.

use std::time::Duration;

use http::StatusCode;
use parking_lot::Mutex;
use perennial_runtime::backoff::Backoff;

/// Pause before another attempt.
const PAUSE: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// Number of retries that may be saved up, and the part of a retry that each call adds. When a server fails for
/// everybody, retries add a tenth to its load, and no multiple.
const BUDGET: (f64, f64) = (10.0, 0.1);

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    /// An answer with this status, and when the server wants to be asked again.
    Answered(StatusCode, Option<Duration>),
    /// No connection: nothing was sent.
    NotSent,
    /// The server may have done what was asked.
    Unknown,
}

impl Attempt {
    /// Returns true when the server works. It may refuse this request, or fail at it (500): one who sends such requests must
    /// not keep others from it.
    pub(super) fn is_success(self) -> bool {
        use StatusCode as S;
        matches!(self, Self::Answered(status, _)
            if !matches!(status, S::BAD_GATEWAY | S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT))
    }
}

/// Properties of a request that decide about retries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repeatable {
    /// The body is in memory, and can be sent again.
    pub(super) is_replayable: bool,
    /// To do it twice is the same as to do it once.
    pub(super) is_idempotent: bool,
}

/// Returns the pause before the next attempt; `None` when there is none. `failed` is the number of attempts so far, and
/// `left` the time until the deadline.
pub(super) fn pause(
    attempt: Attempt,
    request: Repeatable,
    failed: u32,
    retries: u32,
    left: Duration,
) -> Option<Duration> {
    use StatusCode as S;
    let may_succeed = match attempt {
        // The server has done nothing.
        Attempt::NotSent | Attempt::Answered(S::TOO_MANY_REQUESTS, _) => true,
        Attempt::Unknown
        | Attempt::Answered(S::BAD_GATEWAY | S::SERVICE_UNAVAILABLE | S::GATEWAY_TIMEOUT, _) => {
            request.is_idempotent
        }
        Attempt::Answered(..) => false,
    };
    if !may_succeed || !request.is_replayable || failed > retries {
        return None;
    }
    let wanted = match attempt {
        Attempt::Answered(_, Some(after)) => after,
        _ => Duration::ZERO,
    };
    // An attempt that has no time left only burdens the server.
    Some(PAUSE.jittered(failed).max(wanted)).filter(|pause| *pause < left / 2)
}

/// Retries that may still be made.
#[derive(Debug)]
pub(super) struct RetryBudget(Mutex<f64>);

impl Default for RetryBudget {
    fn default() -> Self {
        Self(Mutex::new(BUDGET.0))
    }
}

impl RetryBudget {
    /// Adds the part of a call.
    pub(super) fn called(&self) {
        let mut saved = self.0.lock();
        *saved = (*saved + BUDGET.1).min(BUDGET.0);
    }

    /// Takes one retry, if there is one.
    pub(super) fn take(&self) -> bool {
        let mut saved = self.0.lock();
        let has_one = *saved >= 1.0;
        if has_one {
            *saved -= 1.0;
        }
        has_one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: Repeatable = Repeatable { is_replayable: true, is_idempotent: false };
    const AGAIN: Repeatable = Repeatable { is_replayable: true, is_idempotent: true };
    const STREAM: Repeatable = Repeatable { is_replayable: false, is_idempotent: true };

    fn tries(attempt: Attempt, request: Repeatable) -> bool {
        pause(attempt, request, 1, 2, Duration::from_secs(60)).is_some()
    }

    #[test]
    fn a_request_that_may_have_been_done_is_not_sent_again_unless_that_is_the_same() {
        let status = |status| Attempt::Answered(status, None);
        assert!(tries(Attempt::NotSent, ONCE) && tries(Attempt::NotSent, AGAIN));
        assert!(!tries(Attempt::Unknown, ONCE) && tries(Attempt::Unknown, AGAIN));
        assert!(
            !tries(status(StatusCode::BAD_GATEWAY), ONCE) && tries(status(StatusCode::BAD_GATEWAY), AGAIN)
        );
        assert!(tries(status(StatusCode::TOO_MANY_REQUESTS), ONCE), "nothing was done");
        assert!(!tries(Attempt::NotSent, STREAM), "the body is gone");
        for done in [200, 301, 400, 404, 409, 500, 501] {
            assert!(!tries(status(StatusCode::from_u16(done).unwrap()), AGAIN), "{done}");
        }
    }

    #[test]
    fn attempts_end_by_number_and_by_time() {
        let minute = Duration::from_secs(60);
        let number = (1..).take_while(|failed| pause(Attempt::NotSent, AGAIN, *failed, 3, minute).is_some());
        assert_eq!(number.count(), 3);
        let after =
            |seconds| Attempt::Answered(StatusCode::SERVICE_UNAVAILABLE, Some(Duration::from_secs(seconds)));
        assert_eq!(pause(after(7), AGAIN, 1, 3, minute), Some(Duration::from_secs(7)));
        assert_eq!(pause(after(40), AGAIN, 1, 3, minute), None, "the deadline comes first");
        assert_eq!(pause(after(u64::MAX), AGAIN, 1, 3, minute), None);
    }

    #[test]
    fn a_server_that_fails_for_everybody_is_not_asked_twice_as_often() {
        let budget = RetryBudget::default();
        let mut retries = 0;
        for _ in 0..1000 {
            budget.called();
            retries += u32::from(budget.take());
        }
        assert!((100..=115).contains(&retries), "{retries}");
    }
}
