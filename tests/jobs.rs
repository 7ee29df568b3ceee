//! Jobs: at least once, fenced by epochs, on short renewed leases.

use std::sync::Arc;
use std::time::Duration;

use perennial_server::backoff::Backoff;
use perennial_server::drain::{self, Phase, Trigger};
use perennial_server::pool::sqlite::{self, Sqlite};
use perennial_server::tasks::Tasks;
use perennial_workers::job::Stopped;
use perennial_workers::queue::{Claim, Held};
use perennial_workers::state::{Budget, Spent, State, Transition};
use perennial_workers::store::sqlite::{MIGRATIONS, SqliteQueue, count, insert_jobs};
use perennial_workers::worker::{Config, LeaseTooShort, Status};
use perennial_workers::{Context, Fate, Job, NewJob, Options, Queue, Registry, Worker, rescue};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};

use support::{eventually, soon};

/// What a job does, as the test says.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Act {
    Done,
    Fail,
    Panic,
    /// Longer than it may.
    Hang,
    Snooze,
    /// Waits for a permit of [`Tools::gate`], or for being told to stop.
    Wait,
    /// Works on without asking, and then asks whether it still may.
    Check,
}

#[derive(Clone, Debug)]
struct Tools {
    ran: mpsc::UnboundedSender<(String, Context)>,
    gave_up: mpsc::UnboundedSender<String>,
    gate: Arc<Semaphore>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Test {
    name: String,
    act: Act,
}

impl Job for Test {
    const KIND: &'static str = "test";
    type Tools = Tools;

    fn options() -> Options {
        Options {
            queue: "tests",
            timeout: Duration::from_secs(2),
            budget: Budget {
                failures: 3,
                recoveries: 3,
                backoff: Backoff::new(Duration::from_millis(20), Duration::from_millis(50)),
            },
            ..Options::default()
        }
    }

    async fn run(&self, context: Context, tools: Tools) -> anyhow::Result<Fate> {
        tools.ran.send((self.name.clone(), context.clone())).unwrap();
        match self.act {
            Act::Fail => anyhow::bail!("as the test wants"),
            Act::Panic => panic!("as the test wants"),
            Act::Hang => std::future::pending().await,
            Act::Snooze if context.epoch == 1 => Ok(Fate::Snooze(Duration::from_millis(50))),
            Act::Done | Act::Snooze => Ok(Fate::Done),
            Act::Wait => tokio::select! {
                permit = tools.gate.acquire() => {
                    permit.unwrap().forget();
                    Ok(Fate::Done)
                }
                () = context.cancel.cancelled() => Err(Stopped::Cancelled.into()),
            },
            Act::Check => {
                tools.gate.acquire().await.unwrap().forget();
                context.check()?;
                Ok(Fate::Done)
            }
        }
    }

    async fn give_up(&self, _context: Context, tools: Tools, reason: String) -> anyhow::Result<()> {
        tools.gave_up.send(reason).unwrap();
        Ok(())
    }
}

/// An engine on a store of its own.
struct Engine {
    store: Sqlite,
    queue: SqliteQueue,
    ran: mpsc::UnboundedReceiver<(String, Context)>,
    gave_up: mpsc::UnboundedReceiver<String>,
    tools: Tools,
    trigger: Trigger,
    tasks: Tasks,
    status: Option<Status>,
    _directory: TempDir,
}

fn config(lease: Duration) -> Config {
    Config { name: "test".to_owned(), lease, renew_every: lease / 4, poll: Duration::from_millis(200) }
}

impl Engine {
    /// With no worker yet.
    async fn idle() -> Self {
        let directory = TempDir::new().unwrap();
        let store = Sqlite::open(sqlite::Config {
            path: directory.path().join("jobs.db"),
            readers: 2,
            write_queue: 1000,
            wait: Duration::from_secs(5),
            commit_wait: Duration::from_secs(5),
        })
        .await
        .unwrap();
        store.migrate(&[MIGRATIONS]).await.unwrap();
        let (ran, ran_receiver) = mpsc::unbounded_channel();
        let (gave_up, gave_up_receiver) = mpsc::unbounded_channel();
        let (trigger, drain) = drain::channel();
        Self {
            queue: SqliteQueue::new(store.clone()),
            store,
            ran: ran_receiver,
            gave_up: gave_up_receiver,
            tools: Tools { ran, gave_up, gate: Arc::new(Semaphore::new(0)) },
            tasks: Tasks::new(drain),
            trigger,
            status: None,
            _directory: directory,
        }
    }

