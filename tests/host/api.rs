//! Answers of the HTTP interface to invalid input: each is a problem document that names the field,
//! and nothing is stored.

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use http::Method;
use perennial_webpush::ReceiverKeys;
use serde_json::{Value, json};

use support::double::Double;
use support::process::{Perennial, Setup};

/// Numbers of stored subscriptions and notifications.
async fn stored(perennial: &Perennial) -> (usize, usize) {
    let count = |answer: Value, list: &str| answer[list].as_array().unwrap().len();
    let subscriptions = perennial.client().get("/subscriptions").await.json();
    let notifications = perennial.client().get("/notifications").await.json();
    (count(subscriptions, "subscriptions"), count(notifications, "notifications"))
}

fn with(mut base: Value, pointer: &str, value: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    base.pointer_mut(parent).unwrap()[name] = value;
    base
}

fn without(mut base: Value, pointer: &str) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    base.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name);
    base
}

#[tokio::test]
async fn a_bad_subscription_names_the_field_and_stores_nothing() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let good = json!({ "subscription": double.mint() });
    let p256dh = good["subscription"]["keys"]["p256dh"].as_str().unwrap();
    let off_curve = format!("BAAA{}", &p256dh[4..]);
    let other_key = ReceiverKeys::generate().unwrap().keys();
    let other_key =
        base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, other_key.p256dh());
    let endpoint = |url: &str| with(good.clone(), "/subscription/endpoint", url.into());
    for (body, field) in [
        (json!({}), "body"),
        (json!([]), "body"),
        (without(good.clone(), "/subscription/keys"), "subscription"),
        (without(good.clone(), "/subscription/endpoint"), "subscription"),
        (without(good.clone(), "/subscription/keys/auth"), "subscription.keys"),
        (with(good.clone(), "/subscription/keys/auth", "AAAA".into()), "subscription.keys.auth"),
        (with(good.clone(), "/subscription/keys/auth", 7.into()), "subscription.keys.auth"),
        (with(good.clone(), "/subscription/keys/p256dh", "AAAA".into()), "subscription.keys.p256dh"),
        (with(good.clone(), "/subscription/keys/p256dh", off_curve.into()), "subscription.keys.p256dh"),
        (with(good.clone(), "/subscription/endpoint", 5.into()), "subscription.endpoint"),
        (endpoint("nowhere"), "subscription.endpoint"),
        (endpoint("https://evil.example/x"), "subscription.endpoint"),
        (endpoint("https://10.0.0.1/x"), "subscription.endpoint"),
        (endpoint("https://169.254.169.254/latest/meta-data"), "subscription.endpoint"),
        (endpoint("https://user@127.0.0.1/x"), "subscription.endpoint"),
        (with(good.clone(), "/colour", "red".into()), "colour"),
        (with(good.clone(), "/key", other_key.into()), "key"),
        (with(good.clone(), "/user", "".into()), "user"),
        (with(good.clone(), "/user", "a\nb".into()), "user"),
        (with(good.clone(), "/tags", json!(["news", "a b"])), "tags[1]"),
        (with(good.clone(), "/tags", json!(["not"])), "tags[0]"),
        (with(good.clone(), "/tags", json!(vec!["t"; 65])), "tags"),
        (with(good.clone(), "/metadata", json!({"long": "x".repeat(5000)})), "metadata"),
        (with(good.clone(), "/metadata", json!("text")), "metadata"),
        (with(good.clone(), "/replaces", json!({"endpoint": "x", "auth": "short"})), "replaces.auth"),
    ] {
        let answer = perennial.client().post("/subscriptions", &body).await;
        assert_eq!(answer.status, 422, "{body}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.fields(), [field], "{body}: {}", answer.text());
    }
    let two = with(with(good.clone(), "/subscription/keys/auth", "x".into()), "/user", "".into());
    let answer = perennial.client().post("/subscriptions", &two).await;
    assert_eq!(answer.fields(), ["subscription.keys.auth", "user"], "all at once");
    assert_eq!(stored(&perennial).await, (0, 0));
    assert_eq!(perennial.client().post("/subscriptions", &good).await.status, 201, "the base was good");
}

