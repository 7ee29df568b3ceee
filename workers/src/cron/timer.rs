//! The task that fires what is due.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use perennial_server::drain::{Drain, Phase};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::claim::{Decision, decide, due_at};
use super::{Claim, Crontab, Overlap, Schedule, Standing};
use crate::ledger::Ledger;
use crate::metrics;
use crate::queue::Result;
use crate::schedules::{ABANDONED, Schedules};
use crate::worker;

/// Between the moment that is due and the look, so that a timer of whole milliseconds is not early.
const AFTER: Duration = Duration::from_millis(1);
/// What a job is told that another of its schedule replaces.
const GIVES_WAY: &str = "the next run of its schedule is due";
/// How far this machine's clock may be from the store's.
const SKEW: Duration = Duration::from_secs(30);

/// Fires what is due, until the drain begins.
#[derive(Debug)]
pub struct Timer {
    crontab: Crontab,
    /// How often to look, whatever wakes us.
    poll: Duration,
    /// The jobs in hand here, which are told at once when they must not go on.
    workers: worker::Status,
    /// The next time of each schedule after its last: what is asked again and again.
    next: HashMap<String, (Timestamp, Option<Timestamp>)>,
    uphold_at: Instant,
    is_skewed: bool,
}

impl Timer {
    /// Fires the schedules of `crontab`, looking at least every `poll`.
    pub fn new(crontab: Crontab, poll: Duration, workers: worker::Status) -> Self {
        Self { crontab, poll, workers, next: HashMap::new(), uphold_at: Instant::now(), is_skewed: false }
    }

    /// Fires until the drain has begun: from then on nothing is claimed.
    ///
    /// # Errors
    /// Never: the type is that of a task. A store that fails is asked again.
    pub async fn run(mut self, drain: Drain) -> std::result::Result<(), Infallible> {
        while drain.phase() == Phase::Running {
            let wait = match self.look(&drain).await {
                Ok(next) => next.map_or(self.poll, |next| (next + AFTER).min(self.poll)),
                Err(error) => {
                    warn!(error = error.in_one_line(), "schedules could not be looked at");
                    self.poll
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.crontab.woken() => {}
                () = drain.notice() => {}
            }
        }
        Ok(())
    }

    /// Fires what is due now, and returns how long until something else is.
    async fn look(&mut self, drain: &Drain) -> Result<Option<Duration>> {
        let crontab = self.crontab.clone();
        let schedules = crontab.schedules();
        if schedules.is_empty() {
            return Ok(None);
        }
        let store = crontab.store();
        let mut standings = store.due().await?;
        let is_known = |schedule: &Arc<Schedule>| standings.all.iter().any(|one| one.name == schedule.name);
        // A store that has lost everything learns it again.
        if Instant::now() >= self.uphold_at || !schedules.iter().all(is_known) {
            store.sync(schedules.to_vec(), false).await?;
            self.uphold_at = Instant::now() + ABANDONED / 3;
            standings = store.due().await?;
        }
        self.compare_clocks(standings.now);
        let now = standings.now;
        let mut soonest: Option<Duration> = None;
        for schedule in schedules {
            let Some(standing) = standings.all.iter().find(|one| one.name == schedule.name) else { continue };
            let mut last_fire = standing.last_fire;
            let next = self.next_after(schedule, last_fire);
            if due_at(schedule, standing, next, now) == Some(now) {
                if drain.phase() > Phase::Running {
                    break;
                }
                last_fire = self.fire(schedule, standing, now).await?;
            }
            metrics::last_fire(&schedule.name, last_fire);
            let next = self.next_after(schedule, last_fire);
            if let Some(due) = due_at(schedule, &Standing { last_fire, ..standing.clone() }, next, now) {
                let wait = Duration::try_from(due.duration_since(now)).unwrap_or_default();
                soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait)));
            }
        }
        // What waits for a job to end, or for room in its queue, is for the next poll.
        Ok(soonest.filter(|wait| !wait.is_zero()))
    }

    /// Does what is to be done about one schedule, and returns its last time as it is then.
    async fn fire(&self, schedule: &Schedule, standing: &Standing, now: Timestamp) -> Result<Timestamp> {
        let store = self.crontab.store();
        let unfinished = match schedule.overlap {
            Overlap::Allow => Vec::new(),
            _ => store.unfinished(&schedule.name, &schedule.job.queue).await?,
        };
        let Decision { claim, cancel, passed, overlapped, set_back } =
            decide(schedule, standing, &unfinished, now);
        for job in cancel {
            store.cancel(job, GIVES_WAY.to_owned()).await?;
            self.workers.cancel(job, GIVES_WAY);
        }
        let Some(claim) = claim else { return Ok(standing.last_fire) };
        let (last_fire, runs) = (claim.last_fire, claim.runs.clone());
        if !self.claim(claim).await? {
            return Ok(standing.last_fire);
        }
        let name = &schedule.name;
        if let Some(by) = set_back {
            warn!(schedule = name, by_s = by.as_secs(), "the clock was set back: the schedule begins anew");
        }
        metrics::occurrences(name, "passed", passed);
        metrics::occurrences(name, "overlapped", overlapped);
        for run in &runs {
            let (occurrence, passed) = (run.occurrence, run.passed);
            match &run.ending {
                None => {
                    let lag = Duration::try_from(now.duration_since(occurrence)).unwrap_or_default();
                    metrics::occurrences(name, "fired", 1);
                    metrics::cron_lag(name, lag);
                    let lag_ms = lag.as_millis();
                    debug!(schedule = name, %occurrence, job = %run.id, lag_ms, passed, "fired");
                }
                Some(ending) => {
                    let why = ending.outcome.as_str();
                    info!(schedule = name, %occurrence, passed, why, "a schedule did not run");
                }
            }
        }
        Ok(last_fire)
    }

    /// Writes down a claim, if there is room for its jobs and nobody was faster.
    async fn claim(&self, claim: Claim) -> Result<bool> {
        if let Err(error) = self.crontab.admission().admit(&claim.jobs) {
            // It is due until there is room; then what was missed is for its policy.
            warn!(schedule = claim.schedule, error = error.in_one_line(), "a schedule waits");
            return Ok(false);
        }
        self.crontab.store().fire(claim).await
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

    /// Says once when this machine's clock and the store's have come apart.
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
