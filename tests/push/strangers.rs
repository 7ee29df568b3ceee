//! Strangers choose what they store, but it costs other users nothing that they would notice.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Method;
use perennial::sink::Answer;
use serde_json::{Value, json};

use support::double::{Double, status_answer};
use support::process::{Perennial, Setup};
use support::{eventually, soon};

use support::keys::add_key;

fn to_all() -> Value {
    json!({ "to": { "all": true }, "payload": "x" })
}

async fn start_with(change: impl FnOnce(Setup) -> Setup) -> (Double, Perennial) {
    let double = Double::start().await;
    let perennial = change(Setup::new().sending_to(&double)).start().await;
    (double, perennial)
}

/// Last part of an endpoint, by which the push service identifies a subscription.
fn token(subscription: &Value) -> String {
    subscription["endpoint"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()
}

async fn store(perennial: &Perennial, subscription: &Value) {
    let request = json!({ "subscription": subscription });
    let answer = perennial.client().without_key().post("/subscriptions", &request).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
}

/// Checks that 100 good subscriptions are served beside hostile ones. Hostile subscriptions answer with `status`: a
/// refusal, a request to wait, or an error. They are stored before the good ones, or among them if `scattered`.
async fn good_ones_are_served_beside(status: u16, hostile: usize, scattered: bool) {
    of_many_good_ones(100, status, hostile, scattered).await;
}

/// Checks the same with `many` good subscriptions.
async fn of_many_good_ones(many: usize, status: u16, hostile: usize, scattered: bool) {
    let (double, perennial) = start_with(|setup| {
        setup.set("push.address_burst=1000000").set("push.site_burst=1000000").set("push.attempts=2")
    })
    .await;
    let good: Vec<Value> = (0..many).map(|_| double.mint()).collect();
    let bad: Vec<Value> = (0..hostile).map(|_| double.mint()).collect();
    let is_bad: std::collections::HashSet<String> = bad.iter().map(token).collect();
    double.script(
        move |push| {
            if is_bad.contains(&push.token) { status_answer(status, &[]) } else { Answer::Take }
        },
    );
    // Half of the good ones have been delivered to before.
    for subscription in &good[..many / 2] {
        store(&perennial, subscription).await;
    }
    perennial.notify_and_wait(&to_all()).await;
    let mut rest = good[many / 2..].iter();
    for subscription in &bad {
        store(&perennial, subscription).await;
        if scattered && let Some(good) = rest.next() {
            store(&perennial, good).await;
        }
    }
    for subscription in rest {
        store(&perennial, subscription).await;
    }
    let before = double.taken().len();
    let began = Instant::now();
    perennial.notify(&to_all()).await;
    eventually(&format!("{many} are delivered to beside {hostile} that answer {status}"), || async {
        (double.taken().len() >= before + many).then_some(())
    })
    .await;
    println!("{many} beside {hostile} that answer {status}, scattered {scattered}: {:?}", began.elapsed());
    // An urgent message gets through at any moment.
    for _ in 0..5 {
        let urgent = json!({ "to": { "push": [good[0]] }, "payload": "now", "urgency": "high", "ttl": 60 });
        let progress = soon("an urgent message", perennial.notify_and_wait(&urgent)).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    }
}

#[tokio::test]
async fn a_few_subscriptions_with_another_key_keep_nobody_waiting() {
    good_ones_are_served_beside(403, 20, false).await;
}

#[tokio::test]
async fn a_hundred_subscriptions_with_another_key_keep_nobody_waiting() {
    good_ones_are_served_beside(403, 100, true).await;
}

#[tokio::test]
async fn five_hundred_subscriptions_with_another_key_keep_nobody_waiting() {
    good_ones_are_served_beside(403, 500, false).await;
}

#[tokio::test]
async fn two_hundred_subscriptions_that_ask_to_wait_keep_nobody_waiting() {
    good_ones_are_served_beside(429, 200, false).await;
}

#[tokio::test]
async fn two_hundred_subscriptions_that_are_out_of_order_keep_nobody_waiting() {
    good_ones_are_served_beside(503, 200, true).await;
}

/// Uses as many subscriptions as a determined visitor may store, for the figures.
#[tokio::test]
async fn two_thousand_hostile_subscriptions_keep_three_thousand_waiting_no_longer_than_none_do() {
    if !support::full() {
        return;
    }
    for (status, hostile) in [(403, 0), (403, 2000), (429, 2000), (503, 2000)] {
        for scattered in [false, true] {
            of_many_good_ones(3000, status, hostile, scattered).await;
        }
    }
}

/// Nothing was ever delivered, and the first subscriptions are refused: the good ones behind them are found soon.
#[tokio::test]
async fn a_first_broadcast_finds_the_good_ones_behind_hostile_ones() {
    let (double, perennial) =
        start_with(|setup| setup.set("push.address_burst=1000000").set("push.site_burst=1000000")).await;
    let bad: Vec<Value> = (0..300).map(|_| double.mint()).collect();
    let is_bad: std::collections::HashSet<String> = bad.iter().map(token).collect();
    double.script(
        move |push| {
            if is_bad.contains(&push.token) { status_answer(403, &[]) } else { Answer::Take }
        },
    );
    for subscription in &bad {
        store(&perennial, subscription).await;
    }
    perennial.subscribe(&double, 300).await;
    let began = Instant::now();
    let id = perennial.notify(&to_all()).await;
    let progress = perennial.done_within(&id, Duration::from_secs(60)).await;
    println!("300 behind 300 that are refused: {:?}", began.elapsed());
    assert_eq!(progress["outcomes"], json!({ "delivered": 300, "unauthorized": 300 }));
}

/// The contact was forgotten, or a key does not belong to a dump: the push service refuses all messages for days.
#[tokio::test]
async fn refusals_for_a_fault_of_ours_lose_nobody() {
    let (double, perennial) = start_with(|setup| setup.set("push.attempts=1")).await;
    perennial.subscribe(&double, 15).await;
    double.answer(403);
    for _ in 0..5 {
        perennial.notify_and_wait(&to_all()).await;
        perennial.sql("UPDATE subscriptions SET refused_since = refused_since - 864000000, struck_at = struck_at - 864000000").await;
        let origin = perennial.admin().get("/origins").await.json()[0]["origin"].clone();
        let token = std::fs::read_to_string(perennial.setup.data_dir().join("admin.token")).unwrap();
        let admin = perennial.admin().with_key(token.trim());
        assert_eq!(admin.post("/origins/resume", &json!({ "origin": origin })).await.status, 204);
    }
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions").await, 15, "nobody is lost");
    // The fault is mended, and all subscriptions are still there.
    double.script(|_| Answer::Take);
    let progress = perennial.notify_and_wait(&to_all()).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 15 }));
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions WHERE refused_since IS NOT NULL").await, 0);
}

