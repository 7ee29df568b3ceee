//! Postgres: one server for all tests with a database for each test, or a server of one test, which the test may break.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use perennial_store::pool::postgres::{Config, Postgres};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::{eventually, free_port};

/// Variable in which `tests/run` passes the URL of the server that it has started, without a database.
const SHARED: &str = "PERENNIAL_TEST_POSTGRES";

/// A database of one test.
#[derive(Debug)]
pub struct Database {
    url: String,
    /// A server of its own, where no server is shared.
    _server: Option<Server>,
}

impl Database {
    /// Creates an empty database.
    pub async fn new() -> Self {
        match std::env::var(SHARED) {
            Ok(server) => Self { url: create(&server).await, _server: None },
            Err(_) => {
                let server = Server::start(&["fsync=off"]).await;
                Self { url: server.create().await, _server: Some(server) }
            }
        }
    }

    /// URL of the database, `postgres://..`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Opens a pool of connections to the database.
    pub async fn connect(&self) -> Postgres {
        connect(&self.url).await
    }
}

/// Opens a pool of connections to a URL.
pub async fn connect(url: &str) -> Postgres {
    Postgres::open(config(url)).await.unwrap()
}

/// Settings with which the tests connect to a server.
pub fn config(url: &str) -> Config {
    Config {
        name: "postgres",
        url: url.into(),
        ca_file: None,
        size: 8,
        wait: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(10),
        max_age: Duration::from_secs(1800),
        pgbouncer: false,
        may_only_read: false,
    }
}

/// Creates a database on a server, and returns its URL. In the URL, `?host=` names the directory of a Unix socket.
async fn create(server: &str) -> String {
    let name = format!("test_{}", Uuid::now_v7().simple());
    let of = |database: &str| match server.split_once('?') {
        Some((base, query)) => format!("{base}{database}?{query}"),
        None => format!("{server}{database}"),
    };
    let postgres = connect(&of("postgres")).await;
    // Other tests may be copying the template at the same time, which makes this fail.
    eventually("a database", || async {
        postgres.execute(&format!("CREATE DATABASE {name}"), &[]).await.ok()
    })
    .await;
    postgres.close();
    of(&name)
}

/// A server of one test.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
    port: u16,
    settings: Vec<String>,
}

impl Server {
    /// Starts a server with these settings, each `name=value`.
    pub async fn start(settings: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let data = directory.path().join("data");
        let mut initdb = as_postgres(bin().join("initdb"));
        initdb.args(["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "-D"]).arg(&data);
        let output = initdb.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let port = free_port();
        let child = spawn(directory.path(), port, &settings);
        let server = Self { child, directory, port, settings };
        server.ready().await;
        server
    }

    /// Creates a database, and returns its URL.
    pub async fn create(&self) -> String {
        create(&format!("postgres://postgres@127.0.0.1:{}/", self.port)).await
    }

    /// Port on which the server listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sends a signal to the first process of the server: SIGINT is a fast shutdown, SIGQUIT an immediate one.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Sends a signal to the server and to all processes that it has started.
    pub fn signal_all(&self, signal: Signal) {
        let all = std::process::Command::new("pgrep").args(["-P", &self.pid().to_string()]).output().unwrap();
        let children = String::from_utf8(all.stdout).unwrap();
        for pid in children.lines().filter_map(|pid| pid.trim().parse().ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        self.signal(signal);
    }

    /// Stops the server and starts it again.
    pub async fn restart(&mut self) {
        self.signal(Signal::SIGINT);
        self.child.wait().await.unwrap();
        self.child = spawn(self.directory.path(), self.port, &self.settings);
        self.ready().await;
    }

    /// Log of the server, if it runs with `logging_collector=on`, `log_directory=log` and `log_filename=log`.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("data/log/log")).unwrap_or_default()
    }

    /// Id of the user as whom the server runs.
    pub fn user(&self) -> u32 {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(self.directory.path().join("data")).unwrap().uid()
    }

    /// Starts a standby of this server, which replicates all changes.
    pub async fn standby(&self) -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let mut copy = as_postgres(bin().join("pg_basebackup"));
        let port = self.port.to_string();
        copy.args([
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
        ]);
        let output =
            copy.args(["-p", &port, "-D"]).arg(directory.path().join("data")).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let port = free_port();
        let child = spawn(directory.path(), port, &self.settings);
        let standby = Self { child, directory, port, settings: self.settings.clone() };
        standby.ready().await;
        standby
    }

    async fn admin(&self) -> Postgres {
        connect(&format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)).await
    }

    /// Waits until this standby has replayed all changes that `primary` has made so far.
    pub async fn caught_up_with(&self, primary: &Self) {
        let (here, there) = (self.admin().await, primary.admin().await);
        let now = there.query("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap()[0].get::<_, String>(0);
        let sql = format!("SELECT pg_last_wal_replay_lsn() >= '{now}'::pg_lsn");
        eventually("the standby has caught up", || async {
            here.query(&sql, &[]).await.unwrap()[0].get::<_, bool>(0).then_some(())
        })
        .await;
        here.close();
        there.close();
    }

    /// Promotes this standby to primary.
    pub async fn promote(&self) {
        let here = self.admin().await;
        here.query("SELECT pg_promote()", &[]).await.unwrap();
        here.close();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().expect("it runs").try_into().unwrap())
    }

    async fn ready(&self) {
        let url = format!("postgres://postgres@127.0.0.1:{}/postgres", self.port);
        eventually("Postgres answers", || async { Postgres::open(config(&url)).await.ok() }).await.close();
    }
}

fn spawn(directory: &Path, port: u16, settings: &[String]) -> Child {
    let mut command = as_postgres(bin().join("postgres"));
    command.arg("-D").arg(directory.join("data")).args(["-p", &port.to_string()]);
    command.args([
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
        "-c",
        "max_connections=200",
    ]);
    for setting in settings {
        command.args(["-c", setting]);
    }
    command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().unwrap()
}

/// Builds the command of a program that refuses to be run by root, to be run as the user `postgres`.
pub(crate) fn as_postgres(program: PathBuf) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program).current_dir("/");
    command
}

/// Builds the command of a client program of Postgres.
pub fn client(name: &str) -> Command {
    Command::new(bin().join(name))
}

/// Directory of the programs of the newest version that is installed. Debian has one directory for each version.
fn bin() -> PathBuf {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").expect("Postgres is not installed: run tests/run");
    versions.map(|version| version.unwrap().path().join("bin")).max().unwrap()
}
