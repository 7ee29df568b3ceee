//! Browsers subscribe, change and unsubscribe.

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Method;
use serde_json::{Value, json};

use support::double::Double;
use support::process::{Perennial, Setup};

async fn start() -> (Double, Perennial) {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    (double, perennial)
}

async fn one(perennial: &Perennial, id: i64) -> Value {
    perennial.client().get(&format!("/subscriptions/{id}")).await.json()
}

fn id(answer: &support::http::Answer) -> i64 {
    answer.json()["id"].as_i64().unwrap_or_else(|| panic!("{}", answer.text()))
}

#[tokio::test]
async fn the_same_endpoint_again_is_the_same_subscription() {
    let (double, perennial) = start().await;
    let subscription = double.mint();
    let request =
        json!({ "subscription": subscription, "user": "ann", "tags": ["news", "fr"], "metadata": {"a": 1} });
    let created = perennial.client().post("/subscriptions", &request).await;
    assert_eq!(created.status, 201);
    let id = id(&created);
    assert_eq!(created.header("location"), Some(&*format!("/subscriptions/{id}")));

    let again = perennial.client().post("/subscriptions", &json!({ "subscription": subscription })).await;
    assert_eq!((again.status.as_u16(), again.json()["id"].as_i64()), (200, Some(id)));
    let stored = one(&perennial, id).await;
    assert_eq!(stored["user"], "ann", "what is not said is kept");
    assert_eq!(stored["tags"], json!(["fr", "news"]));
    assert_eq!(stored["metadata"], json!({"a": 1}));

    let changed = json!({ "subscription": subscription, "tags": ["de"], "user": "bob" });
    perennial.client().post("/subscriptions", &changed).await;
    let stored = one(&perennial, id).await;
    assert_eq!((stored["user"].as_str(), &stored["tags"]), (Some("bob"), &json!(["de"])));
}

#[tokio::test]
async fn without_a_key_only_the_browser_itself_may_change_it() {
    let (double, perennial) = start().await;
    let anybody = perennial.client().without_key();
    let subscription = double.mint();
    assert_eq!(anybody.post("/subscriptions", &json!({ "subscription": subscription })).await.status, 201);
    assert_eq!(anybody.post("/subscriptions", &json!({ "subscription": subscription })).await.status, 200);
    let mut stolen = double.mint();
    stolen["endpoint"] = subscription["endpoint"].clone();
    let refused = anybody.post("/subscriptions", &json!({ "subscription": stolen })).await;
    assert_eq!(refused.status, 403, "{}", refused.text());
    assert_eq!(
        perennial.client().post("/subscriptions", &json!({ "subscription": stolen })).await.status,
        200
    );
}

#[tokio::test]
async fn a_renewed_subscription_keeps_its_id_user_and_tags() {
    let (double, perennial) = start().await;
    let old = double.mint();
    let request = json!({ "subscription": old, "user": "ann", "tags": ["news"] });
    let first = id(&perennial.client().post("/subscriptions", &request).await);
    let new = double.mint();
    let replaces = json!({ "endpoint": old["endpoint"], "auth": old["keys"]["auth"] });
    let anybody = perennial.client().without_key();
    let renewed = anybody.post("/subscriptions", &json!({ "subscription": new, "replaces": replaces })).await;
    assert_eq!((renewed.status.as_u16(), id(&renewed)), (200, first));
    let stored = one(&perennial, first).await;
    assert_eq!(stored["endpoint"], new["endpoint"]);
    assert_eq!((stored["user"].as_str(), &stored["tags"]), (Some("ann"), &json!(["news"])));

    // Both the service worker and the page report the change; the second report finds it done.
    let again = anybody.post("/subscriptions", &json!({ "subscription": new, "replaces": replaces })).await;
    assert_eq!((again.status.as_u16(), id(&again)), (200, first));

    // A wrong secret takes over nothing and loses nothing.
    let newest = double.mint();
    let wrong = json!({ "endpoint": new["endpoint"], "auth": old["keys"]["auth"] });
    let other = anybody.post("/subscriptions", &json!({ "subscription": newest, "replaces": wrong })).await;
    assert_eq!(other.status, 201);
    assert_eq!(one(&perennial, first).await["endpoint"], new["endpoint"]);
}

