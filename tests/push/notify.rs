//! `POST /notify`: the audience, the outcomes, and the promises that its acceptance makes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use perennial::sink::Answer;
use serde_json::{Value, json};

use support::double::{Double, status_answer};
use support::eventually;
use support::process::{Perennial, Setup};

async fn start() -> (Double, Perennial) {
    start_with(|setup| setup).await
}

async fn start_with(change: impl FnOnce(Setup) -> Setup) -> (Double, Perennial) {
    let double = Double::start().await;
    let perennial = change(Setup::new().sending_to(&double)).start().await;
    (double, perennial)
}

fn hello(to: &Value) -> Value {
    json!({ "to": to, "notification": { "title": "Hello", "body": "World" } })
}

#[tokio::test]
async fn a_notification_is_delivered_as_it_was_asked() {
    let (double, perennial) = start_with(|setup| setup.set("push.contact=mailto:ops@shop.example.com")).await;
    perennial.subscribe(&double, 1).await;
    let request = json!({
        "to": {"all": true},
        "notification": {"title": "Grüße", "body": "🌱", "icon": "/i.png", "url": "/news"},
        "ttl": 90, "urgency": "high", "topic": "news",
    });
    let accepted = perennial.client().post("/notify", &request).await;
    assert_eq!(accepted.status, 202);
    let body = accepted.json();
    assert_eq!((body["status"].as_str(), body["audience"].as_u64()), (Some("queued"), Some(1)));
    let id = body["id"].as_str().unwrap();
    assert_eq!(accepted.header("location"), Some(&*format!("/notifications/{id}")));

    let progress = perennial.done(id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    assert_eq!((progress["audience"].as_u64(), progress["audience_final"].as_bool()), (Some(1), Some(true)));
    for time in ["created_at", "started_at", "ended_at"] {
        assert!(progress[time].is_string(), "{progress}");
    }
    let taken = &double.taken()[0];
    let shown: Value = serde_json::from_str(&taken.text).unwrap();
    assert_eq!((shown["title"].as_str(), shown["body"].as_str()), (Some("Grüße"), Some("🌱")));
    assert_eq!(shown["tag"], id, "a repeat replaces it");
    assert_eq!(
        (taken.push.ttl, taken.push.urgency.as_str(), taken.push.topic.as_deref()),
        (90, "high", Some("news"))
    );
    assert!(double.refused().is_empty(), "{:?}", double.refused());
}

#[tokio::test]
async fn payloads_may_be_any_json_or_text_or_nothing() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 1).await;
    let long = "x".repeat(3993);
    for payload in [json!({"a": [1, 2]}), json!("just text"), json!(7), json!(""), json!(long)] {
        let progress = perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": payload })).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    }
    let texts: Vec<String> = double.taken().into_iter().map(|taken| taken.text).collect();
    assert_eq!(texts, [r#"{"a":[1,2]}"#, "just text", "7", "", &long]);
    assert!(double.refused().is_empty(), "{:?}", double.refused());
}

#[tokio::test]
async fn each_audience_reaches_those_it_names() {
    let (double, perennial) = start().await;
    let mut tokens = BTreeMap::new();
    let mut ids = Vec::new();
    for (name, user, tags) in [
        ("ann-1", "ann", json!(["news", "fr"])),
        ("ann-2", "ann", json!(["news", "de"])),
        ("bob", "bob", json!(["news", "fr", "muted"])),
        ("eve", "eve", json!([])),
    ] {
        let subscription = double.mint();
        let token = subscription["endpoint"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
        tokens.insert(token, name);
        let request = json!({ "subscription": subscription, "user": user, "tags": tags });
        ids.push(perennial.client().post("/subscriptions", &request).await.json()["id"].clone());
    }
    let inline = double.mint();
    tokens.insert(inline["endpoint"].as_str().unwrap().rsplit('/').next().unwrap().to_owned(), "inline");
    for (to, expected) in [
        (json!({"all": true}), vec!["ann-1", "ann-2", "bob", "eve"]),
        (json!({"user": "ann"}), vec!["ann-1", "ann-2"]),
        (json!({"user": "nobody"}), vec![]),
        (json!({"users": ["bob", "eve", "nobody"]}), vec!["bob", "eve"]),
        (json!({"tags": "news and fr and not muted"}), vec!["ann-1"]),
        (json!({"tags": "de or muted"}), vec!["ann-2", "bob"]),
        (json!({"tags": "not news"}), vec!["eve"]),
        (json!({"subscriptions": [ids[3], ids[0], 999]}), vec!["ann-1", "eve"]),
        (json!({"push": [inline]}), vec!["inline"]),
    ] {
        let before = double.taken().len();
        let progress = perennial.notify_and_wait(&hello(&to)).await;
        let mut reached: Vec<&str> =
            double.taken()[before..].iter().map(|taken| tokens[&taken.push.token]).collect();
        reached.sort_unstable();
        assert_eq!(reached, expected, "{to}");
        assert_eq!(progress["audience"].as_u64(), Some(expected.len() as u64), "{to}: {progress}");
    }
    let stored = perennial.client().get("/subscriptions").await.json();
    assert_eq!(stored["subscriptions"].as_array().unwrap().len(), 4, "the inline one is not stored");
}

#[tokio::test]
async fn the_outcomes_add_up_to_the_audience_and_what_has_ended_is_deleted() {
    let (double, perennial) =
        start_with(|setup| setup.set("push.attempts=1").set("push.small_audience=0")).await;
    let answers = [201, 404, 410, 400, 401, 403, 413, 500, 301];
    let mut by_token = BTreeMap::new();
    for (number, answer) in answers.iter().cycle().take(27).enumerate() {
        let subscription = double.mint();
        let token = subscription["endpoint"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
        by_token.insert(token, *answer);
        let request = json!({ "subscription": subscription, "user": number.to_string() });
        assert_eq!(perennial.client().post("/subscriptions", &request).await.status, 201);
    }
    double.script(move |push| match by_token[&push.token] {
        201 => Answer::Take,
        other => status_answer(other, &[("location", "http://169.254.169.254/")]),
    });
    let progress = perennial.notify_and_wait(&hello(&json!({"all": true}))).await;
    assert_eq!(
        progress["outcomes"],
        json!({ "delivered": 3, "gone": 6, "rejected": 6, "unauthorized": 6, "too_large": 3, "unreachable": 3 })
    );
    assert_eq!((progress["audience"].as_u64(), progress["decided"].as_u64()), (Some(27), Some(27)));
    assert_eq!(double.asked(), 27, "each was asked once, and no redirect was followed");
    let left = perennial.client().get("/subscriptions").await.json();
    assert_eq!(left["subscriptions"].as_array().unwrap().len(), 21, "404 and 410 are gone, and nobody else");
}

#[tokio::test]
async fn one_bad_row_never_stops_a_batch() {
    let (double, perennial) = start_with(|setup| setup.set("push.small_audience=0")).await;
    let ids = perennial.subscribe(&double, 12).await;
    // A restored backup, a bug or an older version may have left such rows.
    for (id, damage) in [
        (ids[0], format!("p256dh = x'{}'", "00".repeat(65))),
        (ids[3], "p256dh = x'04'".to_owned()),
        (ids[5], "auth = x''".to_owned()),
        (ids[7], "endpoint = 'nonsense'".to_owned()),
        (ids[8], "endpoint = 'https://10.1.2.3/x'".to_owned()),
    ] {
        let changed = perennial.sql(&format!("UPDATE subscriptions SET {damage} WHERE id = {id}")).await;
        assert_eq!(changed, 1);
    }
    let progress = perennial.notify_and_wait(&hello(&json!({"all": true}))).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 7, "forbidden": 5 }));
    assert_eq!(double.taken().len(), 7);
}

#[tokio::test]
async fn what_may_heal_is_tried_again_within_the_time_to_live() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 4).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    double.script(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => status_answer(503, &[]),
        1 => status_answer(429, &[("retry-after", "1")]),
        2 => Answer::Cut,
        _ => Answer::Take,
    });
    let mut request = hello(&json!({"all": true}));
    request["ttl"] = 100.into();
    let progress = perennial.notify_and_wait(&request).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 4 }));
    assert_eq!(double.reached_and_repeats().0, 4);
    let ttls: Vec<u32> = double.taken().iter().map(|taken| taken.push.ttl).collect();
    // A cut also ends the other requests on the connection.
    let later = ttls.iter().filter(|ttl| (80..100).contains(*ttl)).count();
    assert!(later >= 3 && ttls.iter().all(|ttl| (80..=100).contains(ttl)), "the wait is taken off: {ttls:?}");
}

