//! The task that fires schedules when they are due.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_runtime::drain::{Drain, Phase};
use perennial_runtime::telemetry::Seldom;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::claim::{Decision, decide, due_at};
use super::{Crontab, Overlap, Run, Schedule, ScheduleClaim, ScheduleState, ScheduleStates, TakeOver};
use crate::job_admin::JobAdmin;
use crate::metrics;
use crate::queue::Result;
use crate::schedules::{ABANDONED, Schedules};
use crate::worker;

/// Wait from a due time to the look, so that a timer of whole milliseconds is not early.
const AFTER: Duration = Duration::from_millis(1);
/// Reason for the cancellation of a job that a later run of its schedule replaces.
const GIVES_WAY: &str = "the next run of its schedule is due";
/// How far this machine's clock may be from the store's without a warning.
const SKEW: Duration = Duration::from_secs(30);

/// Fires the schedules that are due, until the drain begins.
#[derive(Debug)]
pub struct Timer {
    crontab: Crontab,
    /// Longest time between two looks, if nothing wakes the timer.
    poll: Duration,
    /// Status of the worker in this process: its jobs are told at once when they must not go on.
    workers: worker::Status,
    drain: Drain,
    /// Cache of the next time of each schedule after its last time, since it is asked for again and again.
    next: HashMap<String, (Timestamp, Option<Timestamp>)>,
    /// Schedules whose queue is full.
    held_up: HashSet<String>,
    uphold_at: Instant,
    /// Time since when the store answers: before that, no process could uphold its definitions.
    answers_since: Instant,
    is_skewed: bool,
}

/// Result of a claim.
enum ClaimedSchedule {
    Won,
    /// Another process was faster.
    Lost,
    /// The queue has no room, or the drain has begun.
    HeldUp,
}

/// Limits the log lines: a store that is away fails every look.
static NOT_LOOKED_AT: Seldom = Seldom::each_minute();

impl Timer {
    /// Creates a timer for the schedules of `crontab`, which fires until `drain` begins and looks at least
    /// every `poll`.
    pub fn new(crontab: Crontab, poll: Duration, workers: worker::Status, drain: Drain) -> Self {
        let now = Instant::now();
        Self {
            crontab,
            poll,
            workers,
            drain,
            next: HashMap::new(),
            held_up: HashSet::new(),
            uphold_at: now,
            answers_since: now,
            is_skewed: false,
        }
    }

