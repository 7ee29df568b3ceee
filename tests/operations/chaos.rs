//! Kills, stops, cuts and a full disk while jobs run: no job is lost or given up, and a crash is recovered from
//! within two leases. The long versions (`--full`) print their figures.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use perennial_workers::job_admin::JobFilter;
use perennial_workers::queue::NewJob;
use perennial_workers::state::State;
use perennial_workers::store::JobStore;
use perennial_workers::{JobAdmin, Queue};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use uuid::Uuid;

use serde_json::json;
use support::double::Double;
use support::process::Setup;
use support::{backend, eventually, full, postgres, process, redis};

/// Lease of the jobs in a mill.
const LEASE: Duration = Duration::from_secs(3);

/// A stream of jobs, and the mills that run them.
struct Chaos {
    store: String,
    queue: JobStore,
    directory: TempDir,
    mills: Vec<Child>,
    enqueued: u32,
    /// Times of all disturbances, in milliseconds since 1970.
    broken_at: Vec<u128>,
}

impl Chaos {
    async fn new(store: String, mills: usize) -> Self {
        let queue = backend::open(&store).await;
        let mut chaos = Self {
            store,
            queue,
            directory: TempDir::new().unwrap(),
            mills: Vec::new(),
            enqueued: 0,
            broken_at: Vec::new(),
        };
        for _ in 0..mills {
            let mill = chaos.mill().await;
            chaos.mills.push(mill);
        }
        chaos
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("runs")
    }

    async fn mill(&self) -> Child {
        let output = |name: &str| {
            let file = self.directory.path().join(name);
            std::fs::File::options().create(true).append(true).open(file).unwrap()
        };
        let mut child = Command::new(process::example("mill"))
            .arg(&self.store)
            .arg(self.log())
            .stdout(Stdio::piped())
            .stderr(output("mill.log"))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        let out = child.stdout.as_mut().unwrap();
        support::soon("a mill", out.read_exact(&mut ready)).await.unwrap();
        child
    }

    /// Adds jobs, and retries while the store is unreachable.
    async fn enqueue(&mut self, count: u32) {
        let jobs = |numbers: std::ops::Range<u32>| -> Vec<NewJob> { numbers.map(job).collect() };
        for from in (self.enqueued..self.enqueued + count).step_by(250) {
            let some = jobs(from..(from + 250).min(self.enqueued + count));
            let began = Instant::now();
            while let Err(error) = self.queue.enqueue(some.clone()).await {
                assert!(began.elapsed() < Duration::from_secs(60), "{error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        self.enqueued += count;
    }

    fn broke(&mut self) {
        self.broken_at.push(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis());
    }

    /// Kills a mill in the middle of its work, and starts another one.
    async fn kill(&mut self) {
        let index = fastrand::usize(..self.mills.len());
        self.broke();
        let mill = &mut self.mills[index];
        let pid = Pid::from_raw(mill.id().unwrap().try_into().unwrap());
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
        mill.wait().await.unwrap();
        self.mills[index] = self.mill().await;
    }

    /// Waits until every job has settled, prints the figures, and checks that no job was lost or given up.
    async fn settle(&mut self, what: &str) {
        let began = Instant::now();
        loop {
            let depth = self.queue.measure("chaos".into()).await;
            if depth.is_ok_and(|depth| depth.waiting() + depth.running == 0) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(180), "{what}: jobs are left over");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let dead = JobFilter { state: Some(State::Dead), ..JobFilter::default() };
        let dead = self.queue.list(dead, None, 10).await.unwrap().len();
        let runs = runs(&self.log());
        let lost = (0..self.enqueued).filter(|number| !runs.contains_key(number)).count();
        let ended = |run: &Run| run.ended.is_some();
        let twice = runs.values().filter(|runs| runs.iter().filter(|run| ended(run)).count() > 1).count();
        let unfinished = runs.values().filter(|runs| !runs.iter().any(ended)).count();
        let mut recoveries = self.recoveries(&runs);
        recoveries.sort_unstable();
        let at = |share: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "an index"
            )]
            recoveries
                .get((recoveries.len() as f64 * share) as usize)
                .or(recoveries.last())
                .copied()
                .unwrap_or_default()
        };
        let stale = self.stale();
        println!(
            "{what}: {} jobs, {} breaks: lost {lost}, dead {dead}, run twice {twice}, stale settles {stale}, \
             interrupted {}, begun again after p50 {} ms, p99 {} ms",
            self.enqueued,
            self.broken_at.len(),
            recoveries.len(),
            at(0.5),
            at(0.99)
        );
        assert_eq!((lost, unfinished, dead), (0, 0, 0), "{what}");
    }

