//! The test kit: a program runs within its own tests, on free ports and in a directory of its own, many at a time.
//!
//! ```no_run
//! # use perennial_host::Perennial;
//! # async fn example() -> anyhow::Result<()> {
//! let shop = Perennial::new().test().set("server.threads=1").start().await?;
//! let answer = shop.client().get("/books").await?;
//! assert_eq!(answer.status, 200);
//! shop.jobs().run_until_idle().await?;
//! shop.stop().await
//! # }
//! ```
//!
//! It needs the feature `testing`, for `[dev-dependencies]`. The store is embedded, unless `PERENNIAL_TEST_POSTGRES` (with
//! the prefix of the program) has the URL of a Postgres server: then each program gets a database there, which
//! [`TestProgram::stop`] drops. A test that fails leaves it, to be looked at. Jobs are in that store, unless
//! `PERENNIAL_TEST_REDIS` has the URL of a Redis server: then each program gets a prefix there.

mod client;
mod database;

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use jiff::SignedDuration;
use parking_lot::Mutex;
use perennial_runtime::drain::{self, Trigger};
use perennial_runtime::health::Health;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::signal::{ProcessSignal, Signals};
use perennial_runtime::tasks::Tasks;
use perennial_runtime::telemetry::Telemetry;
use perennial_store::pool::sql::{self, Store};
use perennial_store::values;
use perennial_workers::queue::Depth;
use perennial_workers::worker::Status;
use perennial_workers::{Jobs, Queue, store};
use tempfile::TempDir;
use tokio::runtime::Handle;

pub use client::{TestAnswer, TestClient};

use crate::Perennial;
use crate::addresses::url;
use crate::admin::jobs::JobAdminState;
use crate::boot::{self, App, BootPlan};
use crate::config::{Phases, StoreConfig};
use crate::control::Control;
use crate::data_dir;
use crate::handover::Inheritance;
use crate::module::{self, Blueprint};
use crate::program;
use crate::sessions;
use crate::settings::Sources;
use crate::stop::{Reason, StopReport, stop};
use database::{TestDatabase, TestRedis};

/// Time limit for what a test waits for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at what a test waits for.
const LOOK: Duration = Duration::from_millis(5);

/// A part of a test beside the program, such as a local push service.
pub trait Beside: Clone + Send + Sync + 'static {
    /// Settings with which the program uses it, as `section.key=value`.
    fn settings(&self) -> Vec<String>;
}

/// A program that is about to run within a test.
#[derive(Debug)]
pub struct TestBuilder {
    program: Perennial,
    set: Vec<String>,
    beside: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
    is_embedded: bool,
}

impl TestBuilder {
    pub(crate) fn new(program: Perennial) -> Self {
        let set =
            ["server.listen=127.0.0.1:0", "admin.listen=127.0.0.1:0", "server.threads=2", "drain.idle=100ms"];
        Self { program, set: set.map(str::to_owned).to_vec(), beside: HashMap::new(), is_embedded: false }
    }

    /// Sets a setting: `section.key=value`.
    #[must_use]
    pub fn set(mut self, setting: impl Into<String>) -> Self {
        self.set.push(setting.into());
        self
    }

    /// Uses the embedded store, also when the environment names a Postgres server.
    #[must_use]
    pub fn embedded(mut self) -> Self {
        self.is_embedded = true;
        self
    }

    /// Adds a part beside the program, which [`TestProgram::beside`] returns.
    #[must_use]
    pub fn with<B: Beside>(mut self, beside: &B) -> Self {
        self.set.extend(beside.settings());
        self.beside.insert(TypeId::of::<B>(), Box::new(beside.clone()));
        self
    }

    /// Starts the program on the runtime of the test, and returns when it is ready.
    ///
    /// # Errors
    /// When the settings are not valid, or boot fails.
    pub async fn start(self) -> anyhow::Result<TestProgram> {
        let Self { program: Perennial { modules, identity, defaults }, mut set, beside, is_embedded } = self;
        program::identify(&identity);
        let modules =
            module::in_order(&modules).and_then(module::without_clashes).map_err(anyhow::Error::msg)?;
        // What the test sets comes later, and counts.
        let listeners = modules.iter().flat_map(|module| module.listeners);
        let free = listeners.map(|listener| format!("listeners.{}.listen=127.0.0.1:0", listener.name()));
        set.splice(0..0, free);
        let directory = TempDir::new()?;
        set.push(format!("data_dir={}", directory.path().join("data").display()));
        let database = if is_embedded { None } else { TestDatabase::of_environment().await? };
        set.extend(database.iter().map(|database| format!("store.url={}", database.url())));
        let redis = if is_embedded { None } else { TestRedis::of_environment(&set) };
        set.extend(redis.iter().flat_map(TestRedis::settings));
        let sources = Sources { set, program: defaults, ..Sources::default() };
        let started = match Box::pin(start(&sources, &modules)).await {
            Ok(started) => started,
            Err(error) => {
                if let Some(database) = database {
                    database.drop_it().await?;
                }
                return Err(error);
            }
        };
        Ok(TestProgram { started, beside, database, _directory: directory })
    }
}

