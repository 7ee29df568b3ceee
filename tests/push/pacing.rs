//! Sending at a rate: evenly, shared by replicas, changed while it goes on; and the states of a notification meanwhile.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use perennial::sink::Answer;
use serde_json::{Value, json};

use support::double::Double;
use support::postgres::Database;
use support::process::{Perennial, Setup};
use support::{eventually, soon};

use support::stores::on_postgres;

/// Arrival times of messages.
#[derive(Clone, Default)]
struct Arrivals(Arc<Mutex<Vec<Instant>>>);

impl Arrivals {
    fn at(double: &Double) -> Self {
        let arrivals = Self::default();
        let noted = arrivals.clone();
        double.script(move |_| {
            noted.0.lock().unwrap().push(Instant::now());
            Answer::Take
        });
        arrivals
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Time from the first message to the last.
    fn span(&self) -> Duration {
        let times = self.0.lock().unwrap();
        *times.last().unwrap() - *times.first().unwrap()
    }

    /// Maximum number of messages within any interval of this length.
    fn most_within(&self, while_: Duration) -> usize {
        let times = self.0.lock().unwrap();
        let from =
            |first: &Instant| times.iter().filter(|time| (*first..*first + while_).contains(*time)).count();
        times.iter().map(from).max().unwrap_or_default()
    }

    /// Number of messages in the first of `parts` equal parts of the time.
    fn in_first(&self, parts: u32) -> usize {
        let times = self.0.lock().unwrap();
        let (first, last) = (*times.first().unwrap(), *times.last().unwrap());
        times.iter().filter(|time| **time <= first + (last - first) / parts).count()
    }
}

async fn start(count: usize) -> (Double, Perennial, Arrivals) {
    start_with(count, |setup| setup).await
}

async fn start_with(count: usize, change: impl FnOnce(Setup) -> Setup) -> (Double, Perennial, Arrivals) {
    let double = Double::start().await;
    let perennial = change(Setup::new().sending_to(&double).set("push.small_audience=5")).start().await;
    perennial.subscribe(&double, count).await;
    let arrivals = Arrivals::at(&double);
    (double, perennial, arrivals)
}

fn at_rate(rate: f64) -> Value {
    json!({ "to": {"all": true}, "payload": "slowly", "rate": rate })
}

#[tokio::test]
async fn a_rate_is_kept_evenly_from_batch_to_batch() {
    let (_double, perennial, arrivals) = start(60).await;
    let progress = perennial.notify_and_wait(&at_rate(40.0)).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 60 }));
    assert_eq!(progress["rate_wanted"], 40.0);
    // There are 59 waits of 25 ms.
    let span = arrivals.span();
    assert!((Duration::from_millis(1300)..Duration::from_secs(8)).contains(&span), "{span:?}");
    let most = arrivals.most_within(Duration::from_millis(100));
    assert!(most <= 16, "no flood: {most} within 100 ms");
}

#[tokio::test]
async fn a_rate_may_be_less_than_one_a_second() {
    let (_double, perennial, arrivals) = start(2).await;
    perennial.notify_and_wait(&at_rate(0.5)).await;
    let span = arrivals.span();
    assert!((Duration::from_millis(1900)..Duration::from_secs(8)).contains(&span), "{span:?}");
}

#[tokio::test]
async fn a_ramp_rises_from_nothing() {
    let (_double, perennial, arrivals) = start(60).await;
    let mut request = at_rate(60.0);
    request["ramp_up"] = "2s".into();
    perennial.notify_and_wait(&request).await;
    // The first half of a ramp has a quarter of its messages.
    let early = arrivals.in_first(2);
    assert!((5..=26).contains(&early), "{early} of 60");
}

/// Starts two processes on one database.
async fn two_replicas() -> (Double, Database, [Perennial; 2]) {
    let (double, database) = (Double::start().await, Database::new().await);
    let start = async || {
        let setup = Setup::new().sending_to(&double).set("push.small_audience=5").set("push.batch=10");
        on_postgres(setup, database.url()).await.start().await
    };
    let replicas = [start().await, start().await];
    (double, database, replicas)
}

