//! Delivery over real connections: HTTP/2 and HTTP/1.1, GOAWAY, cuts, stalls, addresses that are not allowed.

use std::time::{Duration, Instant};

use perennial::sink::Answer;
use serde_json::{Value, json};

use support::double::Double;
use support::nginx::Nginx;
use support::process::{Perennial, Setup};

fn hello() -> Value {
    json!({ "to": {"all": true}, "notification": { "title": "Hello" } })
}

async fn start_with(change: impl FnOnce(Setup) -> Setup) -> (Double, Perennial) {
    let double = Double::start().await;
    let perennial = change(Setup::new().sending_to(&double)).start().await;
    (double, perennial)
}

#[tokio::test]
async fn goaway_from_nginx_loses_and_doubles_nothing() {
    let double = Double::start().await;
    let nginx = Nginx::start(double.ca_file().parent().unwrap(), 100).await;
    let perennial = Setup::new()
        .sending_to(&double)
        .set("push.http=2")
        .set("push.small_audience=0")
        .set("push.attempts=1")
        .start()
        .await;
    // nginx serves 1,500 subscriptions, and closes each connection after 100 requests while others are in flight on it.
    let mut push = Vec::new();
    for number in 0..1500 {
        let mut subscription = double.mint();
        subscription["endpoint"] = format!("https://127.0.0.1:{}/{number}", nginx.port).into();
        push.push(subscription);
        if push.len() == 500 {
            let request = json!({ "to": {"push": push}, "notification": {"title": "Hello"} });
            let progress = perennial.notify_and_wait(&request).await;
            assert_eq!(progress["outcomes"], json!({ "delivered": 500 }), "{progress}");
            push = Vec::new();
        }
    }
    assert_eq!(nginx.answered().await, 1500);
}

#[tokio::test]
async fn a_service_that_closes_in_order_after_every_answer_is_survived() {
    for http in ["1", "2"] {
        let (double, perennial) =
            start_with(|setup| setup.set(&format!("push.http={http}")).set("push.attempts=1")).await;
        perennial.subscribe(&double, 50).await;
        double.script(|_| Answer::TakeAndClose);
        let progress = perennial.notify_and_wait(&hello()).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 50 }), "HTTP/{http}");
        assert_eq!(double.reached_and_repeats(), (50, 0), "HTTP/{http}");
    }
}

#[tokio::test]
async fn both_versions_of_http_deliver() {
    let (http1, http2) = (http::Version::HTTP_11, http::Version::HTTP_2);
    for (http, version) in [("auto", http2), ("1", http1), ("2", http2)] {
        let (double, perennial) = start_with(|setup| setup.set(&format!("push.http={http}"))).await;
        perennial.subscribe(&double, 150).await;
        let progress = perennial.notify_and_wait(&hello()).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 150 }), "{http}");
        assert_eq!(double.reached_and_repeats(), (150, 0));
        assert!(double.taken().iter().all(|taken| taken.push.version == version), "{http}");
        assert!(double.refused().is_empty(), "{:?}", double.refused());
    }
}

#[tokio::test]
async fn cut_connections_are_tried_again() {
    let (double, perennial) = start_with(|setup| setup).await;
    perennial.subscribe(&double, 30).await;
    let cuts = std::sync::atomic::AtomicUsize::new(0);
    double.script(move |_| {
        let cut = cuts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 10 == 5;
        if cut { Answer::Cut } else { Answer::Take }
    });
    let progress = perennial.notify_and_wait(&hello()).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 30 }));
    assert_eq!(double.reached_and_repeats().0, 30);
}

#[tokio::test]
async fn a_service_that_never_answers_costs_only_its_own_time() {
    let (double, perennial) = start_with(|setup| setup.set("push.timeout=1s").set("push.attempts=1")).await;
    perennial.subscribe(&double, 20).await;
    let first = std::sync::Mutex::new(None::<String>);
    double.script(move |push| {
        let mut first = first.lock().unwrap();
        let stalled = first.get_or_insert_with(|| push.token.clone()) == &push.token;
        if stalled { Answer::Stall } else { Answer::Take }
    });
    let began = Instant::now();
    let progress = perennial.notify_and_wait(&hello()).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 19, "unreachable": 1 }));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_endless_answer_is_cut_off() {
    for http in ["1", "2"] {
        let (double, perennial) = start_with(|setup| setup.set(&format!("push.http={http}"))).await;
        perennial.subscribe(&double, 20).await;
        double.script(|_| Answer::TakeEndless);
        let progress = perennial.notify_and_wait(&hello()).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 20 }), "the status says so");
        assert_eq!(double.reached_and_repeats(), (20, 0), "and nobody gets it twice");
    }
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_no_push_service() {
    let double = Double::start().await;
    let stranger = Double::start().await;
    let perennial = Setup::new().sending_to(&double).set("push.attempts=1").start().await;
    perennial.subscribe(&stranger, 2).await;
    let progress = perennial.notify_and_wait(&hello()).await;
    assert_eq!(progress["outcomes"], json!({ "unreachable": 2 }));
    assert_eq!(stranger.asked() + stranger.refused().len(), 0);
}

#[tokio::test]
async fn an_address_that_becomes_private_is_not_sent_to() {
    // The browser subscribes while the name leads to an allowed address; when the message is sent, it leads
    // elsewhere (DNS rebinding).
    let double = Double::start().await;
    let port = double.origin().rsplit(':').next().unwrap().to_owned();
    let resolve =
        |address: &str| format!(r#"push.resolve=[{{ host = "push.example", addresses = ["{address}"] }}]"#);
    let setup = Setup::new().sending_to(&double).set("push.allow_hosts=push.example");
    let mut perennial = setup.set(&resolve("127.0.0.1")).start().await;
    let mut subscription = double.mint();
    let endpoint = subscription["endpoint"].as_str().unwrap().replace("127.0.0.1", "push.example");
    subscription["endpoint"] = endpoint.into();
    let stored = perennial.client().post("/subscriptions", &json!({ "subscription": subscription })).await;
    assert_eq!(stored.status, 201, "{}", stored.text());
    perennial.stop().await;

    for address in ["10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"] {
        perennial.setup = perennial.setup.set(&resolve(address));
        perennial = perennial.start_again().await;
        let progress = perennial.notify_and_wait(&hello()).await;
        assert_eq!(progress["outcomes"], json!({ "forbidden": 1 }), "{address}");
        let mut other = double.mint();
        other["endpoint"] = format!("https://push.example:{port}/x").into();
        let refused = perennial.client().post("/subscriptions", &json!({ "subscription": other })).await;
        assert_eq!(refused.fields(), ["subscription.endpoint"], "{address}");
        perennial.stop().await;
    }
    assert_eq!(double.asked(), 0);
}

#[tokio::test]
async fn a_name_without_an_address_is_refused_and_strangers_are_not_told_why() {
    let (double, perennial) = start_with(|setup| setup.set("push.allow_hosts=*")).await;
    let mut subscription = double.mint();
    subscription["endpoint"] = "https://permanently-removed.invalid/x".into();
    let request = json!({ "subscription": subscription });
    for (client, told) in [(perennial.client().clone(), true), (perennial.client().without_key(), false)] {
        let answer = client.post("/subscriptions", &request).await;
        assert_eq!(
            (answer.status.as_u16(), answer.fields()),
            (422, vec!["subscription.endpoint".to_owned()])
        );
        assert_eq!(answer.text().contains("permanently-removed.invalid"), told, "{}", answer.text());
    }
}