    /// For a worker after the drain of the last one.
    fn again(mut self) -> Self {
        let (trigger, drain) = drain::channel();
        self.tasks = Tasks::new(drain);
        self.trigger = trigger;
        self
    }

    async fn start() -> Self {
        Self::start_with(4, Duration::from_secs(4)).await
    }

    async fn start_with(slots: usize, lease: Duration) -> Self {
        let mut engine = Self::idle().await;
        engine.work(slots, lease);
        engine
    }

    fn work(&mut self, slots: usize, lease: Duration) {
        let mut registry = Registry::new();
        registry.register::<Test>(self.tools.clone());
        registry.serve("tests", slots);
        let registry = Arc::new(registry);
        let worker = Worker::new(self.queue.clone(), Arc::clone(&registry), config(lease)).unwrap();
        self.status = Some(worker.status());
        self.tasks.critical("worker", worker.run(self.trigger.listen()));
        let drain = self.trigger.listen();
        self.tasks
            .critical("rescue", rescue::run(self.queue.clone(), registry, Duration::from_millis(100), drain));
    }

    async fn enqueue(&self, name: &str, act: Act) {
        self.queue.enqueue(vec![job(name, act)]).await.unwrap();
    }

    async fn next_run(&mut self) -> (String, Context) {
        soon("a run", self.ran.recv()).await.unwrap()
    }

    async fn count(&self, state: State) -> usize {
        self.store.read(move |tx| count(tx, "tests", state)).await.unwrap()
    }

    async fn until(&self, state: State, wanted: usize) {
        eventually(&format!("{wanted} jobs {state:?}"), || async {
            (self.count(state).await == wanted).then_some(())
        })
        .await;
    }

    async fn is_empty(&self) {
        for state in [State::Running, State::Ready, State::Scheduled, State::Dead] {
            self.until(state, 0).await;
        }
    }

