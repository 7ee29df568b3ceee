//! What becomes of the program when the servers that it depends on are away, and of them when it asks too much.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::stores::on_postgres;
use support::postgres::{self, Database};
use support::process::{Perennial, Setup};
use support::{eventually, eventually_within, redis};

/// What `/readyz` says: its status, and everything that is wrong.
async fn readiness(perennial: &Perennial) -> (u16, String) {
    let answer = perennial.admin().get("/readyz").await;
    let reasons = answer.json()["reasons"].as_array().cloned().unwrap_or_default();
    let reasons: Vec<String> = reasons.iter().map(|reason| reason.as_str().unwrap().to_owned()).collect();
    (answer.status.as_u16(), reasons.join("; "))
}

async fn until_ready_says(perennial: &Perennial, status: u16, part: &str) {
    eventually_within(2 * support::SOON, &format!("/readyz says {status} {part}"), || async {
        let (found, reasons) = readiness(perennial).await;
        (found == status && reasons.contains(part) && reasons.is_empty() == part.is_empty()).then_some(())
    })
    .await;
}

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
    let pools = perennial.admin().get("/pools").await.json();
    for pool in ["postgres", "redis"] {
        let size = pools[pool]["size"].as_u64().unwrap();
        assert!(size >= 1 && pools[pool]["max"] == 10 && pools[pool]["waiting"] == 0, "{pools}");
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
    assert_eq!(perennial.client().get("/push/key").await.status, 200, "what does not need it goes on");
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
        // What only reads may still be told this.
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
    // Long before its statement would have ended by itself.
    eventually("nobody waits any more", || async { (waits().await == 0).then_some(()) }).await;
    lock.commit().await.unwrap();
    let listed = perennial.client().get("/subscriptions").await;
    assert_eq!((listed.status.as_u16(), listed.json()["subscriptions"].clone()), (200, json!([])));
    let pool: Value = perennial.admin().get("/pools").await.json()["postgres"].clone();
    assert_eq!(pool["waiting"], 0, "{pool}");
}
