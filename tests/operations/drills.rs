//! Failure drills with real servers: every way in which a server can be unreachable. Requests that need it are answered
//! with 503 in time, the others go on, `/readyz` names it, and when it is back all recovers without a restart.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use perennial_store::pool::postgres::{Config, Postgres};
use perennial_store::pool::redis::Redis;
use perennial_store::pool::redis::client::cmd;
use serde_json::{Value, json};
use tempfile::TempDir;

use support::double::Double;
use support::eventually_within;
use support::postgres;
use support::process::{Perennial, Setup};
use support::readiness::{readiness, until_ready_says};
use support::redis;
use support::stores::on_postgres;
use support::wire::{Proxy, Wire};

/// Number of subscriptions that are sent to during a drill, and messages a second.
const AUDIENCE: usize = 40;
const RATE: u32 = 20;
/// Maximum time of an answer: several times the sum of all waits of these settings.
const IN_TIME: Duration = Duration::from_secs(15);
/// Maximum time from the return of a server to full recovery.
const SOON_AFTER: Duration = Duration::from_secs(30);

/// State of a drill.
struct Drill {
    perennial: Perennial,
    double: Double,
    sending: String,
}

/// Starts a process with short waits on these servers, in the middle of sending.
async fn drill(store: &str, queue: &str) -> Drill {
    drill_with(Setup::new(), store, queue).await
}

async fn drill_with(setup: Setup, store: &str, queue: &str) -> Drill {
    let double = Double::start().await;
    let setup = ["wait=1s", "connect_timeout=1s"]
        .iter()
        .fold(setup, |setup, each| setup.set(&format!("store.{each}")).set(&format!("queue.{each}")));
    let setup = setup
        .sending_to(&double)
        .set("store.statement_timeout=2s")
        .set("queue.response_timeout=2s")
        .set("queue.lease=6s")
        .set("queue.renew_every=1s")
        .set(&format!("queue.url={queue}"));
    let perennial = on_postgres(setup, store).await.start().await;
    perennial.subscribe(&double, AUDIENCE).await;
    let sending = perennial.notify(&json!({ "to": { "all": true }, "payload": "x", "rate": RATE })).await;
    Drill { perennial, double, sending }
}

impl Drill {
    /// Sends several requests at once that need the store, and returns their status codes.
    async fn ask(&self) -> Vec<u16> {
        let ask = async || {
            let began = Instant::now();
            let answer = self.perennial.client().get("/notifications").await;
            assert!(began.elapsed() < IN_TIME, "{:?}", began.elapsed());
            let status = answer.status.as_u16();
            assert!(status == 200 || answer.header("retry-after").is_some(), "{status} {}", answer.text());
            status
        };
        join_all((0..12).map(|_| ask())).await
    }

    /// Checks the process while Postgres is unreachable: requests that need it get 503, the others go on.
    async fn without_postgres(&self) {
        let answers = self.ask().await;
        assert!(answers.iter().all(|status| *status == 503), "{answers:?}");
        until_ready_says(&self.perennial, 200, "postgres: ").await;
        self.goes_on().await;
    }

    /// Checks the process while Redis is unreachable: notifications are accepted, and wait.
    async fn without_redis(&self) -> String {
        until_ready_says(&self.perennial, 200, "redis: ").await;
        assert!(self.ask().await.iter().all(|status| *status == 200));
        self.goes_on().await;
        self.perennial.notify(&json!({ "to": { "all": true }, "payload": "y" })).await
    }

    async fn goes_on(&self) {
        let began = Instant::now();
        assert_eq!(self.perennial.client().get("/push/key").await.status, 200);
        assert_eq!(self.perennial.admin().get("/livez").await.status, 200);
        assert!(began.elapsed() < IN_TIME);
    }