/// The parts of a running program that a test needs.
struct Started {
    app: App,
    control: Control,
    last: Trigger,
    trigger: Trigger,
    phases: Phases,
    books: JobAdminState,
    admin_addresses: Vec<String>,
    data_dir: std::path::PathBuf,
}

async fn start(sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<Started> {
    let settings = module::load(sources, modules);
    let (config, configured) = module::read(&settings, modules)?;
    let phases = config.phases;
    let data_dir = config.data_dir.clone();
    if matches!(config.store, StoreConfig::Postgres(_)) {
        make_keys(sources, modules).await?;
    }
    let running = Arc::new(Mutex::new(settings));
    let (last, at_last) = drain::channel();
    let control = Control {
        background: Tasks::new(at_last.clone()),
        drain: at_last,
        health: Health::new(config.health),
        metrics: metrics()?,
        telemetry: Arc::new(Telemetry::detached()?),
        running: Arc::clone(&running),
    };
    let inheritance = Inheritance::none();
    let admin = control.open_admin(&config, &inheritance, &Handle::current()).await?;
    let plan = BootPlan::new(config, modules, &running.lock(), inheritance, admin.addresses.clone());
    let (trigger, drain) = drain::channel();
    let (app, booted) = Box::pin(boot::boot(plan, configured, control.health.clone(), drain)).await?;
    let books = booted.books.clone();
    admin.known.booted(booted);
    control.health.started();
    Ok(Started { app, control, last, trigger, phases, books, admin_addresses: admin.addresses, data_dir })
}

/// The recorder of metrics, of which a process has one.
fn metrics() -> anyhow::Result<Metrics> {
    static METRICS: OnceLock<Result<Metrics, String>> = OnceLock::new();
    let installed = METRICS.get_or_init(|| Metrics::install().map_err(|error| error.to_string()));
    installed.clone().map_err(anyhow::Error::msg)
}

/// Makes the keys, which a shared store must have before the first start.
async fn make_keys(sources: &Sources, modules: &[Blueprint]) -> anyhow::Result<()> {
    let context = crate::cli::context(true, sources, modules)?;
    crate::cli::make_keys(&context, modules).await.map(drop)
}

/// A program that runs within a test. Dropping it without [`TestProgram::stop`] cuts it off.
pub struct TestProgram {
    started: Started,
    beside: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
    database: Option<TestDatabase>,
    _directory: TempDir,
}

impl fmt::Debug for TestProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestProgram").field("url", &self.url()).finish_non_exhaustive()
    }
}

impl TestProgram {
    /// A client of the public listener, with the API key that the program has made.
    pub fn client(&self) -> TestClient {
        let key = std::fs::read_to_string(self.started.data_dir.join(data_dir::API_KEY)).ok();
        TestClient::new(self.url(), key.map(|key| key.trim().to_owned()))
    }

    /// A client of the admin listener.
    pub fn admin(&self) -> TestClient {
        let token = std::fs::read_to_string(self.started.data_dir.join(data_dir::ADMIN_TOKEN)).ok();
        let base = url(&self.started.admin_addresses).unwrap_or_default();
        TestClient::new(base, token.map(|token| token.trim().to_owned()))
    }

    /// The URL of the public listener.
    pub fn url(&self) -> String {
        url(&self.started.app.addresses.server).unwrap_or_default()
    }

    /// The first address of the listener of a module, as `host:port`.
    ///
    /// # Panics
    /// When no module has a listener of this name.
    pub fn listener(&self, name: &str) -> String {
        #[expect(clippy::expect_used, reason = "a mistake of the test, which ends with it")]
        let addresses = self.started.app.addresses.listeners.get(name).expect("no listener has this name");
        addresses.first().map(|address| address.replace("tls://", "")).unwrap_or_default()
    }

    /// The store.
    pub fn store(&self) -> &perennial_store::pool::sql::Store {
        self.started.app.store()
    }

