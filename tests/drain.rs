//! SIGTERM: in order, on time, and without a failed request while anybody is listening.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use nix::sys::signal::Signal;
use perennial::sink::Answer;
use serde_json::json;
use tokio::task::JoinSet;

use support::double::Double;
use support::eventually;
use support::http::Client;
use support::process::Setup;

/// Clients that ask without a pause, until one of them finds nobody listening any more.
struct Load {
    answered: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
    clients: JoinSet<Vec<String>>,
}

impl Load {
    fn start(clients: &[Client], path: &'static str) -> Self {
        let (answered, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut running = JoinSet::new();
        for client in clients {
            let (client, answered, closed) = (client.clone(), Arc::clone(&answered), Arc::clone(&closed));
            running.spawn(async move {
                let mut failures = Vec::new();
                while !closed.load(Ordering::SeqCst) {
                    match client.try_send(Method::GET, path, None, Bytes::new()).await {
                        Ok(answer) if answer.status.is_success() => {
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        Ok(answer) => failures.push(answer.status.to_string()),
                        Err(error) => {
                            // No connection: the listener is closed, in order. A cut one is a failure.
                            if error.downcast_ref().is_some_and(hyper_util::client::legacy::Error::is_connect)
                            {
                                closed.store(true, Ordering::SeqCst);
                            } else {
                                failures.push(format!("{error:#}"));
                            }
                        }
                    }
                }
                failures
            });
        }
        Self { answered, closed, clients: running }
    }

    async fn at_least(&self, count: usize) {
        let before = self.answered.load(Ordering::SeqCst);
        eventually("requests are answered", || async {
            (self.answered.load(Ordering::SeqCst) >= before + count).then_some(())
        })
        .await;
    }

    async fn failures(self) -> Vec<String> {
        self.clients.join_all().await.into_iter().flatten().collect()
    }
}

#[tokio::test]
async fn sigterm_under_load_fails_no_request_before_the_listener_closes() {
    let mut perennial = Setup::new().set("drain.notice=1s").start().await;
    let (base, admin) = (perennial.client().base().to_owned(), perennial.admin().clone());
    let mut clients: Vec<Client> = (0..6).map(|_| Client::new(&base)).collect();
    clients.extend((0..4).map(|_| Client::http2(&base)));
    let load = Load::start(&clients, "/push/key");
    load.at_least(200).await;

    let began = Instant::now();
    perennial.signal(Signal::SIGTERM);
    eventually("not ready", || async { (admin.get("/readyz").await.status == 503).then_some(()) }).await;
    assert!(admin.get("/readyz").await.text().contains("draining"));
    assert_eq!(admin.get("/livez").await.status, 200, "alive to the end");
    load.at_least(200).await;
    assert!(!load.closed.load(Ordering::SeqCst), "it goes on serving during the notice");
    assert_eq!(perennial.ended().await.code(), Some(0));
    assert!(began.elapsed() >= Duration::from_secs(1), "the notice was given: {:?}", began.elapsed());
    let failures = load.failures().await;
    assert!(failures.is_empty(), "{} failed: {:?}", failures.len(), failures.first());
}

#[tokio::test]
async fn ctrl_c_skips_the_notice() {
    let mut perennial = Setup::new().set("drain.notice=60s").start().await;
    perennial.signal(Signal::SIGINT);
    assert_eq!(perennial.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_signal_waits_for_nobody() {
    let mut perennial = Setup::new().set("drain.notice=60s").start().await;
    perennial.signal(Signal::SIGTERM);
    perennial.logged("draining").await;
    // At once it would be the first one, sent twice.
    tokio::time::sleep(Duration::from_millis(500)).await;
    perennial.signal(Signal::SIGTERM);
    assert_eq!(perennial.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_broadcast_is_handed_back_and_goes_on_after_the_restart() {
    let double = Double::start().await;
    let perennial = Setup::new()
        .sending_to(&double)
        .set("push.small_audience=0")
        .set("push.window=4")
        .set("drain.soft=300ms")
        .start()
        .await;
    perennial.subscribe(&double, 60).await;
    // Slow enough that the drain comes in the middle.
    let gate = Arc::new(AtomicUsize::new(0));
    let asked = Arc::clone(&gate);
    double.script(move |_| {
        std::thread::sleep(Duration::from_millis(20));
        if asked.fetch_add(1, Ordering::SeqCst) < 20 { Answer::Take } else { Answer::Stall }
    });
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    eventually("the middle", || async { (double.taken().len() >= 20).then_some(()) }).await;
    let mut perennial = perennial;
    assert_eq!(perennial.stop().await, Some(0));
    let ended = perennial
        .log_lines()
        .into_iter()
        .find(|line| line["message"] == "job ended" && line["span"]["kind"] == "push.deliver");
    let ended = ended.expect("a line for the job");
    assert_eq!(
        (ended["outcome"].as_str(), ended["settled"].as_bool()),
        (Some("handed-back"), Some(true)),
        "{ended}"
    );

    double.script(|_| Answer::Take);
    let perennial = perennial.start_again().await;
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 60 }));
    assert_eq!(double.reached_and_repeats(), (60, 0), "what was recorded is not sent again");
    let jobs = perennial.log_lines().into_iter().filter(|line| line["message"] == "job started");
    assert!(
        jobs.into_iter().all(|job| job["failures"] == 0 && job["recoveries"] == 0),
        "handing back is free"
    );
}

#[tokio::test]
async fn what_is_in_flight_at_the_end_of_the_drain_is_recorded_and_not_repeated() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).set("drain.soft=0s").start().await;
    perennial.fill((0..4000).map(|_| double.mint()));
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    for part in 1..=3 {
        eventually("some were sent", || async { (double.asked() >= part * 800).then_some(()) }).await;
        assert_eq!(perennial.stop().await, Some(0));
        perennial = perennial.start_again().await;
    }
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 4000 }));
    assert_eq!(double.reached_and_repeats(), (4000, 0));
}