    /// Checks that all has recovered: accepted notifications are done, and no connection is held.
    async fn recovered(&self, accepted: &[&str]) {
        let perennial = &self.perennial;
        until_ready_says(perennial, 200, "").await;
        let request = json!({ "to": { "all": true }, "payload": "z" });
        let id = eventually_within(SOON_AFTER, "it accepts notifications", || async {
            let answer = perennial.client().post("/notify", &request).await;
            assert!(answer.status == 202 || answer.status == 503, "{}", answer.text());
            (answer.status == 202).then(|| answer.json()["id"].as_str().unwrap().to_owned())
        })
        .await;
        for id in [&[id.as_str(), &self.sending], accepted].concat() {
            let progress = perennial.done_within(id, 2 * SOON_AFTER).await;
            assert_eq!(progress["outcomes"], json!({ "delivered": AUDIENCE }), "{progress}");
        }
        eventually_within(SOON_AFTER, "no slot is taken", || async {
            let pools = perennial.admin().get("/pools").await.json();
            let is_free = |pool: &Value| pool["size"] == pool["available"] && pool["waiting"] == 0;
            (is_free(&pools["postgres"]) && is_free(&pools["redis"])).then_some(())
        })
        .await;
        let jobs = perennial.admin().get("/jobs?state=running").await.json();
        assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(0), "{jobs}");
        let metrics = perennial.admin().get("/metrics").await.text();
        let nested = metrics.lines().filter(|line| line.starts_with("perennial_pool_nested_total{"));
        assert!(nested.clone().all(|line| line.ends_with(" 0")), "something holds two connections at once");
        assert!(nested.count() > 0, "nobody would notice");
        assert!(self.double.refused().is_empty());
    }

    async fn stop(mut self) {
        assert_eq!(self.perennial.stop().await, Some(0), "{}", self.perennial.log());
    }
}

/// Port of a URL of this machine.
fn port(url: &str) -> u16 {
    url.split("127.0.0.1:").nth(1).unwrap().split('/').next().unwrap().parse().unwrap()
}

/// The same URL, but through a proxy.
fn by_way_of(proxy: &Proxy, url: &str) -> String {
    url.replace(&format!("127.0.0.1:{}", port(url)), &proxy.address.to_string())
}

