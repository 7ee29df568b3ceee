//! Promises of the engine about schedules, on every store: each occurrence is claimed once, across replicas,
//! restarts and changes of the clock.
//!
//! Each promise is one function; [`promises`] makes tests of it for each store, with the tick and without it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use perennial_runtime::drain::{self, Phase, Trigger};
use perennial_runtime::tasks::Tasks;
use perennial_workers::admission::{Admission, Bounds};
use perennial_workers::cron::crontab::{Asked, RunView, ScheduleActivity};
use perennial_workers::cron::timer::Timer;
use perennial_workers::cron::{
    CronExpression, Misfire, Occurrence, Overlap, ScheduleClaim, ScheduleState, TakeOver, tick,
};
use perennial_workers::store::JobStore;
use perennial_workers::worker::Config;
use perennial_workers::{
    Context, Crontab, Job, JobOutcome, NewJob, Options, Queue, Registry, Schedule, Schedules, Worker,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use support::backend::{Backend, Kind};
use support::{eventually, soon};

/// Makes tests of each promise, for each store, with and without the tick.
macro_rules! promises {
    ($($promise:ident)*) => {
        promises! { @ sqlite sqlite_without_tick Sqlite: $($promise)* }
        promises! { @ postgres postgres_without_tick Postgres: $($promise)* }
        promises! { @ redis redis_without_tick Redis: $($promise)* }
    };
    (@ $with:ident $without:ident $kind:ident: $($promise:ident)*) => {
        mod $with {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() { super::$promise(support::backend::Kind::$kind, true).await; })*
        }
        mod $without {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() { super::$promise(support::backend::Kind::$kind, false).await; })*
        }
    };
}

promises! {
    rivals_claim_each_second_once
    a_claim_is_for_one_and_comes_with_its_job
    what_was_missed_is_for_the_policy
    a_clock_that_was_set_back_doubles_nothing
    what_has_not_ended_is_for_the_policy
    rivals_cancel_only_what_came_before
    a_pause_holds_and_is_not_made_up_for
    a_definition_stands_until_nobody_upholds_it
    the_history_says_how_each_run_ended
    a_store_that_lost_everything_learns_it_again
    a_full_queue_is_waited_for
    nothing_is_fired_from_the_moment_of_the_signal
}

/// A job that reports its id and its occurrence. Then it ends, fails for good, or waits.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    act: Act,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Act {
    End,
    Die,
    /// Waits for a permit, or until the job is cancelled.
    Wait,
}

#[derive(Clone, Debug)]
struct Tools {
    ran: mpsc::UnboundedSender<(Uuid, Option<Occurrence>)>,
    gate: Arc<Semaphore>,
}

impl Job for Note {
    const KIND: &'static str = "note";
    type Tools = Tools;

    fn options() -> Options {
        Options { queue: "tests", ..Options::default() }
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<JobOutcome> {
        tools.ran.send((context.id, context.occurrence()))?;
        match self.act {
            Act::End => Ok(JobOutcome::Done),
            Act::Die => Ok(JobOutcome::Dead("hopeless".to_owned())),
            Act::Wait => tokio::select! {
                permit = tools.gate.acquire() => {
                    permit?.forget();
                    Ok(JobOutcome::Done)
                }
                () = context.cancel.cancelled() => Ok(JobOutcome::HandBack),
            },
        }
    }
}

/// A replica, as far as schedules are concerned: it behaves as a process of its own, and reports the jobs that it ran.
struct Replica {
    queue: JobStore,
    crontab: Crontab,
    trigger: Trigger,
    tasks: Tasks,
    ran: mpsc::UnboundedReceiver<(Uuid, Option<Occurrence>)>,
    gate: Arc<Semaphore>,
}

impl Replica {
    /// Defines schedules, but fires nothing yet.
    async fn idle(backend: &Backend, schedules: Vec<Schedule>) -> (Self, Timer) {
        let queue = backend.queue().await;
        let crontab = crontab(&queue, schedules, 1000);
        crontab.define().await.unwrap();
        let (ran, runs) = mpsc::unbounded_channel();
        let gate = Arc::new(Semaphore::new(0));
        let mut registry = Registry::new();
        registry.register::<Note>(Tools { ran, gate: Arc::clone(&gate) });
        registry.serve("tests", 8);
        let config = Config {
            name: "replica".to_owned(),
            lease: Duration::from_secs(3),
            renew_every: Duration::from_millis(200),
            poll: Duration::from_millis(50),
            payload_bytes: 1 << 20,
            pressure: perennial_runtime::cgroup::Pressure::default(),
        };
        let worker = Worker::new(queue.clone(), Arc::new(registry), config).unwrap();
        let (trigger, drain) = drain::channel();
        let timer = Timer::new(crontab.clone(), Duration::from_millis(100), worker.status(), drain.clone());
        let tasks = Tasks::new(drain.clone());
        tasks.critical("worker", worker.run(drain));
        (Self { queue, crontab, trigger, tasks, ran: runs, gate }, timer)
    }