#[tokio::test]
async fn replicas_share_one_rate() {
    let (double, _database, [one, _other]) = two_replicas().await;
    one.subscribe(&double, 80).await;
    let arrivals = Arrivals::at(&double);
    let progress = one.notify_and_wait(&at_rate(40.0)).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 80 }));
    let span = arrivals.span();
    assert!(span > Duration::from_millis(1700), "not twice as fast: {span:?}");
    assert!(span < Duration::from_secs(10), "{span:?}");
}

/// Both replicas report the rate of all replicas.
#[tokio::test]
async fn replicas_tell_the_rate_of_all_of_them() {
    let (double, _database, [one, other]) = two_replicas().await;
    one.subscribe(&double, 300).await;
    let id = one.notify(&at_rate(40.0)).await;
    for replica in [&one, &other] {
        eventually("the rate of all", || async {
            let progress = replica.client().get(&format!("/notifications/{id}")).await.json();
            let (rate, eta) = (progress["rate"].as_f64().unwrap(), progress["eta_seconds"].as_u64());
            (rate > 30.0 && rate < 60.0 && eta.is_some()).then_some(())
        })
        .await;
    }
    one.client().post(&format!("/notifications/{id}/cancel"), &json!({})).await;
}

#[tokio::test]
async fn a_rate_is_changed_while_it_is_kept() {
    let (_double, perennial, arrivals) = start(100).await;
    let id = perennial.notify(&at_rate(2.0)).await;
    eventually("the first is there", || async { (arrivals.count() > 0).then_some(()) }).await;
    let changed = perennial.client().patch(&format!("/notifications/{id}"), &json!({ "rate": 200 })).await;
    assert_eq!(changed.json()["rate_wanted"], 200.0);
    let began = Instant::now();
    perennial.done(&id).await;
    assert!(began.elapsed() < Duration::from_secs(15), "not 50 s: {:?}", began.elapsed());

    let id = perennial.notify(&at_rate(2.0)).await;
    perennial.client().patch(&format!("/notifications/{id}"), &json!({ "rate": null })).await;
    perennial.done(&id).await;
    for bad in [json!({}), json!({ "rate": 0 }), json!({ "rate": -1 }), json!({ "rate": 1e9 })] {
        let refused = perennial.client().patch(&format!("/notifications/{id}"), &bad).await;
        assert_eq!(
            (refused.status.as_u16(), refused.json()["errors"][0]["field"].as_str()),
            (422, Some("rate"))
        );
    }
}

#[tokio::test]
async fn a_pause_acts_within_a_moment_and_loses_nothing() {
    let (double, perennial, arrivals) = start(60).await;
    let id = perennial.notify(&at_rate(30.0)).await;
    eventually("it is under way", || async { (arrivals.count() >= 5).then_some(()) }).await;
    let act =
        async |what: &str| perennial.client().post(&format!("/notifications/{id}/{what}"), &json!({})).await;
    assert_eq!(act("pause").await.json()["state"], "paused");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let paused = arrivals.count();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(arrivals.count(), paused);
    assert_eq!(act("resume").await.json()["state"], "sending");
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 60 }));
    assert_eq!(double.reached_and_repeats(), (60, 0));
    assert_eq!(act("pause").await.json()["state"], "done", "it has ended");
}

#[tokio::test]
async fn a_broadcast_without_a_rate_can_be_paused_too() {
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double).set("push.small_audience=5").set("push.batch=20");
    let perennial = setup.set("push.timeout=5s").start().await;
    perennial.subscribe(&double, 200).await;
    let gate = Arc::new(Mutex::new(false));
    let open = Arc::clone(&gate);
    double.script(move |_| {
        if *open.lock().unwrap() {
            Answer::Take
        } else {
            Answer::Status(http::StatusCode::SERVICE_UNAVAILABLE, vec![])
        }
    });
    let id = perennial.notify(&json!({ "to": {"all": true}, "payload": "x" })).await;
    eventually("it is under way", || async { (double.asked() > 0).then_some(()) }).await;
    perennial.client().post(&format!("/notifications/{id}/pause"), &json!({})).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let asked = double.asked();
    *gate.lock().unwrap() = true;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(double.asked(), asked, "nothing while it is paused");
    perennial.client().post(&format!("/notifications/{id}/resume"), &json!({})).await;
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 200 }));
}