#[tokio::test]
async fn servers_that_are_killed_and_started_again() {
    let (mut postgres, mut redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let drill = drill(&postgres.create().await, &redis.url()).await;
    postgres.signal_all(Signal::SIGKILL);
    drill.without_postgres().await;
    postgres.restart().await;
    drill.recovered(&[]).await;
    redis.signal(Signal::SIGKILL);
    let accepted = drill.without_redis().await;
    redis.restart().await;
    drill.recovered(&[&accepted]).await;
    drill.stop().await;
}

#[tokio::test]
async fn servers_that_are_stopped() {
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let drill = drill(&postgres.create().await, &redis.url()).await;
    postgres.signal_all(Signal::SIGSTOP);
    drill.without_postgres().await;
    postgres.signal_all(Signal::SIGCONT);
    drill.recovered(&[]).await;
    redis.signal(Signal::SIGSTOP);
    let accepted = drill.without_redis().await;
    redis.signal(Signal::SIGCONT);
    drill.recovered(&[&accepted]).await;
    drill.stop().await;
}

async fn on_the_wire(fault: Wire) {
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let (store, queue) = (postgres.create().await, redis.url());
    let (to_postgres, to_redis) = (Proxy::before(port(&store)).await, Proxy::before(port(&queue)).await);
    let drill = drill(&by_way_of(&to_postgres, &store), &by_way_of(&to_redis, &queue)).await;
    to_postgres.set(fault);
    drill.without_postgres().await;
    to_postgres.set(Wire::Whole);
    drill.recovered(&[]).await;
    to_redis.set(fault);
    let accepted = drill.without_redis().await;
    to_redis.set(Wire::Whole);
    drill.recovered(&[&accepted]).await;
    drill.stop().await;
}

#[tokio::test]
async fn sockets_that_are_cut() {
    on_the_wire(Wire::Cut).await;
}

#[tokio::test]
async fn packets_that_are_swallowed() {
    on_the_wire(Wire::Dead).await;
}

/// Passwords that were changed on the servers are read again from their files.
#[tokio::test]
async fn passwords_that_are_changed() {
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let url = postgres.create().await;
    let server = postgres::connect(&url).await;
    owned_by_app(&server, "first").await;
    let hba: String = server.query("SHOW hba_file", &[]).await.unwrap()[0].get(0);
    let trust = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(&hba, format!("host all app 127.0.0.1/32 scram-sha-256\n{trust}")).unwrap();
    server.query("SELECT pg_reload_conf()", &[]).await.unwrap();
    let client = Redis::open(redis::config(&redis.url())).await.unwrap();
    let set_password = async |client: &Redis, password: &str| {
        let mut set = cmd("CONFIG");
        client.query::<()>(set.arg("SET").arg("requirepass").arg(password)).await.unwrap();
    };
    set_password(&client, "first").await;

    let setup = Setup::new();
    let (store_file, queue_file) = (setup.file("store-url"), setup.file("queue-url"));
    let store_url =
        |password: &str| url.replace("postgres://postgres@", &format!("postgres://app:{password}@"));
    let queue_url = |password: &str| redis.url().replace("redis://", &format!("redis://:{password}@"));
    std::fs::write(&store_file, store_url("first")).unwrap();
    std::fs::write(&queue_file, queue_url("first")).unwrap();
    let setup = setup
        .set(&format!("store.url_file={}", store_file.display()))
        .set(&format!("queue.url_file={}", queue_file.display()));
    let drill = drill_with(setup, &url, "store").await;

    let end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    server.execute("ALTER ROLE app PASSWORD 'second'", &[]).await.unwrap();
    server.query(end_all, &[]).await.unwrap();
    drill.without_postgres().await;
    let (_, reasons) = readiness(&drill.perennial).await;
    assert!(reasons.contains("password authentication failed"), "{reasons}");
    std::fs::write(&store_file, store_url("second")).unwrap();
    drill.recovered(&[]).await;

    set_password(&client, "second").await;
    let authenticated = Redis::open(redis::config(&queue_url("second"))).await.unwrap();
    let mut kill = cmd("CLIENT");
    authenticated
        .query::<()>(kill.arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes"))
        .await
        .unwrap();
    let accepted = drill.without_redis().await;
    std::fs::write(&queue_file, queue_url("second")).unwrap();
    drill.recovered(&[&accepted]).await;
    for secret in ["first", "second"] {
        assert!(!drill.perennial.log().contains(&format!(":{secret}@")), "a password was logged");
    }
    drill.stop().await;
}

/// Gives a database to a user without special rights.
async fn owned_by_app(server: &Postgres, password: &str) {
    let database: String = server.query("SELECT current_database()::text", &[]).await.unwrap()[0].get(0);
    for sql in [
        format!("CREATE ROLE app LOGIN PASSWORD '{password}'"),
        format!("ALTER DATABASE {database} OWNER TO app"),
        "GRANT ALL ON SCHEMA public TO app".to_owned(),
    ] {
        server.execute(&sql, &[]).await.unwrap();
    }
}

#[tokio::test]
async fn servers_that_take_no_more_connections() {
    let postgres = postgres::Server::start(&["max_connections=20", "superuser_reserved_connections=3"]).await;
    let redis = redis::Server::durable().await;
    let url = postgres.create().await;
    let server = postgres::connect(&url).await;
    owned_by_app(&server, "any").await;
    let drill = drill(&url.replace("postgres@", "app:any@"), &redis.url()).await;
    // Other clients take all free connections, and the connections of the process are terminated.
    let mut others = Vec::new();
    let end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    let one_each = Config { size: 1, ..postgres::config(&url) };
    while !drill.ask().await.iter().all(|status| *status == 503) {
        assert!(others.len() < 20, "it still has connections");
        server.query(end_all, &[]).await.unwrap();
        while let Ok(other) = Postgres::open(one_each.clone()).await {
            others.push(other);
        }
    }
    drill.without_postgres().await;
    let (_, reasons) = readiness(&drill.perennial).await;
    assert!(reasons.contains("too many clients already"), "{reasons}");
    others.iter().for_each(Postgres::close);
    drill.recovered(&[]).await;

    let client = Redis::open(redis::config(&redis.url())).await.unwrap();
    client.query::<()>(cmd("CONFIG").arg("SET").arg("maxclients").arg(1)).await.unwrap();
    client
        .query::<()>(cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes"))
        .await
        .unwrap();
    let accepted = drill.without_redis().await;
    client.query::<()>(cmd("CONFIG").arg("SET").arg("maxclients").arg(1000)).await.unwrap();
    drill.recovered(&[&accepted]).await;
    drill.stop().await;
}

/// A small disk. It is unmounted when this is dropped.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    /// Mounts the disk. Returns `None` with a message where the test may not mount; CI runs as root.
    fn at(path: &'a Path, size: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("not tested: a full disk takes root, who may mount a small one");
            return None;
        }
        std::fs::create_dir_all(path).unwrap();
        let options = format!("size={size},mode=0777");
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
        Some(Self(path))
    }

    /// Fills the disk to the last byte.
    fn fill(&self) {
        let mut file = File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    fn clear(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        // The detached mount stays usable for processes that still have open files on it.
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

/// Stores more than fits into the pages that are already allocated, until a request is refused.
async fn until_nothing_is_written(perennial: &Perennial, double: &Double) {
    eventually_within(SOON_AFTER, "nothing more is written", || async {
        let metadata = json!({ "filler": "x".repeat(4000) });
        let request = json!({ "subscription": double.mint(), "metadata": metadata, "tags": ["filler"] });
        let answer = perennial.client().post("/subscriptions", &request).await;
        let is_full = answer.status == 503 && answer.header("retry-after").is_some();
        assert!(is_full || answer.status == 201, "{} {}", answer.status, answer.text());
        is_full.then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_disk_of_postgres_that_is_full() {
    let directory = TempDir::new().unwrap();
    let Some(disk) = Disk::at(directory.path(), "24m") else { return };
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let url = postgres.create().await;
    let server = postgres::connect(&url.replace("/test_", "/postgres?application_name=test_")).await;
    let name = url.rsplit('/').next().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(postgres.user()), None).unwrap();
    let location = directory.path().display();
    server.execute(&format!("CREATE TABLESPACE small LOCATION '{location}'"), &[]).await.unwrap();
    server.execute(&format!("ALTER DATABASE {name} SET TABLESPACE small"), &[]).await.unwrap();
    let drill = drill(&url, &redis.url()).await;
    drill.perennial.done(&drill.sending).await;
    disk.fill();
    until_nothing_is_written(&drill.perennial, &drill.double).await;
    // Stored data can still be read.
    assert!(drill.ask().await.iter().all(|status| *status == 200));
    drill.goes_on().await;
    disk.clear();
    let cleared = drill.perennial.client().get("/subscriptions?tag=filler&limit=1000").await.json();
    for subscription in cleared["subscriptions"].as_array().unwrap() {
        let path = format!("/subscriptions/{}", subscription["id"]);
        eventually_within(SOON_AFTER, "it writes again", || async {
            (drill.perennial.client().delete(&path, None).await.status == 204).then_some(())
        })
        .await;
    }
    drill.recovered(&[]).await;
    drill.stop().await;
    drop(postgres);
}

#[tokio::test]
async fn a_disk_of_redis_that_is_full() {
    let directory = TempDir::new().unwrap();
    let Some(disk) = Disk::at(directory.path(), "4m") else { return };
    let directory = directory.path().to_str().unwrap();
    // With `appendfsync always`, Redis would exit when it cannot write.
    let options =
        ["--appendonly", "yes", "--appendfsync", "everysec", "--appenddirname", "log", "--dir", directory];
    let (postgres, redis) = (postgres::Server::start(&[]).await, redis::Server::start(&options).await);
    let drill = drill(&postgres.create().await, &redis.url()).await;
    disk.fill();
    let client = Redis::open(redis::config(&redis.url())).await.unwrap();
    eventually_within(SOON_AFTER, "it takes no more writes", || async {
        client.query::<()>(cmd("SET").arg("filler").arg("x".repeat(100_000))).await.err()
    })
    .await;
    let id = drill.perennial.notify(&json!({ "to": { "all": true }, "payload": "y" })).await;
    assert!(drill.ask().await.iter().all(|status| *status == 200));
    drill.goes_on().await;
    disk.clear();
    drill.recovered(&[&id]).await;
    drill.stop().await;
    drop(redis);
}

#[tokio::test]
async fn our_own_disk_that_is_full() {
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double);
    let data_dir = setup.data_dir();
    let Some(disk) = Disk::at(&data_dir, "8m") else { return };
    let mut perennial = setup.start().await;
    perennial.subscribe(&double, 3).await;
    disk.fill();
    until_nothing_is_written(&perennial, &double).await;
    assert_eq!(perennial.client().get("/subscriptions").await.status, 200);
    assert_eq!(perennial.admin().get("/livez").await.status, 200);
    disk.clear();
    let request = json!({ "to": { "tags": "not filler" }, "payload": "x" });
    let id = eventually_within(SOON_AFTER, "it writes again", || async {
        let answer = perennial.client().post("/notify", &request).await;
        (answer.status == 202).then(|| answer.json()["id"].as_str().unwrap().to_owned())
    })
    .await;
    assert_eq!(perennial.done(&id).await["outcomes"], json!({ "delivered": 3 }));
    assert_eq!(perennial.stop().await, Some(0));
}

/// The standby of a primary takes over, and the process finds it by the list of hosts.
#[tokio::test]
async fn a_standby_that_takes_over() {
    let (mut primary, redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let url = primary.create().await;
    let standby = primary.standby().await;
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", primary.port(), standby.port());
    let both =
        url.replace(&format!("127.0.0.1:{}", primary.port()), &hosts) + "?target_session_attrs=read-write";
    let drill = drill(&both, &redis.url()).await;
    drill.perennial.done(&drill.sending).await;
    standby.caught_up_with(&primary).await;
    primary.signal_all(Signal::SIGKILL);
    drill.without_postgres().await;
    standby.promote().await;
    drill.recovered(&[]).await;
    drill.stop().await;
    primary.restart().await;
}
