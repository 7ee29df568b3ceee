//! A worker that is a process of its own, to be killed. It runs jobs of the kind `grind` from the given store, and
//! writes a line to a file when a run begins (`S`) and when it ends (`E`): the number of the job, the epoch, and
//! the time in milliseconds.
//!
//! Usage: `mill STORE FILE`, where STORE is a name that [`support::backend::open`] takes.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use perennial_runtime::backoff::Backoff;
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::signal::{ProcessSignal, Signals};
use perennial_runtime::tasks::Tasks;
use perennial_workers::admission::{Admission, Bounds};
use perennial_workers::state::Budget;
use perennial_workers::store::JobStore;
use perennial_workers::worker::Config;
use perennial_workers::{Context, Job, JobOutcome, Options, Queue, Registry, Worker, upkeep};
use serde::{Deserialize, Serialize};

/// A job that takes a moment and is written down.
#[derive(Serialize, Deserialize)]
struct Grind {
    number: u32,
}

impl Job for Grind {
    const KIND: &'static str = "grind";
    type Tools = Arc<File>;

    fn options() -> Options {
        // The job causes no failure here, so the budget is never used up.
        let backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        let budget = Budget { failures: 1000, recoveries: 1000, window: Duration::from_secs(3600), backoff };
        Options { queue: "chaos", timeout: Duration::from_secs(30), budget, ..Options::default() }
    }

    async fn run(&self, context: Context, mut log: Arc<File>) -> anyhow::Result<JobOutcome> {
        context.check()?;
        let mut note = |word: char| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
            log.write_all(format!("{word} {} {} {now}\n", self.number, context.epoch).as_bytes())
        };
        note('S')?;
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..50_000))).await;
        // The end is not written when the lease may be lost, since another worker may then have the job.
        context.check()?;
        note('E')?;
        Ok(JobOutcome::Done)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let (store, file) = (arguments.next().unwrap(), arguments.next().unwrap());
    let log = Arc::new(OpenOptions::new().create(true).append(true).open(file).unwrap());
    let queue = support::backend::open(&store).await;
    if let JobStore::Sqlite(queue) = &queue {
        queue.end_leases().await.unwrap();
    }
    let mut registry = Registry::new();
    registry.register::<Grind>(log);
    registry.serve("chaos", 32);
    let registry = Arc::new(registry);
    let lease = Duration::from_secs(3);
    let config = Config {
        name: std::process::id().to_string(),
        lease,
        renew_every: lease / 3,
        poll: Duration::from_millis(500),
        payload_bytes: 64 << 20,
        pressure: perennial_runtime::cgroup::Pressure::default(),
    };
    let (trigger, drain) = drain::channel();
    let tasks = Tasks::new(drain.clone());
    let worker = Worker::new(queue.clone(), Arc::clone(&registry), config).unwrap();
    tasks.critical("worker", worker.run(drain.clone()));
    let upkeep = upkeep::Config { rescue_every: Duration::from_millis(500), lease };
    let admission = Admission::new(Bounds { jobs: 1 << 30, bytes: 1 << 30 });
    tasks.critical("upkeep", upkeep::run(queue.clone(), registry, admission, upkeep, drain.clone()));
    tasks.contained("wake-ups", move || {
        let (queue, drain) = (queue.clone(), drain.clone());
        async move { queue.listen(drain).await }
    });
    let mut signals = Signals::install().unwrap();
    println!("ready");
    while !matches!(signals.next().await, ProcessSignal::Terminate | ProcessSignal::Interrupt) {}
    trigger.advance(Phase::Hard);
    tasks.ended().await;
}