#[tokio::test]
async fn a_page_names_a_user_only_with_a_word_from_the_backend() {
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double);
    let secret = setup.file("user.secret");
    std::fs::write(&secret, "correct horse battery\n").unwrap();
    let perennial = setup.set(&format!("sites.default.user_secret_file={}", secret.display())).start().await;
    let anybody = perennial.client().without_key();
    let subscribe = |user: &str, token: Option<String>| {
        let mut request = json!({ "subscription": double.mint(), "user": user });
        if let Some(token) = token {
            request["user_token"] = token.into();
        }
        let anybody = anybody.clone();
        async move { anybody.post("/subscriptions", &request).await }
    };
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"correct horse battery");
    let token = |user: &str| Some(URL_SAFE_NO_PAD.encode(hmac::sign(&key, user.as_bytes())));
    assert_eq!(subscribe("ann", None).await.status, 403);
    assert_eq!(subscribe("ann", Some("AAAA".into())).await.status, 403);
    assert_eq!(subscribe("ann", token("bob")).await.status, 403);
    assert_eq!(subscribe("ann", token("ann")).await.status, 201);
    let listed = perennial.client().get("/subscriptions?user=ann").await.json();
    assert_eq!(listed["subscriptions"].as_array().unwrap().len(), 1);
    assert!(!perennial.log().contains("correct horse battery"));
}

#[tokio::test]
async fn a_page_sets_only_public_tags() {
    let double = Double::start().await;
    let perennial =
        Setup::new().sending_to(&double).set("sites.default.public_tags=news,sport").start().await;
    let anybody = perennial.client().without_key();
    let with = |tags: Value| json!({ "subscription": double.mint(), "tags": tags });
    assert_eq!(anybody.post("/subscriptions", &with(json!(["news"]))).await.status, 201);
    let refused = anybody.post("/subscriptions", &with(json!(["news", "vip"]))).await;
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("the tag vip"), "{}", refused.text());
    assert_eq!(perennial.client().post("/subscriptions", &with(json!(["vip"]))).await.status, 201);
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_unless_they_are_listed() {
    let double = Double::start().await;
    let perennial =
        Setup::new().sending_to(&double).set("sites.default.origins=https://shop.example").start().await;
    let page = |origin: &str| perennial.client().without_key().with_header("origin", origin);
    let request = || json!({ "subscription": double.mint() });
    assert_eq!(
        page(perennial.client().base()).post("/subscriptions", &request()).await.status,
        201,
        "its own"
    );
    let listed = page("https://shop.example").post("/subscriptions", &request()).await;
    assert_eq!(listed.status, 201);
    assert_eq!(listed.header("access-control-allow-origin"), Some("https://shop.example"));
    let other = page("https://evil.example").post("/subscriptions", &request()).await;
    assert_eq!(other.status, 403);
    assert_eq!(other.header("access-control-allow-origin"), None);
    assert_eq!(page("null").get("/push/key").await.status, 403);

    // The page can read every refusal, also a refusal that no route has made.
    let readable = |answer: &support::http::Answer| {
        assert_eq!(
            answer.header("access-control-allow-origin"),
            Some("https://shop.example"),
            "{}",
            answer.text()
        );
    };
    let listed = page("https://shop.example");
    let missing = listed.get("/subscription").await;
    assert_eq!(missing.status, 404);
    readable(&missing);
    let unknown = json!({ "endpoint": "https://x.example/", "auth": double.mint()["keys"]["auth"] });
    let gone = listed.delete("/subscriptions", Some(&unknown)).await;
    assert_eq!(gone.status, 404);
    readable(&gone);
    let long = listed.post("/subscriptions", &json!({ "subscription": "x".repeat(2 << 20) })).await;
    assert_eq!(long.status, 413);
    readable(&long);
    let wrong = listed.send(Method::PUT, "/subscriptions", None).await;
    assert_eq!(wrong.status, 405);
    readable(&wrong);
    assert_eq!(
        page("https://evil.example").get("/nothing").await.header("access-control-allow-origin"),
        None
    );

    let preflight = page("https://shop.example")
        .with_header("access-control-request-method", "POST")
        .with_header("access-control-request-headers", "content-type")
        .send(Method::OPTIONS, "/subscriptions", None)
        .await;
    assert_eq!(preflight.header("access-control-allow-origin"), Some("https://shop.example"));
    assert!(preflight.header("access-control-allow-headers").unwrap().contains("content-type"));
}