    /// Defines schedules and fires them.
    async fn start(backend: &Backend, schedules: Vec<Schedule>, ticks: bool) -> Self {
        let (replica, timer) = Self::idle(backend, schedules).await;
        replica.fire(timer, ticks);
        replica
    }

    fn fire(&self, timer: Timer, ticks: bool) {
        self.tasks.critical("cron", timer.run());
        if ticks {
            let (crontab, drain) = (self.crontab.clone(), self.trigger.listen());
            self.tasks.contained("cron tick", move || tick::run(crontab.clone(), drain.clone()));
        }
    }

    async fn stop(&self) {
        self.trigger.advance(Phase::Hard);
        soon("the replica ends", self.tasks.ended()).await;
    }

    /// Time of the occurrence that the next job runs for.
    async fn next_run(&mut self) -> Timestamp {
        soon("a run", self.ran.recv()).await.unwrap().1.unwrap().time
    }

    /// Returns true when no job runs for a while.
    async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(400), self.ran.recv()).await.is_err()
    }

    async fn standing(&self) -> ScheduleState {
        self.queue.due().await.unwrap().all.remove(0)
    }

    async fn runs(&self) -> Vec<RunView> {
        self.crontab.runs("test", 100).await.unwrap().unwrap()
    }

    /// Waits until the newest runs have these outcomes, newest first.
    async fn outcomes(&self, expected: &[&str]) {
        eventually(&format!("outcomes {expected:?}"), || async {
            let found: Vec<String> =
                self.runs().await.into_iter().take(expected.len()).map(|run| run.outcome).collect();
            (found == expected).then_some(())
        })
        .await;
    }
}

fn crontab(queue: &JobStore, schedules: Vec<Schedule>, jobs: u64) -> Crontab {
    Crontab::new(queue.clone(), Admission::new(Bounds { jobs, bytes: 1 << 20 }), schedules)
}

fn schedule(expression: &str, act: Act) -> Schedule {
    Schedule::new("test", expression, &Note { act }).unwrap()
}

/// A schedule that becomes due only when the clock is made to jump.
fn hourly(act: Act) -> Schedule {
    schedule("@every 1h", act)
}

const HOUR: i64 = 3600;
/// A jump past the next occurrence of [`hourly`]: two jobs of the same time would be the same job.
const JUMP: i64 = HOUR + 60;

async fn rivals_claim_each_second_once(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let every_second =
        schedule("* * * * * *", Act::End).misfire(Misfire::CatchUp { most: 100, within_ms: 60_000 });
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(Replica::start(&backend, vec![every_second.clone()], ticks).await);
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut times = BTreeMap::<Timestamp, usize>::new();
    for replica in &mut replicas {
        replica.stop().await;
        while let Ok((_, occurrence)) = replica.ran.try_recv() {
            *times.entry(occurrence.unwrap().time).or_default() += 1;
        }
    }
    let seconds: Vec<i64> = times.keys().map(|time| time.as_second()).collect();
    assert!(seconds.len() >= 3 && seconds.windows(2).all(|two| two[1] == two[0] + 1), "{seconds:?}");
    assert!(times.values().all(|runs| *runs == 1), "{times:?}");
    let (first, last) = (replicas[0].runs().await.pop().unwrap(), replicas[0].standing().await.last_fire);
    assert_eq!(first.occurrence.utc.as_second(), seconds[0]);
    assert_eq!(last.as_second(), *seconds.last().unwrap());
}

