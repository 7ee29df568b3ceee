//! Cost of jobs on each store, beside apalis 1.0 in the same run, and the figures that must not get worse with many
//! jobs: claims, the wait of a job that comes when all workers are idle, and memory.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]
#![allow(clippy::cast_precision_loss, reason = "counts are small")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use perennial_runtime::cgroup::Pressure;
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::tasks::Tasks;
use perennial_workers::queue::{Claim, Due, NewJob, Settlement};
use perennial_workers::state::Transition;
use perennial_workers::store::JobStore;
use perennial_workers::worker::Config;
use perennial_workers::{Context, Job, JobOutcome, Options, Queue, Registry, Worker};
use serde::{Deserialize, Serialize};
use support::figures::{line, median};
use support::process::memory_kib;
use support::{backend, postgres, redis};
use tempfile::TempDir;
use tokio::sync::mpsc;
use uuid::Uuid;

const ROUNDS: usize = 3;
const COUNT: usize = 50_000;
/// Number of jobs that run at once, and that a peer fetches at once.
const SLOTS: usize = 500;

static RUN: AtomicUsize = AtomicUsize::new(0);

/// A job that does nothing.
#[derive(Serialize, Deserialize)]
struct Noop(u32);

impl Job for Noop {
    const KIND: &'static str = "noop";
    type Tools = ();

    fn options() -> Options {
        Options { queue: "bench", ..Options::default() }
    }

    async fn run(&self, _context: Context, _tools: ()) -> anyhow::Result<JobOutcome> {
        RUN.fetch_add(1, Ordering::Relaxed);
        Ok(JobOutcome::Done)
    }
}

/// A job that reports the time of its start.
#[derive(Serialize, Deserialize)]
struct Ping;

impl Job for Ping {
    const KIND: &'static str = "ping";
    type Tools = mpsc::UnboundedSender<Instant>;

    fn options() -> Options {
        Options { queue: "bench", ..Options::default() }
    }

    async fn run(&self, _context: Context, began: Self::Tools) -> anyhow::Result<JobOutcome> {
        began.send(Instant::now())?;
        Ok(JobOutcome::Done)
    }
}

fn main() {
    // The figures are printed only by `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // `JOBS_BENCH=claims,memory` chooses tables.
    let only = std::env::var("JOBS_BENCH").unwrap_or_default();
    let wanted = |table: &str| only.is_empty() || only.split(',').any(|name| name == table);
    runtime.block_on(async {
        if wanted("speed") {
            Box::pin(speed()).await;
        }
        if wanted("latency") {
            Box::pin(latency()).await;
        }
        if wanted("claims") {
            Box::pin(claims()).await;
        }
        if wanted("memory") {
            Box::pin(memory()).await;
        }
    });
}

/// The servers of the bench: Postgres with its durable defaults, Redis without persistence.
struct Servers {
    directory: TempDir,
    postgres: postgres::Server,
    redis: redis::Server,
    files: AtomicUsize,
}

impl Servers {
    async fn start() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
            postgres: postgres::Server::start(&["shared_buffers=256MB", "max_wal_size=4GB"]).await,
            redis: redis::Server::start(&[]).await,
            files: AtomicUsize::new(0),
        }
    }

    /// Name of an empty store.
    async fn fresh(&self, kind: &str) -> String {
        match kind {
            "sqlite" => {
                let number = self.files.fetch_add(1, Ordering::Relaxed);
                format!("sqlite:{}", self.directory.path().join(format!("{number}.db")).display())
            }
            "postgres" => self.postgres.create().await,
            _ => {
                Command::new("redis-cli").args(["-u", &self.redis.url(), "FLUSHALL"]).output().unwrap();
                self.redis.url()
            }
        }
    }
}

fn registry(began: Option<mpsc::UnboundedSender<Instant>>) -> Arc<Registry> {
    let mut registry = Registry::new();
    registry.register::<Noop>(());
    if let Some(began) = began {
        registry.register::<Ping>(began);
    }
    registry.serve("bench", SLOTS);
    Arc::new(registry)
}

/// A running worker.
struct Working {
    trigger: drain::Trigger,
    tasks: Tasks,
}