#[tokio::test]
async fn what_is_cancelled_is_accounted_for() {
    let (double, perennial, arrivals) = start(100).await;
    let id = perennial.notify(&at_rate(20.0)).await;
    eventually("it is under way", || async { (arrivals.count() >= 5).then_some(()) }).await;
    perennial.client().post(&format!("/notifications/{id}/cancel"), &json!({})).await;
    let ended = eventually("it has ended", || async {
        let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
        (progress["audience_final"] == true).then_some(progress)
    })
    .await;
    assert_eq!(ended["state"], "cancelled");
    let of = |outcome: &str| ended["outcomes"][outcome].as_u64().unwrap_or_default();
    assert_eq!(of("delivered") + of("cancelled"), 100, "{ended}");
    assert_eq!(of("delivered"), double.taken().len() as u64);
}

#[tokio::test]
async fn a_notification_waits_for_its_time_and_ends_at_its_end() {
    let (double, perennial, _arrivals) = start(20).await;
    let at = jiff::Timestamp::now() + Duration::from_millis(1500);
    let request = json!({ "to": {"all": true}, "payload": "later", "at": at });
    let answer = perennial.client().post("/notify", &request).await.json();
    assert_eq!(answer["status"], "scheduled");
    let id = answer["id"].as_str().unwrap();
    assert_eq!(double.taken().len(), 0);
    perennial.done(id).await;
    assert!(jiff::Timestamp::now() >= at);

    let expires = jiff::Timestamp::now() + Duration::from_secs(2);
    let mut request = at_rate(2.0);
    request["expires"] = json!(expires);
    let id = perennial.notify(&request).await;
    let ended = eventually("it has expired", || async {
        let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
        (progress["state"] == "expired").then_some(progress)
    })
    .await;
    let of = |outcome: &str| ended["outcomes"][outcome].as_u64().unwrap_or_default();
    assert_eq!(of("delivered") + of("expired"), 20, "{ended}");
    assert!(of("delivered") >= 1 && of("expired") >= 10, "{ended}");
}

#[tokio::test]
async fn an_origin_has_a_rate_over_all_notifications() {
    let (_double, perennial, arrivals) = start_with(30, |setup| setup.set("push.origin_rate=40")).await;
    let request = json!({ "to": {"all": true}, "payload": "x" });
    let (one, other) = (perennial.notify(&request).await, perennial.notify(&request).await);
    perennial.done(&one).await;
    perennial.done(&other).await;
    assert_eq!(arrivals.count(), 60);
    let span = arrivals.span();
    assert!((Duration::from_millis(1300)..Duration::from_secs(10)).contains(&span), "{span:?}");
}

#[tokio::test]
async fn what_cannot_be_planned_is_refused_by_name() {
    let (_double, perennial, _arrivals) = start(1).await;
    let past = jiff::Timestamp::now() - Duration::from_secs(60);
    for (field, value) in [
        ("rate", json!(0)),
        ("rate", json!(-3.5)),
        ("ramp_up", json!("30s")),
        ("ramp_up", json!("soon")),
        ("expires", json!(past)),
        ("at", json!("2399-01-01T00:00:00Z")),
        ("webhook", json!("nobody")),
        ("log", json!("some")),
        ("http", json!("3")),
        ("declarative", json!(true)),
    ] {
        let mut request = json!({ "to": {"all": true}, "payload": "x" });
        request[field] = value;
        let refused = perennial.client().post("/notify", &request).await;
        assert_eq!(refused.status, 422, "{field}");
        assert_eq!(refused.json()["errors"][0]["field"], field, "{}", refused.text());
    }
}