async fn a_claim_is_for_one_and_comes_with_its_job(kind: Kind, _ticks: bool) {
    let backend = Backend::new(kind).await;
    let (replica, _) = Replica::idle(&backend, vec![hourly(Act::End)]).await;
    replica.stop().await;
    let standing = replica.standing().await;
    let claim = |number: i64| ScheduleClaim {
        schedule: "test".to_owned(),
        version: standing.version,
        last_fire: standing.last_fire + SignedDuration::from_secs(number),
        queued: None,
        jobs: vec![NewJob::new(&Note { act: Act::End }).unwrap()],
        runs: Vec::new(),
    };
    let rivals = (0..20).map(async |number| {
        let queue = backend.queue().await;
        queue.fire(claim(number)).await.unwrap().then_some(number)
    });
    let winners: Vec<i64> = join_all(rivals).await.into_iter().flatten().collect();
    assert_eq!(winners.len(), 1);
    let after = replica.standing().await;
    assert_eq!(after.last_fire, standing.last_fire + SignedDuration::from_secs(winners[0]));
    assert_eq!(after.version, standing.version + 1);
    assert_eq!(replica.queue.measure("tests".into()).await.unwrap().ready, 1);
}

/// A stopped process, an unreachable store and a clock that was set forward look the same: occurrences are overdue.
async fn what_was_missed_is_for_the_policy(kind: Kind, ticks: bool) {
    let every = |misfire| vec![hourly(Act::End).misfire(misfire)];
    for (misfire, expected) in [
        (Misfire::Coalesce, vec![5]),
        (Misfire::SKIP, vec![]),
        (Misfire::CatchUp { most: 2, within_ms: u64::MAX }, vec![4, 5]),
        (Misfire::CatchUp { most: 500, within_ms: 9_000_000 }, vec![4, 5]),
    ] {
        let backend = Backend::new(kind).await;
        let mut replica = Replica::start(&backend, every(misfire), ticks).await;
        let jump = 5 * HOUR + HOUR / 2;
        let began = replica.standing().await.last_fire - SignedDuration::from_secs(jump);
        backend.jump(jump).await;
        let mut times = Vec::new();
        for _ in &expected {
            times.push(replica.next_run().await);
        }
        times.sort();
        let hours = |hours: &i64| began + SignedDuration::from_hours(*hours);
        assert_eq!(times, expected.iter().map(hours).collect::<Vec<_>>(), "{misfire:?}");
        assert!(replica.is_quiet().await, "{misfire:?}");
        let newest = replica.runs().await.remove(0);
        let (passed, outcome) = (newest.passed, newest.outcome);
        let said = match misfire {
            Misfire::Coalesce => (4, "done"),
            Misfire::Skip { .. } => (4, "missed"),
            Misfire::CatchUp { .. } => (0, "done"),
        };
        assert_eq!((passed, outcome.as_str()), said, "{misfire:?}");
        assert_eq!(replica.standing().await.last_fire, began + SignedDuration::from_hours(5));
        replica.stop().await;
    }
}

async fn a_clock_that_was_set_back_doubles_nothing(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut replica = Replica::start(&backend, vec![schedule("* * * * * *", Act::End)], ticks).await;
    replica.next_run().await;
    // After a step back of two hours, no occurrence is claimed twice.
    backend.jump(-2 * HOUR).await;
    while replica.ran.try_recv().is_ok() {}
    let before = replica.standing().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(replica.ran.try_recv().is_err());
    assert_eq!(replica.standing().await.last_fire, before.last_fire);
    // After a further step of two hours, the clock must have been wrong before: the schedule does not wait until then.
    backend.jump(-2 * HOUR).await;
    let time = replica.next_run().await;
    assert!(Timestamp::now().duration_since(time).abs() < SignedDuration::from_secs(30), "{time}");
    replica.stop().await;

    let backend = Backend::new(kind).await;
    let mut replica = Replica::start(&backend, vec![schedule("@every 1s", Act::End)], ticks).await;
    replica.next_run().await;
    backend.jump(-HOUR).await;
    replica.next_run().await;
    replica.next_run().await;
    replica.stop().await;
}