/// A subscription that is refused for longer than a week, while others are accepted, is not ours and is given up.
#[tokio::test]
async fn a_subscription_that_is_refused_alone_for_a_week_is_given_up() {
    let (double, perennial) = start_with(|setup| setup.set("push.attempts=1")).await;
    let lost = double.mint();
    let of_lost = token(&lost);
    double.script(move |push| if push.token == of_lost { status_answer(403, &[]) } else { Answer::Take });
    store(&perennial, &lost).await;
    perennial.subscribe(&double, 5).await;
    let count = async || perennial.sql("SELECT count(*) FROM subscriptions").await;
    for _ in 0..4 {
        perennial.notify_and_wait(&to_all()).await;
    }
    assert_eq!(count().await, 6, "not within the same day");
    eventually("what was accepted is written down", || async {
        (perennial.sql("SELECT count(*) FROM push_acceptances").await == 1).then_some(())
    })
    .await;
    for days in [3, 3, 2] {
        let sql = format!(
            "UPDATE subscriptions SET refused_since = refused_since - {0}, struck_at = struck_at - {0}",
            days * 86_400_000
        );
        perennial.sql(&sql).await;
        perennial.notify_and_wait(&to_all()).await;
        assert_eq!(count().await, if days == 3 { 6 } else { 5 }, "after {days} more days");
    }
}

#[tokio::test]
async fn names_that_dns_cannot_carry_are_refused() {
    let (double, perennial) =
        start_with(|setup| setup.set("push.allow_hosts=[\"*.push.example.com\", \"127.0.0.1\"]")).await;
    let long = format!("{}.push.example.com", "a".repeat(64));
    let very_long = format!("{}push.example.com", "abcdefgh.".repeat(30));
    for host in [
        "a..push.example.com",
        "-a.push.example.com",
        "a!b.push.example.com",
        "a_~b.push.example.com",
        &long,
        &very_long,
    ] {
        let mut subscription = double.mint();
        subscription["endpoint"] = json!(format!("https://{host}/x"));
        let (anybody, request) = (perennial.client().without_key(), json!({ "subscription": subscription }));
        let answer = anybody.post("/subscriptions", &request).await;
        assert_eq!(
            (answer.status.as_u16(), answer.fields()),
            (422, vec!["subscription.endpoint".to_owned()]),
            "{host}"
        );
    }
}

