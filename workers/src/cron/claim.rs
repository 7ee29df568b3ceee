//! The decision what to do about a schedule now, as a pure function.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::{
    Ending, MAX_CATCH_UP, Misfire, Overlap, Run, RunCause, RunOutcome, Schedule, ScheduleClaim, ScheduleState,
};

/// How far a clock may be set back without times being claimed a second time. Vixie's cron has the same bound.
pub const WAIT_OUT: Duration = Duration::from_secs(3 * 3600);
/// Number up to which passed occurrences are counted.
const COUNTED: usize = 1000;

/// Decision what to do about a schedule.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// New state of the schedule; `None` if the state does not change.
    pub claim: Option<ScheduleClaim>,
    /// Jobs that must not go on.
    pub cancel: Vec<Uuid>,
    /// How far the clock was set back, if the schedule begins anew because of that.
    pub set_back: Option<Duration>,
}

/// When the schedule next needs attention: `now` if due, `None` if never. `next` is the next time after
/// [`ScheduleState::last_fire`].
pub fn due_at(
    schedule: &Schedule,
    standing: &ScheduleState,
    next: Option<Timestamp>,
    now: Timestamp,
) -> Option<Timestamp> {
    if !may_claim(schedule, standing) {
        return None;
    }
    let at_once = standing.queued.is_some() || set_back(schedule, standing, now).is_some();
    if at_once { Some(now) } else { next.map(|next| next.max(now)) }
}

/// Decides what to do about `schedule` in the state `standing`, at `now` by the store's clock. `unfinished`
/// are its jobs that have not ended.
pub fn decide(
    schedule: &Schedule,
    standing: &ScheduleState,
    unfinished: &[Uuid],
    now: Timestamp,
) -> Decision {
    if !may_claim(schedule, standing) {
        return Decision::default();
    }
    if let Some(by) = set_back(schedule, standing, now) {
        let claim = ScheduleClaim { last_fire: now, ..stays(standing) };
        return Decision { claim: Some(claim), cancel: Vec::new(), set_back: Some(by) };
    }
    let mut firing = Firing::new(schedule, standing, unfinished, now);
    if let Some(queued) = standing.queued
        && firing.is_free
    {
        firing.claim.queued = None;
        firing.run(queued, RunCause::Queued, 0);
    }
    let Missed { newest, due, passed } = missed(schedule, standing.last_fire, now);
    if let Some(newest) = newest {
        firing.claim.last_fire = newest;
        match due.split_first() {
            Some((first, rest)) => {
                firing.meet(*first, passed);
                rest.iter().for_each(|occurrence| firing.meet(*occurrence, 0));
            }
            None => firing.note(newest, passed.saturating_sub(1), RunOutcome::Missed),
        }
    }
    firing.finish(standing)
}

/// Returns the claim of a run that an operator asks for at `now`, with its job; `None` if the policy for
/// overlaps refuses the run.
pub fn by_hand(
    schedule: &Schedule,
    standing: &ScheduleState,
    unfinished: &[Uuid],
    now: Timestamp,
) -> Option<(Uuid, ScheduleClaim)> {
    if schedule.overlap != Overlap::Allow && !unfinished.is_empty() {
        return None;
    }
    let mut firing = Firing::new(schedule, standing, unfinished, now);
    firing.run(now, RunCause::Manual, 0);
    Some((firing.claim.jobs.first()?.id, firing.claim))
}

/// Returns true if the schedule is not paused, and the store has the definition of this process. The
/// definition of another version may differ.
fn may_claim(schedule: &Schedule, standing: &ScheduleState) -> bool {
    !standing.is_paused() && standing.definition == schedule.definition()
}

/// Returns how far the clock was set back, if that is too far to wait until it has caught up.
fn set_back(schedule: &Schedule, standing: &ScheduleState, now: Timestamp) -> Option<Duration> {
    let back = Duration::try_from(standing.last_fire.duration_since(now)).ok()?;
    // A schedule by elapsed time has nothing to wait for.
    let waited_out = if schedule.expression.is_elapsed() { Duration::ZERO } else { WAIT_OUT };
    (back > waited_out).then_some(back)
}

