//! State of one request: its own id, its own deadline, its own timings.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::{get, post};
use http::HeaderMap;
use perennial_runtime::cpu::{self, Cpu};
use perennial_runtime::drain::Phase;
use perennial_server::http::Config;
use perennial_server::http::detach::Detach;
use perennial_server::http::scope::RequestScope;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use support::host::{Host, net};
use support::http::Client;
use support::process::Setup;
use support::{eventually, soon};

/// Compares the identity of the request with that at its start, several times with waits between, and returns it.
async fn interleaved(scope: RequestScope, headers: HeaderMap) -> String {
    let first = (scope.id().to_string(), scope.connection().id, scope.connection().peer());
    let user = headers["x-user"].to_str().unwrap().to_owned();
    for _ in 0..5 {
        let _waiting = scope.waiting("a random while");
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..3000))).await;
        let now = (scope.id().to_string(), scope.connection().id, scope.connection().peer());
        assert_eq!(now, first);
        assert_eq!(headers["x-user"].to_str().unwrap(), user);
    }
    format!("{user} {} {}", first.0, scope.connection().id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interleaved_requests_never_see_each_others_state() {
    const REQUESTS: usize = 10_000;
    let host = Host::start(net(|_| {}), Router::new().route("/who", get(interleaved))).await;
    let clients: Vec<Client> = (0..20).map(|_| Client::http2(host.client().base())).collect();
    let mut running = JoinSet::new();
    let turns = Arc::new(Semaphore::new(1000));
    for number in 0..REQUESTS {
        let turn = Arc::clone(&turns).acquire_owned().await.unwrap();
        let client = clients[number % clients.len()].with_header("x-user", &number.to_string());
        running.spawn(async move {
            let answer = client.get("/who").await;
            drop(turn);
            let text = answer.text();
            let mut words = text.split(' ');
            assert_eq!(words.next(), Some(number.to_string().as_str()));
            assert_eq!(words.next(), answer.header("x-request-id"));
            answer.header("x-request-id").unwrap().to_owned()
        });
    }
    let ids: std::collections::HashSet<String> = running.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), REQUESTS, "each has an id of its own");
    drop(clients);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request_unless_the_route_says_otherwise() {
    let (begun, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gate = Arc::new(Semaphore::new(0));
    let work = {
        let (begun, ended, gate) = (Arc::clone(&begun), Arc::clone(&ended), Arc::clone(&gate));
        move || {
            let (begun, ended, gate) = (Arc::clone(&begun), Arc::clone(&ended), Arc::clone(&gate));
            async move {
                begun.fetch_add(1, Ordering::SeqCst);
                gate.acquire().await.unwrap().forget();
                ended.fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    let router = Router::new().route("/page", get(work.clone())).route("/order", post(work).layer(Detach));
    let host = Host::start(net(|_| {}), router).await;
    for (number, request) in ["GET /page", "POST /order"].into_iter().enumerate() {
        let mut stream = host.connect().await;
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        eventually("it has begun", || async { (begun.load(Ordering::SeqCst) > number).then_some(()) }).await;
    }
    host.open(0).await;
    gate.add_permits(10);
    // The drain waits for work that goes on after its client has left.
    host.stop().await;
    assert_eq!(ended.load(Ordering::SeqCst), 1, "the order, and not the page");
}

#[tokio::test]
async fn a_panic_of_detached_work_is_a_500() {
    let router = Router::new().route("/order", get(|| async { panic!("a bug") as () }).layer(Detach));
    let (host, client) = Host::plain(router).await;
    assert_eq!(client.get("/order").await.status, 500);
    host.stop().await;
}

async fn fib(scope: RequestScope) -> Result<String, http::StatusCode> {
    fn fib(n: u32) -> u64 {
        if n < 2 { u64::from(n) } else { fib(n - 1) + fib(n - 2) }
    }
    let result = scope.cpu(|| fib(20)).await;
    result.map(|result| result.to_string()).map_err(|_| http::StatusCode::SERVICE_UNAVAILABLE)
}

#[tokio::test]
async fn work_for_the_processor_is_done_elsewhere_and_within_the_requests_time() {
    let cpu = Cpu::start(cpu::Config { threads: NonZeroUsize::MIN, queue: 1 }).unwrap();
    let slow = |scope: RequestScope| async move {
        let slept = scope.cpu(|| std::thread::sleep(Duration::from_secs(2))).await;
        slept.map_err(|_| http::StatusCode::SERVICE_UNAVAILABLE)
    };
    let router = Router::new().route("/fib", get(fib)).route("/slow", get(slow));
    let config = Config { request_timeout: Duration::from_millis(300), ..net(|_| {}) };
    let host = Host::start_with(config, router, Some(cpu)).await;
    let client = host.client();
    assert_eq!(client.get("/fib").await.text(), "6765");
    let began = Instant::now();
    assert_eq!(client.get("/slow").await.status, 503);
    assert!(began.elapsed() < Duration::from_secs(2), "nobody waits for it to end");
    eventually("it works again", || async { (client.get("/fib").await.status == 200).then_some(()) }).await;
    host.trigger.advance(Phase::Hard);
    soon("the end", host.tasks.ended()).await;
}

#[tokio::test]
async fn a_running_request_is_listed_with_what_it_waits_for() {
    let router = Router::new()
        .route(
            "/wait/{what}",
            get(|scope: RequestScope| async move {
                let _waiting = scope.waiting("the moon");
                std::future::pending::<()>().await;
            }),
        )
        .route("/body", post(|body: String| async move { body }));
    let host = Host::start(net(|_| {}), router).await;
    let mut streams = Vec::new();
    for request in [
        "GET /wait/x HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf",
    ] {
        let mut stream = host.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        streams.push(stream);
    }
    let listed = eventually("both run", || async {
        let requests = serde_json::to_value(host.connections.requests()).unwrap();
        let stages: Vec<&Value> =
            requests.as_array().unwrap().iter().map(|request| &request["stage"]).collect();
        (stages.len() == 2 && stages.iter().any(|stage| *stage == "body")).then_some(requests)
    })
    .await;
    let waiting = listed.as_array().unwrap().iter().find(|request| request["method"] == "GET").unwrap();
    assert_eq!(
        (
            waiting["route"].as_str(),
            waiting["path"].as_str(),
            waiting["waiting"].as_str(),
            waiting["stage"].as_str()
        ),
        (Some("/wait/{what}"), Some("/wait/x"), Some("the moon"), Some("handler"))
    );
    assert!(waiting["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    let connections = serde_json::to_value(host.connections.view()).unwrap();
    assert_eq!(
        (connections[0]["phase"].as_str(), connections[0]["protocol"].as_str()),
        (Some("busy"), Some("http1"))
    );
    drop(streams);
    host.stop().await;
}

#[tokio::test]
async fn a_slow_request_says_where_its_time_went() {
    let perennial = Setup::new().set("server.slow_after=20ms").start().await;
    let address = perennial.client().base().trim_start_matches("http://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = "POST /subscriptions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stream.write_all(b"}").await.unwrap();
    let slow = perennial.logged("slow request").await;
    assert_eq!(slow["route"], "/subscriptions");
    assert!(slow["body_ms"].as_f64().unwrap() >= 50.0, "{slow}");
    assert!(slow["handler_ms"].as_f64().unwrap() < slow["took_ms"].as_f64().unwrap() - 50.0, "{slow}");
}

#[tokio::test]
async fn a_handler_that_keeps_its_thread_is_named() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().json().with_writer({
        let log = log.clone();
        move || log.clone()
    });
    // The subscriber applies to this thread, which is the only one of the test's runtime.
    let _logging = tracing::subscriber::set_default(subscriber.finish());
    let router = Router::new()
        .route("/blocking", get(|| async { std::thread::sleep(Duration::from_millis(30)) }))
        .route("/waiting", get(|| tokio::time::sleep(Duration::from_millis(30))));
    let config = Config { slow_poll: Duration::from_millis(20), ..net(|_| {}) };
    let host = Host::start(config, router).await;
    for path in ["/waiting", "/blocking"] {
        host.client().get(path).await;
    }
    host.stop().await;
    let kept: Vec<Value> =
        log.lines().into_iter().filter(|line| line["fields"]["took_ms"].as_f64() >= Some(20.0)).collect();
    let kept: Vec<&Value> = kept.iter().filter(|line| line["level"] == "WARN").collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(kept[0]["fields"]["route"], "/blocking");
}

/// The log of a test.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl Log {
    fn lines(&self) -> Vec<Value> {
        let log = self.0.lock().unwrap();
        log.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
