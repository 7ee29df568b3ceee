//! The program as a process: started on free ports in a directory of its own, queried, signalled, killed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::double::Double;
use crate::http::Client;
use crate::postgres::Database;
use crate::{eventually, soon, stores};

/// Path of the binary, built beside the tests.
pub fn binary() -> PathBuf {
    std::env::var_os("PERENNIAL_BIN").map_or_else(|| built("perennial"), PathBuf::from)
}

/// Path of an example, built beside the tests.
pub fn example(name: &str) -> PathBuf {
    built(&format!("examples/{name}"))
}

fn built(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join(name);
    assert!(path.exists(), "{} is not there: run tests/run", path.display());
    path
}

/// Processor time that a process has used, in seconds; `None` when there is no such process.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The fields after the name, which is in parentheses: the 12th is the user time, the 13th the system time.
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    #[expect(clippy::cast_precision_loss, reason = "it is 100")]
    let per_second = per_second as f64;
    Some(ticks / per_second)
}

/// Value of a line of `/proc/PID/status` in KiB, such as `VmRSS` or `VmHWM`.
pub fn memory_kib(pid: u32, line: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let found = status.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'))?;
    found.trim().trim_end_matches(" kB").parse().ok()
}

/// The program, settings, environment and directory with which a process is started.
#[derive(Debug)]
pub struct Setup {
    program: PathBuf,
    directory: TempDir,
    set: Vec<String>,
    environment: Vec<(String, String)>,
    config: Option<String>,
    /// Further arguments of `serve`.
    arguments: Vec<String>,
    database: Option<Database>,
}

/// Returns true when a process is gone, or is a zombie child of the test.
pub fn is_gone(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

impl Setup {
    /// Creates a setup on free ports, in a directory of its own.
    pub fn new() -> Self {
        let setup = Self {
            program: binary(),
            directory: TempDir::new().unwrap(),
            set: Vec::new(),
            environment: Vec::new(),
            config: None,
            arguments: Vec::new(),
            database: None,
        };
        setup
            .set("server.listen=127.0.0.1:0")
            .set("admin.listen=127.0.0.1:0")
            .set("telemetry.format=json")
            // Clients of the tests keep their connections, and a drain would wait for them.
            .set("drain.idle=500ms")
    }

    /// Creates a setup with a free port for the admin listener; a settings file sets the public listeners.
    pub fn listening_as_configured() -> Self {
        let mut setup = Self::new();
        setup.set.retain(|set| !set.starts_with("server.listen"));
        setup
    }

    /// Runs another program than ours, with the same command line.
    pub fn program(self, program: PathBuf) -> Self {
        Self { program, ..self }
    }

    /// Configures the process to send to this push service.
    pub fn sending_to(self, double: &Double) -> Self {
        self.set("push.allow_insecure=true")
            .set("push.allow_hosts=127.0.0.1,localhost")
            .set("push.allow_networks=127.0.0.0/8")
            .set(&format!("push.extra_ca_file={}", double.ca_file().display()))
    }

    /// Adds a setting.
    pub fn set(mut self, setting: &str) -> Self {
        self.set.push(setting.to_owned());
        self
    }

    /// Adds an argument to `serve`.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Adds a settings file.
    pub fn config(self, file: &str) -> Self {
        Self { config: Some(file.to_owned()), ..self }
    }

    /// Adds a variable to the environment.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Path of the data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Id of the process that holds the lock of the data directory.
    pub fn holder(&self) -> Option<i32> {
        let text = std::fs::read_to_string(self.data_dir().join("perennial.lock")).ok()?;
        text.trim().parse().ok()
    }

    /// Path of a file beside the data directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Builds the command with these arguments and with all settings of this setup.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("PERENNIAL_DATA_DIR", self.data_dir())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(self.directory.path())
            .kill_on_drop(true)
            .stdin(Stdio::null());
        if let Some(config) = &self.config {
            command.args(["--config", config]);
        }
        for setting in &self.set {
            command.args(["--set", setting]);
        }
        command
    }

    /// Runs a command to its end.
    pub async fn run(&self, arguments: &[&str]) -> Output {
        soon(&format!("the end of {arguments:?}"), self.command(arguments).output()).await.unwrap()
    }

    /// Stores everything in `database`. Makes the keys first.
    async fn on_postgres(self, database: Database) -> Self {
        let setup = stores::on_postgres(self, database.url()).await;
        Self { database: Some(database), ..setup }
    }

    /// Starts the process without waiting for anything.
    pub fn spawn(self) -> Perennial {
        let log = self.file("log");
        let append = || File::options().create(true).append(true).open(&log).unwrap();
        let child =
            self.command(&["serve"]).args(&self.arguments).stdout(append()).stderr(append()).spawn().unwrap();
        Perennial { setup: self, child, client: None, admin: None }
    }

    /// Starts the process and waits until it is ready. Tests of the module `on_postgres` get a Postgres
    /// database as their store.
    pub async fn start(self) -> Perennial {
        let is_on_postgres =
            std::thread::current().name().is_some_and(|name| name.starts_with("on_postgres::"));
        let has_store = self.set.iter().any(|set| set.starts_with("store.url"));
        let setup =
            if is_on_postgres && !has_store { self.on_postgres(Database::new().await).await } else { self };
        let mut perennial = setup.spawn();
        perennial.ready().await;
        perennial
    }
}