impl Working {
    fn begin(queue: &JobStore, registry: Arc<Registry>) -> Self {
        let (trigger, drain) = drain::channel();
        let tasks = Tasks::new(drain.clone());
        let config = Config {
            name: "bench".to_owned(),
            lease: Duration::from_secs(15),
            renew_every: Duration::from_secs(5),
            poll: Duration::from_secs(1),
            payload_bytes: 128 << 20,
            pressure: Pressure::default(),
        };
        let worker = Worker::new(queue.clone(), registry, config).unwrap();
        tasks.critical("worker", worker.run(drain.clone()));
        let queue = queue.clone();
        tasks.contained("wake-ups", move || {
            let (queue, drain) = (queue.clone(), drain.clone());
            async move { queue.listen(drain).await }
        });
        Self { trigger, tasks }
    }

    async fn end(self) {
        self.trigger.advance(Phase::Hard);
        self.tasks.ended().await;
    }
}

async fn enqueue(queue: &JobStore, count: usize) -> Duration {
    let began = Instant::now();
    for from in (0..count).step_by(SLOTS) {
        let some = from..(from + SLOTS).min(count);
        let jobs = some.map(|number| NewJob::new(&Noop(u32::try_from(number).unwrap())).unwrap()).collect();
        queue.enqueue(jobs).await.unwrap();
    }
    began.elapsed()
}

