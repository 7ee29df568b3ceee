//! SIGTERM: the drain runs in order and on time, and no request fails while a listener is open.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, Request};
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::Signal;
use perennial::sink::Answer;
use perennial_runtime::drain::Phase;
use perennial_server::http::scope::RequestScope;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use support::double::Double;
use support::eventually;
use support::host::{Host, net};
use support::http::{Client, crossed_goaway};
use support::process::Setup;

/// Clients that send requests without a pause, until one of them cannot connect any more.
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
                        Err(error) if crossed_goaway(&error) => {}
                        Err(error) => {
                            // A failed connect is in order: the listener is closed. A connection that
                            // is cut off is a failure.
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
    // A second signal that comes at once would count as a repetition of the first.
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
    // The push service is so slow that the drain comes in the middle.
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

/// States in which a client may have left a connection when the signal comes.
const STANDING: [(&str, &str); 4] = [
    ("silent", ""),
    ("idle", "GET /push/key HTTP/1.1\r\nhost: x\r\n\r\n"),
    ("half a head", "GET /push/key HT"),
    (
        "half a body",
        "POST /subscriptions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_a_client_leaves_standing_holds_the_drain_and_admin_answers_to_the_end() {
    let mut perennial =
        Setup::new().set("drain.notice=1s").set("drain.soft=2s").set("drain.hard=2s").start().await;
    let base = perennial.client().base().to_owned();
    let address = base.trim_start_matches("http://").to_owned();
    let mut standing = Vec::new();
    for (what, bytes) in STANDING {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        standing.push((what, stream));
    }
    // An HTTP/2 stream that stays open, since its body never comes.
    let io = TokioIo::new(TcpStream::connect(&address).await.unwrap());
    let (mut send, http2) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let stalled = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>());
    let request = Request::post(format!("{base}/subscriptions")).header("content-type", "application/json");
    let request = request.body(stalled).unwrap();
    let mut others = JoinSet::new();
    others.spawn(async move {
        let answer = send.send_request(request).await;
        drop(answer);
    });
    others.spawn(async move { drop(http2.await) });

    let mut clients: Vec<Client> = (0..3).map(|_| Client::new(&base)).collect();
    clients.push(Client::http2(&base));
    let load = Load::start(&clients, "/push/key");
    load.at_least(50).await;
    let (admin, last) = (perennial.admin().clone(), Arc::new(std::sync::Mutex::new(Instant::now())));
    let probing = {
        let last = Arc::clone(&last);
        async move {
            while admin.try_send(Method::GET, "/livez", None, Bytes::new()).await.is_ok() {
                *last.lock().unwrap() = Instant::now();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    let mut prober = JoinSet::new();
    prober.spawn(probing);

    let began = Instant::now();
    perennial.signal(Signal::SIGTERM);
    let code = perennial.ended().await.code();
    let (took, silent_for) = (began.elapsed(), last.lock().unwrap().elapsed());
    assert_eq!(code, Some(0), "{}", perennial.log());
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(6), "{took:?}");
    assert!(silent_for < Duration::from_secs(1), "the last probe was answered {silent_for:?} before the end");
    let failures = load.failures().await;
    assert!(failures.is_empty(), "{} failed: {:?}", failures.len(), failures.first());
    for (what, mut stream) in standing {
        let mut rest = Vec::new();
        let _ = support::soon(what, stream.read_to_end(&mut rest)).await;
    }
    support::soon("HTTP/2 has ended", others.join_all()).await;
}

#[tokio::test]
async fn a_response_without_an_end_may_watch_for_the_drain() {
    let events = |scope: RequestScope| async move {
        let soft = scope.drain().clone();
        let ticks = futures_util::stream::unfold(0, |tick: u64| async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Some((Ok::<_, Infallible>(format!("data: {tick}\n\n")), tick + 1))
        });
        Body::from_stream(ticks.take_until(async move { soft.soft().await }))
    };
    let router = Router::new().route("/events", get(events)).route(
        "/for-ever",
        get(|| async { Body::from_stream(futures_util::stream::pending::<Result<Bytes, Infallible>>()) }),
    );
    let host = Host::start(net(|_| {}), router).await;
    let mut polite = host.connect().await;
    let mut stubborn = host.connect().await;
    polite.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stubborn.write_all(b"GET /for-ever HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    eventually("both run", || async { (host.connections.requests().len() == 2).then_some(()) }).await;
    host.trigger.advance(Phase::Soft);
    let (events, _) = support::host::until_closed(&mut polite, b"").await;
    assert!(events.ends_with("0\r\n\r\n"), "to its last chunk");
    assert_eq!(host.connections.count(), 1, "the other one may go on for now");
    host.trigger.advance(Phase::Hard);
    support::soon("the server ends", host.tasks.ended()).await;
}
