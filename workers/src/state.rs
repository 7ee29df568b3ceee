//! The states of a job, as one pure function.
//!
//! ```text
//!              due                claim (epoch rises)          done, skipped
//! Scheduled ─────────► Ready ───────────────────► Running ─────────────────► (gone)
//!     ▲                  ▲                          │ │ │
//!     │                  └── handed back, expired ──┘ │ ├──► Dead        budget used up or hopeless,
//!     └────────────── snoozed, failed ────────────────┘ │                 and given up
//!                                                       └──► Cancelled   asked for, or by the job itself
//! ```
//!
//! Two budgets are kept apart. *Failures* are errors, panics and timeouts of the job itself, in a row.
//! *Recoveries* are crashes of its worker within a window: the lease expired before the job was settled. A run
//! that makes progress ([`Context::advanced`](crate::Context::advanced)) begins both anew. Handing back at a
//! drain and snoozing cost nothing.
//!
//! A job whose recoveries are used up goes to a worker once more, not to run but to be given up there
//! ([`spent_by_crashes`]): only a worker can call [`Job::give_up`](crate::Job::give_up).
//!
//! Waits are durations, not times: the store that keeps the job adds them to its own clock.

use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::backoff::Backoff;
use serde::{Deserialize, Serialize};

/// Number of crashes while a job is given up, after which it becomes dead without being told.
const GIVING_UP: u32 = 3;

/// State of a job. A job that is done is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[derive(strum::IntoStaticStr, strum::EnumString)]
#[strum(serialize_all = "snake_case")]
#[strum(parse_err_ty = NoState, parse_err_fn = no_state)]
pub enum State {
    /// The job is not due yet.
    Scheduled,
    /// The job waits for a worker.
    Ready,
    /// A worker has claimed the job.
    Running,
    /// The job was given up, and is kept for operators.
    Dead,
    /// The job was cancelled, and is kept like a dead one.
    Cancelled,
}

fn no_state(_: &str) -> NoState {
    NoState
}

impl State {
    /// Returns the word for the state in stores.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Error for a word that names no state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("one of scheduled, ready, running, dead, cancelled")]
pub struct NoState;

/// Failures and crashes that a job may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Number of runs that may fail; the last failure ends the job.
    pub failures: u32,
    /// Number of times that its worker may crash within `window`; the last crash ends the job.
    pub recoveries: u32,
    /// Time since the first crash after which crashes are counted anew.
    pub window: Duration,
    /// Wait after a failure.
    pub backoff: Backoff,
}

/// Failures and crashes that count against a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    /// Number of runs that failed.
    pub failures: u32,
    /// Number of workers that crashed.
    pub recoveries: u32,
    /// Time of the first of these crashes, by the store's clock.
    pub since: Option<Timestamp>,
}

/// How a run ended, as input of [`next`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The job is done, or there was nothing to do.
    Done,
    /// The job runs again after this wait.
    Snoozed(Duration),
    /// The worker stops, and another one should take the job.
    HandedBack,
    /// The run failed by an error, a panic or its timeout.
    Failed {
        /// Text of the error.
        error: String,
        /// Wait that the job asked for, instead of its backoff.
        after: Option<Duration>,
    },
    /// The job can never succeed, for this reason.
    Hopeless(String),
    /// The job must not go on, for this reason: it was cancelled, or cancelled itself.
    Cancelled(String),
    /// The lease expired before the job was settled: its worker crashed.
    Lapsed,
}

/// Longest text of an error or of a reason that is kept, in bytes. The text of a job may contain a whole page
/// of another server.
const MAX_TEXT: usize = 2_000;

impl Event {
    /// Returns the event with texts that are short enough to be kept.
    #[must_use]
    pub fn in_short(mut self) -> Self {
        match &mut self {
            Self::Failed { error: text, .. } | Self::Hopeless(text) | Self::Cancelled(text) => {
                if text.len() > MAX_TEXT {
                    text.truncate(text.floor_char_boundary(MAX_TEXT - '…'.len_utf8()));
                    text.push('…');
                }
            }
            Self::Done | Self::Snoozed(_) | Self::HandedBack | Self::Lapsed => {}
        }
        self
    }
}

/// Next step of a job after an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// The job is done.
    Finished,
    /// The job runs again.
    Again {
        /// Shortest wait before the next run. Without a wait the job keeps its place in the queue, before
        /// jobs that came later.
        wait: Duration,
        /// Failures and crashes so far.
        spent: Attempts,
    },
    /// The job has ended, and is kept for operators.
    Ended {
        /// [`State::Dead`] or [`State::Cancelled`].
        state: State,
        /// Reason of the end.
        reason: String,
        /// Failures and crashes so far.
        spent: Attempts,
    },
}

/// Returns the transition of a running job after `event`. `now` is the time of the store's clock, and
/// `random` in `0.0..1.0` is for the jitter of the backoff.
pub fn next(budget: &Budget, spent: Attempts, event: Event, now: Timestamp, random: f64) -> Transition {
    match event {
        Event::Done => Transition::Finished,
        Event::Snoozed(wait) => Transition::Again { wait, spent },
        Event::HandedBack => Transition::Again {
            wait: Duration::ZERO,
            spent: Attempts { recoveries: 0, since: None, ..spent },
        },
        Event::Hopeless(reason) => Transition::Ended { state: State::Dead, reason, spent },
        Event::Cancelled(reason) => Transition::Ended { state: State::Cancelled, reason, spent },
        Event::Failed { error, after } => {
            let spent = Attempts { failures: spent.failures + 1, ..spent };
            if spent.failures >= budget.failures {
                return Transition::Ended { state: State::Dead, reason: error, spent };
            }
            let wait = budget.backoff.delay(spent.failures, random);
            Transition::Again { wait: after.unwrap_or(wait), spent }
        }
        Event::Lapsed => {
            let spent = crashed_again(budget, spent, now);
            match spent_by_crashes(budget, spent) {
                // Even giving up crashes the process, so the job ends without it.
                Some(reason) if spent.recoveries >= budget.recoveries + GIVING_UP => {
                    Transition::Ended { state: State::Dead, reason, spent }
                }
                _ => Transition::Again { wait: Duration::ZERO, spent },
            }
        }
    }
}