/// A new subscription evicts the oldest one without a delivery; subscriptions with a delivery stay.
#[tokio::test]
async fn what_strangers_store_is_bounded() {
    let (double, perennial) =
        start_with(|setup| setup.set("push.guests_per_site=20").set("push.address_burst=1000")).await;
    let known = double.mint();
    store(&perennial, &known).await;
    perennial.notify_and_wait(&to_all()).await;
    for _ in 0..60 {
        store(&perennial, &double.mint()).await;
    }
    let count = perennial.sql("SELECT count(*) FROM subscriptions").await;
    assert!((15..=30).contains(&count), "{count}");
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions WHERE delivered_at IS NOT NULL").await, 1);
    let metrics = perennial.admin().get("/metrics").await.text();
    assert!(metrics.contains("perennial_push_guests_evicted_total"), "{metrics}");
    perennial.logged("strangers have stored nearly as many subscriptions as may be; the oldest that nothing was delivered to will make room (push.guests_per_site)").await;
}

/// The attacker has the same address as all other clients, as behind a proxy that is not listed.
#[tokio::test]
async fn wrong_keys_keep_no_right_one_out() {
    let perennial = Setup::new().start().await;
    let unused = add_key(&perennial.setup, "unused", &[]).await;
    let mut refused = 0;
    for number in 0..900 {
        let wrong = perennial.client().with_key(&format!("{}{number:06}", &unused[..unused.len() - 6]));
        let status = wrong.get("/notifications").await.status;
        assert!(status == 401 || status == 429, "{status}");
        refused += usize::from(status == 429);
    }
    assert!(refused > 100, "the guesser is told so: {refused}");
    let right = perennial.client().with_key(&unused).get("/notifications").await;
    assert_eq!(right.status, 200, "{}", right.text());
    assert_eq!(perennial.client().get("/notifications").await.status, 200);
}

/// All followers share one query, and one key may have a limited number of followers.
#[tokio::test]
async fn those_who_follow_share_one_question_and_have_a_bound() {
    let (double, perennial) = start_with(|setup| setup.set("push.followers_per_key=20")).await;
    perennial.subscribe(&double, 1).await;
    let later = json!({ "to": { "all": true }, "payload": "x", "at": (jiff::Timestamp::now() + Duration::from_secs(3)).to_string() });
    let id = perennial.notify(&later).await;
    let path = format!("/notifications/{id}/events");
    let follow = |client: &support::http::Client| {
        let (client, path) = (client.clone(), path.clone());
        async move { client.get(&path).await }
    };
    let mut following = tokio::task::JoinSet::new();
    for _ in 0..20 {
        following.spawn(follow(perennial.client()));
    }
    eventually("all follow", || async {
        let modules = perennial.admin().get("/modules").await.json();
        modules.to_string().contains("\"followers\":20").then_some(())
    })
    .await;
    let one_more = perennial.client().get(&path).await;
    assert_eq!((one_more.status.as_u16(), one_more.header("retry-after").is_some()), (429, true));
    let other = add_key(&perennial.setup, "other", &[]).await;
    following.spawn(follow(&perennial.client().with_key(&other)));
    while let Some(followed) = soon("the end", following.join_next()).await {
        let text = followed.unwrap().text();
        assert!(text.contains("event: progress") && text.contains("event: end"), "{text}");
        assert!(text.contains("\"delivered\":1"), "{text}");
    }
    eventually("nobody is counted any more", || async {
        let modules = perennial.admin().get("/modules").await.json();
        modules.to_string().contains("\"followers\":0").then_some(())
    })
    .await;
}

#[tokio::test]
async fn errors_are_no_longer_than_somebody_reads() {
    let (_double, perennial) = start_with(|setup| setup).await;
    let name = "x".repeat(100_000);
    let answer =
        perennial.client().post("/notify", &json!({ "to": { "all": true }, name.as_str(): 1 })).await;
    assert_eq!(answer.status, 422);
    assert!(answer.text().len() < 8_000, "{}", answer.text().len());
    let users: Vec<&str> = vec![""; 60_000];
    let answer =
        perennial.client().post("/notify", &json!({ "to": { "users": users }, "payload": "x" })).await;
    assert_eq!(answer.status, 422);
    assert!(answer.fields().len() <= 20 && answer.text().len() < 16_000, "{}", answer.text().len());
}

