//! The crate apalis 1.0 on a store, as fast as its documents allow. `peers KIND URL COUNT BATCH` enqueues COUNT jobs
//! that do nothing, runs them, and prints how many jobs a second it enqueued and how many it ran.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use apalis::prelude::*;
use futures::stream;

/// Number of jobs that are pushed at once.
const PUSH: usize = 500;
/// Maximum number of jobs that wait in its Redis store: at 8,000 it stops for good.
const REDIS_SLICE: usize = 7_000;

static RUN: AtomicUsize = AtomicUsize::new(0);

async fn noop(_number: u32) -> Result<(), BoxDynError> {
    RUN.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// Waits until `count` jobs have run.
async fn ran(count: usize) {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let now = RUN.load(Ordering::Relaxed);
        if now >= count {
            return;
        }
        if now > last {
            (last, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < Duration::from_secs(60), "it stands still after {now} of {count} jobs");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, url, count, batch] = &arguments[..] else { panic!("peers KIND URL COUNT BATCH") };
    let (count, batch): (usize, usize) = (count.parse().unwrap(), batch.parse().unwrap());
    let (enqueue, drain) = match kind.as_str() {
        "postgres" => postgres(url, count, batch).await,
        "redis" => redis(url, count, batch).await,
        "sqlite" => sqlite(url, count, batch).await,
        other => panic!("{other} is no store"),
    };
    let rate = |took: Duration| count as f64 / took.as_secs_f64();
    println!("{} {}", rate(enqueue), rate(drain));
    // An orderly end of apalis would take a while.
    std::process::exit(0);
}

macro_rules! drain {
    ($backend:expr, $count:expr) => {{
        let began = Instant::now();
        let worker = WorkerBuilder::new(format!("worker-{}", RUN.load(Ordering::Relaxed)))
            .backend($backend)
            .build(noop);
        let running = tokio::spawn(async move { worker.run().await });
        ran($count).await;
        let took = began.elapsed();
        running.abort();
        took
    }};
}

async fn postgres(url: &str, count: usize, batch: usize) -> (Duration, Duration) {
    use apalis_postgres::{Config, PostgresStorage};
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(8).connect(url).await.unwrap();
    PostgresStorage::setup(&pool).await.unwrap();
    // Locks for each row are off: this is twice as fast, and its authors recommend it for speed.
    let mut config = Config::default().queue("bench").batch_size(batch);
    config.lock_tasks = false;
    config.persist_results = true;
    let mut backend = PostgresStorage::new(&pool).with_config(config);
    let began = Instant::now();
    for from in (0..count).step_by(PUSH) {
        let mut items =
            stream::iter((from..(from + PUSH).min(count)).map(|n| TaskBuilder::new(n as u32).build()));
        backend.push_all(&mut items).await.unwrap();
    }
    let enqueue = began.elapsed();
    (enqueue, drain!(backend, count))
}

async fn sqlite(url: &str, count: usize, batch: usize) -> (Duration, Duration) {
    use apalis_sqlite::{Config, SqliteStorage};
    let options: sqlx::sqlite::SqliteConnectOptions = url.parse().unwrap();
    let options = options.create_if_missing(true);
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1).connect_with(options).await.unwrap();
    SqliteStorage::setup(&pool).await.unwrap();
    // Its setup turns synchronous off. Ours is full, and so this one is set to full.
    sqlx::query("PRAGMA synchronous = FULL").execute(&pool).await.unwrap();
    let config = Config::default().queue("bench").batch_size(batch);
    let mut backend = SqliteStorage::new(&pool).with_config(config);
    let began = Instant::now();
    for from in (0..count).step_by(PUSH) {
        let mut items =
            stream::iter((from..(from + PUSH).min(count)).map(|n| TaskBuilder::new(n as u32).build()));
        backend.push_all(&mut items).await.unwrap();
    }
    let enqueue = began.elapsed();
    (enqueue, drain!(backend, count))
}

async fn redis(url: &str, count: usize, batch: usize) -> (Duration, Duration) {
    use apalis_redis::{Config, RedisStorage};
    let (mut enqueue, mut drain) = (Duration::ZERO, Duration::ZERO);
    let mut done = 0;
    while done < count {
        let slice = REDIS_SLICE.min(count - done);
        let connection = apalis_redis::connect(url).await.unwrap();
        let config = Config::default().queue("bench").batch_size(batch);
        let mut backend = RedisStorage::new(connection).with_config(config);
        let began = Instant::now();
        for from in (0..slice).step_by(PUSH) {
            let items = (from..(from + PUSH).min(slice)).map(|n| TaskBuilder::new(n as u32).build());
            backend.push_all(&mut stream::iter(items)).await.unwrap();
        }
        enqueue += began.elapsed();
        done += slice;
        drain += drain!(backend, done);
    }
    (enqueue, drain)
}