    /// Times from the disturbance of each interrupted run to the next run of its job, in milliseconds.
    fn recoveries(&self, runs: &BTreeMap<u32, Vec<Run>>) -> Vec<u128> {
        let again = runs.values().flat_map(|runs| runs.windows(2)).filter(|pair| pair[0].ended.is_none());
        again
            .map(|pair| {
                let cut =
                    self.broken_at.iter().filter(|at| (pair[0].began..=pair[1].began).contains(*at)).min();
                pair[1].began - cut.unwrap_or(&pair[0].began)
            })
            .collect()
    }

    /// Number of settlements that were refused, according to the logs of the mills.
    fn stale(&self) -> usize {
        let log = std::fs::read_to_string(self.directory.path().join("mill.log")).unwrap_or_default();
        log.lines().filter(|line| line.contains("settled=false")).count()
    }
}

/// One run of a job.
#[derive(Clone, Copy, Debug)]
struct Run {
    epoch: i64,
    began: u128,
    ended: Option<u128>,
}

/// All runs that the mills have written down, by job.
fn runs(log: &std::path::Path) -> BTreeMap<u32, Vec<Run>> {
    let mut runs = BTreeMap::<u32, Vec<Run>>::new();
    for line in std::io::BufReader::new(std::fs::File::open(log).unwrap()).lines() {
        let line = line.unwrap();
        let parts: Vec<&str> = line.split(' ').collect();
        let [word, number, epoch, at] = parts[..] else { panic!("{line}") };
        let (epoch, at): (i64, u128) = (epoch.parse().unwrap(), at.parse().unwrap());
        let runs = runs.entry(number.parse().unwrap()).or_default();
        match word {
            "S" => runs.push(Run { epoch, began: at, ended: None }),
            _ => runs.iter_mut().rfind(|run| run.epoch == epoch).unwrap().ended = Some(at),
        }
    }
    for runs in runs.values() {
        let epochs: BTreeSet<i64> = runs.iter().map(|run| run.epoch).collect();
        assert_eq!(epochs.len(), runs.len(), "no epoch twice: {runs:?}");
        for pair in runs.windows(2) {
            let late = pair[0].ended.is_some_and(|ended| ended > pair[1].began);
            assert!(!late, "who has lost the lease does nothing any more: {runs:?}");
        }
    }
    runs
}