fn crashed_again(budget: &Budget, spent: Attempts, now: Timestamp) -> Attempts {
    let since = spent.since.unwrap_or(now);
    if now.duration_since(since).unsigned_abs() > budget.window {
        return Attempts { recoveries: 1, since: Some(now), ..spent };
    }
    Attempts { recoveries: spent.recoveries + 1, since: Some(since), ..spent }
}

/// Returns why a job must be given up instead of run; `None` unless its workers have crashed too often.
pub fn spent_by_crashes(budget: &Budget, spent: Attempts) -> Option<String> {
    (spent.recoveries >= budget.recoveries).then(|| format!("its worker crashed {} times", spent.recoveries))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget {
        failures: 3,
        recoveries: 2,
        window: Duration::from_secs(3600),
        backoff: Backoff::new(Duration::from_secs(10), Duration::from_secs(60)),
    };

    fn step(spent: Attempts, event: Event) -> Transition {
        next(&BUDGET, spent, event, at(0), 1.0)
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn dead(reason: &str, spent: Attempts) -> Transition {
        Transition::Ended { state: State::Dead, reason: reason.to_owned(), spent }
    }

    #[test]
    fn texts_of_errors_are_cut_between_characters() {
        let long = "ä".repeat(5_000);
        for event in [
            Event::Failed { error: long.clone(), after: None },
            Event::Hopeless(long.clone()),
            Event::Cancelled(long.clone()),
        ] {
            let (Event::Failed { error: text, .. } | Event::Hopeless(text) | Event::Cancelled(text)) =
                event.in_short()
            else {
                panic!("another event");
            };
            assert!(
                text.ends_with('…') && text.len() <= MAX_TEXT && text.len() > MAX_TEXT - 4,
                "{}",
                text.len()
            );
        }
        let short = Event::Hopeless("no".to_owned());
        assert_eq!(short.clone().in_short(), short);
    }

    #[test]
    fn failures_wait_longer_each_time_and_then_end() {
        let error = |after| Event::Failed { error: "no".to_owned(), after };
        let spent = |failures| Attempts { failures, recoveries: 1, since: Some(at(0)) };
        let again = |seconds, failures| Transition::Again {
            wait: Duration::from_secs(seconds),
            spent: spent(failures),
        };
        assert_eq!(step(spent(0), error(None)), again(10, 1));
        assert_eq!(step(spent(1), error(None)), again(20, 2));
        assert_eq!(step(spent(1), error(Some(Duration::from_secs(300)))), again(300, 2), "it knows better");
        assert_eq!(step(spent(2), error(None)), dead("no", spent(3)));
    }

    #[test]
    fn crashes_have_a_budget_of_their_own_and_then_it_is_given_up() {
        let spent = |recoveries| Attempts { failures: 2, recoveries, since: Some(at(0)) };
        let again = |recoveries| Transition::Again { wait: Duration::ZERO, spent: spent(recoveries) };
        assert_eq!(step(Attempts { failures: 2, ..Attempts::default() }, Event::Lapsed), again(1));
        assert_eq!(spent_by_crashes(&BUDGET, spent(1)), None);
        assert_eq!(step(spent(1), Event::Lapsed), again(2), "to be given up");
        assert_eq!(spent_by_crashes(&BUDGET, spent(2)).unwrap(), "its worker crashed 2 times");
        assert_eq!(step(spent(3), Event::Lapsed), again(4));
        let ended = dead("its worker crashed 5 times", spent(5));
        assert_eq!(step(spent(4), Event::Lapsed), ended, "when even that crashes");
    }

    #[test]
    fn crashes_that_are_far_apart_are_counted_anew() {
        let spent = Attempts { failures: 0, recoveries: 1, since: Some(at(0)) };
        let lapsed = |now| next(&BUDGET, spent, Event::Lapsed, at(now), 0.0);
        let again = |recoveries, since| Transition::Again {
            wait: Duration::ZERO,
            spent: Attempts { failures: 0, recoveries, since: Some(at(since)) },
        };
        assert_eq!(lapsed(3600), again(2, 0));
        assert_eq!(lapsed(3601), again(1, 3601));
    }

    #[test]
    fn handing_back_and_snoozing_cost_nothing() {
        let spent = Attempts { failures: 2, recoveries: 1, since: Some(at(0)) };
        let again = |wait, spent| Transition::Again { wait, spent };
        let calm = Attempts { failures: 2, ..Attempts::default() };
        assert_eq!(step(spent, Event::HandedBack), again(Duration::ZERO, calm));
        assert_eq!(step(spent, Event::Snoozed(Duration::MAX)), again(Duration::MAX, spent));
    }

    #[test]
    fn done_is_gone_and_the_hopeless_and_cancelled_are_kept() {
        let spent = Attempts::default();
        assert_eq!(step(spent, Event::Done), Transition::Finished);
        assert_eq!(step(spent, Event::Hopeless("bad payload".into())), dead("bad payload", spent));
        let cancelled = Transition::Ended { state: State::Cancelled, reason: "by ops".into(), spent };
        assert_eq!(step(spent, Event::Cancelled("by ops".into())), cancelled);
    }
}
