//! API keys: created, replaced and revoked while servers run, with their scopes and rate limits.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use support::double::Double;
use support::http::Client;
use support::keys::add_key;
use support::postgres::Database;
use support::process::{Perennial, Setup};
use support::redis::{self, Prefix};
use support::stores::{on_postgres, with_redis};
use support::{eventually, eventually_within};

async fn status(client: &Client) -> u16 {
    client.get("/notifications").await.status.as_u16()
}

async fn command(setup: &Setup, arguments: &[&str]) -> String {
    let output = setup.run(arguments).await;
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

async fn cache(perennial: &Perennial, name: &str) -> Value {
    perennial.admin().get("/cache").await.json()[name].clone()
}

#[tokio::test]
async fn keys_are_made_replaced_and_revoked_while_it_runs() {
    let perennial = Setup::new().start().await;
    let setup = &perennial.setup;
    let first = add_key(setup, "backend", &["--scopes", "read,notify", "--expires-in", "720h"]).await;
    let with = |key: &str| perennial.client().with_key(key);
    assert_eq!(status(&with(&first)).await, 200);
    // The key lacks the scope for this request.
    let refused = with(&first).post("/jobs/x", &json!({ "payload": {} })).await;
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("the scope jobs"), "{}", refused.text());
    let twice = setup.run(&["keys", "add", "backend"]).await;
    assert!(String::from_utf8_lossy(&twice.stderr).contains("replace it"));

    // When two commands change the key at once, one of them is too late.
    for _ in 0..5 {
        let (one, other) = tokio::join!(
            setup.run(&["keys", "replace", "backend", "--overlap", "1h"]),
            setup.run(&["keys", "revoke", "backend"])
        );
        assert!(other.status.success());
        if one.status.success() {
            // Either the key was replaced and then revoked, or it was revoked first and there was nothing to replace.
            let key = String::from_utf8(one.stdout).unwrap();
            assert_eq!(status(&with(key.trim())).await, 401);
        }
        add_key(setup, "backend", &[]).await;
    }
    command(setup, &["keys", "revoke", "backend"]).await;
    let first = add_key(setup, "backend", &["--scopes", "read,notify", "--expires-in", "720h"]).await;

    // Both keys are valid for a while and count as one caller: a request is not done twice because a key was replaced.
    let second = command(setup, &["keys", "replace", "backend", "--overlap", "1h"]).await.trim().to_owned();
    let request = json!({ "to": { "all": true }, "payload": "x" });
    let send = async |key: &str| {
        with(key).with_header("idempotency-key", "one").post("/notify", &request).await.json()["id"].clone()
    };
    assert_eq!(send(&first).await, send(&second).await);
    let third = command(setup, &["keys", "replace", "backend", "--overlap", "0s"]).await.trim().to_owned();
    assert_eq!((status(&with(&first)).await, status(&with(&second)).await), (401, 401));
    assert_eq!(status(&with(&third)).await, 200);
    command(setup, &["keys", "revoke", "backend"]).await;
    assert_eq!(status(&with(&third)).await, 401);
    assert_eq!(status(perennial.client()).await, 200, "the first key of all");

    let list = command(setup, &["keys", "list"]).await;
    assert!(list.lines().all(|line| !line.contains("backend") || line.ends_with("(ended)")), "{list}");
    for bad in [
        &["keys", "add", "Bad Name"][..],
        &["keys", "add", "x", "--scopes", "everything"],
        &["keys", "add", "x", "--per-minute", "0"],
        &["keys", "add", "x", "--expires-in", "soon"],
        &["keys", "add", "x", "--site", "zoo"],
        &["keys", "revoke", "nobody"],
    ] {
        assert_eq!(setup.run(bad).await.status.code(), Some(1), "{bad:?}");
    }
    // The keys themselves are stored neither in the data directory nor in the log.
    for key in [&first, &second, &third] {
        for entry in std::fs::read_dir(setup.data_dir()).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap_or_default();
            assert!(!bytes.windows(key.len()).any(|part| part == key.as_bytes()));
        }
        assert!(!perennial.log().contains(key.as_str()));
    }
    assert!(cache(&perennial, "api_keys").await["hits"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_key_ends_when_it_was_said_to() {
    let perennial = Setup::new().start().await;
    let key = add_key(&perennial.setup, "brief", &["--expires-in", "1s"]).await;
    let brief = perennial.client().with_key(&key);
    eventually("it ends", || async { (status(&brief).await == 401).then_some(()) }).await;
    // The name of an expired key is free again.
    add_key(&perennial.setup, "brief", &[]).await;
}

#[tokio::test]
async fn a_key_in_a_file_is_replaced_by_changing_the_file() {
    let setup = Setup::new();
    let file = setup.file("backend.key");
    let (old, new) = ("old-0123456789-0123456789", "new-0123456789-0123456789");
    std::fs::write(&file, format!("{old}\n")).unwrap();
    let keys = |scopes: &str| {
        format!("access.keys=[{{ name = 'backend', file = '{}', scopes = [{scopes}] }}]", file.display())
    };
    let perennial = setup.set(&keys("'read'")).start().await;
    let with = |key: &str| perennial.client().with_key(key);
    assert_eq!(status(&with(old)).await, 200);
    assert_eq!(with(old).post("/notify", &json!({})).await.status, 403);
    assert_eq!(status(&with(new)).await, 401);
    std::fs::write(&file, format!("{new}\n{old}\n")).unwrap();
    eventually("both are good", || async { (status(&with(new)).await == 200).then_some(()) }).await;
    assert_eq!(status(&with(old)).await, 200);
    // A broken file changes nothing.
    std::fs::write(&file, "short\n").unwrap();
    perennial
        .logged("the keys stay as they were: wanted keys of at least 24 characters, which nobody can guess")
        .await;
    assert_eq!(status(&with(new)).await, 200);
    std::fs::write(&file, format!("{new}\n")).unwrap();
    eventually("the old one is not", || async { (status(&with(old)).await == 401).then_some(()) }).await;
    assert_eq!(status(&with(new)).await, 200);
    std::fs::remove_file(&file).unwrap();
    eventually("none is good", || async { (status(&with(new)).await == 401).then_some(()) }).await;
    std::fs::write(&file, format!("{new}\n")).unwrap();

    for (bad, wanted) in [
        (keys("'everything'"), "access.keys[0].scopes"),
        (keys("'read'").replace(" scopes", " per_minute = 0, scopes"), "access.keys[0].per_minute"),
        (keys("'read'").replace(" scopes", " skopes = [], scopes"), "access.keys[0].skopes"),
        (keys("'read'").replace("backend.key", "nothing.key"), "access.keys[0].file"),
        (keys("'read'").replace(" scopes", " site = 'zoo', scopes"), "access.keys[0].site"),
    ] {
        let refused = Setup::new().set(&bad).run(&["check"]).await;
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && text.contains(wanted), "{bad}: {text}");
    }
}

#[tokio::test]
async fn a_key_may_be_used_so_often() {
    let perennial = Setup::new().start().await;
    let key = add_key(&perennial.setup, "slow", &["--per-minute", "3"]).await;
    let slow = perennial.client().with_key(&key);
    for left in ["2", "1", "0"] {
        let answer = slow.get("/notifications").await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("ratelimit-policy"), Some("\"key\";q=3;w=60"));
        assert!(answer.header("ratelimit").unwrap().starts_with(&format!("\"key\";r={left};t=")));
    }
    let refused = slow.get("/notifications").await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    assert!(refused.header("ratelimit").unwrap().starts_with("\"key\";r=0;t="));
    // Other keys are not limited.
    let other = perennial.client().get("/notifications").await;
    assert_eq!((other.status.as_u16(), other.header("ratelimit")), (200, None));
}