#[tokio::test]
async fn a_message_for_now_or_never_is_not_tried_later() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 2).await;
    double.answer(503);
    let mut request = hello(&json!({"all": true}));
    request["ttl"] = 0.into();
    let progress = perennial.notify_and_wait(&request).await;
    assert_eq!(progress["outcomes"], json!({ "expired": 2 }));
    assert_eq!(double.asked(), 2);
}

#[tokio::test]
async fn attempts_end_some_time() {
    let (double, perennial) = start_with(|setup| setup.set("push.attempts=2")).await;
    perennial.subscribe(&double, 3).await;
    double.answer(500);
    let progress = perennial.notify_and_wait(&hello(&json!({"all": true}))).await;
    assert_eq!(progress["outcomes"], json!({ "unreachable": 3 }));
    assert_eq!(double.asked(), 6);
}

#[tokio::test]
async fn an_idempotency_key_makes_repeating_safe() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 1).await;
    let keyed = perennial.client().with_header("idempotency-key", "order-1");
    let first = keyed.post("/notify", &hello(&json!({"all": true}))).await;
    assert_eq!(first.status, 202);
    perennial.done(first.json()["id"].as_str().unwrap()).await;
    let reordered = json!({ "notification": { "body": "World", "title": "Hello" }, "to": {"all": true} });
    for same in [hello(&json!({"all": true})), reordered] {
        let again = keyed.post("/notify", &same).await;
        assert_eq!((again.status, again.json()), (first.status, first.json()));
        assert_eq!(again.header("location"), first.header("location"));
    }
    let other = keyed.post("/notify", &hello(&json!({"user": "ann"}))).await;
    assert_eq!(other.status, 422, "{}", other.text());
    let fresh = perennial.client().with_header("idempotency-key", "order-2");
    assert_ne!(fresh.post("/notify", &hello(&json!({"all": true}))).await.json()["id"], first.json()["id"]);
    eventually("two messages", || async { (double.taken().len() == 2).then_some(()) }).await;
    let later = perennial.client().with_header("idempotency-key", "order-3");
    let request = json!({ "to": {"all": true}, "payload": "x", "at": "2027-06-01T00:00:00Z" });
    let scheduled = later.post("/notify", &request).await.json();
    assert_eq!(scheduled["status"], "scheduled");
    assert_eq!(later.post("/notify", &request).await.json(), scheduled);

    // The key is remembered across a restart.
    let mut perennial = perennial;
    perennial.stop().await;
    let perennial = perennial.start_again().await;
    let keyed = perennial.client().with_header("idempotency-key", "order-1");
    assert_eq!(keyed.post("/notify", &hello(&json!({"all": true}))).await.json(), first.json());
}

