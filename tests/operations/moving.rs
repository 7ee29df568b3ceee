//! Moving in: keys and subscriptions of other senders, as their own tools write them.

use std::path::PathBuf;

use serde_json::{Value, json};

use support::double::Double;
use support::process::Setup;

/// Addresses of the push services in the dumps, so that no name is resolved.
pub(crate) const SERVICES: &str = r#"[{ host = "fcm.googleapis.com", addresses = ["142.250.1.1"] }, { host = "updates.push.services.mozilla.com", addresses = ["34.107.1.1"] }, { host = "web.push.apple.com", addresses = ["17.188.1.1"] }, { host = "wns2-par02p.notify.windows.com", addresses = ["40.77.1.1"] }]"#;

fn fixture(name: &str) -> String {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    assert!(file.exists(), "{}", file.display());
    file.display().to_string()
}

fn public_key() -> String {
    std::fs::read_to_string(fixture("keys/public.txt")).unwrap().trim().to_owned()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn a_key_of_elsewhere_is_taken_over_before_the_first_start_and_while_it_runs() {
    let setup = Setup::new();
    let imported = setup.run(&["keys", "import", &fixture("keys/web-push-cli.json")]).await;
    assert!(imported.status.success(), "{}", said(&imported.stderr));
    assert!(said(&imported.stdout).contains(&public_key()), "{}", said(&imported.stdout));
    assert!(said(&setup.run(&["keys", "show"]).await.stdout).contains(&public_key()));
    let perennial = setup.start().await;
    assert_eq!(perennial.client().get("/push/key").await.json()["key"], public_key());

    // A site that already has a key keeps it for its existing subscriptions.
    let perennial = Setup::new().start().await;
    let before = perennial.client().get("/push/key").await.json()["key"].clone();
    let imported =
        perennial.setup.run(&["keys", "import", &fixture("keys/openssl-ecparam-genkey.pem")]).await;
    assert!(imported.status.success(), "{}", said(&imported.stderr));
    assert_eq!(perennial.client().get("/push/key").await.json()["key"], public_key());
    let pem = std::fs::read_to_string(perennial.setup.data_dir().join("vapid.pem")).unwrap();
    assert_eq!(pem.matches("BEGIN").count(), 2, "the old one stays");
    assert_ne!(before, public_key());
    // A second import of the same key changes nothing.
    let again = perennial.setup.run(&["keys", "import", &fixture("keys/jwk-node.json")]).await;
    assert!(again.status.success(), "{}", said(&again.stderr));
    let pem = std::fs::read_to_string(perennial.setup.data_dir().join("vapid.pem")).unwrap();
    assert_eq!(pem.matches("BEGIN").count(), 2);

    let bad = perennial.setup.run(&["keys", "import", &fixture("keys/bad/encrypted-pkcs8.pem")]).await;
    assert_eq!(bad.status.code(), Some(1));
    assert!(said(&bad.stderr).contains("is encrypted"), "{}", said(&bad.stderr));
}

#[tokio::test]
async fn subscriptions_made_with_an_imported_key_are_sent_to_at_once() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let imported = perennial.setup.run(&["keys", "import", &fixture("keys/raw-base64url.txt")]).await;
    assert!(imported.status.success(), "{}", said(&imported.stderr));
    // A dump of web-push-php has subscriptions as browsers write them, or with flat keys.
    let (one, other) = (double.mint(), double.mint());
    let flat = json!({ "endpoint": other["endpoint"], "publicKey": other["keys"]["p256dh"], "authToken": other["keys"]["auth"] });
    let file = perennial.setup.file("dump.json");
    std::fs::write(&file, json!([one, flat, { "endpoint": "x" }]).to_string()).unwrap();
    let file = file.to_str().unwrap();
    let import = ["subscriptions", "import", "--from", "web-push-php", file];
    let dry = perennial.setup.run(&[&import[..], &["--dry-run"]].concat()).await;
    let told: Value = serde_json::from_slice(&dry.stdout).unwrap();
    assert_eq!((&told["usable"], &told["refused"]), (&json!(2), &json!(1)), "{told}");
    assert_eq!(told["services"], json!({ "127.0.0.1": 2 }));
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions").await, 0, "nothing is stored");
    assert!(said(&dry.stderr).contains("line 3: endpoint: it is no URL"), "{}", said(&dry.stderr));
    assert!(!dry.status.success());

    let stored = perennial.setup.run(&[&import[..], &["--ids"]].concat()).await;
    let lines: Vec<String> = said(&stored.stdout).lines().map(str::to_owned).collect();
    assert_eq!(lines[..2], ["1 1", "2 2"], "{lines:?}");
    assert!(lines[2].contains("\"created\":2"), "{lines:?}");
    let progress = perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "moved" })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 2 }));
    let key = perennial_webpush::decode_base64(&public_key()).unwrap();
    assert!(double.taken().iter().all(|taken| taken.push.vapid_key == key), "signed with the imported key");
}

