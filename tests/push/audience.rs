//! The audience of a notification and the message of each member: imports, users, personal texts, logs, webhooks.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::hmac;
use axum::Router;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use perennial::sink::Answer;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use support::double::{Double, status_answer};
use support::eventually;
use support::process::{Perennial, Setup};

async fn start_with(change: impl FnOnce(Setup) -> Setup) -> (Double, Perennial) {
    let double = Double::start().await;
    let perennial = change(Setup::new().sending_to(&double)).start().await;
    (double, perennial)
}

async fn subscribe(perennial: &Perennial, double: &Double, more: &Value) -> i64 {
    let mut request = json!({ "subscription": double.mint() });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = perennial.client().post("/subscriptions", &request).await;
    assert!(answer.status.is_success(), "{}", answer.text());
    answer.json()["id"].as_i64().unwrap()
}

#[tokio::test]
async fn a_text_takes_what_each_subscription_brings() {
    let (double, perennial) = start_with(|setup| setup).await;
    subscribe(&perennial, &double, &json!({ "metadata": { "name": "Ada \"A\"" } })).await;
    subscribe(&perennial, &double, &json!({ "metadata": { "name": 7 } })).await;
    let stranger = subscribe(&perennial, &double, &json!({})).await;
    let request = json!({ "to": {"all": true}, "notification": { "title": "Hello {{name}}" } });
    let progress = perennial.notify_and_wait(&request).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 2, "incomplete": 1 }));
    let titles: BTreeSet<String> = double
        .taken()
        .iter()
        .map(|taken| {
            serde_json::from_str::<Value>(&taken.text).unwrap()["title"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(titles, ["Hello 7".to_owned(), "Hello Ada \"A\"".to_owned()].into());
    let id = progress["id"].as_str().unwrap();
    let log = perennial.client().get(&format!("/notifications/{id}/deliveries")).await;
    let log: Vec<Value> = log.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((log.len(), log[0]["subscription"].as_i64()), (1, Some(stranger)));
    assert_eq!(log[0]["detail"], "its metadata has no name");
    let with_default = json!({ "to": {"all": true}, "payload": "{{name|you}}" });
    let progress = perennial.notify_and_wait(&with_default).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 3 }));
}

/// The audience is determined when the notification is sent, however small it was when the notification was accepted.
#[tokio::test]
async fn an_audience_that_has_grown_is_sent_to_batch_by_batch() {
    let (double, perennial) = start_with(|setup| setup.set("push.batch=7")).await;
    let subscriptions: Vec<Value> = (0..30).map(|_| json!({ "subscription": double.mint() })).collect();
    for subscription in &subscriptions {
        assert_eq!(perennial.client().post("/subscriptions", subscription).await.status, 201);
    }
    let soon = Timestamp::now() + Duration::from_secs(4);
    let request = json!({ "to": {"tags": "launch"}, "payload": "x", "at": soon.to_string() });
    let id = perennial.notify(&request).await;
    for subscription in subscriptions {
        let mut tagged = subscription;
        tagged["tags"] = json!(["launch"]);
        assert_eq!(perennial.client().post("/subscriptions", &tagged).await.status, 200);
    }
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 30 }));
    eventually("no more than seven at once in memory", || async {
        let lines = perennial.log_lines();
        (lines.iter().filter(|line| line["message"] == "batch sent").count() == 5).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_declarative_notification_needs_no_service_worker() {
    let (double, perennial) = start_with(|setup| setup).await;
    subscribe(&perennial, &double, &json!({})).await;
    let mut request = json!({ "to": {"all": true}, "notification": { "title": "Hello", "url": "https://example.com/" }, "declarative": true });
    perennial.notify_and_wait(&request).await;
    let taken = double.taken().pop().unwrap();
    let text: Value = serde_json::from_str(&taken.text).unwrap();
    assert_eq!(
        (text["web_push"].as_u64(), text["notification"]["navigate"].as_str()),
        (Some(8030), Some("https://example.com/"))
    );
    assert_eq!(taken.push.content_type.as_deref(), Some("application/notification+json"));
    request["notification"] = json!({ "title": "Hello" });
    let refused = perennial.client().post("/notify", &request).await;
    assert_eq!(refused.json()["errors"][0]["field"], "notification.url");
}

#[tokio::test]
async fn the_log_has_failures_or_all() {
    let (double, perennial) = start_with(|setup| setup).await;
    let ids = perennial.subscribe(&double, 4).await;
    let first = Mutex::new(None::<String>);
    double.script(move |push| {
        let mut first = first.lock().unwrap();
        let refused = first.get_or_insert_with(|| push.token.clone()) == &push.token;
        if refused { status_answer(413, &[]) } else { Answer::Take }
    });
    let log = async |request: Value, query: &str| -> Vec<Value> {
        let id = perennial.notify_and_wait(&request).await["id"].as_str().unwrap().to_owned();
        let log = perennial.client().get(&format!("/notifications/{id}/deliveries{query}")).await;
        assert_eq!(log.header("content-type"), Some("application/x-ndjson"));
        log.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let mut request = json!({ "to": {"all": true}, "payload": "x" });
    let failures = log(request.clone(), "").await;
    assert_eq!(
        (failures.len(), &failures[0]["outcome"], &failures[0]["status"]),
        (1, &json!("too_large"), &json!(413))
    );
    request["log"] = "all".into();
    let all = log(request.clone(), "").await;
    assert_eq!(all.iter().map(|line| line["subscription"].as_i64().unwrap()).collect::<Vec<_>>(), ids);
    assert_eq!(log(request, "?outcome=delivered").await.len(), 3);
}

#[tokio::test]
async fn everything_of_a_user_is_shown_and_forgotten() {
    let (double, perennial) = start_with(|setup| setup).await;
    for user in ["ada", "ada", "bob/1"] {
        subscribe(&perennial, &double, &json!({ "user": user, "tags": ["news"] })).await;
    }
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "x", "log": "all" })).await;
    let shown = perennial.client().get("/users/ada").await.json();
    assert_eq!(shown["subscriptions"].as_array().unwrap().len(), 2);
    assert_eq!(shown["deliveries"].as_array().unwrap().len(), 2);
    assert_eq!(shown["subscriptions"][0]["tags"], json!(["news"]));
    let deleted = perennial.client().delete("/users/ada", None).await.json();
    assert_eq!(deleted, json!({ "subscriptions": 2, "deliveries": 2 }));
    let shown = perennial.client().get("/users/ada").await.json();
    assert_eq!((&shown["subscriptions"], &shown["deliveries"]), (&json!([]), &json!([])));
    let other = perennial.client().get("/users/bob%2F1").await.json();
    assert_eq!(other["subscriptions"].as_array().unwrap().len(), 1);
    assert_eq!(perennial.client().without_key().get("/users/bob").await.status, 401);
}