/// The trace goes from the request to each of its batches, including those of retries.
#[tokio::test]
async fn every_batch_carries_the_trace_of_its_request() {
    let (double, perennial) =
        start_with(|setup| setup.set("push.small_audience=1").set("push.batch=4")).await;
    perennial.subscribe(&double, 10).await;
    let asked = AtomicUsize::new(0);
    double.script(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => status_answer(503, &[]),
        _ => Answer::Take,
    });
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let client = perennial.client().with_header("traceparent", trace);
    let sent = client.post("/notify", &hello(&json!({"all": true}))).await.json();
    perennial.done(sent["id"].as_str().unwrap()).await;
    eventually("three batches, and one again", || async {
        let lines = perennial.log_lines();
        let is_end =
            |line: &&Value| line["message"].as_str().is_some_and(|text| text.starts_with("batch sent"));
        let sent: Vec<_> = lines.iter().filter(is_end).collect();
        assert!(sent.iter().all(|line| line["span"]["trace"] == trace), "{sent:?}");
        (sent.len() == 4).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_same_request_twice_at_once_is_accepted_once() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 1).await;
    let keyed = perennial.client().with_header("idempotency-key", "twice");
    let request = hello(&json!({"all": true}));
    let answers = futures_util::future::join_all((0..20).map(|_| keyed.post("/notify", &request))).await;
    let mut ids: Vec<Value> = Vec::new();
    for answer in answers {
        match answer.status.as_u16() {
            202 => ids.push(answer.json()["id"].clone()),
            409 => assert!(answer.header("retry-after").is_some()),
            other => panic!("{other}: {}", answer.text()),
        }
    }
    assert!(!ids.is_empty() && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    perennial.done(ids[0].as_str().unwrap()).await;
    assert_eq!(double.taken().len(), 1);
}

#[tokio::test]
async fn a_small_urgent_one_does_not_wait_for_a_big_one() {
    let (double, perennial) = start_with(|setup| {
        setup.set("push.small_audience=1").set("push.batch=50").set("push.window=16").set("push.timeout=20s")
    })
    .await;
    let ids = perennial.subscribe(&double, 300).await;
    // The service answers no message of the big notification, which then gets no more than its first permits.
    double.script(|push| if push.topic.is_some() { Answer::Stall } else { Answer::Take });
    let mut big = hello(&json!({"all": true}));
    big["topic"] = "slow".into();
    let big = perennial.notify(&big).await;
    eventually("the big one is under way", || async { (double.asked() >= 12).then_some(()) }).await;
    for id in &ids[..10] {
        let mut urgent = hello(&json!({"subscriptions": [id]}));
        urgent["urgency"] = "high".into();
        let progress = perennial.notify_and_wait(&urgent).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    }
    let progress = perennial.client().get(&format!("/notifications/{big}")).await.json();
    assert_eq!(
        (progress["state"].as_str(), progress["decided"].as_u64()),
        (Some("sending"), Some(0)),
        "{progress}"
    );
    assert_eq!(progress["audience"], 300);
}

#[tokio::test]
async fn a_big_audience_is_sent_page_by_page_to_those_who_were_there() {
    let (double, perennial) = start_with(|setup| {
        setup.set("push.small_audience=10").set("push.batch=37").set("push.batches=2").set("push.window=8")
    })
    .await;
    let ids = perennial.subscribe(&double, 400).await;
    for id in ids.iter().step_by(10) {
        perennial.client().delete(&format!("/subscriptions/{id}"), None).await;
    }
    let id = perennial.notify(&hello(&json!({"all": true}))).await;
    // A subscription that comes now has an id above the watermark.
    perennial.subscribe(&double, 5).await;
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 360 }));
    assert_eq!(double.reached_and_repeats(), (360, 0));
    let claims: std::collections::BTreeSet<_> =
        double.taken().into_iter().map(|taken| taken.push.authorization).collect();
    assert_eq!(claims.len(), 1, "one signature for one key and one origin");
}