/// A page has as many rows as fit, and the cursor leads to the next page.
#[tokio::test]
async fn pages_are_bounded_in_bytes() {
    let (double, perennial) = start_with(|setup| setup).await;
    let metadata = json!({ "text": "x".repeat(4000) });
    for _ in 0..150 {
        let request = json!({ "subscription": double.mint(), "metadata": metadata });
        assert_eq!(perennial.client().post("/subscriptions", &request).await.status, 201);
    }
    let (mut seen, mut path, mut pages) = (0, "/subscriptions?limit=1000".to_owned(), 0);
    loop {
        let answer = perennial.client().get(&path).await;
        assert!(answer.text().len() < 500_000, "{}", answer.text().len());
        let page = answer.json();
        seen += page["subscriptions"].as_array().unwrap().len();
        pages += 1;
        let Some(next) = page["next"].as_i64().or(page["cursor"].as_i64()) else { break };
        path = format!("/subscriptions?limit=1000&cursor={next}");
    }
    assert!(seen == 150 && pages > 1, "{seen} in {pages}");
}

/// Half of the readers are reserved for other sites.
#[tokio::test]
async fn one_site_that_counts_again_and_again_keeps_others_from_nothing() {
    let double = Double::start().await;
    let perennial = Setup::new()
        .sending_to(&double)
        .set("sites.shop.origins=[\"https://shop.example.com\"]")
        .set("store.readers=4")
        .start()
        .await;
    let shop = perennial.client().with_key(&add_key(&perennial.setup, "shop", &["--site", "shop"]).await);
    let tags: Vec<String> = (0..8).map(|tag| format!("t{tag}")).collect();
    // The key of the site is noted with its first subscription.
    perennial.subscribe(&double, 1).await;
    perennial.fill((0..20_000).map(|_| double.mint()));
    perennial.sql("INSERT INTO subscription_tags (site, subscription, tag) SELECT site, subscriptions.id, 't' || value FROM subscriptions, json_each('[0,1,2,3,4,5,6,7]')").await;
    let heavy = tags.iter().map(|tag| format!("({tag} or x{tag})")).collect::<Vec<_>>().join(" and ");
    let mut counting = tokio::task::JoinSet::new();
    for number in 0..40 {
        let client = perennial.client().clone();
        let tags = format!("{heavy} and (t1 or y{number})");
        counting.spawn(async move {
            let request = json!({ "to": { "tags": tags }, "payload": "x", "dry_run": true });
            client.send(Method::POST, "/notify", Some(&request)).await.status
        });
    }
    for _ in 0..20 {
        let answer = shop.get("/subscriptions").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    while let Some(status) = counting.join_next().await {
        let status = status.unwrap();
        assert!(status == 200 || status == 503, "{status}");
    }
}

/// The signature of a token covers its site and its expiry.
#[tokio::test]
async fn a_user_token_ends_and_is_for_one_site() {
    use aws_lc_rs::hmac;
    let secret = "s".repeat(32);
    let (double, perennial) = start_with(|setup| {
        let file = setup.file("secret");
        std::fs::write(&file, &secret).unwrap();
        let file = format!("sites.default.user_secret_file={}", file.display());
        setup.set(&file).set("push.subscriptions_per_user=3").set("push.old_user_tokens_until=")
    })
    .await;
    let sign = |text: &str| {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        URL_SAFE_NO_PAD.encode(hmac::sign(&key, text.as_bytes()))
    };
    let in_seconds = |seconds: i64| jiff::Timestamp::now().as_second() + seconds;
    let token = |site: &str, expires: i64, user: &str| {
        format!("v1.{expires}.{}", sign(&format!("v1.{site}.{expires}.{user}")))
    };
    let store = async |token: &str| {
        let request = json!({ "subscription": double.mint(), "user": "ann", "user_token": token });
        perennial.client().without_key().post("/subscriptions", &request).await.status.as_u16()
    };
    let good = token("default", in_seconds(3600), "ann");
    for _ in 0..6 {
        assert_eq!(store(&good).await, 201);
    }
    assert_eq!(perennial.sql("SELECT count(*) FROM subscriptions").await, 3, "no more of one user");
    for bad in [
        token("default", in_seconds(-3600), "ann"),
        token("default", in_seconds(90 * 86_400), "ann"),
        token("shop", in_seconds(3600), "ann"),
        token("default", in_seconds(3600), "bob"),
        sign("ann"),
    ] {
        assert_eq!(store(&bad).await, 403, "{bad}");
    }
}