fn stays(standing: &ScheduleState) -> ScheduleClaim {
    ScheduleClaim {
        schedule: standing.name.clone(),
        version: standing.version,
        last_fire: standing.last_fire,
        queued: standing.queued,
        jobs: Vec::new(),
        runs: Vec::new(),
    }
}

/// The occurrences since the last claim.
struct Missed {
    /// The newest of these occurrences.
    newest: Option<Timestamp>,
    /// Occurrences that the policy wants to run, the oldest first.
    due: Vec<Timestamp>,
    /// Number of the other occurrences.
    passed: usize,
}

fn missed(schedule: &Schedule, last: Timestamp, now: Timestamp) -> Missed {
    let until = schedule.until.map_or(now, |until| until.min(now));
    let begin = schedule.begin(last);
    let most = match schedule.misfire {
        Misfire::Skip { .. } | Misfire::Coalesce => 1,
        Misfire::CatchUp { most, .. } => most.clamp(1, MAX_CATCH_UP) as usize,
    };
    let mut due = schedule.expression.newest(begin, until, most);
    let newest = due.last().copied();
    let oldest = |ms: u64| {
        let age = SignedDuration::from_millis(i64::try_from(ms).unwrap_or(i64::MAX));
        now.checked_sub(age).unwrap_or(Timestamp::MIN)
    };
    match schedule.misfire {
        Misfire::Skip { grace_ms } => due.retain(|time| *time >= oldest(grace_ms)),
        Misfire::Coalesce => {}
        Misfire::CatchUp { within_ms, .. } => due.retain(|time| *time >= oldest(within_ms)),
    }
    let all = schedule.expression.count(begin, until, COUNTED + due.len());
    Missed { newest, passed: all.saturating_sub(due.len()), due }
}

/// A claim while it is built.
struct Firing<'a> {
    schedule: &'a Schedule,
    unfinished: &'a [Uuid],
    now: Timestamp,
    /// True if no job of the schedule is under way.
    is_free: bool,
    claim: ScheduleClaim,
}

impl<'a> Firing<'a> {
    fn new(schedule: &'a Schedule, standing: &ScheduleState, unfinished: &'a [Uuid], now: Timestamp) -> Self {
        let is_free = unfinished.is_empty();
        let claim = stays(standing);
        Self { schedule, unfinished, now, is_free, claim }
    }

    /// Applies the policy for overlaps to an occurrence that is due.
    fn meet(&mut self, occurrence: Timestamp, passed: usize) {
        match self.schedule.overlap {
            Overlap::Allow => self.run(occurrence, RunCause::Due, passed),
            _ if self.is_free && self.claim.queued.is_none() => self.run(occurrence, RunCause::Due, passed),
            Overlap::QueueOne if self.claim.queued.is_none() => self.claim.queued = Some(occurrence),
            Overlap::CancelOther => {
                if let Some(replaced) = self.claim.queued.replace(occurrence) {
                    self.note(replaced, 0, RunOutcome::Overlapped);
                }
            }
            Overlap::Skip | Overlap::QueueOne => self.note(occurrence, passed, RunOutcome::Overlapped),
        }
    }

    /// Adds a run with its job.
    fn run(&mut self, occurrence: Timestamp, cause: RunCause, passed: usize) {
        let job = self.schedule.job(occurrence, cause == RunCause::Manual);
        self.is_free = false;
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        let (id, claimed_at) = (job.id, self.now);
        self.claim.runs.push(Run { id, has_job: true, occurrence, claimed_at, cause, passed, ending: None });
        self.claim.jobs.push(job);
    }

    /// Adds a run without a job, with the reason why there is none.
    fn note(&mut self, occurrence: Timestamp, passed: usize, outcome: RunOutcome) {
        self.claim.runs.push(Run {
            id: Uuid::now_v7(),
            has_job: false,
            occurrence,
            claimed_at: self.now,
            cause: RunCause::Due,
            passed: u32::try_from(passed).unwrap_or(u32::MAX),
            ending: Some(Ending { outcome, reason: None, at: self.now }),
        });
    }

