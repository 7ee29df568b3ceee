//! Promises of the job engine, on every store: at least once, fenced by epochs, on short renewed leases.
//!
//! Each promise is one function; [`promises`] makes a test of it for each store.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use perennial_runtime::backoff::Backoff;
use perennial_runtime::breaker::{self, Breaker};
use perennial_runtime::cgroup::{Cgroup, Pressure};
use perennial_runtime::drain::{self, Phase, Trigger};
use perennial_runtime::tasks::Tasks;
use perennial_workers::admission::{Admission, Bounds};
use perennial_workers::job::{Rate, Stopped, Unique, UniqueUntil};
use perennial_workers::job_admin::{Cancelled, JobFilter, JobView};
use perennial_workers::queue::{Claim, Claimed, Due, Error, Held, Renewal, Renewed, Settlement};
use perennial_workers::state::{Attempts, Budget, State, Transition};
use perennial_workers::store::JobStore;
use perennial_workers::worker::{Config, LeaseTooShort, Status};
use perennial_workers::{
    Context, Job, JobAdmin, JobOutcome, Jobs, NewJob, Options, Queue, Registry, Worker, upkeep,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use support::backend::{Backend, Kind};
use support::{eventually, soon};

/// Makes a test of each promise for each store.
macro_rules! promises {
    ($($promise:ident)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() { super::$promise(support::backend::Kind::Sqlite).await; })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() { super::$promise(support::backend::Kind::Postgres).await; })*
        }
        mod redis {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() { super::$promise(support::backend::Kind::Redis).await; })*
        }
    };
}

promises! {
    a_job_runs_and_is_gone
    failures_panics_and_timeouts_are_tried_again_and_then_given_up
    every_fate_is_what_it_says
    snoozing_costs_nothing
    an_open_breaker_snoozes
    only_free_slots_are_filled_and_lower_priorities_go_first
    a_kind_with_limits_keeps_nobody_waiting
    a_rate_is_kept
    the_same_id_is_added_once
    a_unique_key_is_taken_until_it_is_given_back
    a_unique_key_that_is_given_back_just_then_loses_no_job
    a_lease_is_renewed_for_as_long_as_the_job_runs
    a_stale_claim_changes_nothing
    rivals_never_claim_the_same_job
    a_crash_is_noticed_within_two_leases
    crashes_have_a_budget_of_their_own
    a_hung_job_is_freed
    a_checkpoint_is_kept_and_forgives_crashes
    who_lost_the_lease_finds_out_before_the_next_side_effect
    a_drain_hands_back_what_does_not_finish
    jobs_of_another_version_are_left_alone
    a_payload_that_cannot_be_read_is_dead_at_once
    delayed_jobs_wait_and_wake_by_themselves
    a_paused_queue_waits
    what_waits_and_what_runs_can_be_cancelled
    dead_letters_are_kept_shown_retried_and_discarded
    what_ended_long_ago_is_forgotten
    what_comes_again_after_its_end_can_end_again
    a_queue_is_measured_and_a_full_one_refuses
    progress_is_written_down
    a_worker_finds_what_nobody_woke_it_for
    a_clock_that_jumps_loses_nothing
}

/// Behaviour of a job, which the test chooses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Act {
    Done,
    Fail,
    Panic,
    /// Runs longer than its timeout.
    Hang,
    Snooze,
    Skip,
    RetrySoon,
    Cancel,
    Dead,
    Breaker,
    /// Writes a checkpoint and waits.
    Save,
    /// Waits for a permit of [`Tools::gate`], or until the job is cancelled.
    Wait,
    /// Waits for a permit without heeding the cancellation, and then checks whether the run may go on.
    Check,
}

#[derive(Clone, Debug)]
struct Tools {
    ran: mpsc::UnboundedSender<(String, Context)>,
    gave_up: mpsc::UnboundedSender<String>,
    gate: Arc<Semaphore>,
    breaker: Breaker,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Test {
    name: String,
    act: Act,
}

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(50));

impl Job for Test {
    const KIND: &'static str = "test";
    type Tools = Tools;

    fn options() -> Options {
        Options {
            queue: "tests",
            timeout: Duration::from_secs(2),
            budget: Budget {
                failures: 6,
                recoveries: 3,
                window: Duration::from_secs(3600),
                backoff: BACKOFF,
            },
            ..Options::default()
        }
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<JobOutcome> {
        tools.ran.send((self.name.clone(), context.clone())).unwrap();
        match self.act {
            Act::Fail => anyhow::bail!("no. {}", context.attempt()),
            Act::Panic => panic!("as the test wants"),
            Act::Hang => std::future::pending().await,
            Act::Snooze if context.saved::<bool>()?.is_none() => {
                context.save(&true).await?;
                Ok(JobOutcome::Snooze(Duration::from_millis(50)))
            }
            Act::Skip => Ok(JobOutcome::Skipped("nothing to do".to_owned())),
            Act::RetrySoon if context.attempt() == 1 => {
                Ok(JobOutcome::Retry { after: Duration::from_millis(300), reason: "busy".to_owned() })
            }
            Act::Cancel => Ok(JobOutcome::Cancel("not wanted".to_owned())),
            Act::Dead => Ok(JobOutcome::Dead("hopeless".to_owned())),
            Act::Breaker => {
                tools.breaker.call(async { Err::<(), _>(std::io::Error::other("away")) }).await?;
                Ok(JobOutcome::Done)
            }
            Act::Save => {
                let before: u32 = context.saved()?.unwrap_or_default();
                context.save(&(before + 1)).await?;
                context.progress(u64::from(before) + 1, 10);
                tools.gate.acquire().await?.forget();
                Ok(JobOutcome::Done)
            }
            Act::Done | Act::Snooze | Act::RetrySoon => Ok(JobOutcome::Done),
            Act::Wait => tokio::select! {
                permit = tools.gate.acquire() => {
                    permit?.forget();
                    Ok(JobOutcome::Done)
                }
                () = context.cancel.cancelled() => Err(Stopped::Cancelled.into()),
            },
            Act::Check => {
                tools.gate.acquire().await?.forget();
                context.check()?;
                Ok(JobOutcome::Done)
            }
        }
    }

    async fn give_up(&self, _context: Context, tools: Tools, reason: String) -> anyhow::Result<()> {
        tools.gave_up.send(reason).unwrap();
        Ok(())
    }
}

/// A job of the same queue, with a limit of one run at a time.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Narrow(String);

impl Job for Narrow {
    const KIND: &'static str = "narrow";
    type Tools = Tools;