#[tokio::test]
async fn one_address_may_not_fill_the_store() {
    let double = Double::start().await;
    let perennial = Setup::new()
        .sending_to(&double)
        .set("push.address_burst=3")
        .set("push.address_per_minute=1")
        .start()
        .await;
    let anybody = perennial.client().without_key();
    let request = || json!({ "subscription": double.mint() });
    for _ in 0..3 {
        assert_eq!(anybody.post("/subscriptions", &request()).await.status, 201);
    }
    let over = anybody.post("/subscriptions", &request()).await;
    assert_eq!(over.status, 429);
    let wait: u64 = over.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(
        perennial.client().post("/subscriptions", &request()).await.status,
        201,
        "a key has no such limit"
    );
    assert_eq!(anybody.get("/push/key").await.status, 200, "reading is free");
    let listed = perennial.client().get("/subscriptions").await.json();
    assert_eq!(listed["subscriptions"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn they_are_found_by_user_and_tag_page_by_page_and_deleted() {
    let (double, perennial) = start().await;
    let mut ids = Vec::new();
    for number in 0..5 {
        let user = if number % 2 == 0 { "even" } else { "odd" };
        let request =
            json!({ "subscription": double.mint(), "user": user, "tags": [format!("n{number}"), "all"] });
        ids.push(id(&perennial.client().post("/subscriptions", &request).await));
    }
    let list = async |query: &str| {
        let page = perennial.client().get(&format!("/subscriptions?{query}")).await.json();
        let found =
            page["subscriptions"].as_array().unwrap().iter().map(|found| found["id"].as_i64().unwrap());
        (found.collect::<Vec<_>>(), page["next"].as_i64())
    };
    assert_eq!(list("user=even").await.0, [ids[0], ids[2], ids[4]]);
    assert_eq!(list("tag=n3").await.0, [ids[3]]);
    assert_eq!(list("tag=all&user=odd").await.0, [ids[1], ids[3]]);
    assert_eq!(list("limit=2").await, (ids[..2].to_vec(), Some(ids[1])));
    let rest = perennial.client().get(&format!("/subscriptions?limit=10&cursor={}", ids[1])).await.json();
    assert_eq!(rest["subscriptions"].as_array().unwrap().len(), 3);
    assert_eq!(rest.get("next"), None);

    let path = format!("/subscriptions/{}", ids[0]);
    assert_eq!(perennial.client().delete(&path, None).await.status, 204);
    assert_eq!(perennial.client().delete(&path, None).await.status, 404);
    assert_eq!(perennial.client().get(&path).await.status, 404);
    assert_eq!(list("tag=n0").await.0, Vec::<i64>::new(), "its tags went with it");
}

#[tokio::test]
async fn a_browser_deletes_its_own_by_endpoint_and_secret() {
    let (double, perennial) = start().await;
    let anybody = perennial.client().without_key();
    let subscription = double.mint();
    anybody.post("/subscriptions", &json!({ "subscription": subscription })).await;
    let delete = |auth: Value| {
        let body = json!({ "endpoint": subscription["endpoint"], "auth": auth });
        let anybody = anybody.clone();
        async move { anybody.delete("/subscriptions", Some(&body)).await.status.as_u16() }
    };
    assert_eq!(delete(double.mint()["keys"]["auth"].clone()).await, 404);
    assert_eq!(delete("short".into()).await, 422);
    assert_eq!(delete(subscription["keys"]["auth"].clone()).await, 204);
    assert_eq!(delete(subscription["keys"]["auth"].clone()).await, 404);
}

/// Another user signs in with the same browser.
#[tokio::test]
async fn a_new_user_of_the_same_browser_inherits_nothing_private() {
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double).set("sites.default.public_tags=[\"news\"]");
    let perennial = setup.start().await;
    let subscription = double.mint();
    let post = async |mut request: Value| {
        request["subscription"] = subscription.clone();
        let answer = perennial.client().post("/subscriptions", &request).await;
        assert!(answer.status.is_success(), "{}", answer.text());
        one(&perennial, id(&answer)).await
    };
    let ann = json!({ "user": "ann", "tags": ["news", "vip"], "metadata": { "name": "Ann" } });
    post(ann.clone()).await;
    let kept = post(json!({ "user": "ann" })).await;
    assert_eq!(
        (&kept["tags"], &kept["metadata"]),
        (&json!(["news", "vip"]), &ann["metadata"]),
        "the same user"
    );
    let bob = post(json!({ "user": "bob" })).await;
    assert_eq!((&bob["user"], &bob["tags"]), (&json!("bob"), &json!(["news"])));
    assert!(bob["metadata"].is_null() || bob["metadata"] == json!({}), "{bob}");
    post(ann.clone()).await;
    let nobody = post(json!({ "user": null })).await;
    assert_eq!((&nobody["user"], &nobody["tags"]), (&Value::Null, &json!(["news"])), "logged out");
    let carol = post(json!({ "user": "carol", "tags": ["gold"], "metadata": { "name": "Carol" } })).await;
    assert_eq!(
        (&carol["tags"], &carol["metadata"]["name"]),
        (&json!(["gold"]), &json!("Carol")),
        "what is sent is kept"
    );
}

#[tokio::test]
async fn odd_times_of_expiry_are_refused_and_zero_is_none() {
    let (double, perennial) = start().await;
    let now = jiff::Timestamp::now().as_millisecond();
    for (time, status) in [
        (json!(0), 201),
        (json!(null), 201),
        (json!(now + 3_600_000), 201),
        (json!(now / 1000), 422),
        (json!(now - 3_600_000), 422),
    ] {
        let mut subscription = double.mint();
        subscription["expirationTime"] = time.clone();
        let answer =
            perennial.client().post("/subscriptions", &json!({ "subscription": subscription })).await;
        assert_eq!(answer.status, status, "{time}: {}", answer.text());
        if status == 422 {
            assert_eq!(answer.fields(), ["subscription.expirationTime"]);
        }
    }
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions WHERE expires_at IS NOT NULL").await, 1);
}
