//! The move from the embedded store to Postgres, which only the operator notices.

use std::path::PathBuf;

use serde_json::{Value, json};

use support::double::Double;
use support::keys::add_key;
use support::postgres::Database;
use support::process::{Perennial, Setup};
use support::redis::Prefix;

/// Returns the same setup with further settings.
fn on(setup: Setup, settings: &[String]) -> Setup {
    settings.iter().fold(setup, |setup, setting| setup.set(setting))
}

async fn adopted(queue: Option<&Prefix>) {
    let (double, database) = (Double::start().await, Database::new().await);
    let setup = Setup::new().sending_to(&double).set("sites.shop.origins=https://shop.example");
    let mut before = setup.start().await;
    // This site comes later and is first in the alphabet, so its number is not the one that a new store would give it.
    assert_eq!(before.stop().await, Some(0));
    let mut before = before.setup.set("sites.news.origins=https://news.example").start().await;
    let of_news = add_key(&before.setup, "backend", &["--site", "news"]).await;
    let news_key = before.client().with_key(&of_news).get("/push/key").await.json();
    let ann = json!({ "subscription": double.mint(), "user": "ann", "tags": ["news", "fr"], "metadata": { "n": "Ann" } });
    let ann = before.client().post("/subscriptions", &ann).await.json()["id"].clone();
    let ids = before.subscribe(&double, 3).await;
    let gone = *ids.last().unwrap();
    assert_eq!(before.client().delete(&format!("/subscriptions/{gone}"), None).await.status, 204);
    let extra = add_key(&before.setup, "extra", &["--scopes", "read", "--per-minute", "1000"]).await;
    let of_shop = add_key(&before.setup, "backend", &["--site", "shop"]).await;
    let shop_key = before.client().with_key(&of_shop).get("/push/key").await.json();
    let done =
        before.notify_and_wait(&json!({ "to": { "tags": "news" }, "payload": "one", "log": "all" })).await;
    let once = before.client().with_header("idempotency-key", "once");
    let request = json!({ "to": { "all": true }, "payload": "waits" });
    // These notifications are accepted and not sent: one since its queue is paused, one since it is for later.
    assert!(before.setup.run(&["jobs", "pause", "push-small"]).await.status.success());
    assert!(before.setup.run(&["cron", "pause", "store.optimize"]).await.status.success());
    let waiting = once.post("/notify", &request).await.json()["id"].clone();
    let later = json!({ "to": { "user": "ann" }, "payload": "later", "at": "2027-06-01T00:00:00Z" });
    let later = before.notify(&later).await;
    let public = before.client().get("/push/key").await.json();
    let paths =
        [format!("/subscriptions/{ann}"), "/subscriptions?limit=100".to_owned(), "/users/ann".to_owned()];
    let mut told = Vec::new();
    for path in &paths {
        told.push(before.client().get(path).await.json());
    }
    let file = before.setup.data_dir().join("perennial.db").display().to_string();

    // A store is not adopted while a server runs on it.
    let mut settings = vec![format!("store.url={}", database.url())];
    if let Some(prefix) = queue {
        settings.extend([format!("queue.url={}", prefix.url()), format!("queue.prefix={}", prefix.name())]);
    }
    let flags: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting.as_str()]).collect();
    let adopt: Vec<&str> = ["adopt", &file].into_iter().chain(flags.clone()).collect();
    let refused = before.setup.run(&adopt).await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by another process"));
    assert_eq!(before.stop().await, Some(0));
    // A command that ran too early has already numbered the sites in the new store.
    let hurried = before.setup.run(&[&["keys", "list"], flags.as_slice()].concat()).await;
    assert!(hurried.status.success(), "{}", String::from_utf8_lossy(&hurried.stderr));
    // These names would break SQL that does not quote them.
    let hostile = rusqlite::Connection::open(&file).unwrap();
    hostile
        .execute_batch(
            r#"CREATE TABLE "x; DROP TABLE subscriptions; --" ("a"" b" TEXT); CREATE TABLE "it's" (id INTEGER);
               INSERT INTO "it's" VALUES (1);"#,
        )
        .unwrap();
    drop(hostile);
    let output = before.setup.run(&adopt).await;
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.contains("3  subscriptions\n") && out.contains("2  jobs, to be done"), "{out}");
    assert!(out.contains("The queue push-small was paused"), "{out}");
    assert_eq!(out.contains("The schedule store.optimize was paused"), queue.is_some(), "{out}");
    // A second adoption is refused.
    let again = before.setup.run(&adopt).await;
    let err = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && err.contains("wanted a store with nothing in it"), "{err}");

    let after: Perennial = on(before.setup, &settings).start().await;
    for (path, told) in paths.iter().zip(told) {
        assert_eq!(after.client().get(path).await.json(), told, "{path}");
    }
    assert_eq!(after.client().get("/push/key").await.json(), public);
    assert_eq!(after.client().with_key(&of_news).get("/push/key").await.json(), news_key);
    assert_eq!(after.client().with_key(&of_shop).get("/push/key").await.json(), shop_key);
    let extra = after.client().with_key(&extra).get("/subscriptions").await;
    assert!(extra.status == 200 && extra.header("ratelimit").is_some());
    let id = done["id"].as_str().unwrap();
    let kept: Value = after.client().get(&format!("/notifications/{id}")).await.json();
    assert_eq!((&kept["outcomes"], &kept["created_at"]), (&done["outcomes"], &done["created_at"]));
    assert_eq!(
        after.client().get(&format!("/notifications/{id}/deliveries")).await.text().lines().count(),
        1
    );
    let repeated =
        after.client().with_header("idempotency-key", "once").post("/notify", &request).await.json();
    assert_eq!(repeated["id"], waiting);
    assert_eq!(after.done(waiting.as_str().unwrap()).await["outcomes"], json!({ "delivered": 3 }));
    let scheduled = after.client().get(&format!("/notifications/{later}")).await.json();
    assert_eq!(scheduled["state"], "scheduled");
    // No id comes twice, not even that of a deleted subscription.
    let new = after.subscribe(&double, 1).await[0];
    assert!(new > gone, "{new} after {gone}");
    assert!(double.refused().is_empty());
}

#[tokio::test]
async fn everything_moves_to_postgres() {
    adopted(None).await;
}

#[tokio::test]
async fn and_its_jobs_to_redis() {
    adopted(Some(&Prefix::new().await)).await;
}

#[tokio::test]
async fn what_cannot_be_adopted_is_refused() {
    let setup = Setup::new();
    let nothing = setup.run(&["adopt", "nowhere/perennial.db"]).await;
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("wanted store.url = postgres://"));
    let database = Database::new().await;
    let setup = setup.set(&format!("store.url={}", database.url()));
    let missing: PathBuf = setup.file("nothing.db");
    let nothing = setup.run(&["adopt", missing.to_str().unwrap()]).await;
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("is not there"));
    assert!(!missing.exists());
}