/// Two replicas on one store share a limit, and a revoked key is dropped by both.
#[tokio::test]
async fn replicas_share_limits_and_hear_of_changes() {
    let (database, prefix) = (Database::new().await, Prefix::new().await);
    let one = on_postgres(with_redis(Setup::new(), &prefix), database.url()).await.start().await;
    let other = with_redis(Setup::new(), &prefix).set(&format!("store.url={}", database.url()));
    let other = other.start().await;
    let key = add_key(&one.setup, "slow", &["--per-minute", "4"]).await;
    let clients = [one.client().with_key(&key), other.client().with_key(&key)];
    let mut statuses = Vec::new();
    for turn in 0..6 {
        statuses.push(status(&clients[turn % 2]).await);
    }
    assert_eq!(statuses, [200, 200, 200, 200, 429, 429]);

    let key = add_key(&one.setup, "known", &[]).await;
    assert_eq!(status(&other.client().with_key(&key)).await, 200);
    command(&one.setup, &["keys", "revoke", "known"]).await;
    // The entry is dropped sooner than it would have expired by itself.
    let gone = async || (status(&other.client().with_key(&key)).await == 401).then_some(());
    eventually_within(Duration::from_secs(8), "the other replica has heard of it", gone).await;
    assert!(cache(&other, "api_keys").await["forgotten"].as_u64().unwrap() > 0);

    // The same holds for a VAPID key; browsers keep the key that they have subscribed with.
    let double = Double::start().await;
    let public = async |perennial: &Perennial| {
        perennial.client().without_key().get("/push/key").await.json()["key"].as_str().unwrap().to_owned()
    };
    let before = public(&other).await;
    command(&one.setup, &["keys", "rotate"]).await;
    let after = eventually_within(Duration::from_secs(8), "the other replica has the new key", || async {
        Some(public(&other).await).filter(|key| *key != before)
    })
    .await;
    assert_eq!(public(&one).await, after);
    drop(double);
}

#[tokio::test]
async fn a_limit_is_kept_without_redis() {
    let mut redis = redis::Server::durable().await;
    let perennial = Setup::new().set(&format!("queue.url={}", redis.url())).start().await;
    let key = add_key(&perennial.setup, "slow", &["--per-minute", "2"]).await;
    let slow = perennial.client().with_key(&key);
    assert_eq!(status(&slow).await, 200);
    // The gauge of the circuit breaker is there before it opens for the first time.
    let metrics = perennial.admin().get("/metrics").await.text();
    let closed = "perennial_breaker_open{dependency=\"rate limits\"} 0";
    assert!(metrics.lines().any(|line| line == closed), "{closed} is not in\n{metrics}");
    redis.signal(Signal::SIGKILL);
    // The process counts for itself now, and starts from zero.
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(status(&slow).await);
    }
    assert_eq!(statuses, [200, 200, 429]);
    redis.restart().await;
}
