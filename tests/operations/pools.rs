//! The program while the servers that it depends on are unreachable, and the load that it puts on them.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use perennial_store::pool::redis::Redis;
use perennial_store::pool::redis::client::{Script, cmd};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::Command;

use support::certificates::Certificates;
use support::double::Double;
use support::postgres::{self, Database};
use support::process::Setup;
use support::readiness::{readiness, until_ready_says};
use support::stores::on_postgres;
use support::{eventually, redis};

#[tokio::test]
async fn who_is_away_is_named_by_its_policy_and_found_again() {
    let (mut postgres, mut redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
    let setup = Setup::new()
        .set(&format!("queue.url={}", redis.url()))
        .set("store.readiness=required")
        .set("queue.readiness=degraded")
        .set("store.connect_timeout=1s");
    let perennial = on_postgres(setup, &postgres.create().await).await.start().await;
    assert_eq!(readiness(&perennial).await, (200, String::new()));
    for name in ["postgres", "redis"] {
        eventually("nobody waits for a connection", || async {
            let pool = perennial.admin().get("/pools").await.json()[name].clone();
            let size = pool["size"].as_u64().unwrap();
            (size >= 1 && pool["max"] == 10 && pool["waiting"] == 0).then_some(())
        })
        .await;
    }

    redis.signal(Signal::SIGKILL);
    until_ready_says(&perennial, 200, "redis: Redis cannot be reached").await;
    assert_eq!(perennial.logged("not met").await["condition"], "redis");
    redis.restart().await;
    until_ready_says(&perennial, 200, "").await;

    postgres.signal_all(Signal::SIGKILL);
    until_ready_says(&perennial, 503, "postgres: ").await;
    let refused = perennial.client().get("/notifications").await;
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    assert_eq!(perennial.admin().get("/livez").await.status, 200, "that is no reason to be restarted");
    assert_eq!(
        perennial.client().without_key().get("/push/key").await.status,
        200,
        "what does not need it goes on"
    );
    postgres.restart().await;
    until_ready_says(&perennial, 200, "").await;
    eventually("requests are served again", || async {
        (perennial.client().get("/notifications").await.status == 200).then_some(())
    })
    .await;
    let metrics = perennial.admin().get("/metrics").await.text();
    for line in [
        "perennial_pool{pool=\"postgres\",state=\"available\"}",
        "perennial_pool_wait_seconds_count{pool=\"redis\"}",
    ] {
        assert!(metrics.contains(line), "{line}");
    }
}

#[tokio::test]
async fn a_primary_that_only_reads_is_none() {
    let postgres = postgres::Server::start(&[]).await;
    let url = postgres.create().await;
    let perennial = on_postgres(Setup::new(), &url).await.start().await;
    let server = postgres::connect(&url).await;
    let only_reads = async |word: &str| {
        let sql = format!("ALTER SYSTEM SET default_transaction_read_only = {word}");
        // A session that only reads may still execute this.
        server.execute(&sql, &[]).await.unwrap();
        server.query("SELECT pg_reload_conf()", &[]).await.unwrap();
    };
    only_reads("on").await;
    until_ready_says(&perennial, 200, "postgres: it only reads").await;
    only_reads("off").await;
    until_ready_says(&perennial, 200, "").await;
}

#[tokio::test]
async fn what_a_client_has_left_is_cancelled_on_the_server() {
    let database = Database::new().await;
    let setup = Setup::new().set("store.statement_timeout=10m").set("server.request_timeout=10m");
    let perennial = on_postgres(setup, database.url()).await.start().await;
    let server = database.connect().await;
    let mut lock = server.get().await.unwrap();
    let lock = lock.begin().await.unwrap();
    lock.batch("LOCK TABLE subscriptions").await.unwrap();
    let waits = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%subscriptions%'";
        server.query(sql, &[]).await.unwrap()[0].get::<_, i64>(0)
    };
    let asked = perennial.client().get("/subscriptions");
    let left = tokio::time::timeout(Duration::from_secs(1), asked).await;
    assert!(left.is_err(), "it waits for the lock");
    // The statement ends long before its own timeout.
    eventually("nobody waits any more", || async { (waits().await == 0).then_some(()) }).await;
    lock.commit().await.unwrap();
    let listed = perennial.client().get("/subscriptions").await;
    assert_eq!((listed.status.as_u16(), listed.json()["subscriptions"].clone()), (200, json!([])));
    let pool: Value = perennial.admin().get("/pools").await.json()["postgres"].clone();
    assert_eq!(pool["waiting"], 0, "{pool}");
}