#[tokio::test]
async fn dumps_of_other_senders_say_by_line_what_was_left_out() {
    let perennial = Setup::new().set(&format!("push.resolve={SERVICES}")).start().await;
    for (sender, dump, usable, refused, inactive) in [
        ("laravel", "laravel.phpmyadmin.csv", 3, 2, 0),
        ("laravel", "laravel.batch.tsv", 3, 2, 0),
        ("django", "django-push-notifications.csv", 3, 1, 1),
        ("django", "django-webpush.dumpdata.json", 3, 2, 0),
        ("pywebpush", "pywebpush.jsonl", 3, 2, 0),
        ("web-push-php", "web-push-php.json", 4, 1, 0),
        ("onesignal", "onesignal.csv", 3, 2, 1),
        ("json", "pywebpush.wrapped.jsonl", 3, 0, 0),
    ] {
        let file = fixture(&format!("dumps/{dump}"));
        let output =
            perennial.setup.run(&["subscriptions", "import", "--from", sender, "--dry-run", &file]).await;
        let told: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{dump}: {}", said(&output.stderr)));
        assert_eq!((&told["usable"], &told["refused"]), (&json!(usable), &json!(refused)), "{dump}: {told}");
        assert_eq!(told["inactive"].as_u64().unwrap_or(0), inactive, "{dump}: {told}");
        assert_eq!(output.status.success(), refused == 0, "{dump}");
    }
    let default = fixture("dumps/onesignal-default-columns.csv");
    let output = perennial.setup.run(&["subscriptions", "import", "--from", "onesignal", &default]).await;
    assert!(said(&output.stderr).contains("web_p256"), "{}", said(&output.stderr));
    // The page has a recipe for each sender, with the commands that are tried here.
    let page = include_str!("../../docs/moving-in.md");
    for sender in ["web-push-php", "laravel", "django", "pywebpush", "onesignal", "json"] {
        assert!(page.contains(&format!("--from {sender}")), "{sender}");
    }
}

#[tokio::test]
async fn a_backend_finds_and_deletes_by_endpoint() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 2).await;
    let subscription = double.mint();
    let client = perennial.client();
    let request = json!({ "subscription": subscription, "user": "ann", "tags": ["news"] });
    assert_eq!(client.post("/subscriptions", &request).await.status, 201);
    let endpoint = subscription["endpoint"].as_str().unwrap();
    let query = format!("/subscriptions?endpoint={}", urlencode(endpoint));
    let found = client.get(&query).await.json();
    assert_eq!(found["subscriptions"][0]["user"], "ann", "{found}");
    assert_eq!(client.get(&format!("{query}&tag=other")).await.json()["subscriptions"], json!([]));
    assert_eq!(
        client.get("/subscriptions?endpoint=https://x.example/").await.json()["subscriptions"],
        json!([])
    );

    let by_endpoint = json!({ "endpoint": endpoint });
    let stranger = perennial.client().without_key();
    let refused = stranger.delete("/subscriptions", Some(&by_endpoint)).await;
    assert_eq!((refused.status.as_u16(), refused.fields()), (422, vec!["auth".to_owned()]));
    assert_eq!(client.delete("/subscriptions", Some(&by_endpoint)).await.status, 204);
    assert_eq!(client.delete("/subscriptions", Some(&by_endpoint)).await.status, 404);
}

#[tokio::test]
async fn a_browser_that_knows_the_old_secret_may_bring_new_keys() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let (old, fresh) = (double.mint(), double.mint());
    let page = perennial.client().without_key();
    assert_eq!(page.post("/subscriptions", &json!({ "subscription": old })).await.status, 201);
    let mut renewed = old.clone();
    renewed["keys"] = fresh["keys"].clone();
    assert_eq!(page.post("/subscriptions", &json!({ "subscription": renewed })).await.status, 403);
    let wrong = json!({ "endpoint": old["endpoint"], "auth": fresh["keys"]["auth"] });
    let with_wrong = json!({ "subscription": renewed, "replaces": wrong });
    assert_eq!(page.post("/subscriptions", &with_wrong).await.status, 403);
    let before = json!({ "endpoint": old["endpoint"], "auth": old["keys"]["auth"] });
    let with_old = json!({ "subscription": renewed, "replaces": before });
    assert_eq!(page.post("/subscriptions", &with_old).await.status, 200);
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions").await, 1);
}

#[tokio::test]
async fn ports_are_allowed_one_by_one() {
    let perennial = Setup::new().set("push.allow_hosts=*").set("push.allow_ports=443,8443").start().await;
    let double = Double::start().await;
    let stored = async |port: u16| {
        let mut subscription = double.mint();
        subscription["endpoint"] = format!("https://93.184.215.14:{port}/push").into();
        perennial.client().post("/subscriptions", &json!({ "subscription": subscription })).await
    };
    assert_eq!(stored(8443).await.status, 201);
    let refused = stored(9443).await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("push.allow_ports"), "{}", refused.text());
}

fn urlencode(text: &str) -> String {
    text.replace('%', "%25")
        .replace('/', "%2F")
        .replace(':', "%3A")
        .replace('?', "%3F")
        .replace('&', "%26")
        .replace('=', "%3D")
}