    async fn claim(&self, limit: usize, lease: Duration) -> Vec<perennial_workers::queue::Claimed> {
        let claim = Claim { queue: "tests", limit, worker: "by hand".to_owned(), lease };
        self.queue.claim(claim).await.unwrap().jobs
    }
}

fn job(name: &str, act: Act) -> NewJob {
    NewJob::new(&Test { name: name.to_owned(), act }).unwrap()
}

#[tokio::test]
async fn a_job_runs_and_is_gone() {
    let mut engine = Engine::start().await;
    engine.enqueue("one", Act::Done).await;
    let (name, context) = engine.next_run().await;
    assert_eq!((name.as_str(), context.epoch, context.spent), ("one", 1, Spent::default()));
    engine.is_empty().await;
}

#[tokio::test]
async fn failures_panics_and_timeouts_are_tried_again_and_then_given_up() {
    for (act, reason) in [
        (Act::Fail, "as the test wants"),
        (Act::Panic, "panic: as the test wants"),
        (Act::Hang, "not done within 2s"),
    ] {
        let mut engine = Engine::start().await;
        engine.enqueue("bad", act).await;
        for failures in 0..3 {
            let (_, context) = engine.next_run().await;
            assert_eq!((context.spent.failures, context.epoch), (failures, i64::from(failures) + 1));
        }
        assert_eq!(soon("giving up", engine.gave_up.recv()).await.unwrap(), reason);
        engine.until(State::Dead, 1).await;
        engine.enqueue("good", Act::Done).await;
        assert_eq!(engine.next_run().await.0, "good", "the worker goes on");
    }
}

#[tokio::test]
async fn snoozing_costs_nothing() {
    let mut engine = Engine::start().await;
    engine.enqueue("later", Act::Snooze).await;
    engine.next_run().await;
    let (_, context) = engine.next_run().await;
    assert_eq!((context.epoch, context.spent), (2, Spent::default()));
    engine.is_empty().await;
}

#[tokio::test]
async fn only_free_slots_are_filled_and_lower_priorities_go_first() {
    let mut engine = Engine::idle().await;
    for (name, priority) in [("late", 9), ("soon", 5), ("first", 0)] {
        engine.queue.enqueue(vec![job(name, Act::Wait).priority(priority)]).await.unwrap();
    }
    engine.work(2, Duration::from_secs(4));
    let mut names = [engine.next_run().await.0, engine.next_run().await.0];
    names.sort();
    assert_eq!(names, ["first", "soon"]);
    assert_eq!(engine.status.as_ref().unwrap().busy().len(), 2);
    assert_eq!((engine.count(State::Running).await, engine.count(State::Ready).await), (2, 1));
    engine.tools.gate.add_permits(3);
    assert_eq!(engine.next_run().await.0, "late");
    engine.is_empty().await;
}

#[tokio::test]
async fn a_job_exists_if_and_only_if_the_transaction_does() {
    let mut engine = Engine::start().await;
    let kept = job("kept", Act::Done);
    let lost = job("lost", Act::Done);
    let failed = engine
        .store
        .write(move |tx| insert_jobs(tx, &[lost]).and_then(|()| Err::<(), _>(rusqlite::Error::InvalidQuery)))
        .await;
    assert!(failed.is_err());
    engine.store.write(move |tx| insert_jobs(tx, &[kept.clone(), kept])).await.unwrap();
    engine.queue.wake();
    assert_eq!(engine.next_run().await.0, "kept");
    engine.is_empty().await;
    assert!(engine.ran.try_recv().is_err(), "neither the lost one nor the same one twice");
}

#[tokio::test]
async fn a_lease_is_renewed_for_as_long_as_the_job_runs() {
    let lease = Duration::from_millis(400);
    let mut engine = Engine::start_with(1, lease).await;
    engine.enqueue("long", Act::Wait).await;
    let (_, context) = engine.next_run().await;
    tokio::time::sleep(lease * 3).await;
    assert_eq!(context.check(), Ok(()), "three leases later it is still held");
    engine.tools.gate.add_permits(1);
    engine.is_empty().await;
    assert!(engine.ran.try_recv().is_err(), "it ran once");
}

#[tokio::test]
async fn a_stale_claim_settles_and_renews_nothing() {
    let engine = Engine::idle().await;
    engine.enqueue("contested", Act::Done).await;
    let first = engine.claim(1, Duration::from_millis(1)).await.remove(0);
    tokio::time::sleep(Duration::from_millis(20)).await;
    let registry = Arc::new(Registry::new());
    assert_eq!(engine.queue.rescue(Arc::clone(&registry)).await.unwrap(), 1);
    let second = engine.claim(1, Duration::from_secs(60)).await.remove(0);
    assert_eq!((first.epoch, second.epoch, second.spent.recoveries), (1, 2, 1));

    let held = |epoch| Held { id: first.id, epoch };
    let renewed = engine.queue.renew(vec![held(1), held(2)], Duration::from_secs(60)).await.unwrap();
    assert_eq!(renewed, [held(2)]);
    for stale in [Transition::Finished, Transition::Dead { reason: String::new(), spent: Spent::default() }] {
        assert!(!engine.queue.settle(held(1), stale).await.unwrap());
    }
    assert_eq!(engine.count(State::Running).await, 1, "nothing has changed");
    assert_eq!(engine.queue.rescue(registry).await.unwrap(), 0, "the lease of the second is held");
    assert!(engine.queue.settle(held(2), Transition::Finished).await.unwrap());
    assert!(!engine.queue.settle(held(2), Transition::Finished).await.unwrap(), "once");
    engine.is_empty().await;
}

#[tokio::test]
async fn a_crash_is_noticed_within_two_leases_and_has_its_own_budget() {
    let mut engine = Engine::idle().await;
    engine.enqueue("survivor", Act::Done).await;
    let lease = Duration::from_millis(500);
    // Claimed by a worker that is never heard of again.
    engine.claim(1, lease).await;
    let crashed = std::time::Instant::now();
    engine.work(1, Duration::from_secs(4));
    let (_, context) = engine.next_run().await;
    assert!(crashed.elapsed() >= lease);
    assert_eq!(context.spent, Spent { failures: 0, recoveries: 1 });
    engine.is_empty().await;

    // One that kills its worker every time is given up.
    engine.trigger.advance(Phase::Soft);
    soon("the worker ends", engine.tasks.ended()).await;
    engine.enqueue("poison", Act::Done).await;
    for _ in 0..3 {
        engine.claim(1, Duration::from_millis(1)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        let mut registry = Registry::new();
        registry.register::<Test>(engine.tools.clone());
        engine.queue.rescue(Arc::new(registry)).await.unwrap();
    }
    let mut engine = engine.again();
    engine.work(1, Duration::from_secs(4));
    let reason = soon("giving up", engine.gave_up.recv()).await.unwrap();
    assert_eq!(reason, "its worker crashed 3 times");
    engine.until(State::Dead, 1).await;
    assert!(engine.ran.try_recv().is_err(), "it is not run again");
}

#[tokio::test]
async fn who_lost_the_lease_finds_out_before_the_next_side_effect() {
    let mut engine = Engine::start_with(1, Duration::from_millis(400)).await;
    engine.enqueue("asleep", Act::Check).await;
    let (_, context) = engine.next_run().await;
    // Another process takes it: a stop of ours that was longer than the lease looks like this.
    let id = context.id.as_bytes().to_vec();
    let taken = "UPDATE jobs SET epoch = epoch + 1, lease_until = lease_until + 60000 WHERE id = ?";
    engine.store.write(move |tx| tx.execute(taken, [id])).await.unwrap();
    soon("it is told", context.cancel.cancelled()).await;
    eventually("its lease lapses", || async { (context.check() == Err(Stopped::Lapsed)).then_some(()) })
        .await;
    engine.tools.gate.add_permits(1);
    eventually("its slot is free", || async {
        engine.status.as_ref().unwrap().busy().is_empty().then_some(())
    })
    .await;
    assert_eq!(engine.count(State::Running).await, 1, "it settled nothing of the other's");
}

#[tokio::test]
async fn a_drain_hands_back_what_does_not_finish() {
    let mut engine = Engine::start().await;
    engine.enqueue("short", Act::Wait).await;
    engine.enqueue("long", Act::Wait).await;
    engine.next_run().await;
    engine.next_run().await;
    engine.trigger.advance(Phase::Notice);
    engine.enqueue("new", Act::Done).await;
    engine.tools.gate.add_permits(1);
    engine.until(State::Running, 1).await;
    assert_eq!(engine.count(State::Ready).await, 1, "nothing new is claimed");
    engine.trigger.advance(Phase::Hard);
    soon("the worker ends", engine.tasks.ended()).await;
    assert_eq!((engine.count(State::Running).await, engine.count(State::Ready).await), (0, 2));
    let again = engine.claim(9, Duration::from_secs(1)).await;
    assert!(again.iter().all(|job| job.spent == Spent::default()), "free of charge: {again:?}");
}

#[tokio::test]
async fn jobs_of_another_version_are_left_alone() {
    let engine = Engine::idle().await;
    let unknown = NewJob { kind: "test.v2", ..job("future", Act::Done) };
    engine.queue.enqueue(vec![unknown]).await.unwrap();
    let mut engine = engine;
    engine.work(1, Duration::from_secs(4));
    engine.until(State::Scheduled, 1).await;
    engine.enqueue("mine", Act::Done).await;
    assert_eq!(engine.next_run().await.0, "mine");
}

#[tokio::test]
async fn a_payload_that_cannot_be_read_is_dead_at_once() {
    let engine = Engine::start().await;
    let bad = NewJob { payload: "{}".to_owned(), ..job("bad", Act::Done) };
    engine.queue.enqueue(vec![bad]).await.unwrap();
    engine.until(State::Dead, 1).await;
}

#[tokio::test]
async fn delayed_jobs_wait_and_wake_by_themselves() {
    let mut engine = Engine::start().await;
    let wait = Duration::from_millis(300);
    let due = std::time::SystemTime::now() + wait;
    let later = job("later", Act::Done).at(due.try_into().unwrap());
    engine.queue.enqueue(vec![later]).await.unwrap();
    engine.until(State::Scheduled, 1).await;
    engine.next_run().await;
    assert!(std::time::SystemTime::now() >= due);
}

#[tokio::test]
async fn a_lease_that_cannot_be_kept_is_refused_at_boot() {
    let engine = Engine::idle().await;
    let config = Config { renew_every: Duration::from_secs(6), ..config(Duration::from_secs(15)) };
    let refused = Worker::new(engine.queue.clone(), Arc::new(Registry::new()), config);
    assert!(matches!(refused, Err(LeaseTooShort)));
}