    fn finish(self, standing: &ScheduleState) -> Decision {
        let Self { schedule, unfinished, claim, .. } = self;
        let gives_way = schedule.overlap == Overlap::CancelOther && claim.queued.is_some();
        let cancel = if gives_way { unfinished.to_vec() } else { Vec::new() };
        let changes = claim.last_fire != standing.last_fire || claim.queued != standing.queued;
        Decision { claim: changes.then_some(claim), cancel, set_back: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cron::{JobTemplate, Occurrence};

    fn at(text: &str) -> Timestamp {
        format!("2026-11-21T{text}Z").parse().unwrap()
    }

    fn schedule(expression: &str) -> Schedule {
        let job = JobTemplate {
            kind: "test".to_owned(),
            queue: "tests".to_owned(),
            priority: 0,
            payload: "{}".to_owned(),
        };
        Schedule::of("test", expression.parse().unwrap(), job).unwrap()
    }

    fn standing(schedule: &Schedule, last_fire: &str) -> ScheduleState {
        ScheduleState {
            name: schedule.name.clone(),
            definition: schedule.definition(),
            timing: schedule.expression.to_string(),
            last_fire: at(last_fire),
            queued: None,
            paused: false,
            held: None,
            version: 7,
            seen_at: at(last_fire),
        }
    }

    /// Returns the runs that are claimed at `now`, of a schedule that was last due at `last`.
    fn runs(schedule: &Schedule, last: &str, now: &str) -> Vec<(Timestamp, u32, Option<RunOutcome>)> {
        let decision = decide(schedule, &standing(schedule, last), &[], at(now));
        let runs = decision.claim.map(|claim| claim.runs).unwrap_or_default();
        runs.iter()
            .map(|run| (run.occurrence, run.passed, run.ending.as_ref().map(|end| end.outcome)))
            .collect()
    }

    #[test]
    fn what_is_due_is_claimed_up_to_the_newest() {
        let minutes = schedule("* * * * *");
        assert_eq!(runs(&minutes, "10:00:00", "10:00:59.999"), []);
        assert_eq!(runs(&minutes, "10:00:00", "10:01:00"), [(at("10:01:00"), 0, None)]);
        let standing = standing(&minutes, "10:00:00");
        let claim = decide(&minutes, &standing, &[], at("10:04:30")).claim.unwrap();
        assert_eq!((claim.last_fire, claim.version, claim.queued), (at("10:04:00"), 7, None));
        assert_eq!(claim.jobs.len(), 1);
    }

    #[test]
    fn each_policy_for_what_was_missed() {
        let (last, now) = ("10:00:00", "10:05:30");
        let coalesce = schedule("* * * * *");
        assert_eq!(runs(&coalesce, last, now), [(at("10:05:00"), 4, None)]);
        let skip = schedule("* * * * *").misfire(Misfire::Skip { grace_ms: 29_000 });
        assert_eq!(runs(&skip, last, now), [(at("10:05:00"), 4, Some(RunOutcome::Missed))]);
        let grace = schedule("* * * * *").misfire(Misfire::SKIP);
        assert_eq!(runs(&grace, last, now), [(at("10:05:00"), 4, None)]);
        let catch_up =
            |most, within_ms: u64| schedule("* * * * *").misfire(Misfire::CatchUp { most, within_ms });
        let three = [(at("10:03:00"), 2, None), (at("10:04:00"), 0, None), (at("10:05:00"), 0, None)];
        assert_eq!(runs(&catch_up(3, 600_000), last, now), three);
        assert_eq!(runs(&catch_up(3, u64::MAX), last, now), three);
        assert_eq!(
            runs(&catch_up(9, 100_000), last, now),
            [(at("10:04:00"), 3, None), (at("10:05:00"), 0, None)]
        );
        assert_eq!(runs(&catch_up(9, 1000), last, now), [(at("10:05:00"), 4, Some(RunOutcome::Missed))]);
        // In years of seconds, no more than `COUNTED` are counted.
        let years = "2020-01-01T00:00:00Z".parse().unwrap();
        let seconds = schedule("* * * * * *");
        let standing = ScheduleState { last_fire: years, ..standing(&seconds, last) };
        let claim = decide(&seconds, &standing, &[], at(now)).claim.unwrap();
        assert_eq!(claim.runs[0].passed as usize, COUNTED);
    }

    #[test]
    fn each_policy_for_what_has_not_ended() {
        let other = [Uuid::from_u128(1)];
        let decide = |overlap, queued: Option<&str>, unfinished: &[Uuid]| {
            let schedule = schedule("* * * * *").overlap(overlap);
            let standing = ScheduleState { queued: queued.map(at), ..standing(&schedule, "10:00:00") };
            let Decision { claim, cancel, .. } = decide(&schedule, &standing, unfinished, at("10:01:00"));
            let claim = claim.unwrap();
            let overlapped = claim.runs.iter().filter(|run| !run.has_job).count();
            let jobs: Vec<Timestamp> =
                claim.runs.iter().filter(|run| run.has_job).map(|run| run.occurrence).collect();
            (jobs, claim.queued, cancel, overlapped)
        };
        let (now, before) = (at("10:01:00"), at("10:00:00"));
        for overlap in [Overlap::Allow, Overlap::Skip, Overlap::QueueOne, Overlap::CancelOther] {
            assert_eq!(decide(overlap, None, &[]), (vec![now], None, vec![], 0), "{overlap:?}");
        }
        assert_eq!(decide(Overlap::Allow, None, &other), (vec![now], None, vec![], 0));
        assert_eq!(decide(Overlap::Skip, None, &other), (vec![], None, vec![], 1));
        assert_eq!(decide(Overlap::QueueOne, None, &other), (vec![], Some(now), vec![], 0));
        assert_eq!(decide(Overlap::QueueOne, Some("10:00:00"), &other), (vec![], Some(before), vec![], 1));
        // The earlier job has ended: the occurrence that waited runs, and the next one waits for it.
        assert_eq!(decide(Overlap::QueueOne, Some("10:00:00"), &[]), (vec![before], Some(now), vec![], 0));
        assert_eq!(decide(Overlap::CancelOther, None, &other), (vec![], Some(now), other.to_vec(), 0));
        let replaced = decide(Overlap::CancelOther, Some("10:00:00"), &other);
        assert_eq!(replaced, (vec![], Some(now), other.to_vec(), 1));
    }

    #[test]
    fn a_clock_that_was_set_back_is_waited_for_but_not_for_long() {
        let hourly = schedule("@hourly");
        let decide = |schedule: &Schedule, now| {
            let decision = decide(schedule, &standing(schedule, "10:00:00"), &[], at(now));
            decision.claim.map(|claim| (claim.last_fire, claim.jobs.len(), decision.set_back.unwrap()))
        };
        assert_eq!(decide(&hourly, "09:30:00"), None);
        assert_eq!(decide(&hourly, "07:00:00"), None);
        let hours = Duration::from_secs(3600);
        assert_eq!(decide(&hourly, "06:00:00"), Some((at("06:00:00"), 0, 4 * hours)));
        let every = schedule("@every 1h");
        assert_eq!(decide(&every, "09:30:00"), Some((at("09:30:00"), 0, hours / 2)));
        assert_eq!(decide(&every, "10:00:00"), None);
    }

    #[test]
    fn nothing_is_claimed_of_what_is_paused_or_somebody_elses() {
        let minutes = schedule("* * * * *");
        let due = standing(&minutes, "10:00:00");
        let is_claimed =
            |standing: &ScheduleState| decide(&minutes, standing, &[], at("10:05:00")).claim.is_some();
        assert!(is_claimed(&due));
        assert!(!is_claimed(&ScheduleState { paused: true, ..due.clone() }));
        assert!(is_claimed(&ScheduleState { paused: true, held: Some(false), ..due.clone() }));
        assert!(!is_claimed(&ScheduleState { held: Some(true), ..due.clone() }));
        let other = schedule("* * * * *").overlap(Overlap::Skip).definition();
        assert!(!is_claimed(&ScheduleState { definition: other, ..due }));
    }

    #[test]
    fn nothing_is_due_outside_of_its_window() {
        let window = |from, until| Schedule {
            from: Some(at(from)),
            until: Some(at(until)),
            ..schedule("*/10 * * * *")
        };
        let inside = window("10:10:00", "10:30:00");
        assert_eq!(runs(&inside, "09:00:00", "10:09:00"), []);
        assert_eq!(runs(&inside, "09:00:00", "10:10:00"), [(at("10:10:00"), 0, None)]);
        assert_eq!(runs(&inside, "10:10:00", "11:00:00"), [(at("10:30:00"), 1, None)]);
        assert_eq!(inside.next_after(at("10:30:00")), None);
        let every = Schedule { expression: "@every 7m".parse().unwrap(), ..inside };
        assert_eq!(every.next_after(at("09:00:00")), Some(at("10:17:00")));
    }

    #[test]
    fn jobs_are_spread_out_by_less_than_the_jitter_and_the_same_everywhere() {
        let spread = schedule("* * * * *").jitter(Duration::from_secs(30));
        let delay = |minute: i64| spread.delay(at("10:00:00") + SignedDuration::from_mins(minute));
        let delays: Vec<SignedDuration> = (0..200).map(delay).collect();
        assert!(
            delays.iter().all(|delay| (SignedDuration::ZERO..SignedDuration::from_secs(30)).contains(delay))
        );
        assert!(delays.iter().any(|delay| *delay < SignedDuration::from_secs(3)));
        assert!(delays.iter().any(|delay| *delay > SignedDuration::from_secs(27)));
        assert_eq!(delays, (0..200).map(delay).collect::<Vec<_>>());
        let claim = decide(&spread, &standing(&spread, "10:00:00"), &[], at("10:01:00")).claim.unwrap();
        let due = crate::queue::Due::At(at("10:01:00") + spread.delay(at("10:01:00")));
        assert_eq!(claim.jobs[0].due, due);
    }

    #[test]
    fn the_id_of_a_job_is_made_of_its_schedule_and_its_time() {
        let id = |name: &str, time| {
            Schedule { name: name.to_owned(), ..schedule("@daily") }.job(at(time), false).id
        };
        assert_eq!(id("a", "10:00:00"), id("a", "10:00:00"));
        assert_ne!(id("a", "10:00:00"), id("b", "10:00:00"));
        assert!(id("a", "10:00:00") < id("a", "10:00:01"), "in the order of time, as all ids");
        assert_eq!(id("a", "10:00:00").get_version_num(), 7);
        let occurrence = Occurrence { schedule: "a".to_owned(), time: at("10:00:00") };
        assert!(occurrence.has_job(id("a", "10:00:00")));
        assert!(!occurrence.has_job(Uuid::now_v7()), "one that follows from it has its trace, too");
    }

    #[test]
    fn a_run_by_hand_keeps_to_the_policy_for_overlaps_and_moves_nothing() {
        let schedule = schedule("@daily").overlap(Overlap::Skip);
        let standing = ScheduleState { held: Some(true), ..standing(&schedule, "10:00:00") };
        let (job, claim) = by_hand(&schedule, &standing, &[], at("11:11:11")).unwrap();
        assert_eq!(claim.jobs[0].id, job);
        assert_eq!((claim.last_fire, claim.jobs.len()), (standing.last_fire, 1));
        assert_eq!(claim.runs[0].cause, RunCause::Manual);
        assert!(by_hand(&schedule, &standing, &[Uuid::nil()], at("11:11:11")).is_none());
    }
}