#[tokio::test]
async fn a_bad_notification_names_the_field_and_stores_nothing() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let good = json!({ "to": {"all": true}, "notification": {"title": "Hi"} });
    let mut bad_inline = double.mint();
    bad_inline["keys"]["auth"] = "x".into();
    for (body, field) in [
        (json!({}), "body"),
        (json!({"notification": {"title": "Hi"}}), "body"),
        (with(good.clone(), "/rate_limit", 5.into()), "rate_limit"),
        (with(good.clone(), "/to", json!({"everybody": true})), "to"),
        (with(good.clone(), "/to", json!({"all": false})), "to.all"),
        (with(good.clone(), "/to", json!({"all": "yes"})), "to.all"),
        (with(good.clone(), "/to", json!({"user": ""})), "to.user"),
        (with(good.clone(), "/to", json!({"users": []})), "to.users"),
        (with(good.clone(), "/to", json!({"users": ["a", ""]})), "to.users[1]"),
        (with(good.clone(), "/to", json!({"users": vec!["u"; 1001]})), "to.users"),
        (with(good.clone(), "/to", json!({"tags": "news and"})), "to.tags"),
        (with(good.clone(), "/to", json!({"subscriptions": []})), "to.subscriptions"),
        (with(good.clone(), "/to", json!({"subscriptions": ["a"]})), "to.subscriptions[0]"),
        (with(good.clone(), "/to", json!({"push": []})), "to.push"),
        (with(good.clone(), "/to", json!({"push": [double.mint(), bad_inline]})), "to.push[1].keys.auth"),
        (without(good.clone(), "/notification"), "notification"),
        (with(good.clone(), "/payload", "x".into()), "payload"),
        (with(good.clone(), "/notification", json!({"body": "no title"})), "notification.title"),
        (with(good.clone(), "/notification", json!({"title": ""})), "notification.title"),
        (with(good.clone(), "/notification", json!({"title": "x".repeat(4000)})), "notification"),
        (with(without(good.clone(), "/notification"), "/payload", json!("x".repeat(3994))), "payload"),
        (with(good.clone(), "/ttl", json!(-1)), "ttl"),
        (with(good.clone(), "/ttl", json!(2_419_201)), "ttl"),
        (with(good.clone(), "/ttl", json!(1.5)), "ttl"),
        (with(good.clone(), "/urgency", "urgent".into()), "urgency"),
        (with(good.clone(), "/topic", "new_event".into()), "topic"),
        (with(good.clone(), "/topic", "a b".into()), "topic"),
    ] {
        let answer = perennial.client().post("/notify", &body).await;
        assert_eq!(answer.status, 422, "{body}: {}", answer.text());
        assert_eq!(answer.fields(), [field], "{body}: {}", answer.text());
    }
    let syntax = with(good.clone(), "/to", json!({"tags": "news and (fr or de"}));
    let error = perennial.client().post("/notify", &syntax).await.json()["errors"][0].clone();
    assert_eq!(error["position"], 18, "{error}");
    let idempotency = perennial.client().with_header("idempotency-key", &"x".repeat(256));
    assert_eq!(idempotency.post("/notify", &good).await.fields(), ["Idempotency-Key"]);
    assert_eq!(stored(&perennial).await, (0, 0));
    assert_eq!(perennial.client().post("/notify", &good).await.status, 202, "the base was good");
    assert_eq!(double.asked(), 0);
}