    fn options() -> Options {
        Options { concurrency: Some(1), ..Test::options() }
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<JobOutcome> {
        Test { name: self.0.clone(), act: Act::Wait }.run(context, tools).await
    }
}

/// A job with a rate of twenty a second.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Slow(String);

impl Job for Slow {
    const KIND: &'static str = "slow";
    type Tools = Tools;

    fn options() -> Options {
        Options { rate: Some(Rate { jobs: 20, per: Duration::from_secs(1) }), ..Test::options() }
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<JobOutcome> {
        tools.ran.send((self.0.clone(), context))?;
        Ok(JobOutcome::Done)
    }
}

/// A job with a unique key.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Only {
    key: String,
    until: u8,
    act: Act,
}

impl Job for Only {
    const KIND: &'static str = "only";
    type Tools = Tools;

    fn options() -> Options {
        Test::options()
    }

    fn unique(&self) -> Option<Unique> {
        let until = match self.until {
            0 => UniqueUntil::Started,
            1 => UniqueUntil::Ended,
            _ => UniqueUntil::Window(Duration::from_millis(700)),
        };
        Some(Unique { key: self.key.clone(), until })
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<JobOutcome> {
        Test { name: self.key.clone(), act: self.act.clone() }.run(context, tools).await
    }
}

/// An engine on a store of its own.
struct Engine {
    backend: Backend,
    queue: JobStore,
    ran: mpsc::UnboundedReceiver<(String, Context)>,
    gave_up: mpsc::UnboundedReceiver<String>,
    tools: Tools,
    trigger: Trigger,
    tasks: Tasks,
    status: Option<Status>,
    pressure: Pressure,
}

const LEASE: Duration = Duration::from_secs(4);

fn config(lease: Duration) -> Config {
    Config {
        name: "test".to_owned(),
        lease,
        renew_every: lease / 4,
        poll: Duration::from_millis(200),
        payload_bytes: 64 << 20,
        pressure: Pressure::default(),
    }
}

impl Engine {
    /// Creates an engine without a worker.
    async fn idle(kind: Kind) -> Self {
        let backend = Backend::new(kind).await;
        let (ran, ran_receiver) = mpsc::unbounded_channel();
        let (gave_up, gave_up_receiver) = mpsc::unbounded_channel();
        let (trigger, drain) = drain::channel();
        let breaker = breaker::Config {
            failures: 1,
            pause: Backoff::new(Duration::from_secs(3), Duration::from_secs(3)),
        };
        Self {
            queue: backend.queue().await,
            backend,
            ran: ran_receiver,
            gave_up: gave_up_receiver,
            tools: Tools {
                ran,
                gave_up,
                gate: Arc::new(Semaphore::new(0)),
                breaker: Breaker::new("something", breaker),
            },
            tasks: Tasks::new(drain),
            trigger,
            status: None,
            pressure: Pressure::default(),
        }
    }

    async fn start(kind: Kind) -> Self {
        Self::start_with(kind, 4, LEASE).await
    }

    async fn start_with(kind: Kind, slots: usize, lease: Duration) -> Self {
        let mut engine = Self::idle(kind).await;
        engine.work(slots, lease);
        engine
    }

    /// Starts a worker and the maintenance of all jobs.
    fn work(&mut self, slots: usize, lease: Duration) {
        self.work_alone(slots, lease);
        let upkeep = upkeep::Config { rescue_every: Duration::from_millis(100), lease: LEASE };
        let admission = Admission::new(Bounds { jobs: 1000, bytes: 1 << 20 });
        let (queue, drain) = (self.queue.clone(), self.trigger.listen());
        self.tasks.critical("upkeep", upkeep::run(queue, self.registry(slots), admission, upkeep, drain));
    }

    /// Starts a worker alone.
    fn work_alone(&mut self, slots: usize, lease: Duration) {
        let config = Config { pressure: self.pressure.clone(), ..config(lease) };
        let worker = Worker::new(self.queue.clone(), self.registry(slots), config).unwrap();
        self.status = Some(worker.status());
        self.tasks.critical("worker", worker.run(self.trigger.listen()));
        let (queue, drain) = (self.queue.clone(), self.trigger.listen());
        self.tasks.contained("wake-ups", move || {
            let (queue, drain) = (queue.clone(), drain.clone());
            async move { queue.listen(drain).await }
        });
    }

    fn registry(&self, slots: usize) -> Arc<Registry> {
        let mut registry = Registry::new();
        registry.register::<Test>(self.tools.clone());
        registry.register::<Narrow>(self.tools.clone());
        registry.register::<Slow>(self.tools.clone());
        registry.register::<Only>(self.tools.clone());
        registry.serve("tests", slots);
        registry.check().unwrap();
        Arc::new(registry)
    }