#[tokio::test]
async fn subscriptions_come_in_and_go_out_as_lines() {
    let (double, mut perennial) = start_with(|setup| setup).await;
    let mut lines = String::new();
    for number in 0..50 {
        let line = json!({
            "subscription": double.mint(),
            "user": format!("user {}", number % 5),
            "tags": ["imported"],
            "metadata": { "number": number },
        });
        lines.push_str(&format!("{line}\n"));
    }
    let good = perennial.setup.file("good.ndjson");
    std::fs::write(&good, &lines).unwrap();
    let bad = perennial.setup.file("bad.ndjson");
    let strange =
        json!({ "subscription": { "endpoint": "https://10.0.0.1/x", "keys": double.mint()["keys"] } });
    let last = json!({ "subscription": double.mint() });
    std::fs::write(&bad, format!("nonsense\n\n{strange}\n{last}")).unwrap();

    let import = async |perennial: &Perennial, file: &std::path::Path| {
        let output = perennial.setup.run(&["subscriptions", "import", file.to_str().unwrap()]).await;
        (output.status.success(), serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default(), output)
    };
    let (done, counts, output) = import(&perennial, &good).await;
    assert!(done, "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(counts, json!({ "created": 50, "updated": 0, "refused": 0 }));
    assert_eq!(import(&perennial, &good).await.1, json!({ "created": 0, "updated": 50, "refused": 0 }));
    let (done, counts, output) = import(&perennial, &bad).await;
    assert!(!done, "it says so");
    assert_eq!(counts, json!({ "created": 1, "updated": 0, "refused": 2 }));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("line 1: ") && told.contains("line 3: subscription.endpoint"), "{told}");

    let progress =
        perennial.notify_and_wait(&json!({ "to": {"tags": "imported"}, "payload": "{{number}}" })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 50 }));

    let file = perennial.setup.file("all.ndjson");
    let export = async |perennial: &Perennial| {
        let output = perennial.setup.run(&["subscriptions", "export", file.to_str().unwrap()]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read_to_string(&file).unwrap()
    };
    let exported = export(&perennial).await;
    assert_eq!(exported.lines().count(), 51);
    // While no server runs, the command works on the store itself. An import into another server loses nothing.
    assert_eq!(perennial.stop().await, Some(0));
    assert_eq!(export(&perennial).await, exported);
    assert_eq!(import(&perennial, &file).await.1, json!({ "created": 0, "updated": 51, "refused": 0 }));
    let line: Value = serde_json::from_str(exported.lines().next().unwrap()).unwrap();
    assert_eq!((&line["user"], &line["metadata"]["number"]), (&json!("user 0"), &json!(0)));
}

/// A backend that receives webhooks.
struct Backend {
    url: String,
    told: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
    _running: JoinSet<()>,
}