async fn what_has_not_ended_is_for_the_policy(kind: Kind, ticks: bool) {
    let start = async |overlap| {
        let backend = Backend::new(kind).await;
        let mut replica = Replica::start(&backend, vec![hourly(Act::Wait).overlap(overlap)], ticks).await;
        backend.jump(JUMP).await;
        let first = replica.next_run().await;
        backend.jump(JUMP).await;
        (backend, replica, first)
    };
    let (_backend, mut replica, _) = start(Overlap::Allow).await;
    replica.next_run().await;
    replica.stop().await;

    let (_backend, mut replica, _) = start(Overlap::Skip).await;
    replica.outcomes(&["overlapped", "running"]).await;
    assert!(matches!(replica.crontab.run("test").await.unwrap(), Asked::Unfinished(jobs) if jobs.len() == 1));
    let moved = replica.queue.unfinished("test", "elsewhere").await.unwrap();
    assert_eq!(moved.len(), 1, "also where its kind waits elsewhere by now");
    replica.gate.add_permits(1);
    replica.outcomes(&["overlapped", "done"]).await;
    assert!(matches!(replica.crontab.run("test").await.unwrap(), Asked::Enqueued(_)));
    replica.next_run().await;
    replica.stop().await;

    let (backend, mut replica, _) = start(Overlap::QueueOne).await;
    let queued = eventually("one is queued", || async { replica.standing().await.queued }).await;
    backend.jump(JUMP).await;
    replica.outcomes(&["overlapped", "running"]).await;
    replica.gate.add_permits(1);
    let next = replica.next_run().await;
    assert_eq!(
        next,
        queued - SignedDuration::from_secs(JUMP),
        "the one that waited, as the clock has it by now"
    );
    assert_eq!(replica.standing().await.queued, None);
    replica.stop().await;

    let (backend, mut replica, first) = start(Overlap::CancelOther).await;
    let next = replica.next_run().await;
    assert_eq!(next, first + SignedDuration::from_secs(HOUR - JUMP), "an hour later, after the jump");
    replica.outcomes(&["running", "cancelled"]).await;
    drop(backend);
    replica.stop().await;
}

async fn a_pause_holds_and_is_not_made_up_for(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut replica = Replica::start(&backend, vec![hourly(Act::End)], ticks).await;
    assert!(replica.crontab.pause("test", true).await.unwrap());
    assert!(!replica.crontab.pause("nothing", true).await.unwrap());
    backend.jump(2 * HOUR).await;
    assert!(replica.is_quiet().await);
    assert!(matches!(replica.crontab.run("test").await.unwrap(), Asked::Enqueued(_)), "but by hand");
    replica.next_run().await;
    // The pause outlasts a restart.
    replica.stop().await;
    let mut replica = Replica::start(&backend, vec![hourly(Act::End)], ticks).await;
    assert!(replica.is_quiet().await);
    replica.crontab.pause("test", false).await.unwrap();
    assert!(replica.is_quiet().await, "it goes on from now");
    backend.jump(HOUR).await;
    replica.next_run().await;
    // A schedule starts paused if it is defined so, until an operator resumes it.
    replica.stop().await;
    let paused = || vec![Schedule { paused: true, ..hourly(Act::End) }];
    let mut replica = Replica::start(&backend, paused(), ticks).await;
    backend.jump(HOUR).await;
    assert!(replica.is_quiet().await);
    replica.crontab.pause("test", false).await.unwrap();
    assert_eq!(replica.standing().await.held, Some(false));
    backend.jump(HOUR).await;
    replica.next_run().await;
    replica.crontab.pause("test", true).await.unwrap();
    assert_eq!(replica.standing().await.held, None, "which is what is defined");
    replica.stop().await;
}