async fn ran(count: usize) {
    while RUN.load(Ordering::Relaxed) < count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Jobs enqueued a second, and jobs run a second.
async fn ours(store: &str, count: usize) -> (f64, f64) {
    let queue = backend::open(store).await;
    let enqueued = enqueue(&queue, count).await;
    RUN.store(0, Ordering::Relaxed);
    let began = Instant::now();
    let working = Working::begin(&queue, registry(None));
    ran(count).await;
    // The last jobs are settled only when the worker has ended.
    working.end().await;
    (count as f64 / enqueued.as_secs_f64(), count as f64 / began.elapsed().as_secs_f64())
}

fn theirs(kind: &str, store: &str, batch: usize) -> Option<(f64, f64)> {
    // The SQLite store of apalis runs fewer than a thousand jobs a second.
    let count = if kind == "sqlite" { COUNT / 25 } else { COUNT };
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/peers/target/release/perennial-peers");
    let output =
        Command::new(program).args([kind, store, &count.to_string(), &batch.to_string()]).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    let Some((enqueued, drained)) = text.trim().split_once(' ') else {
        println!(
            "  apalis on {kind}: {}",
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default()
        );
        return None;
    };
    Some((enqueued.parse().unwrap(), drained.parse().unwrap()))
}

async fn speed() {
    println!(
        "\nNo-op jobs a second, one process, {COUNT} deep (500,000 where it says so); median of {ROUNDS} (range)"
    );
    println!(
        "SQLite: synchronous=FULL. Postgres: durable defaults. Redis: no persistence; apalis in slices of 7,000,"
    );
    println!(
        "since its Redis store stops for good at 8,000 waiting jobs, and on SQLite with 2,000, since it takes its time."
    );
    let servers = Servers::start().await;
    for kind in ["sqlite", "postgres", "redis"] {
        let mut figures = std::collections::BTreeMap::<String, (Vec<f64>, Vec<f64>)>::new();
        let mut note = |who: String, (enqueued, drained): (f64, f64)| {
            let figures = figures.entry(who).or_default();
            figures.0.push(enqueued);
            figures.1.push(drained);
        };
        for _ in 0..ROUNDS {
            note("perennial".to_owned(), ours(&servers.fresh(kind).await, COUNT).await);
            for batch in [100, 500] {
                let store = servers.fresh(kind).await;
                let figures = tokio::task::block_in_place(|| theirs(kind, &store, batch));
                if let Some(figures) = figures {
                    note(format!("apalis, batch {batch}"), figures);
                }
            }
        }
        note("perennial, 500,000 deep".to_owned(), ours(&servers.fresh(kind).await, 10 * COUNT).await);
        for (who, (enqueued, drained)) in figures {
            line(&format!("{kind}: {who}, enqueued"), enqueued, "/s");
            line(&format!("{kind}: {who}, run"), drained, "/s");
        }
    }
}

/// Time from enqueueing a job to its start, while nothing else runs.
async fn latency() {
    println!("\nFrom enqueueing to start, when idle, 300 jobs one by one");
    let servers = Servers::start().await;
    for kind in ["sqlite", "postgres", "redis"] {
        let store = servers.fresh(kind).await;
        let (began, mut begun) = mpsc::unbounded_channel();
        let queue = backend::open(&store).await;
        // As far as a server can tell, another process has enqueued the jobs; a SQLite file belongs to one process.
        let workers = if kind == "sqlite" { queue.clone() } else { backend::open(&store).await };
        let working = Working::begin(&workers, registry(Some(began)));
        let announcing = (queue.clone(), working.trigger.listen());
        working.tasks.contained("announcements", move || {
            let (queue, drain) = announcing.clone();
            async move { queue.listen(drain).await }
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut waits = Vec::new();
        for _ in 0..300 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let asked = Instant::now();
            queue.enqueue(vec![NewJob::new(&Ping).unwrap()]).await.unwrap();
            waits.push((begun.recv().await.unwrap() - asked).as_secs_f64() * 1000.0);
        }
        working.end().await;
        waits.sort_by(f64::total_cmp);
        println!("{kind:<10} p50 {:.2} ms, p99 {:.2} ms", waits[150], waits[297]);
    }
}

/// Claims of a hundred jobs, with few and with many waiting, and while another transaction holds an old snapshot.
async fn claims() {
    println!("\nPostgres: jobs claimed and settled a second, by the hundred");
    let servers = Servers::start().await;
    for (what, waiting, snapshot) in [
        ("5,000 waiting", 5_000, false),
        ("500,000 waiting", 500_000, false),
        ("500,000 waiting, an old snapshot held for a minute", 500_000, true),
    ] {
        let store = servers.fresh("postgres").await;
        let queue = backend::open(&store).await;
        enqueue(&queue, waiting).await;
        let mut old = postgres::connect(&store).await.get().await.unwrap();
        let held = if snapshot {
            let transaction = old.begin().await.unwrap();
            transaction
                .batch("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM jobs")
                .await
                .unwrap();
            Some(transaction)
        } else {
            None
        };
        let seconds = if snapshot { 60 } else { 10 };
        let (mut rates, mut began, mut claimed) = (Vec::new(), Instant::now(), 0);
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            let claim = Claim {
                queue: "bench".into(),
                limit: 100,
                worker: "bench".to_owned(),
                lease: Duration::from_secs(60),
            };
            let jobs = queue.claim(claim).await.unwrap().jobs;
            claimed += jobs.len();
            let few = jobs.len();
            let settlements =
                jobs.into_iter().map(|job| Settlement::of(Arc::new(job), Transition::Finished)).collect();
            queue.settle(settlements).await.unwrap();
            // As many jobs are enqueued as were settled.
            let new = (0..few).map(|_| NewJob {
                due: Due::Now,
                id: Uuid::now_v7(),
                ..NewJob::new(&Noop(0)).unwrap()
            });
            queue.enqueue(new.collect()).await.unwrap();
            if began.elapsed() >= Duration::from_secs(2) {
                rates.push(claimed as f64 / began.elapsed().as_secs_f64());
                (began, claimed) = (Instant::now(), 0);
            }
        }
        println!(
            "{what:<55} {:>10.0} /s, the slowest two seconds {:.0} /s",
            median(&rates),
            rates.iter().copied().fold(f64::MAX, f64::min)
        );
        drop(held);
    }
}

/// Resident memory of this process while a million jobs pass.
async fn memory() {
    println!("\nMemory of the process while 1,000,000 jobs pass (SQLite), MiB resident after each 200,000");
    let servers = Servers::start().await;
    let store = servers.fresh("sqlite").await;
    let queue = backend::open(&store).await;
    RUN.store(0, Ordering::Relaxed);
    let working = Working::begin(&queue, registry(None));
    let mut resident = Vec::new();
    for round in 1..=5 {
        for _ in 0..10 {
            enqueue(&queue, 20_000).await;
        }
        ran(round * 200_000).await;
        resident.push(memory_kib(std::process::id(), "VmRSS").unwrap() / 1024.0);
    }
    working.end().await;
    println!("{}", resident.iter().map(|mib| format!("{mib:.1}")).collect::<Vec<_>>().join("  "));
}