    /// Stops the worker, so that another can be started.
    async fn stop(&mut self) {
        self.trigger.advance(Phase::Hard);
        soon("the worker ends", self.tasks.ended()).await;
        let (trigger, drain) = drain::channel();
        self.tasks = Tasks::new(drain);
        self.trigger = trigger;
    }

    async fn enqueue(&self, name: &str, act: Act) -> Uuid {
        self.queue.enqueue(vec![job(name, act)]).await.unwrap().remove(0)
    }

    async fn next_run(&mut self) -> (String, Context) {
        soon("a run", self.ran.recv()).await.unwrap()
    }

    async fn jobs(&self, state: State) -> Vec<JobView> {
        let filter = JobFilter { state: Some(state), ..JobFilter::default() };
        self.queue.list(filter, None, 1000).await.unwrap()
    }

    async fn count(&self, state: State) -> usize {
        self.jobs(state).await.len()
    }

    async fn until(&self, state: State, wanted: usize) {
        eventually(&format!("{wanted} jobs {state:?}"), || async {
            (self.count(state).await == wanted).then_some(())
        })
        .await;
    }

    async fn is_empty(&self) {
        for state in [State::Running, State::Ready, State::Scheduled, State::Dead, State::Cancelled] {
            self.until(state, 0).await;
        }
    }

    async fn claim(&self, limit: usize, lease: Duration) -> Vec<Claimed> {
        let claim = Claim { queue: "tests".into(), limit, worker: "by hand".to_owned(), lease };
        self.queue.claim(claim).await.unwrap().jobs
    }

    /// Claims one job. A claim may start behind a job that has become ready again, so it is
    /// repeated until it finds one.
    async fn claim_one(&self) -> Claimed {
        eventually("a job is claimed", async || self.claim(1, LEASE).await.pop()).await
    }

    async fn settle(&self, job: &Claimed, transition: Transition) -> bool {
        let settlement = Settlement::of(Arc::new(job.clone()), transition);
        self.queue.settle(vec![settlement]).await.unwrap().remove(0)
    }

    async fn renew(&self, held: &[Held]) -> Vec<Renewed> {
        let renewal = |held: &Held| Renewal { held: *held, queue: "tests".into(), progress: None };
        self.queue.renew(held.iter().map(renewal).collect(), LEASE).await.unwrap()
    }

    async fn rescue(&self) -> usize {
        upkeep::rescue(&self.queue, &self.registry(1), LEASE).await.unwrap()
    }