fn job(number: u32) -> NewJob {
    NewJob {
        id: Uuid::now_v7(),
        kind: "grind".into(),
        queue: "chaos".into(),
        priority: 0,
        payload: format!(r#"{{"number":{number}}}"#),
        due: Default::default(),
        unique: None,
        trace: None,
        recoveries: 0,
    }
}

/// Number of jobs between two kills, and number of kills.
fn amount() -> (u32, u32) {
    if full() { (200, 100) } else { (200, 4) }
}

async fn kills(chaos: &mut Chaos, what: &str) {
    let (jobs, kills) = amount();
    for _ in 0..kills {
        chaos.enqueue(jobs).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(5..100))).await;
        chaos.kill().await;
    }
    chaos.settle(what).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_on_sqlite() {
    let directory = TempDir::new().unwrap();
    let mut chaos = Chaos::new(format!("sqlite:{}", directory.path().join("jobs.db").display()), 1).await;
    kills(&mut chaos, "sqlite, kill -9").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_on_postgres() {
    let server = postgres::Server::start(&[]).await;
    let mut chaos = Chaos::new(server.create().await, 2).await;
    kills(&mut chaos, "postgres, kill -9").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_on_redis() {
    let server = redis::Server::durable().await;
    let mut chaos = Chaos::new(server.url(), 2).await;
    kills(&mut chaos, "redis, kill -9").await;
}

/// A process that is stopped for longer than its leases notices that they have expired before it does anything else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_stopped_for_longer_than_its_leases() {
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    for (store, what) in [(postgres.create().await, "postgres"), (redis.url(), "redis")] {
        let mut chaos = Chaos::new(store, 2).await;
        for _ in 0..if full() { 5 } else { 1 } {
            chaos.enqueue(3000).await;
            support::eventually("both have their hands full", || async {
                let depth = chaos.queue.measure("chaos".into()).await.unwrap();
                (depth.running > 40).then_some(())
            })
            .await;
            chaos.broke();
            let pid = Pid::from_raw(chaos.mills[0].id().unwrap().try_into().unwrap());
            nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
            tokio::time::sleep(LEASE * 2).await;
            nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
        }
        chaos.settle(&format!("{what}, a worker stopped")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_restarted_stopped_and_cut_off() {
    let mut server = postgres::Server::start(&[]).await;
    let url = server.create().await;
    let mut chaos = Chaos::new(url.clone(), 2).await;
    let (jobs, rounds) = if full() { (2000, 5) } else { (1000, 1) };
    for _ in 0..rounds {
        chaos.enqueue(jobs).await;
        chaos.broke();
        server.restart().await;
        chaos.enqueue(jobs).await;
        // The stop is longer than a lease, so every lease is lost.
        chaos.broke();
        server.signal_all(Signal::SIGSTOP);
        tokio::time::sleep(if full() { Duration::from_secs(10) } else { LEASE + LEASE / 3 }).await;
        server.signal_all(Signal::SIGCONT);
        chaos.enqueue(jobs).await;
        let cut = postgres::connect(&url).await;
        for _ in 0..3 {
            chaos.broke();
            let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
                       AND datname = current_database()";
            cut.query(sql, &[]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    chaos.settle("postgres, restarted, stopped, cut off").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_killed_stopped_and_cut_off() {
    let mut server = redis::Server::durable().await;
    let mut chaos = Chaos::new(server.url(), 2).await;
    let (jobs, rounds) = if full() { (2000, 5) } else { (1000, 1) };
    for _ in 0..rounds {
        chaos.enqueue(jobs).await;
        chaos.broke();
        server.restart().await;
        chaos.enqueue(jobs).await;
        chaos.broke();
        server.signal(Signal::SIGSTOP);
        tokio::time::sleep(if full() { Duration::from_secs(10) } else { LEASE + LEASE / 3 }).await;
        server.signal(Signal::SIGCONT);
        chaos.enqueue(jobs).await;
        for _ in 0..3 {
            chaos.broke();
            let _ = std::process::Command::new("redis-cli")
                .args(["-u", &server.url(), "CLIENT", "KILL", "TYPE", "normal"])
                .output()
                .unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    chaos.settle("redis, killed, stopped, cut off").await;
}

/// A small file system that is soon full. It is unmounted when this is dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// Mounts the file system. Returns `None` where mounting is not permitted.
    fn mount(size: &str) -> Option<Self> {
        let disk = Self(TempDir::new().unwrap());
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(disk.0.path())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        mounted.success().then_some(disk)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        let _ = unmount.arg("-l").arg(self.0.path()).stderr(Stdio::null()).status();
    }
}

/// The test needs the right to mount. Without it, the test is skipped with a message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_meets_a_full_disk() {
    let Some(disk) = SmallDisk::mount("6m") else {
        return eprintln!("skipped: nothing may be mounted here");
    };
    let directory = &disk.0;
    let mut chaos = Chaos::new(format!("sqlite:{}", directory.path().join("jobs.db").display()), 1).await;
    let ballast = directory.path().join("ballast");
    for _ in 0..if full() { 5 } else { 1 } {
        chaos.enqueue(300).await;
        chaos.broke();
        // The file takes all the space that is left.
        let _ = std::fs::write(&ballast, vec![0_u8; 8 << 20]);
        let refused = chaos
            .queue
            .enqueue(
                (0..200)
                    .map(|_| NewJob { payload: "x".repeat(9000), ..job(0) })
                    .map(|job| NewJob { payload: format!("{:?}", job.payload), ..job })
                    .collect(),
            )
            .await;
        assert!(refused.is_err_and(|error| error.is_passing()), "the disk is full, and that passes");
        tokio::time::sleep(Duration::from_millis(500)).await;
        std::fs::remove_file(&ballast).unwrap();
    }
    chaos.settle("sqlite, disk full").await;
    drop(chaos);
}

/// `/readyz` says that the store cannot write for as long as this lasts.
#[tokio::test]
async fn a_full_disk_is_named_until_there_is_room() {
    let Some(disk) = SmallDisk::mount("8m") else {
        return eprintln!("skipped: nothing may be mounted here");
    };
    let directory = &disk.0;
    let double = Double::start().await;
    let store = directory.path().join("perennial.db");
    let setup = Setup::new().sending_to(&double).set("push.page=false");
    let perennial = setup.set(&format!("store.url=sqlite:{}", store.display())).start().await;
    let ballast = directory.path().join("ballast");
    let _ = std::fs::write(&ballast, vec![0_u8; 16 << 20]);
    let metadata = json!({ "text": "x".repeat(4000) });
    eventually("a write fails", || async {
        let request = json!({ "subscription": double.mint(), "metadata": metadata });
        (perennial.client().post("/subscriptions", &request).await.status == 503).then_some(())
    })
    .await;
    support::readiness::until_ready_says(&perennial, 200, "sqlite: it cannot write").await;
    std::fs::remove_file(&ballast).unwrap();
    support::readiness::until_ready_says(&perennial, 200, "").await;
    perennial.subscribe(&double, 1).await;
    drop(perennial);
}