#[tokio::test]
async fn what_is_no_json_is_told_apart() {
    let perennial = Setup::new().set("server.body_limit=64KiB").start().await;
    let send = |media_type: Option<&'static str>, body: &str| {
        let (client, body) = (perennial.client().clone(), Bytes::from(body.to_owned()));
        async move { client.send_bytes(Method::POST, "/notify", media_type, body).await }
    };
    let json = Some("application/json");
    for body in ["", "{", "nonsense", "{\"to\": {\"all\": true}} trailing"] {
        let answer = send(json, body).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.text());
        assert!(answer.text().contains("the body is no JSON"), "{}", answer.text());
    }
    assert_eq!(send(json, &format!("\"{}\"", "x".repeat(65536))).await.status, 413);
    assert_eq!(send(Some("text/plain"), "{}").await.status, 415);
    assert_eq!(send(Some("application/x-www-form-urlencoded"), "a=b").await.status, 415);
    assert_eq!(send(None, "{}").await.status, 415);
    assert_eq!(send(Some("application/json; charset=utf-8"), "[]").await.status, 422);
}

#[tokio::test]
async fn keys_open_what_their_scopes_say() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let anybody = perennial.client().without_key();
    let notification = json!({ "to": {"all": true}, "notification": {"title": "Hi"} });
    let id = perennial.subscribe(&double, 1).await[0];
    let readers = [
        format!("/subscriptions/{id}"),
        "/subscriptions".to_owned(),
        "/notifications".to_owned(),
        format!("/notifications/{}", uuid::Uuid::now_v7()),
    ];
    for path in &readers {
        let answer = anybody.get(path).await;
        assert_eq!(answer.status, 401, "{path}");
        assert_eq!(anybody.with_key("pk_wrong").get(path).await.status, 401, "{path}");
    }
    assert_eq!(anybody.post("/notify", &notification).await.status, 401);
    assert_eq!(anybody.delete(&format!("/subscriptions/{id}"), None).await.status, 401);

    // A key with one scope, as an operator would create it.
    let store = rusqlite::Connection::open(perennial.setup.data_dir().join("perennial.db")).unwrap();
    store
        .execute(
            "INSERT INTO api_keys (site, name, hash, scopes) VALUES (1, 'reader', ?, 'read')",
            [digest(&SHA256, b"pk_reader").as_ref()],
        )
        .unwrap();
    drop(store);
    let mut perennial = perennial;
    perennial.stop().await;
    let perennial = perennial.start_again().await;
    let reader = perennial.client().with_key("pk_reader");
    assert_eq!(reader.get("/subscriptions").await.status, 200);
    let answer = reader.post("/notify", &notification).await;
    assert_eq!(answer.status, 403);
    assert!(answer.text().contains("the scope notify"), "{}", answer.text());
    assert_eq!(reader.delete(&format!("/subscriptions/{id}"), None).await.status, 403);
    assert_eq!(reader.post("/subscriptions", &json!({"subscription": double.mint()})).await.status, 403);
    assert_eq!(stored(&perennial).await, (1, 0));
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_too() {
    let perennial = Setup::new().start().await;
    for (method, path, status) in [
        (Method::GET, "/nothing", 404),
        (Method::GET, "/notifications/nonsense", 404),
        (Method::GET, "/subscriptions/nonsense", 404),
        (Method::GET, "/subscriptions/99", 404),
        (Method::GET, "/subscriptions?limit=many", 422),
        (Method::GET, "/subscriptions?colour=red", 422),
        (Method::PUT, "/notify", 405),
    ] {
        let answer = perennial.client().send(method, path, None).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{path}");
    }
}

#[tokio::test]
async fn the_interface_describes_itself() {
    let perennial = Setup::new().start().await;
    let described = perennial.client().without_key().get("/openapi.json").await.json();
    for (path, method) in [
        ("/notify", "post"),
        ("/subscriptions", "post"),
        ("/subscriptions", "get"),
        ("/subscriptions", "delete"),
        ("/subscriptions/{id}", "get"),
        ("/subscriptions/{id}", "delete"),
        ("/notifications", "get"),
        ("/notifications/{id}", "get"),
        ("/push/key", "get"),
    ] {
        assert!(described["paths"][path][method].is_object(), "{method} {path}");
    }
    assert!(described["components"]["schemas"]["NotifyRequest"].is_object());
}
