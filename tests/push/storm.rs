//! Everything at once: three replicas, some of which are killed, restarts of Postgres and Redis, and a push service
//! that answers with 429, 500, cuts and silence. Every member is reached or accounted for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use perennial::sink::Answer;
use serde_json::{Value, json};

use support::double::{Double, status_answer};
use support::process::{Perennial, Setup};
use support::{eventually, full, postgres, redis};

use support::stores::on_postgres;

/// Maximum number of sends of a batch that are begun and not recorded.
const CHECKPOINT: usize = 10;
/// Usual number of requests on a connection.
const CUT: usize = 30;
/// Maximum number of batches, of all kinds, that a replica has claimed.
const BATCHES: usize = 6;

#[tokio::test]
async fn everybody_is_reached_or_accounted_for() {
    let (audience, kills) = if full() { (40_000, 12) } else { (3_000, 2) };
    let double = Double::start().await;
    let mut postgres = postgres::Server::start(&["fsync=off"]).await;
    let mut redis = redis::Server::durable().await;
    let database = postgres.create().await;
    let setup = || {
        let setup = Setup::new()
            .sending_to(&double)
            .set("push.timeout=2s")
            .set("push.attempts=100")
            .set(&format!("push.checkpoint.sends={CHECKPOINT}"))
            .set("push.batch=200")
            .set("push.batches=4")
            .set("push.retry_batches=2")
            .set("telemetry.log=warn")
            .set(&format!("queue.url={}", redis.url()));
        on_postgres(setup, &database)
    };
    let mut replicas =
        vec![setup().await.start().await, setup().await.start().await, setup().await.start().await];
    let file = replicas[0].setup.file("all.ndjson");
    let lines: Vec<String> =
        (0..audience).map(|_| json!({ "subscription": double.mint() }).to_string()).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let imported = replicas[0].setup.run(&["subscriptions", "import", file.to_str().unwrap()]).await;
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));

    let unclear = Arc::new(AtomicUsize::new(0));
    let noted = Arc::clone(&unclear);
    double.script(move |_| match fastrand::u32(..1000) {
        0..30 => status_answer(429, &[("retry-after", "1")]),
        30..60 => status_answer(500, &[]),
        60..65 => {
            noted.fetch_add(1, Ordering::SeqCst);
            Answer::Cut
        }
        65..67 => Answer::Stall,
        _ => Answer::Take,
    });
    let began = Instant::now();
    let id = replicas[0].notify(&json!({ "to": {"all": true}, "notification": {"title": "Storm"} })).await;
    for kill in 1..=kills {
        let until = audience * kill / (kills + 2);
        let reached = || async { (double.reached_and_repeats().0 >= until).then_some(()) };
        support::eventually_within(Duration::from_secs(120), "some were reached", reached).await;
        let dead = replicas.remove(fastrand::usize(..replicas.len()));
        replicas.push(dead.kill_and_start_again().await);
        match kill % 3 {
            1 => postgres.restart().await,
            2 => redis.restart().await,
            _ => {}
        }
    }
    let progress = ended(&replicas, &id).await;
    let (reached, repeats) = double.reached_and_repeats();
    println!(
        "{audience} subscribers, {kills} kills, {:?}: {reached} reached, {repeats} repeats, {} cuts",
        began.elapsed(),
        unclear.load(Ordering::SeqCst)
    );
    let sum: u64 = progress["outcomes"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(sum, audience as u64, "{progress}");
    assert_eq!(reached, audience, "{progress}");
    assert_eq!(progress["outcomes"], json!({ "delivered": audience }));
    // A restart of a store stops every batch of all three replicas. A cut also ends requests on its connection that
    // the service had already accepted.
    let restarts = kills - kills / 3;
    let by_kills = (kills + restarts * 3) * BATCHES * CHECKPOINT;
    let by_cuts = unclear.load(Ordering::SeqCst) * CUT;
    assert!(repeats <= by_kills + by_cuts, "{repeats} repeats of {audience}, {by_kills} + {by_cuts}");
    assert!(double.refused().is_empty(), "{:?}", double.refused());
}

/// Waits for the end of a notification, and asks the replicas in turn.
async fn ended(replicas: &[Perennial], id: &str) -> Value {
    let ask = || async {
        for replica in replicas {
            let path = format!("/notifications/{id}");
            let answer = replica.client().try_send(http::Method::GET, &path, None, bytes::Bytes::new()).await;
            if let Ok(answer) = answer
                && answer.status.is_success()
                && answer.json()["state"] == "done"
            {
                return Some(answer.json());
            }
        }
        None
    };
    support::eventually_within(Duration::from_secs(600), "the notification is done", ask).await
}

#[tokio::test]
async fn of_three_replicas_that_keep_a_rate_one_dies() {
    let double = Double::start().await;
    let server = postgres::Server::start(&["fsync=off"]).await;
    let database = server.create().await;
    let setup = || on_postgres(Setup::new().sending_to(&double).set("push.small_audience=5"), &database);
    let mut replicas =
        vec![setup().await.start().await, setup().await.start().await, setup().await.start().await];
    replicas[0].subscribe(&double, 150).await;
    let id = replicas[0].notify(&json!({ "to": {"all": true}, "payload": "x", "rate": 50 })).await;
    eventually("it is under way", || async { (double.taken().len() > 20).then_some(()) }).await;
    let dead = replicas.remove(1);
    drop(dead);
    let progress = ended(&replicas, &id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 150 }));
    assert_eq!(double.reached_and_repeats().0, 150);
}