    /// The jobs.
    pub fn jobs(&self) -> TestJobs<'_> {
        let books = &self.started.books;
        let is_elsewhere = matches!(books.jobs.store(), store::JobStore::Redis(_));
        TestJobs { books, outbox: is_elsewhere.then(|| self.store().clone()) }
    }

    /// The clock.
    pub fn clock(&self) -> TestClock<'_> {
        TestClock { program: self }
    }

    /// The part of this type that [`TestBuilder::with`] has added.
    ///
    /// # Panics
    /// When there is none.
    pub fn beside<B: Beside>(&self) -> B {
        let found = self.beside.get(&TypeId::of::<B>()).and_then(|beside| beside.downcast_ref::<B>());
        #[expect(clippy::expect_used, reason = "a mistake of the test, which ends with it")]
        found.cloned().expect("the test has no such part: add it with TestBuilder::with")
    }

    /// Stops the program as SIGTERM does, without the notice for load balancers.
    ///
    /// # Errors
    /// When a task or a job did not end in time: the error names what still runs.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self { started, database, .. } = self;
        let Started { app, control, last, trigger, phases, .. } = started;
        let reason = Reason::ProcessSignal(ProcessSignal::Interrupt);
        let report = stop(app, phases, &control.health, &trigger, &mut Signals::none(), reason).await;
        last.advance(drain::Phase::Hard);
        let in_time = tokio::time::timeout(Duration::from_secs(1), control.background.ended()).await.is_ok();
        if let Some(database) = database {
            database.drop_it().await?;
        }
        if report.is_in_order() && in_time {
            return Ok(());
        }
        let StopReport { cancelled, aborted, death, closed } = report;
        let tasks = [aborted, control.background.running()].concat().join(", ");
        bail!(
            "the program has not stopped in order; tasks that were aborted: {tasks}; jobs that did not end: {}; death: {death:?}; everything was closed in time: {closed}",
            cancelled.join(", ")
        )
    }
}

/// The jobs of a program within a test.
#[derive(Debug)]
pub struct TestJobs<'a> {
    books: &'a JobAdminState,
    /// The store with the outbox, where jobs are kept elsewhere.
    outbox: Option<Store>,
}

impl TestJobs<'_> {
    /// The handle with which the program enqueues jobs.
    pub fn handle(&self) -> &Jobs {
        &self.books.jobs
    }

    /// Waits until no job is due and none runs. Jobs that are due later stay.
    ///
    /// # Errors
    /// When jobs are still due or running after 30 seconds: the error names their queues and kinds.
    pub async fn run_until_idle(&self) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        let mut idle = 0;
        while idle < 2 {
            let busy = self.busy().await?;
            idle = if busy.is_empty() { idle + 1 } else { 0 };
            if Instant::now() > end {
                bail!("jobs are still due or running after {PATIENCE:?}: {}", busy.join(", "));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The queues with due or running jobs.
    async fn busy(&self) -> anyhow::Result<Vec<String>> {
        let store = self.books.jobs.store();
        let mut busy = Vec::new();
        for queue in served(self.books) {
            let Depth { ready, running, .. } = store.measure(queue.as_str().into()).await?;
            if ready + running > 0 {
                busy.push(format!("{queue} ({ready} due, {running} running)"));
            }
        }
        if let Some(outbox) = &self.outbox {
            let waiting = outbox.query("SELECT count(*) FROM outbox", values![]).await?;
            let waiting = waiting.first().map(sql::Row::first::<i64>).transpose()?.unwrap_or_default();
            if waiting > 0 {
                busy.push(format!("the outbox ({waiting} not published)"));
            }
        }
        Ok(busy)
    }
}

/// Names of the queues that the program serves.
fn served(books: &JobAdminState) -> Vec<String> {
    let serving = books.worker.as_ref().map(Status::serving).unwrap_or_default();
    serving.into_iter().map(|served| served.queue).collect()
}

/// The clock of a program within a test.
#[derive(Debug)]
pub struct TestClock<'a> {
    program: &'a TestProgram,
}

impl TestClock<'_> {
    /// Lets this time pass for jobs, their retries, schedules, sessions and caches: what is due by then runs now. Tables in
    /// memory (`perennial::table`) and locks follow the real clock.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn advance(&self, by: Duration) -> anyhow::Result<()> {
        let Started { app, books, .. } = &self.program.started;
        let shift = SignedDuration::try_from(by)?;
        store::shift(app.store(), shift).await.context("the clock cannot be advanced")?;
        sessions::shift(app.store(), by).await.context("the clock of sessions cannot be advanced")?;
        if let store::JobStore::Redis(queue) = books.jobs.store() {
            let queues = served(books);
            let queues = queues.iter().map(String::as_str);
            store::shift_redis(queue.redis(), queue.prefix(), queues, shift).await?;
        }
        app.caches().elapse(by);
        books.jobs.wake(served(books).iter().map(|queue| &**queue));
        books.crontab.wake();
        Ok(())
    }
}