/// A running process.
#[derive(Debug)]
pub struct Perennial {
    /// Setup with which the process was started.
    pub setup: Setup,
    child: Child,
    client: Option<Client>,
    admin: Option<Client>,
}

impl Perennial {
    /// Waits until the process is ready.
    pub async fn ready(&mut self) {
        let file = self.setup.data_dir().join("addresses.json");
        let (server, admin) = eventually("readiness", || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("it ended with {status}: {}", self.log());
            }
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            async move {
                let addresses: Value = serde_json::from_str(&text).ok()?;
                let of = |listener: &str| {
                    Client::new(&format!("http://{}", addresses[listener][0].as_str().unwrap()))
                };
                // The file may be that of a process that was killed; then no process listens at these addresses.
                let ready = of("admin").try_send(Method::GET, "/readyz", None, Bytes::new()).await.ok()?;
                ready.status.is_success().then(|| (of("server"), of("admin")))
            }
        })
        .await;
        // A pod that shares its store has no key of its own.
        let key = std::fs::read_to_string(self.setup.data_dir().join("api.key"));
        self.client = Some(key.map_or(server.clone(), |key| server.with_key(key.trim())));
        self.admin = Some(admin);
    }

    /// Waits until another process, which has taken over from this one, is ready.
    pub async fn ready_again(&self) {
        let admin = self.admin().clone();
        eventually("readiness", || async {
            let ready = admin.try_send(Method::GET, "/readyz", None, Bytes::new()).await.ok()?;
            ready.status.is_success().then_some(())
        })
        .await;
    }

    /// Client of the public listener, with the first API key.
    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("it is ready")
    }

    /// Client of the admin listener.
    pub fn admin(&self) -> &Client {
        self.admin.as_ref().expect("it is ready")
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Processor time that the process has used, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.pid()).unwrap()
    }

    /// Value of a line of `/proc/PID/status` in MiB, such as `VmRSS` or `VmHWM`.
    pub fn memory_mib(&self, line: &str) -> f64 {
        memory_kib(self.pid(), line).unwrap() / 1024.0
    }

    /// Waits until the process has ended.
    pub async fn ended(&mut self) -> ExitStatus {
        soon("the end of the process", self.child.wait()).await.unwrap()
    }

    /// Stops the process as an operator does, and returns its exit code.
    pub async fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.ended().await.code()
    }

    /// Kills the process and starts another one on the same data.
    pub async fn kill_and_start_again(mut self) -> Self {
        self.signal(Signal::SIGKILL);
        self.ended().await;
        self.start_again().await
    }

    /// Starts another process on the same data, when this one has ended.
    pub async fn start_again(self) -> Self {
        self.setup.start().await
    }

    /// Everything that the process has logged, including what it logged before it was started again.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.setup.file("log")).unwrap_or_default()
    }

    /// Lines of the log that are JSON objects.
    pub fn log_lines(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line of the log with this message, and returns the first one.
    pub async fn logged(&self, message: &str) -> Value {
        let find = || {
            let lines = self.log_lines();
            std::future::ready(lines.into_iter().find(|line| line["message"] == message))
        };
        eventually(&format!("the log says {message:?}"), find).await
    }

    /// Stores `count` subscriptions of `double`, and returns their ids.
    pub async fn subscribe(&self, double: &Double, count: usize) -> Vec<i64> {
        let mut ids = Vec::with_capacity(count);
        for _ in 0..count {
            let subscription = double.mint();
            let answer = self.client().post("/subscriptions", &json!({ "subscription": subscription })).await;
            assert_eq!(answer.status, 201, "{}", answer.text());
            ids.push(answer.json()["id"].as_i64().unwrap());
        }
        ids
    }

    /// Runs a statement directly on the store of the process. Returns the number that a query selects, or else the
    /// number of rows that the statement changed.
    pub async fn sql(&self, sql: &str) -> i64 {
        let Some(database) = &self.setup.database else {
            let store = rusqlite::Connection::open(self.setup.data_dir().join("perennial.db")).unwrap();
            store.busy_timeout(crate::SOON).unwrap();
            return if sql.starts_with("SELECT") {
                store.query_row(sql, [], |row| row.get(0)).unwrap()
            } else {
                i64::try_from(store.execute(sql, []).unwrap()).unwrap()
            };
        };
        // Postgres writes literals of bytes in another way.
        let sql = sql.replace(" x'", " '\\x");
        let postgres = database.connect().await;
        if sql.starts_with("SELECT") {
            let sql = sql.replacen("SELECT ", "SELECT (", 1).replacen(" FROM", ")::bigint FROM", 1);
            return postgres.query(&sql, &[]).await.unwrap()[0].get(0);
        }
        i64::try_from(postgres.execute(&sql, &[]).await.unwrap()).unwrap()
    }

    /// Stores many subscriptions at once, directly in the store, as an import would.
    pub fn fill(&self, subscriptions: impl Iterator<Item = Value>) {
        let mut store = rusqlite::Connection::open(self.setup.data_dir().join("perennial.db")).unwrap();
        store.busy_timeout(crate::SOON).unwrap();
        let tx = store.transaction().unwrap();
        let mut insert = tx
            .prepare(
                "INSERT INTO subscriptions (site, vapid_key, endpoint, endpoint_hash, p256dh, auth, created_at, updated_at)
                 VALUES (1, (SELECT min(id) FROM vapid_keys), ?, ?, ?, ?, 0, 0)",
            )
            .unwrap();
        for subscription in subscriptions {
            let endpoint = subscription["endpoint"].as_str().unwrap();
            let hash = digest(&SHA256, endpoint.as_bytes());
            let key =
                |name: &str| URL_SAFE_NO_PAD.decode(subscription["keys"][name].as_str().unwrap()).unwrap();
            insert.execute((endpoint, &hash.as_ref()[..16], key("p256dh"), key("auth"))).unwrap();
        }
        drop(insert);
        tx.commit().unwrap();
    }

    /// Sends a notification and returns its id.
    pub async fn notify(&self, request: &Value) -> String {
        let answer = self.client().post("/notify", request).await;
        assert_eq!(answer.status, 202, "{}", answer.text());
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a notification is done, and returns its progress.
    pub async fn done(&self, id: &str) -> Value {
        self.done_within(id, crate::SOON).await
    }

    /// Waits like [`Self::done`], but for at most `patience`.
    pub async fn done_within(&self, id: &str, patience: Duration) -> Value {
        let began = std::time::Instant::now();
        loop {
            let progress = self.client().get(&format!("/notifications/{id}")).await.json();
            if progress["state"] == "done" {
                return progress;
            }
            assert!(began.elapsed() < patience, "not done: {progress}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends a notification and waits until it is done.
    pub async fn notify_and_wait(&self, request: &Value) -> Value {
        let id = self.notify(request).await;
        self.done(&id).await
    }
}