    /// Fires until the drain has begun: from then on nothing is claimed.
    ///
    /// # Errors
    /// Never: the type is that of a task. A store that fails is asked again.
    pub async fn run(mut self) -> std::result::Result<(), Infallible> {
        while self.drain.phase() == Phase::Running {
            let wait = match self.look().await {
                Ok(next) => next.map_or(self.poll, |next| (next + AFTER).min(self.poll)),
                Err(error) => {
                    if let Some(more) = NOT_LOOKED_AT.tell() {
                        warn!(
                            error = error.in_one_line(),
                            more_since_last = more,
                            "schedules could not be looked at"
                        );
                    }
                    self.answers_since = Instant::now() + self.poll;
                    self.uphold_at = self.answers_since;
                    self.poll
                }
            };
            let until = Instant::now() + wait;
            // A beat before the end of the wait is ignored.
            let is_late = async {
                loop {
                    self.crontab.beats().await;
                    if Instant::now() >= until {
                        return;
                    }
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = is_late => {}
                () = self.crontab.woken() => {}
                () = self.drain.notice() => {}
            }
        }
        Ok(())
    }

    /// Fires the schedules that are due now, and returns the time until the next one is. An occurrence that
    /// waits for a job to end, or for room in its queue, is left to the next poll.
    async fn look(&mut self) -> Result<Option<Duration>> {
        let crontab = self.crontab.clone();
        let schedules = crontab.schedules();
        if schedules.is_empty() {
            return Ok(None);
        }
        let ScheduleStates { now, all, .. } = self.standings().await?;
        let mut soonest: Option<Duration> = None;
        for schedule in schedules {
            let Some(standing) = all.iter().find(|one| one.name == schedule.name) else { continue };
            let mut last_fire = standing.last_fire;
            let next = self.next_after(schedule, last_fire);
            if due_at(schedule, standing, next, now) == Some(now) {
                match self.fire(schedule, standing, now).await {
                    Ok(fired) => last_fire = fired,
                    // The other schedules must not wait for this one.
                    Err(error) => {
                        warn!(
                            schedule = schedule.name,
                            error = error.in_one_line(),
                            "the schedule could not be fired"
                        );
                    }
                }
            }
            let next = self.next_after(schedule, last_fire);
            let due = due_at(schedule, &ScheduleState { last_fire, ..standing.clone() }, next, now);
            let overdue = next.filter(|_| due == Some(now)).map(|next| now.duration_since(next));
            metrics::overdue(&schedule.name, overdue.and_then(|by| by.try_into().ok()).unwrap_or_default());
            let wait = due.and_then(|due| Duration::try_from(due.duration_since(now)).ok());
            if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
                soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait)));
            }
        }
        Ok(soonest)
    }

    /// Returns the states of all schedules. From time to time, and when the store has lost some, it tells the
    /// store which schedules there are.
    async fn standings(&mut self) -> Result<ScheduleStates> {
        let (store, schedules) = (self.crontab.store().clone(), self.crontab.schedules());
        let mut standings = store.due().await?;
        let is_known = |schedule: &Arc<Schedule>| {
            standings.all.iter().any(|one| one.name == schedule.name)
                || standings.unreadable.contains(&schedule.name)
        };
        let now = Instant::now();
        if now >= self.uphold_at || !schedules.iter().all(is_known) {
            // After an outage, other processes must first have had the time to uphold their definitions.
            let answered = now.saturating_duration_since(self.answers_since);
            let take_over = if answered > ABANDONED { TakeOver::IfAbandoned } else { TakeOver::Never };
            store.sync(schedules.to_vec(), take_over).await?;
            self.uphold_at = now + ABANDONED / 3;
            standings = store.due().await?;
        }
        self.compare_clocks(standings.now);
        Ok(standings)
    }

    /// Carries out the decision about one schedule, and returns its last time after that.
    async fn fire(
        &mut self,
        schedule: &Schedule,
        standing: &ScheduleState,
        now: Timestamp,
    ) -> Result<Timestamp> {
        let store = self.crontab.store().clone();
        let unfinished = match schedule.overlap {
            Overlap::Allow => Vec::new(),
            _ => store.unfinished(&schedule.name, &schedule.job.queue).await?,
        };
        let Decision { claim, cancel, set_back } = decide(schedule, standing, &unfinished, now);
        let mut last_fire = standing.last_fire;
        if let Some(claim) = claim {
            let (claimed, runs) = (claim.last_fire, claim.runs.clone());
            match self.claim(claim).await? {
                ClaimedSchedule::Won => tell(schedule, &runs, now, set_back),
                // Another process has done the same, or something that the next look will show.
                ClaimedSchedule::Lost => return Ok(claimed),
                ClaimedSchedule::HeldUp => return Ok(last_fire),
            }
            last_fire = claimed;
        } else if !cancel.is_empty() {
            // Jobs of a claim that came after this state was read must go on.
            let standings = store.due().await?;
            if standings.all.iter().all(|one| one.name != standing.name || one.version != standing.version) {
                return Ok(last_fire);
            }
        }
        for job in cancel {
            store.cancel(job, GIVES_WAY.to_owned()).await?;
            self.workers.cancel(job, GIVES_WAY);
        }
        Ok(last_fire)
    }

    /// Writes a claim, if there is room for its jobs, no other process was faster, and the drain has not
    /// begun.
    async fn claim(&mut self, claim: ScheduleClaim) -> Result<ClaimedSchedule> {
        let schedule = claim.schedule.clone();
        if let Err(error) = self.crontab.admission().admit(&claim.jobs) {
            // The schedule stays due until there is room; then its policy for missed occurrences applies.
            if self.held_up.insert(schedule.clone()) {
                warn!(schedule, error = error.in_one_line(), "the schedule waits for room");
            }
            return Ok(ClaimedSchedule::HeldUp);
        }
        if self.held_up.remove(&schedule) {
            info!(schedule, "there is room for the schedule again");
        }
        if self.drain.phase() > Phase::Running {
            return Ok(ClaimedSchedule::HeldUp);
        }
        Ok(if self.crontab.store().fire(claim).await? { ClaimedSchedule::Won } else { ClaimedSchedule::Lost })
    }

    fn next_after(&mut self, schedule: &Schedule, last: Timestamp) -> Option<Timestamp> {
        match self.next.get(&schedule.name) {
            Some((of, next)) if *of == last => *next,
            _ => {
                let next = schedule.next_after(last);
                self.next.insert(schedule.name.clone(), (last, next));
                next
            }
        }
    }

    /// Warns once when this machine's clock and the store's have come apart.
    fn compare_clocks(&mut self, store: Timestamp) {
        let apart = Timestamp::now().duration_since(store);
        let is_skewed = apart.unsigned_abs() > SKEW;
        if is_skewed && !self.is_skewed {
            warn!(
                ahead_seconds = apart.as_secs(),
                "this machine's clock and the store's are apart: schedules go by the store's"
            );
        }
        self.is_skewed = is_skewed;
    }
}

/// Counts and logs the runs that were claimed at `now`.
fn tell(schedule: &Schedule, runs: &[Run], now: Timestamp, set_back: Option<Duration>) {
    let name = &schedule.name;
    if let Some(by) = set_back {
        warn!(schedule = name, by_s = by.as_secs(), "the clock was set back: the schedule begins anew");
    }
    for Run { id, occurrence, passed, ending, .. } in runs {
        metrics::occurrences(name, "passed", *passed as usize);
        match ending {
            None => {
                let lag = Duration::try_from(now.duration_since(*occurrence)).unwrap_or_default();
                metrics::occurrences(name, "fired", 1);
                metrics::cron_lag(name, lag);
                let lag_ms = lag.as_millis();
                debug!(schedule = name, %occurrence, job = %id, lag_ms, passed, "fired");
            }
            Some(ending) => {
                let why = ending.outcome.as_str();
                metrics::occurrences(name, why, 1);
                info!(schedule = name, %occurrence, passed, why, "a schedule did not run");
            }
        }
    }
}