    fn jobs_handle(&self, bounds: Bounds) -> Jobs {
        Jobs::new(self.queue.clone(), Admission::new(bounds))
    }
}

fn job(name: &str, act: Act) -> NewJob {
    NewJob::new(&Test { name: name.to_owned(), act }).unwrap()
}

fn dead(reason: &str) -> Transition {
    Transition::Ended { state: State::Dead, reason: reason.to_owned(), spent: Attempts::default() }
}

fn filter() -> JobFilter {
    JobFilter::default()
}

async fn a_job_runs_and_is_gone(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    let new = job("one", Act::Done).trace("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let id = new.id;
    engine.queue.enqueue(vec![new]).await.unwrap();
    let (name, context) = engine.next_run().await;
    assert_eq!((name.as_str(), context.id, context.attempt()), ("one", id, 1));
    assert!(context.epoch > 0 && context.spent == Attempts::default());
    assert!(context.trace.unwrap().contains("4bf92f3577b34da6a3ce929d0e0e4736"));
    engine.is_empty().await;
}

async fn failures_panics_and_timeouts_are_tried_again_and_then_given_up(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    for (act, reason) in [(Act::Fail, "no. 6"), (Act::Panic, "panic: as the test wants")] {
        let id = engine.enqueue("bad", act).await;
        let mut epochs = Vec::new();
        for failures in 0..6 {
            let (_, context) = engine.next_run().await;
            assert_eq!(context.spent.failures, failures);
            epochs.push(context.epoch);
        }
        assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
        assert_eq!(soon("giving up", engine.gave_up.recv()).await.unwrap(), reason);
        engine.until(State::Dead, 1).await;
        let shown = engine.queue.show(id).await.unwrap().unwrap();
        assert_eq!((shown.reason.as_deref(), shown.failures), (Some(reason), 6));
        let attempts: Vec<u32> = shown.errors.iter().map(|failure| failure.attempt).collect();
        assert_eq!(attempts, [2, 3, 4, 5, 6], "the last five");
        assert_eq!(shown.errors[4].error, reason);
        assert_eq!(engine.queue.discard(filter()).await.unwrap(), 1);
    }
    engine.enqueue("good", Act::Done).await;
    assert_eq!(engine.next_run().await.0, "good", "the worker goes on");
}

async fn every_fate_is_what_it_says(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    engine.enqueue("skipped", Act::Skip).await;
    engine.next_run().await;
    engine.is_empty().await;

    engine.enqueue("later", Act::RetrySoon).await;
    engine.next_run().await;
    let began = Instant::now();
    let (_, context) = engine.next_run().await;
    assert_eq!(context.spent.failures, 1);
    assert!(began.elapsed() >= Duration::from_millis(280), "not by its backoff, which is 20 ms");
    engine.is_empty().await;

    let cancelled = engine.enqueue("cancelled", Act::Cancel).await;
    engine.until(State::Cancelled, 1).await;
    let dead = engine.enqueue("dead", Act::Dead).await;
    engine.until(State::Dead, 1).await;
    for (id, reason, failures) in [(cancelled, "not wanted", 0), (dead, "hopeless", 0)] {
        let shown = engine.queue.show(id).await.unwrap().unwrap();
        assert_eq!((shown.reason.as_deref(), shown.failures), (Some(reason), failures));
    }
    assert_eq!(engine.gave_up.recv().await.unwrap(), "hopeless", "and only the dead are told");
    assert!(engine.gave_up.try_recv().is_err());
}

async fn snoozing_costs_nothing(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    engine.enqueue("later", Act::Snooze).await;
    let (_, first) = engine.next_run().await;
    let (_, second) = engine.next_run().await;
    assert!(second.epoch > first.epoch && second.spent == Attempts::default());
}

async fn an_open_breaker_snoozes(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    engine.enqueue("depends", Act::Breaker).await;
    let failures = async |engine: &mut Engine| engine.next_run().await.1.spent.failures;
    // The first call fails and opens the breaker. While it is open, the job comes back and the run is not counted.
    assert_eq!(failures(&mut engine).await, 0);
    assert_eq!(failures(&mut engine).await, 1);
    assert_eq!(failures(&mut engine).await, 1);
    assert!(engine.tools.breaker.status().failures >= 1);
}

async fn only_free_slots_are_filled_and_lower_priorities_go_first(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    for (name, priority) in [("late", 9), ("soon", 5), ("first", -3)] {
        engine.queue.enqueue(vec![job(name, Act::Wait).priority(priority)]).await.unwrap();
    }
    engine.work(2, LEASE);
    let mut names = [engine.next_run().await.0, engine.next_run().await.0];
    names.sort();
    assert_eq!(names, ["first", "soon"]);
    assert_eq!(engine.status.as_ref().unwrap().busy().len(), 2);
    assert_eq!((engine.count(State::Running).await, engine.count(State::Ready).await), (2, 1));
    engine.tools.gate.add_permits(3);
    assert_eq!(engine.next_run().await.0, "late");
    engine.is_empty().await;
}

async fn a_kind_with_limits_keeps_nobody_waiting(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    let narrow = |name: &str| NewJob::new(&Narrow(name.to_owned())).unwrap();
    engine.queue.enqueue(vec![narrow("narrow"), narrow("narrow"), job("wide", Act::Wait)]).await.unwrap();
    let mut names = [engine.next_run().await.0, engine.next_run().await.0];
    names.sort();
    assert_eq!(names, ["narrow", "wide"], "one of its kind at a time, and the other goes first");
    engine.enqueue("wide", Act::Wait).await;
    assert_eq!(engine.next_run().await.0, "wide");
    engine.tools.gate.add_permits(4);
    assert_eq!(engine.next_run().await.0, "narrow");
    engine.is_empty().await;
}

async fn a_rate_is_kept(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    let slow: Vec<NewJob> = (0..10).map(|_| NewJob::new(&Slow("slow".to_owned())).unwrap()).collect();
    engine.queue.enqueue(slow).await.unwrap();
    engine.next_run().await;
    let began = Instant::now();
    for _ in 1..10 {
        engine.next_run().await;
    }
    // Nine intervals follow the first run, minus two that a pause of 100 ms may make up for.
    assert!(began.elapsed() >= Duration::from_millis(340), "{:?}", began.elapsed());
    engine.is_empty().await;
}

async fn the_same_id_is_added_once(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    let new = job("once", Act::Wait);
    engine.queue.enqueue(vec![new.clone(), new.clone()]).await.unwrap();
    engine.next_run().await;
    engine.queue.enqueue(vec![new]).await.unwrap();
    engine.tools.gate.add_permits(1);
    engine.is_empty().await;
    assert!(engine.ran.try_recv().is_err());
}

async fn a_unique_key_that_is_given_back_just_then_loses_no_job(kind: Kind) {
    const ENQUEUED: usize = 400;
    let engine = Engine::idle(kind).await;
    let mut rivals = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let queue = engine.queue.clone();
        rivals.spawn(async move {
            let mut stored = HashSet::new();
            for _ in 0..ENQUEUED {
                let new = NewJob::new(&Only { key: "rival".to_owned(), until: 1, act: Act::Done }).unwrap();
                let id = new.id;
                stored.extend(queue.enqueue(vec![new]).await.unwrap().into_iter().filter(|of| *of == id));
            }
            stored
        });
    }
    // Each job that is reported as stored exists, and runs.
    let (mut stored, mut ran) = (HashSet::new(), HashSet::new());
    while !rivals.is_empty() || ran.len() < stored.len() {
        for claimed in engine.claim(9, LEASE).await {
            ran.insert(claimed.id);
            assert!(engine.settle(&claimed, Transition::Finished).await);
        }
        while let Some(of_rival) = rivals.try_join_next() {
            stored.extend(of_rival.unwrap());
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(ran, stored);
}

async fn a_unique_key_is_taken_until_it_is_given_back(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    let only = |key: &str, until: u8| {
        let act = Act::Done;
        NewJob::new(&Only { key: key.to_owned(), until, act }).unwrap()
    };
    let queue = engine.queue.clone();
    let enqueue = async |new: NewJob| queue.enqueue(vec![new]).await.unwrap().remove(0);

    // The key is taken until the job is claimed.
    let first = enqueue(only("started", 0)).await;
    assert_eq!(enqueue(only("started", 0)).await, first);
    assert_ne!(enqueue(only("another", 0)).await, first);
    assert_eq!(engine.claim(2, LEASE).await.len(), 2);
    let second = enqueue(only("started", 0)).await;
    assert_ne!(second, first);
    assert_eq!(enqueue(only("started", 0)).await, second);

    // The key is taken until the job has ended, in whatever way.
    let first = enqueue(only("ended", 1)).await;
    let claimed = engine.claim(9, LEASE).await;
    let claimed = claimed.iter().find(|job| job.id == first).unwrap();
    assert_eq!(enqueue(only("ended", 1)).await, first, "while it runs");
    let again = Transition::Again { wait: Duration::ZERO, spent: Attempts::default() };
    assert!(engine.settle(claimed, again).await);
    assert_eq!(enqueue(only("ended", 1)).await, first, "while it waits to run again");
    let claimed = engine.claim(9, LEASE).await.remove(0);
    assert!(engine.settle(&claimed, dead("as the test wants")).await);
    let second = enqueue(only("ended", 1)).await;
    assert_ne!(second, first, "the dead have no keys");
    let claimed = engine.claim(9, LEASE).await.remove(0);
    assert!(engine.settle(&claimed, Transition::Finished).await);
    let third = enqueue(only("ended", 1)).await;
    assert_ne!(third, second);
    assert_eq!(queue.cancel(third, "as the test wants".to_owned()).await.unwrap(), Cancelled::Now);
    assert_ne!(enqueue(only("ended", 1)).await, third, "nor do the cancelled");

    // The key is taken for a time.
    let first = enqueue(only("window", 2)).await;
    let claimed = engine.claim(9, LEASE).await;
    let claimed = claimed.iter().find(|job| job.id == first).unwrap();
    assert!(engine.settle(claimed, Transition::Finished).await);
    assert_eq!(enqueue(only("window", 2)).await, first, "although it is done");
    tokio::time::sleep(Duration::from_millis(750)).await;
    assert_ne!(enqueue(only("window", 2)).await, first);

    // Two jobs with the same key come in one call.
    let both = queue.enqueue(vec![only("both", 1), only("both", 1)]).await.unwrap();
    assert_eq!(both[0], both[1]);
    engine.work(4, LEASE);
    eventually("all have run", || async { (engine.count(State::Ready).await == 0).then_some(()) }).await;
}

async fn a_lease_is_renewed_for_as_long_as_the_job_runs(kind: Kind) {
    let lease = Duration::from_millis(600);
    let mut engine = Engine::start_with(kind, 1, lease).await;
    engine.enqueue("long", Act::Wait).await;
    let (_, context) = engine.next_run().await;
    tokio::time::sleep(lease * 3).await;
    assert_eq!(context.check(), Ok(()), "three leases later it is still held");
    engine.tools.gate.add_permits(1);
    engine.is_empty().await;
    assert!(engine.ran.try_recv().is_err(), "it ran once");
}

async fn a_stale_claim_changes_nothing(kind: Kind) {
    let engine = Engine::idle(kind).await;
    engine.enqueue("contested", Act::Done).await;
    let first = engine.claim_one().await;
    assert_eq!(engine.rescue().await, 0, "its lease is held");
    engine.backend.end_leases().await;
    assert_eq!(engine.rescue().await, 1);
    let second = engine.claim_one().await;
    assert!(second.epoch > first.epoch);
    assert_eq!(second.spent.recoveries, 1);

    let renewed = engine.renew(&[first.held(), second.held()]).await;
    assert_eq!(renewed, [Renewed { held: second.held(), cancelled: None }]);
    let again = Transition::Again { wait: Duration::ZERO, spent: Attempts::default() };
    for stale in [Transition::Finished, dead(""), again] {
        assert!(!engine.settle(&first, stale).await);
    }
    let record = |held| engine.queue.record(held, "tests".into(), "1".to_owned());
    assert!(!record(first.held()).await.unwrap());
    assert!(record(second.held()).await.unwrap());
    assert_eq!(engine.count(State::Running).await, 1, "nothing has changed");
    assert_eq!(engine.rescue().await, 0, "the lease of the second is held");
    assert!(engine.settle(&second, Transition::Finished).await);
    assert!(!engine.settle(&second, Transition::Finished).await, "once");
    engine.is_empty().await;
}

async fn rivals_never_claim_the_same_job(kind: Kind) {
    let engine = Engine::idle(kind).await;
    let jobs: Vec<NewJob> = (0..600).map(|n| job(&n.to_string(), Act::Done)).collect();
    let all: HashSet<Uuid> = jobs.iter().map(|job| job.id).collect();
    for some in jobs.chunks(100) {
        engine.queue.enqueue(some.to_vec()).await.unwrap();
    }
    let rival = async || {
        let mut mine = Vec::new();
        loop {
            let jobs = engine.claim(7, LEASE).await;
            if jobs.is_empty() {
                return mine;
            }
            // Some jobs are settled while others are claimed.
            for job in jobs.iter().step_by(2) {
                assert!(engine.settle(job, Transition::Finished).await);
            }
            mine.extend(jobs.iter().map(|job| job.id));
        }
    };
    let rivals = Box::pin(async { tokio::join!(rival(), rival(), rival(), rival()) });
    let (a, b, c, d) = soon("all claimed", rivals).await;
    let claimed: Vec<Uuid> = [a, b, c, d].concat();
    assert_eq!(claimed.len(), 600);
    assert_eq!(claimed.into_iter().collect::<HashSet<_>>(), all);
}

async fn a_crash_is_noticed_within_two_leases(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    engine.enqueue("survivor", Act::Done).await;
    let lease = Duration::from_millis(500);
    // The worker that claims the job never reports again.
    let crashed = Instant::now();
    engine.claim(1, lease).await;
    engine.work(1, LEASE);
    let (_, context) = engine.next_run().await;
    assert!(crashed.elapsed() >= lease);
    assert_eq!((context.spent.failures, context.spent.recoveries, context.attempt()), (0, 1, 2));
    engine.is_empty().await;
}

async fn crashes_have_a_budget_of_their_own(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    engine.enqueue("poison", Act::Done).await;
    for crashes in 0..3 {
        let claimed = engine.claim(1, LEASE).await;
        assert_eq!((claimed[0].spent.failures, claimed[0].spent.recoveries), (0, crashes));
        engine.backend.end_leases().await;
        assert_eq!(engine.rescue().await, 1);
    }
    engine.work(1, LEASE);
    let reason = soon("giving up", engine.gave_up.recv()).await.unwrap();
    assert_eq!(reason, "its worker crashed 3 times");
    engine.until(State::Dead, 1).await;
    assert!(engine.ran.try_recv().is_err(), "it is not run again");
}

async fn a_hung_job_is_freed(kind: Kind) {
    let mut engine = Engine::start_with(kind, 1, Duration::from_millis(800)).await;
    engine.enqueue("hung", Act::Hang).await;
    engine.next_run().await;
    let began = Instant::now();
    let (_, context) = engine.next_run().await;
    assert_eq!((context.spent.failures, context.spent.recoveries), (1, 0), "its timeout is a failure");
    assert!(began.elapsed() >= Duration::from_secs(2) - Duration::from_millis(50));
}

async fn a_checkpoint_is_kept_and_forgives_crashes(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    engine.enqueue("long", Act::Save).await;
    engine.claim(1, LEASE).await;
    engine.backend.end_leases().await;
    engine.rescue().await;
    let claimed = engine.claim_one().await;
    assert_eq!((claimed.spent.recoveries, claimed.checkpoint.as_deref()), (1, None));
    assert!(engine.queue.record(claimed.held(), "tests".into(), "7".to_owned()).await.unwrap());
    engine.backend.end_leases().await;
    engine.rescue().await;

    engine.work(1, LEASE);
    let (_, context) = engine.next_run().await;
    assert_eq!(context.spent.recoveries, 1, "counted anew since the checkpoint");
    assert_eq!(context.saved::<u32>().unwrap(), Some(7));
    engine.stop().await;
    // The job did not heed the drain, and ran into its timeout.
    let claimed = eventually("it waits again", || async { engine.claim(1, LEASE).await.pop() }).await;
    assert_eq!(claimed.checkpoint.as_deref(), Some("8"), "the next run goes on from there");
}

async fn who_lost_the_lease_finds_out_before_the_next_side_effect(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    engine.work_alone(1, Duration::from_millis(400));
    engine.enqueue("asleep", Act::Check).await;
    let (_, context) = engine.next_run().await;
    // Another process takes the job, as if this process had been stopped for longer than the lease.
    let rival = eventually("a rival has it", || async {
        engine.backend.end_leases().await;
        let lapsed = engine.queue.lapsed(1, "rival".to_owned(), Duration::from_secs(60)).await.unwrap();
        lapsed.jobs.into_iter().next()
    })
    .await;
    assert!(rival.epoch > context.epoch);
    soon("it is told", context.cancel.cancelled()).await;
    eventually("its lease lapses", || async { (context.check() == Err(Stopped::Lapsed)).then_some(()) })
        .await;
    assert!(context.save(&1).await.is_err());
    engine.tools.gate.add_permits(1);
    eventually("its slot is free", || async {
        engine.status.as_ref().unwrap().busy().is_empty().then_some(())
    })
    .await;
    assert_eq!(engine.count(State::Running).await, 1, "it settled nothing of the other's");
    assert!(engine.settle(&rival, Transition::Finished).await);
}

async fn a_drain_hands_back_what_does_not_finish(kind: Kind) {
    let mut engine = Engine::start_with(kind, 64, LEASE).await;
    let jobs = (0..64).map(|_| job("running", Act::Wait)).collect();
    engine.queue.enqueue(jobs).await.unwrap();
    for _ in 0..64 {
        engine.next_run().await;
    }
    engine.trigger.advance(Phase::Notice);
    engine.enqueue("new", Act::Done).await;
    // Half of the jobs are short.
    engine.tools.gate.add_permits(32);
    engine.until(State::Running, 32).await;
    assert_eq!(engine.count(State::Ready).await, 1, "nothing new is claimed");
    engine.stop().await;
    assert_eq!((engine.count(State::Running).await, engine.count(State::Ready).await), (0, 33));
    let ready = engine.jobs(State::Ready).await;
    assert!(ready.iter().all(|job| job.failures == 0 && job.recoveries == 0), "free of charge");
    engine.tools.gate.add_permits(32);
    engine.work(64, LEASE);
    for _ in 0..33 {
        engine.next_run().await;
    }
    engine.is_empty().await;
}

async fn jobs_of_another_version_are_left_alone(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    let unknown = NewJob { kind: "test.v2".into(), ..job("future", Act::Done) };
    engine.queue.enqueue(vec![unknown]).await.unwrap();
    engine.work(1, LEASE);
    engine.until(State::Scheduled, 1).await;
    engine.enqueue("mine", Act::Done).await;
    assert_eq!(engine.next_run().await.0, "mine");
}

async fn a_payload_that_cannot_be_read_is_dead_at_once(kind: Kind) {
    let engine = Engine::start(kind).await;
    let bad = NewJob { payload: "{}".to_owned(), ..job("bad", Act::Done) };
    let id = engine.queue.enqueue(vec![bad]).await.unwrap().remove(0);
    engine.until(State::Dead, 1).await;
    let shown = engine.queue.show(id).await.unwrap().unwrap();
    assert!(shown.reason.unwrap().contains("missing field `name`"));
    assert_eq!(shown.payload.unwrap().get(), "{}");
}

async fn delayed_jobs_wait_and_wake_by_themselves(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    let wait = Duration::from_millis(300);
    let began = Instant::now();
    engine.queue.enqueue(vec![job("later", Act::Done).due(Due::In(wait))]).await.unwrap();
    engine.until(State::Scheduled, 1).await;
    engine.next_run().await;
    assert!(began.elapsed() >= wait);
    let hour = jiff::Timestamp::now() + Duration::from_secs(3600);
    engine.queue.enqueue(vec![job("at", Act::Done).due(Due::At(hour))]).await.unwrap();
    let scheduled = engine.jobs(State::Scheduled).await.remove(0);
    let off = scheduled.run_at.unwrap().duration_since(hour).abs();
    assert!(off.as_secs() < 2, "{off:?}");
}

async fn a_paused_queue_waits(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    engine.queue.pause("tests".to_owned(), true).await.unwrap();
    assert_eq!(engine.queue.paused().await.unwrap(), ["tests"]);
    engine.enqueue("patient", Act::Done).await;
    // The wait is longer than the poll interval and than any wake-up.
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(engine.ran.try_recv().is_err());
    engine.queue.pause("tests".to_owned(), false).await.unwrap();
    assert_eq!(engine.next_run().await.0, "patient");
    assert!(engine.queue.paused().await.unwrap().is_empty());
}

async fn what_waits_and_what_runs_can_be_cancelled(kind: Kind) {
    let mut engine = Engine::start_with(kind, 1, Duration::from_millis(400)).await;
    let running = engine.enqueue("running", Act::Wait).await;
    let (_, context) = engine.next_run().await;
    let waiting = engine.enqueue("waiting", Act::Done).await;
    let queue = engine.queue.clone();
    let cancel = async |id| queue.cancel(id, "by the test".to_owned()).await.unwrap();
    assert_eq!(cancel(waiting).await, Cancelled::Now);
    assert_eq!(cancel(waiting).await, Cancelled::Never);
    assert_eq!(cancel(running).await, Cancelled::Soon);
    soon("it is told", context.cancel.cancelled()).await;
    engine.until(State::Cancelled, 2).await;
    for id in [running, waiting] {
        let shown = engine.queue.show(id).await.unwrap().unwrap();
        assert_eq!(shown.reason.as_deref(), Some("by the test"));
    }
    // A job whose worker died after the cancellation does not run again.
    engine.stop().await;
    let crashed = engine.enqueue("crashed", Act::Done).await;
    engine.claim(1, LEASE).await;
    assert_eq!(cancel(crashed).await, Cancelled::Soon);
    engine.backend.end_leases().await;
    engine.rescue().await;
    engine.until(State::Cancelled, 3).await;
    assert_eq!(engine.count(State::Ready).await, 0);
}

async fn dead_letters_are_kept_shown_retried_and_discarded(kind: Kind) {
    let mut engine = Engine::idle(kind).await;
    for (name, reason) in [("a", "timeout"), ("b", "bad address"), ("c", "timeout again")] {
        engine.queue.enqueue(vec![job(name, Act::Done).trace(name)]).await.unwrap();
        let claimed = engine.claim_one().await;
        assert!(engine.settle(&claimed, dead(reason)).await);
    }
    let all = engine.jobs(State::Dead).await;
    let ids: Vec<Uuid> = all.iter().map(|job| job.id).collect();
    assert!(ids.is_sorted() && ids.len() == 3);
    assert!(all[0].payload.is_none() && all[0].ended_at.is_some() && all[0].trace.as_deref() == Some("a"));
    let list = async |filter: JobFilter, cursor| engine.queue.list(filter, cursor, 2).await.unwrap();
    assert_eq!(list(filter(), Some(ids[0])).await.len(), 2);
    let timeouts = JobFilter { reason: Some("timeout".to_owned()), ..filter() };
    assert_eq!(list(timeouts.clone(), None).await.len(), 2);
    let others = JobFilter { kind: Some("other".to_owned()), ..filter() };
    assert_eq!(list(others.clone(), None).await.len(), 0);
    assert_eq!(engine.queue.ended().await.unwrap(), [("tests".to_owned(), 3)]);
    let shown = engine.queue.show(ids[0]).await.unwrap().unwrap();
    assert_eq!(shown.payload.unwrap().get(), r#"{"name":"a","act":"Done"}"#);

    assert_eq!(engine.queue.retry(others).await.unwrap(), 0);
    assert_eq!(engine.queue.retry(timeouts).await.unwrap(), 2);
    let one = JobFilter { id: Some(ids[1]), ..filter() };
    assert_eq!(engine.queue.discard(one).await.unwrap(), 1);
    assert!(engine.queue.show(ids[1]).await.unwrap().is_none());
    assert_eq!(engine.count(State::Dead).await, 0);
    engine.work(4, LEASE);
    for _ in 0..2 {
        let (name, context) = engine.next_run().await;
        let epoch = all.iter().find(|job| job.id == context.id).unwrap().epoch;
        assert!(context.epoch > epoch, "{name}: epochs rise on");
        assert_eq!(context.spent, Attempts::default());
    }
    engine.is_empty().await;
}

async fn what_ended_long_ago_is_forgotten(kind: Kind) {
    let engine = Engine::idle(kind).await;
    engine.enqueue("old", Act::Done).await;
    let claimed = engine.claim_one().await;
    assert!(engine.settle(&claimed, dead("as the test wants")).await);
    assert_eq!(engine.queue.prune(Duration::from_secs(3600)).await.unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(engine.queue.prune(Duration::ZERO).await.unwrap(), 1);
    engine.is_empty().await;
}

async fn what_comes_again_after_its_end_can_end_again(kind: Kind) {
    let engine = Engine::idle(kind).await;
    let again = job("again", Act::Done);
    for reason in ["first", "second"] {
        // The id is the same, as when an answer was lost and the caller repeats the call.
        engine.queue.enqueue(vec![again.clone()]).await.unwrap();
        let claimed = engine.claim_one().await;
        assert!(engine.settle(&claimed, dead(reason)).await);
        assert_eq!(engine.queue.show(again.id).await.unwrap().unwrap().reason.as_deref(), Some(reason));
    }
    engine.until(State::Dead, 1).await;
}

async fn a_queue_is_measured_and_a_full_one_refuses(kind: Kind) {
    let engine = Engine::idle(kind).await;
    let jobs = vec![job("ready", Act::Done), job("later", Act::Done).due(Due::In(Duration::from_secs(60)))];
    let bytes: usize = jobs.iter().map(|job| job.payload.len()).sum();
    engine.queue.enqueue(jobs).await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let depth = engine.queue.measure("tests".into()).await.unwrap();
    assert_eq!((depth.ready, depth.scheduled, depth.running, depth.bytes), (1, 1, 0, bytes as u64));
    assert!(depth.oldest_ms >= 15 && depth.oldest_ms < 30_000, "{depth:?}");
    engine.claim(1, LEASE).await;
    let depth = engine.queue.measure("tests".into()).await.unwrap();
    assert_eq!((depth.ready, depth.scheduled, depth.running), (0, 1, 1));

    let jobs = engine.jobs_handle(Bounds { jobs: 2, bytes: 1 << 20 });
    jobs.enqueue_all(vec![job("1", Act::Done), job("2", Act::Done)]).await.unwrap();
    let refused = jobs.enqueue(job("3", Act::Done)).await;
    assert!(matches!(refused, Err(Error::Full { queue }) if queue == "tests"));
}

async fn progress_is_written_down(kind: Kind) {
    let mut engine = Engine::start_with(kind, 1, Duration::from_millis(400)).await;
    let id = engine.enqueue("long", Act::Save).await;
    engine.next_run().await;
    let progress =
        eventually("progress", || async { engine.queue.show(id).await.unwrap().unwrap().progress }).await;
    assert_eq!((progress.done, progress.total), (1, 10));
    let shown = engine.queue.show(id).await.unwrap().unwrap();
    assert_eq!((shown.state, shown.worker.as_deref()), (State::Running, Some("test")));
    engine.tools.gate.add_permits(1);
    engine.is_empty().await;
}

async fn a_worker_finds_what_nobody_woke_it_for(kind: Kind) {
    let mut engine = Engine::start(kind).await;
    // The other handle is like another process: its wake-ups do not reach this one.
    let other = engine.backend.queue().await;
    other.enqueue(vec![job("quiet", Act::Done)]).await.unwrap();
    assert_eq!(engine.next_run().await.0, "quiet");
}

async fn a_clock_that_jumps_loses_nothing(kind: Kind) {
    let hour = 3600;
    for jump in [hour, -hour] {
        let mut engine = Engine::idle(kind).await;
        engine.enqueue("running", Act::Done).await;
        let claimed = engine.claim_one().await;
        engine
            .queue
            .enqueue(vec![job("soon", Act::Done).due(Due::In(Duration::from_secs(2)))])
            .await
            .unwrap();
        engine.backend.jump(jump).await;
        engine.work(4, Duration::from_millis(800));
        let mut ran = BTreeMap::new();
        while ran.len() < 2 {
            let (name, context) = engine.next_run().await;
            ran.insert(name, context);
        }
        assert!(ran["running"].epoch > claimed.epoch, "{jump}");
        assert!(!engine.settle(&claimed, Transition::Finished).await, "{jump}");
        engine.is_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_memory_that_is_nearly_used_up_no_more_is_taken() {
    let mut engine = Engine::idle(Kind::Sqlite).await;
    let cgroup = tempfile::TempDir::new().unwrap();
    let write = |file: &str, text: &str| std::fs::write(cgroup.path().join(file), text).unwrap();
    write("memory.max", "1000000");
    write("memory.stat", "file 0\nshmem 0");
    write("memory.current", "950000");
    let watch = engine.pressure.clone().watch(Cgroup::at(cgroup.path()), 90, engine.trigger.listen());
    engine.tasks.critical("memory", watch);
    eventually("it is noticed", || async { engine.pressure.is_high().then_some(()) }).await;
    for name in ["one", "two", "three"] {
        engine.queue.enqueue(vec![job(name, Act::Wait)]).await.unwrap();
    }
    engine.work(4, LEASE);
    engine.next_run().await;
    // The worker has free slots, and looks for jobs several times.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(engine.status.as_ref().unwrap().busy().len(), 1, "one at a time");
    write("memory.current", "100000");
    engine.next_run().await;
    engine.next_run().await;
    engine.tools.gate.add_permits(3);
    engine.is_empty().await;
}

#[tokio::test]
async fn a_lease_that_cannot_be_kept_is_refused_at_boot() {
    let engine = Engine::idle(Kind::Sqlite).await;
    let config = Config { renew_every: Duration::from_secs(6), ..config(Duration::from_secs(15)) };
    let refused = Worker::new(engine.queue.clone(), Arc::new(Registry::new()), config);
    assert!(matches!(refused, Err(LeaseTooShort)));
}