#[tokio::test]
async fn a_dry_run_sends_nothing() {
    let (double, perennial, _arrivals) = start(7).await;
    let request = json!({ "to": {"all": true}, "payload": "x".repeat(2800), "dry_run": true });
    let answer = perennial.client().post("/notify", &request).await;
    assert_eq!((answer.status.as_u16(), answer.json()["audience"].as_u64()), (200, Some(7)));
    assert!(answer.json()["warnings"][0].as_str().unwrap().contains("2800 bytes"));
    assert_eq!(double.asked(), 0);
    assert_eq!(perennial.client().get("/notifications").await.json()["notifications"], json!([]));
}

#[tokio::test]
async fn progress_is_told_as_it_happens() {
    let (_double, perennial, _arrivals) = start(40).await;
    let id = perennial.notify(&at_rate(20.0)).await;
    let told =
        soon("the end of the events", perennial.client().get(&format!("/notifications/{id}/events"))).await;
    let slow = perennial.log_lines().into_iter().find(|line| line["message"] == "slow request");
    assert_eq!(slow, None, "who follows wants it to last");
    assert_eq!(told.headers["content-type"], "text/event-stream");
    let text = told.text();
    let counts: Vec<u64> = text
        .lines()
        .filter_map(|line| {
            serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok()?["decided"].as_u64()
        })
        .collect();
    assert!(counts.len() >= 3 && counts.is_sorted(), "{counts:?}");
    assert_eq!(counts.last(), Some(&40));
    assert!(text.contains("event: end"), "{text}");
}

#[tokio::test]
async fn what_waits_ends_with_its_notification() {
    let (double, perennial, _arrivals) = start(20).await;
    let end = async |id: &str| {
        perennial.client().post(&format!("/notifications/{id}/cancel"), &json!({})).await;
        eventually("it has ended", || async {
            let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
            (progress["audience_final"] == true).then_some(progress)
        })
        .await
    };
    let next_month = jiff::Timestamp::now() + Duration::from_secs(30 * 24 * 3600);
    let id = perennial.notify(&json!({ "to": {"all": true}, "payload": "x", "at": next_month })).await;
    let ended = end(&id).await;
    assert_eq!((&ended["state"], &ended["outcomes"]), (&json!("cancelled"), &json!({ "cancelled": 20 })));
    assert_eq!(double.asked(), 0);
    // A paused notification also ends when its time is over.
    let expires = jiff::Timestamp::now() + Duration::from_secs(2);
    let request = json!({ "to": {"all": true}, "payload": "x", "rate": 1, "expires": expires });
    let id = perennial.notify(&request).await;
    perennial.client().post(&format!("/notifications/{id}/pause"), &json!({})).await;
    let ended = eventually("it has expired", || async {
        let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
        (progress["audience_final"] == true).then_some(progress)
    })
    .await;
    let of = |outcome: &str| ended["outcomes"][outcome].as_u64().unwrap_or_default();
    assert_eq!((ended["state"].as_str(), of("expired") + of("delivered")), (Some("expired"), 20), "{ended}");
}

#[tokio::test]
async fn a_slow_notification_gives_up_its_place_to_another() {
    let double = Double::start().await;
    let setup = Setup::new()
        .sending_to(&double)
        .set("push.small_audience=5")
        .set("push.batch=20")
        .set("push.batches=1");
    let perennial = setup.start().await;
    perennial.subscribe(&double, 100).await;
    double.script(|_| {
        std::thread::sleep(Duration::from_millis(5));
        Answer::Take
    });
    let slow = perennial.notify(&json!({ "to": {"all": true}, "payload": "slow" })).await;
    perennial.client().patch(&format!("/notifications/{slow}"), &json!({ "rate": 0.1 })).await;
    let other = perennial.notify(&json!({ "to": {"all": true}, "payload": "other" })).await;
    let progress = perennial.done(&other).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 100 }));
    perennial.client().patch(&format!("/notifications/{slow}"), &json!({ "rate": 1000 })).await;
    assert_eq!(perennial.done(&slow).await["outcomes"], json!({ "delivered": 100 }));
}