/// When several replicas cancel the running job, none of them cancels a job that another has just started.
async fn rivals_cancel_only_what_came_before(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut replicas = Vec::new();
    for _ in 0..3 {
        let every_second = vec![schedule("@every 1s", Act::Wait).overlap(Overlap::CancelOther)];
        replicas.push(Replica::start(&backend, every_second, ticks).await);
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    for replica in &replicas {
        replica.trigger.advance(Phase::Notice);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let runs: Vec<RunView> = replicas[0].runs().await.into_iter().filter(|run| run.job.is_some()).collect();
    assert!(runs.len() >= 2, "{runs:?}");
    let newest = runs[0].outcome.as_str();
    let is_replaced = replicas[0].standing().await.queued.is_some();
    assert!(matches!(newest, "running" | "ready") || is_replaced, "the newest goes on: {runs:?}");
    assert!(runs[1..].iter().all(|run| run.outcome == "cancelled"), "{runs:?}");
    for replica in &mut replicas {
        replica.stop().await;
    }
}

async fn a_definition_stands_until_nobody_upholds_it(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut old = Replica::start(&backend, vec![schedule("@every 1s", Act::End)], ticks).await;
    old.next_run().await;
    // A new version of the program boots beside the old one: from now on its definition counts.
    let changed = vec![schedule("0 0 1 1 *", Act::End)];
    let new = Replica::start(&backend, changed, ticks).await;
    let standing = new.standing().await;
    assert_eq!(standing.timing, "0 0 1 1 * UTC");
    assert!(Timestamp::now().duration_since(standing.last_fire) < SignedDuration::from_secs(10));
    while old.ran.try_recv().is_ok() {}
    assert!(old.is_quiet().await, "the old one fires no more");
    old.crontab.clone().define().await.unwrap();
    old.queue.sync(vec![Arc::new(schedule("0 0 2 2 *", Act::End))], TakeOver::IfAbandoned).await.unwrap();
    assert_eq!(new.standing().await.timing, "@every 1s UTC", "whoever boots counts, and nobody else");
    new.stop().await;
    old.stop().await;
    backend.jump(HOUR).await;
    old.queue.sync(vec![Arc::new(schedule("0 0 3 3 *", Act::End))], TakeOver::Never).await.unwrap();
    assert_eq!(old.standing().await.timing, "@every 1s UTC");
    old.queue.sync(vec![Arc::new(schedule("0 0 2 2 *", Act::End))], TakeOver::IfAbandoned).await.unwrap();
    assert_eq!(old.standing().await.timing, "0 0 2 2 * UTC", "nobody upholds the other any more");
}

async fn the_history_says_how_each_run_ended(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let zone = |act| Schedule {
        expression: CronExpression::parse("@hourly", "Asia/Kathmandu").unwrap(),
        ..hourly(act)
    };
    let mut replica = Replica::start(&backend, vec![zone(Act::Die)], ticks).await;
    assert!(matches!(replica.crontab.run("nothing").await.unwrap(), Asked::Unknown));
    let Asked::Enqueued(job) = replica.crontab.run("test").await.unwrap() else { panic!("it was not run") };
    replica.next_run().await;
    replica.outcomes(&["dead"]).await;
    replica.stop().await;
    let replica = Replica::start(&backend, vec![zone(Act::Wait)], ticks).await;
    let Asked::Enqueued(waiting) = replica.crontab.run("test").await.unwrap() else {
        panic!("it was not run")
    };
    replica.outcomes(&["running", "dead"]).await;
    replica.gate.add_permits(1);
    replica.outcomes(&["done", "dead"]).await;
    let runs = replica.runs().await;
    assert_eq!((runs[0].job, runs[1].job), (Some(waiting), Some(job)));
    assert_eq!(runs[1].reason.as_deref(), Some("hopeless"));
    assert!(runs[1].took_ms.is_some_and(|took| (0..60_000).contains(&took)));
    assert!(runs[0].occurrence.local.ends_with("+05:45"), "{:?}", runs[0].occurrence);
    let listed = replica.crontab.list().await.unwrap().remove(0);
    assert_eq!(listed.last.unwrap().outcome, "done");
    let next = listed.next.unwrap();
    assert!(next.utc > Timestamp::now() && next.local.contains(":00:00 +05:45"), "{next:?}");
    assert!(next.utc.duration_since(Timestamp::now()) <= SignedDuration::from_hours(1));
    assert_eq!(listed.state, ScheduleActivity::Active);
    // The history is bounded, but a run that has not ended stays, since overlaps are detected by it.
    replica.crontab.run("test").await.unwrap();
    replica.outcomes(&["running"]).await;
    for _ in 0..150 {
        let standing = replica.standing().await;
        let mut run = replica.queue.runs("test", 1).await.unwrap().remove(0);
        run.id = Uuid::now_v7();
        run.has_job = false;
        run.claimed_at = Timestamp::now();
        run.ending = Some(perennial_workers::cron::Ending {
            outcome: perennial_workers::cron::RunOutcome::Overlapped,
            reason: None,
            at: run.claimed_at,
        });
        let claim = ScheduleClaim {
            schedule: "test".to_owned(),
            version: standing.version,
            last_fire: standing.last_fire,
            queued: None,
            jobs: Vec::new(),
            runs: vec![run],
        };
        replica.queue.fire(claim).await.unwrap();
    }
    let kept = replica.queue.runs("test", 1000).await.unwrap();
    assert!((100..=102).contains(&kept.len()), "{}", kept.len());
    assert_eq!(replica.queue.unfinished("test", "tests").await.unwrap().len(), 1);
    replica.stop().await;
}

async fn a_store_that_lost_everything_learns_it_again(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut replica = Replica::start(&backend, vec![schedule("@every 1s", Act::End)], ticks).await;
    replica.next_run().await;
    backend.forget_schedules().await;
    replica.next_run().await;
    replica.next_run().await;
    replica.stop().await;
}

async fn a_full_queue_is_waited_for(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let queue = backend.queue().await;
    let (mut replica, _) = Replica::idle(&backend, vec![hourly(Act::End)]).await;
    let admission = Admission::new(Bounds { jobs: 1, bytes: 1 << 20 });
    let full = Crontab::new(queue, admission.clone(), vec![hourly(Act::End)]);
    admission.admit(&[NewJob::new(&Note { act: Act::End }).unwrap()]).unwrap();
    let worker = Worker::new(
        backend.queue().await,
        Arc::new(Registry::new()),
        Config {
            name: "none".to_owned(),
            lease: Duration::from_secs(3),
            renew_every: Duration::from_secs(1),
            poll: Duration::from_secs(1),
            payload_bytes: 1,
            pressure: perennial_runtime::cgroup::Pressure::default(),
        },
    );
    let status = worker.unwrap().status();
    let timer = Timer::new(full, Duration::from_millis(100), status, replica.trigger.listen());
    replica.fire(timer, ticks);
    backend.jump(HOUR).await;
    assert!(replica.is_quiet().await);
    let missed = replica.standing().await.last_fire;
    assert!(missed < Timestamp::now() - SignedDuration::from_mins(59), "it is still due");
    let overdue = replica.crontab.list().await.unwrap().remove(0).overdue_ms;
    assert!(overdue.is_some_and(|ms| (0..60_000).contains(&ms)), "{overdue:?}");
    replica.stop().await;
    let mut with_room = Replica::start(&backend, vec![hourly(Act::End)], ticks).await;
    with_room.next_run().await;
    with_room.stop().await;
}

async fn nothing_is_fired_from_the_moment_of_the_signal(kind: Kind, ticks: bool) {
    let backend = Backend::new(kind).await;
    let mut replica = Replica::start(&backend, vec![schedule("@every 1s", Act::Wait)], ticks).await;
    replica.next_run().await;
    replica.trigger.advance(Phase::Notice);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let last = replica.standing().await.last_fire;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(replica.standing().await.last_fire, last);
    // A running job may finish, or is handed back for another process.
    replica.stop().await;
    let mut other = Replica::start(&backend, vec![schedule("@every 1s", Act::End)], ticks).await;
    let resumed = soon("the job that was handed back", other.ran.recv()).await.unwrap();
    assert!(resumed.1.unwrap().time <= last);
    other.stop().await;
}

/// A handler that blocks the only thread has the same effect as a process that was stopped.
#[tokio::test]
async fn a_stalled_runtime_loses_nothing() {
    for ticks in [true, false] {
        let backend = Backend::new(Kind::Sqlite).await;
        let every_second =
            schedule("* * * * * *", Act::End).misfire(Misfire::CatchUp { most: 100, within_ms: 60_000 });
        let mut replica = Replica::start(&backend, vec![every_second], ticks).await;
        let mut times = vec![replica.next_run().await];
        std::thread::sleep(Duration::from_millis(3200));
        let after = Timestamp::now();
        while *times.last().unwrap() < after {
            times.push(replica.next_run().await);
            times.sort();
        }
        assert!(times.windows(2).all(|two| two[1].as_second() == two[0].as_second() + 1), "{times:?}");
        replica.stop().await;
    }
}