impl Backend {
    /// Starts the backend. It fails the first request.
    async fn start() -> Self {
        let told: Arc<Mutex<Vec<(HeaderMap, Bytes)>>> = Arc::default();
        let heard = Arc::clone(&told);
        let handler = move |headers: HeaderMap, body: Bytes| {
            let mut heard = heard.lock().unwrap();
            heard.push((headers, body));
            let status = if heard.len() == 1 { StatusCode::BAD_GATEWAY } else { StatusCode::NO_CONTENT };
            std::future::ready(status)
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/ended", listener.local_addr().unwrap());
        let mut running = JoinSet::new();
        running.spawn(async move {
            axum::serve(listener, Router::new().route("/ended", post(handler))).await.unwrap();
        });
        Self { url, told, _running: running }
    }
}

#[tokio::test]
async fn the_backend_is_told_with_a_signature_and_told_again() {
    let backend = Backend::start().await;
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double);
    let secret = setup.file("webhook.secret");
    std::fs::write(&secret, "a secret of enough bytes\n").unwrap();
    let webhook = format!(
        "sites.default.webhooks=[{{ name = \"backend\", url = \"{}\", secret_file = \"{}\", pruned = true }}]",
        backend.url,
        secret.display()
    );
    let perennial = setup.set(&webhook).start().await;
    perennial.subscribe(&double, 3).await;
    double.answer(410);
    let request = json!({ "to": {"all": true}, "payload": "x", "webhook": "backend" });
    let id = perennial.notify(&request).await;
    let told = eventually("both were told, one of them twice", || async {
        let told = backend.told.lock().unwrap().clone();
        (told.len() >= 3).then_some(told)
    })
    .await;
    let mut kinds = BTreeSet::new();
    for (headers, body) in &told {
        let text = |name: &str| headers[name].to_str().unwrap().to_owned();
        let signed = format!(
            "{}.{}.{}",
            text("webhook-id"),
            text("webhook-timestamp"),
            std::str::from_utf8(body).unwrap()
        );
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"a secret of enough bytes");
        let signature = STANDARD.decode(text("webhook-signature").strip_prefix("v1,").unwrap()).unwrap();
        hmac::verify(&key, signed.as_bytes(), &signature).unwrap();
        let body: Value = serde_json::from_slice(body).unwrap();
        kinds.insert(body["type"].as_str().unwrap().to_owned());
        match body["type"].as_str().unwrap() {
            "notification.ended" => {
                assert_eq!((&body["data"]["id"], &body["data"]["outcomes"]["gone"]), (&json!(id), &json!(3)));
            }
            _ => assert!(!body["data"]["subscriptions"].as_array().unwrap().is_empty()),
        }
    }
    assert_eq!(kinds, ["notification.ended".to_owned(), "subscriptions.pruned".to_owned()].into());
    let again = told.iter().filter(|(headers, _)| headers["webhook-id"] == told[0].0["webhook-id"]).count();
    assert_eq!(again, 2, "the same id");
}

#[tokio::test]
async fn subscriptions_that_come_with_a_notification_are_nobody_elses() {
    let (double, perennial) = start_with(|setup| setup).await;
    for _ in 0..3 {
        subscribe(&perennial, &double, &json!({ "user": "ada" })).await;
    }
    let push: Vec<Value> = (0..3).map(|_| double.mint()).collect();
    for (status, outcome) in [(403, "unauthorized"), (410, "gone")] {
        double.answer(status);
        let progress = perennial.notify_and_wait(&json!({ "to": {"push": push}, "payload": "x" })).await;
        assert_eq!(progress["outcomes"], json!({ outcome: 3 }));
        let id = progress["id"].as_str().unwrap();
        let log = perennial.client().get(&format!("/notifications/{id}/deliveries?outcome={outcome}")).await;
        assert!(log.text().contains("\"subscription\":-3"), "{}", log.text());
    }
    let ada = perennial.client().get("/users/ada").await.json();
    assert_eq!((ada["subscriptions"].as_array().unwrap().len(), &ada["deliveries"]), (3, &json!([])));
    assert_eq!(perennial.sql("SELECT sum(strikes) FROM subscriptions").await, 0);
    let id = perennial.notify_and_wait(&json!({ "to": {"push": push}, "payload": "x" })).await["id"].clone();
    let strange = format!("/notifications/{}/deliveries?outcome=%00", id.as_str().unwrap());
    assert_eq!(perennial.client().get(&strange).await.status, 422);
}

#[tokio::test]
async fn an_import_of_any_length_goes_through() {
    let (double, perennial) = start_with(|setup| setup).await;
    let keys = double.mint()["keys"].clone();
    let line = |number: usize| {
        let subscription =
            json!({ "endpoint": format!("{}/wpush/v2/{number:0>300}", double.origin()), "keys": keys });
        json!({ "subscription": subscription }).to_string()
    };
    let file = perennial.setup.file("long.ndjson");
    std::fs::write(&file, (0..6000).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    assert!(file.metadata().unwrap().len() > 2 << 20, "more than one body holds");
    let output = perennial.setup.run(&["subscriptions", "import", file.to_str().unwrap()]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let counts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(counts, json!({ "created": 6000, "updated": 0, "refused": 0 }));
}