#[tokio::test]
async fn notifications_are_listed_the_newest_first() {
    let (_double, perennial) = start().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(perennial.notify(&hello(&json!({"all": true}))).await);
    }
    let page = perennial.client().get("/notifications?limit=2").await.json();
    let listed: Vec<&str> =
        page["notifications"].as_array().unwrap().iter().map(|n| n["id"].as_str().unwrap()).collect();
    assert_eq!(listed, [&ids[2], &ids[1]]);
    let next = page["next"].as_str().unwrap();
    let page = perennial.client().get(&format!("/notifications?cursor={next}")).await.json();
    assert_eq!(page["notifications"][0]["id"], *ids[0]);
    assert_eq!(page["notifications"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn those_that_are_asked_to_wait_hold_up_nobody() {
    let (double, perennial) = start_with(|setup| {
        setup.set("push.small_audience=1").set("push.batch=20").set("push.retry_batches=1")
    })
    .await;
    let ids = perennial.subscribe(&double, 200).await;
    // Every other request is asked to wait, each for another time.
    let asked = AtomicUsize::new(0);
    double.script(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        count if count < 200 && count % 2 == 0 => {
            status_answer(429, &[("retry-after", &(3600 + count).to_string())])
        }
        _ => Answer::Take,
    });
    let big = perennial.notify(&hello(&json!({"all": true}))).await;
    let path = format!("/notifications/{big}");
    eventually("the others have got it", || async {
        let progress = perennial.client().get(&path).await.json();
        let (outcomes, retrying) = (&progress["outcomes"], &progress["retrying"]);
        (*outcomes == json!({ "delivered": 100 }) && *retrying == 100).then_some(())
    })
    .await;
    let progress = perennial.notify_and_wait(&hello(&json!({"subscriptions": [ids[0]]}))).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    let progress = perennial.notify_and_wait(&hello(&json!({"all": true}))).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 200 }));
    let jobs = perennial.sql("SELECT count(*) FROM jobs").await;
    assert!(jobs <= 20, "those of one batch wait together: {jobs}");
}

#[tokio::test]
async fn the_log_follows_a_notification_from_its_request_to_its_end() {
    let (double, perennial) = start().await;
    perennial.subscribe(&double, 2).await;
    let answer = perennial.client().post("/notify", &hello(&json!({"all": true}))).await;
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    perennial.done(&id).await;
    let done = perennial.logged("notification done").await;
    assert_eq!(done["notification"], id.as_str(), "{done}");
    // This is the last line of all.
    perennial.logged("job ended").await;
    let lines = perennial.log_lines();
    let of = |what: &str, key: &str, value: &str| {
        lines.iter().filter(|line| line["message"] == what && line[key] == value).count()
    };
    let request = answer.header("x-request-id").unwrap();
    assert_eq!(of("request", "request_id", request), 1);
    // Each id has the same name and place in all lines: those of the request, of its jobs, and of messages within them.
    let trace = answer.header("traceresponse").unwrap().split('-').nth(1).unwrap().to_owned();
    assert_eq!(trace, request.replace('-', ""), "a trace that begins with the request has its digits");
    let joined: Vec<&Value> = lines
        .iter()
        .filter(|line| line["trace_id"] == trace.as_str() && line["request_id"] == request)
        .collect();
    for message in ["request", "job started", "batch sent", "job ended"] {
        assert!(joined.iter().any(|line| line["message"] == message), "{message}: {joined:?}");
    }
    assert_eq!(of("batch sent", "notification", &id), 1);
    let accepted: Vec<_> = lines.iter().filter(|line| line["notification"] == id.as_str()).collect();
    assert!(
        accepted.iter().any(|line| line["span"]["request_id"] == request),
        "a line with both: {accepted:?}"
    );
}
