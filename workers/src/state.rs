//! A job's life as one pure function.
//!
//! ```text
//!              due                claim (epoch + 1)            done
//! Scheduled ─────────► Ready ───────────────────► Running ───────────► (gone)
//!     ▲                  ▲                          │ │ │
//!     │                  └── handed back, lapsed ───┘ │ │
//!     └────────────── snoozed, failed ────────────────┘ │
//!                                                       └────────────► Dead
//!                            failures or recoveries spent, and given up
//! ```
//!
//! Three budgets are kept apart. *Failures* are errors, panics and timeouts of the job itself, in a row.
//! *Recoveries* are crashes of its worker, in a row: the lease lapsed and nobody settled. Handing back at a
//! drain and snoozing cost nothing, and show that the job gets on.
//!
//! A job whose recoveries are spent goes to a worker once more, not to run but to be given up there
//! ([`spent_by_crashes`]): whoever waits for it must be told, and only a worker can.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use perennial_server::backoff::Backoff;

/// How many crashes while it is given up are the end.
const GIVING_UP: u32 = 3;

/// Where a job stands. One that is done is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not before a certain time.
    Scheduled,
    /// Waiting for a worker.
    Ready,
    /// Claimed by a worker.
    Running,
    /// Given up: kept until somebody looks.
    Dead,
}

impl State {
    /// The word for it in stores.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }
}

/// How much may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// How many runs may fail; the last failure is the end.
    pub failures: u32,
    /// How many times its worker may crash; the last crash is the end.
    pub recoveries: u32,
    /// How long to wait after a failure.
    pub backoff: Backoff,
}

/// What has gone wrong so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Runs that failed.
    pub failures: u32,
    /// Workers that crashed.
    pub recoveries: u32,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It did what it had to.
    Done,
    /// It wants to run again after this long.
    Snoozed(Duration),
    /// Its worker leaves, and others should take it.
    HandedBack,
    /// It failed: an error, a panic, its timeout.
    Failed(String),
    /// It cannot ever succeed.
    Hopeless(String),
    /// Nobody renewed or settled it: its worker crashed.
    Lapsed,
}

/// What becomes of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// It is done.
    Finished,
    /// It runs again, not before this time.
    Again {
        /// When.
        at: Timestamp,
        /// What has gone wrong so far.
        spent: Spent,
        /// The last failure.
        error: Option<String>,
    },
    /// It is given up.
    Dead {
        /// Why.
        reason: String,
        /// What has gone wrong so far.
        spent: Spent,
    },
}

/// What becomes of a running job by `event` at `now`. `random` in `0.0..1.0` is for the jitter.
pub fn next(budget: &Budget, spent: Spent, event: Event, now: Timestamp, random: f64) -> Transition {
    match event {
        Event::Done => Transition::Finished,
        Event::Snoozed(wait) => {
            Transition::Again { at: later(now, wait), spent: Spent::default(), error: None }
        }
        Event::HandedBack => {
            Transition::Again { at: now, spent: Spent { recoveries: 0, ..spent }, error: None }
        }
        Event::Hopeless(reason) => Transition::Dead { reason, spent },
        Event::Failed(error) => {
            let spent = Spent { failures: spent.failures + 1, ..spent };
            if spent.failures >= budget.failures {
                return Transition::Dead { reason: error, spent };
            }
            let wait = budget.backoff.delay(spent.failures, random);
            Transition::Again { at: later(now, wait), spent, error: Some(error) }
        }
        Event::Lapsed => {
            let spent = Spent { recoveries: spent.recoveries + 1, ..spent };
            match spent_by_crashes(budget, spent) {
                // Even giving it up crashes the process: then nobody is told.
                Some(reason) if spent.recoveries >= budget.recoveries + GIVING_UP => {
                    Transition::Dead { reason, spent }
                }
                _ => Transition::Again { at: now, spent, error: None },
            }
        }
    }
}

/// Why a job must be given up instead of run, if its workers have crashed too often.
pub fn spent_by_crashes(budget: &Budget, spent: Spent) -> Option<String> {
    (spent.recoveries >= budget.recoveries).then(|| format!("its worker crashed {} times", spent.recoveries))
}

fn later(now: Timestamp, wait: Duration) -> Timestamp {
    SignedDuration::try_from(wait).ok().and_then(|wait| now.checked_add(wait).ok()).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget {
        failures: 3,
        recoveries: 2,
        backoff: Backoff::new(Duration::from_secs(10), Duration::from_secs(60)),
    };

    fn step(spent: Spent, event: Event) -> Transition {
        next(&BUDGET, spent, event, Timestamp::UNIX_EPOCH, 1.0)
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn failures_wait_longer_each_time_and_then_end() {
        let error = || Event::Failed("no".to_owned());
        let spent = |failures| Spent { failures, recoveries: 1 };
        let again = |seconds, failures| Transition::Again {
            at: at(seconds),
            spent: spent(failures),
            error: Some("no".to_owned()),
        };
        assert_eq!(step(spent(0), error()), again(10, 1));
        assert_eq!(step(spent(1), error()), again(20, 2));
        assert_eq!(step(spent(2), error()), Transition::Dead { reason: "no".into(), spent: spent(3) });
    }

    #[test]
    fn crashes_have_a_budget_of_their_own_and_then_it_is_given_up() {
        let spent = |recoveries| Spent { failures: 2, recoveries };
        let again = |recoveries| Transition::Again { at: at(0), spent: spent(recoveries), error: None };
        assert_eq!(step(spent(0), Event::Lapsed), again(1));
        assert_eq!(spent_by_crashes(&BUDGET, spent(1)), None);
        assert_eq!(step(spent(1), Event::Lapsed), again(2), "to be given up");
        assert_eq!(spent_by_crashes(&BUDGET, spent(2)).unwrap(), "its worker crashed 2 times");
        assert_eq!(step(spent(3), Event::Lapsed), again(4));
        let dead = Transition::Dead { reason: "its worker crashed 5 times".into(), spent: spent(5) };
        assert_eq!(step(spent(4), Event::Lapsed), dead, "when even that crashes");
    }

    #[test]
    fn handing_back_and_snoozing_cost_nothing() {
        let spent = Spent { failures: 2, recoveries: 1 };
        let again = |seconds, spent| Transition::Again { at: at(seconds), spent, error: None };
        assert_eq!(step(spent, Event::HandedBack), again(0, Spent { failures: 2, recoveries: 0 }));
        assert_eq!(step(spent, Event::Snoozed(Duration::from_secs(7))), again(7, Spent::default()));
        assert_eq!(
            step(spent, Event::Snoozed(Duration::MAX)),
            Transition::Again { at: Timestamp::MAX, spent: Spent::default(), error: None }
        );
    }

    #[test]
    fn done_is_gone_and_hopeless_is_dead() {
        assert_eq!(step(Spent::default(), Event::Done), Transition::Finished);
        let dead = Transition::Dead { reason: "bad payload".into(), spent: Spent::default() };
        assert_eq!(step(Spent::default(), Event::Hopeless("bad payload".into())), dead);
    }
}