/// However many clients give up and however slow the server is, the server runs no more statements than
/// the pool has connections.
#[tokio::test]
async fn those_who_leave_free_no_place_before_their_statements_end() {
    let database = Database::new().await;
    let setup = Setup::new().set("store.statement_timeout=10m").set("server.request_timeout=10m");
    let setup = setup.set("store.connections=2").set("store.wait=200ms");
    let perennial = on_postgres(setup, database.url()).await.start().await;
    let server = database.connect().await;
    let mut lock = server.get().await.unwrap();
    let lock = lock.begin().await.unwrap();
    lock.batch("LOCK TABLE subscriptions").await.unwrap();
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
               AND application_name LIKE 'perennial%' AND query NOT LIKE 'LISTEN%' AND pid <> pg_backend_pid()";
    let ours = database.connect().await;
    let before: i64 = ours.query(sql, &[]).await.unwrap()[0].get(0);
    let (mut most, mut left) = (0, 0);
    for _ in 0..40 {
        let asked = perennial.client().get("/subscriptions");
        left += usize::from(tokio::time::timeout(Duration::from_millis(50), asked).await.is_err());
        most = most.max(ours.query(sql, &[]).await.unwrap()[0].get::<_, i64>(0));
    }
    assert!(left > 0, "some have waited for the lock, and left");
    assert!(most <= before + 2, "{most} connections, {before} before");
    lock.commit().await.unwrap();
    eventually("it serves again", || async {
        (perennial.client().get("/subscriptions").await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_cluster_is_refused_by_its_name() {
    let (directory, port) = (tempfile::TempDir::new().unwrap(), support::free_port());
    let _cluster = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--dir"])
        .arg(directory.path())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    eventually("it answers", || async { TcpStream::connect(("127.0.0.1", port)).await.ok() }).await;
    let mut refused = Setup::new().set(&format!("queue.url=redis://127.0.0.1:{port}/")).spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(refused.log().contains("it is a cluster"), "{}", refused.log());
}

#[tokio::test]
async fn connections_are_encrypted_and_servers_checked() {
    let certificates = Certificates::new();
    let file = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let (certificate, key) = (file(certificates.certificate()), file(certificates.key()));
    let postgres = postgres::Server::start(&[
        "ssl=on",
        &format!("ssl_cert_file={certificate}"),
        &format!("ssl_key_file={key}"),
    ])
    .await;
    let tls_port = support::free_port().to_string();
    let redis = redis::Server::start(&[
        "--tls-port",
        &tls_port,
        "--tls-cert-file",
        &certificate,
        "--tls-key-file",
        &key,
        "--tls-auth-clients",
        "no",
        "--tls-ca-cert-file",
        &file(certificates.authority()),
    ])
    .await;
    let url = format!("{}?sslmode=require", postgres.create().await);
    let setup = || {
        Setup::new()
            .set(&format!("queue.url=rediss://127.0.0.1:{tls_port}/"))
            .set(&format!("queue.ca_file={}", file(certificates.authority())))
    };
    let trusting = setup().set(&format!("store.ca_file={}", file(certificates.authority())));
    let double = Double::start().await;
    let perennial = on_postgres(trusting.sending_to(&double), &url).await.start().await;
    perennial.subscribe(&double, 2).await;
    let progress = perennial.notify_and_wait(&json!({ "to": { "all": true }, "payload": "hello" })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 2 }));
    // With jobs in Postgres, one more connection listens.
    let listening = Setup::new().set(&format!("store.ca_file={}", file(certificates.authority())));
    let listening = listening.set(&format!("store.url={url}")).start().await;
    let plain =
        postgres::connect(&format!("postgres://postgres@127.0.0.1:{}/postgres", postgres.port())).await;
    let sql = "SELECT bool_and(ssl), count(*), count(*) FILTER (WHERE query LIKE 'LISTEN%')
               FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
               WHERE datname <> 'postgres' AND application_name = 'perennial'";
    eventually("all connections are encrypted, that which listens too", || async {
        let row = plain.query(sql, &[]).await.unwrap().remove(0);
        (row.get::<_, bool>(0) && row.get::<_, i64>(1) >= 4 && row.get::<_, i64>(2) == 1).then_some(())
    })
    .await;
    drop(listening);

    // A server whose certificate is not trusted is refused.
    let mut refused = setup().set(&format!("store.url={url}")).spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(refused.log().contains("certificate"), "{}", refused.log());
    drop(redis);
}

#[tokio::test]
async fn a_redis_that_became_a_replica_is_away_until_it_is_the_primary_again() {
    let server = redis::Server::durable().await;
    let client = Redis::open(redis::config(&server.url())).await.unwrap();
    let replicate = async |host: &str, port: &str| {
        client.query::<()>(cmd("REPLICAOF").arg(host).arg(port)).await.unwrap();
    };
    let setup = || Setup::new().set(&format!("queue.url={}", server.url()));
    let perennial = setup().start().await;
    replicate("127.0.0.1", "1").await;
    until_ready_says(&perennial, 200, "redis: it is a replica").await;
    let mut refused = setup().spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(refused.log().contains("it is a replica, wanted the primary"), "{}", refused.log());
    replicate("NO", "ONE").await;
    until_ready_says(&perennial, 200, "").await;
}

/// The shared connection is not checked while it is idle, but the next command must not fail because Redis closed it.
#[tokio::test]
async fn a_connection_that_redis_has_closed_costs_no_command() {
    let server = redis::Server::start(&[]).await;
    let client = Redis::open(redis::config(&server.url())).await.unwrap();
    let other = Redis::open(redis::config(&server.url())).await.unwrap();
    for _ in 0..10 {
        other.query::<u64>(cmd("CLIENT").arg("KILL").arg("TYPE").arg("normal")).await.unwrap();
        assert_eq!(client.query::<String>(&cmd("PING")).await.unwrap(), "PONG");
        let script = Script::new("return 1");
        assert_eq!(client.invoke_beside::<u8>(&script.prepare_invoke()).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn a_sentinel_is_refused_by_its_name() {
    let directory = tempfile::TempDir::new().unwrap();
    let port = support::free_port();
    let config = directory.path().join("sentinel.conf");
    std::fs::write(&config, format!("port {port}\nbind 127.0.0.1\ndir {}\n", directory.path().display()))
        .unwrap();
    let _sentinel = Command::new("redis-server")
        .arg(&config)
        .arg("--sentinel")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    eventually("it listens", || async {
        TcpStream::connect(("127.0.0.1", port)).await.is_ok().then_some(())
    })
    .await;
    let mut refused = Setup::new().set(&format!("queue.url=redis://127.0.0.1:{port}/")).spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(refused.log().contains("it is a Sentinel"), "{}", refused.log());
}

/// Redis is reachable but takes no writes, as when its memory is full or nothing can be saved to its disk.
#[tokio::test]
async fn a_redis_that_takes_no_writes_is_named_until_it_does() {
    let server = support::redis::Server::start(&[]).await;
    let setup = Setup::new().set(&format!("queue.url={}", server.url())).set("queue.readiness=degraded");
    let perennial = setup.start().await;
    let redis = Redis::open(support::redis::config(&server.url())).await.unwrap();
    let set = async |bytes: u64| {
        redis.query::<()>(cmd("CONFIG").arg("SET").arg("maxmemory").arg(bytes)).await.unwrap();
    };
    set(1).await;
    let refused = perennial
        .client()
        .post("/notify", &serde_json::json!({ "to": { "all": true }, "payload": "x" }))
        .await;
    assert!(refused.status == 202 || refused.status == 503, "{}", refused.text());
    until_ready_says(&perennial, 200, "it takes no writes").await;
    set(0).await;
    until_ready_says(&perennial, 200, "").await;
}

/// The Redis user has exactly the rights that the documentation lists.
#[tokio::test]
async fn a_redis_user_needs_no_more_than_is_documented() {
    let documented = include_str!("../../docs/operations.md")
        .split('`')
        .find(|text| text.starts_with("ACL SETUSER perennial"));
    let rights = documented.unwrap().strip_prefix("ACL SETUSER perennial on >PASSWORD ").unwrap().to_owned();
    for (is_told, rights) in [(true, rights.clone()), (false, rights.replace(" +info", ""))] {
        let server = redis::Server::durable().await;
        let admin = Redis::open(redis::config(&server.url())).await.unwrap();
        let mut set = cmd("ACL");
        set.arg("SETUSER").arg("perennial").arg("on").arg(">secret");
        rights.split(' ').for_each(|right| _ = set.arg(right));
        admin.query::<String>(&set).await.unwrap();
        let url = server.url().replace("redis://", "redis://perennial:secret@");
        let double = Double::start().await;
        let perennial = Setup::new().sending_to(&double).set(&format!("queue.url={url}")).start().await;
        perennial.subscribe(&double, 3).await;
        let progress = perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "x" })).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 3 }));
        for arguments in [
            &["jobs", "queues"][..],
            &["jobs", "pause", "push"],
            &["jobs", "resume", "push"],
            &["cron", "list"],
            &["keys", "add", "x"],
        ] {
            let output = perennial.setup.run(arguments).await;
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let log = perennial.log();
        assert_eq!(log.contains("does not let this user ask INFO"), !is_told, "{log}");
        let denied: Vec<&str> = log.lines().filter(|line| line.contains("NOPERM")).collect();
        assert!(denied.is_empty(), "{denied:?}");
    }
}

/// While a store is unreachable the log says so once, and not for every request that needs it.
#[tokio::test]
async fn a_store_that_is_away_is_told_once() {
    let postgres = postgres::Server::start(&[]).await;
    let perennial = on_postgres(Setup::new(), &postgres.create().await).await.start().await;
    let before = perennial.log_lines().len();
    postgres.signal_all(Signal::SIGKILL);
    perennial.logged("not met").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let lines = perennial.log_lines();
    let complaints: Vec<&Value> =
        lines[before..].iter().filter(|line| line["level"] == "WARN" || line["level"] == "ERROR").collect();
    assert!(complaints.len() < 30, "{}: {complaints:#?}", complaints.len());
    let claims = complaints.iter().filter(|line| line["message"] == "no jobs could be claimed").count();
    assert!(claims <= 1, "{complaints:#?}");
}
