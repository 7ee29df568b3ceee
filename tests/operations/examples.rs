//! The examples of applications, as the processes that a reader starts.

use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use nix::sys::signal::Signal;
use perennial::anyhow;
use perennial::axum::body::Bytes;
use perennial::http::{HeaderMap, StatusCode};
use perennial::prelude::{Host, Module, Reader, Router, State, post};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use support::postgres;
use support::process::{Perennial, Setup, example};
use support::{eventually, redis, soon};

async fn start(name: &str) -> Perennial {
    Setup::new().program(example(name)).start().await
}

#[tokio::test]
async fn seed_keeps_nothing_of_a_request_for_the_next_one() {
    let server = redis::Server::start(&["--maxmemory-policy", "allkeys-lru"]).await;
    let setup = Setup::new().program(example("seed")).set(&format!("redis.basket.url={}", server.url()));
    let seed = setup.start().await;
    let client = seed.client();
    let ids = [client.get("/id").await.text(), client.get("/id").await.text()];
    assert_ne!(ids[0], ids[1]);
    assert_eq!(client.get("/price/1290?currency=CHF").await.text(), "12.90 CHF");
    assert_eq!(client.get("/price/1290").await.text(), "12.90 EUR", "not that of the last visitor");
    for (number, status) in [(1, 201), (1, 409), (2, 201), (1, 409), (3, 201)] {
        let answer = client.send(http::Method::PUT, &format!("/orders/{number}"), Some(&json!("Ada"))).await;
        assert_eq!(answer.status, status, "order {number}: {}", answer.text());
    }
    let fills = futures_util::future::join_all((0..50).map(|number| {
        let book = json!(format!("book {}", number % 5));
        async move { client.post("/basket", &book).await.text() }
    }));
    let filled = fills.await;
    assert_eq!(filled.iter().filter(|text| text.starts_with("10 of")).count(), 5, "{filled:?}");
}

#[tokio::test]
async fn import_reads_and_writes_a_million_rows_in_flat_memory() {
    let rows = if support::full() { 1_000_000 } else { 100_000 };
    let import = start("import").await;
    let one = import.client().send_bytes(http::Method::POST, "/books", None, "a,1.00".into()).await;
    assert_eq!(one.text(), "1");
    let before = import.memory_mib("VmHWM");
    let url = format!("{}/books", import.client().base());
    let sent = format!("seq {rows} | sed 's/.*/book &,9.90/' | curl -sS --fail-with-body -T - -X POST {url}");
    let output = Command::new("sh").args(["-c", &sent]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), rows.to_string(), "{output:?}");
    let sold = format!("curl -sS {url} | wc -l");
    let output = Command::new("sh").args(["-c", &sold]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), (rows + 1).to_string());
    let grown = import.memory_mib("VmHWM") - before;
    assert!(grown < 60.0, "{rows} rows took {grown} MiB");
    println!("{rows} rows took {grown:.0} MiB");
    let lines = "a,1.00\nb,2\n";
    let answer = import.client().send_bytes(http::Method::POST, "/books", None, lines.into()).await;
    assert_eq!(answer.status, 422, "{}", answer.text());
    assert!(answer.text().contains("title,12.90"), "{}", answer.text());
}

/// The customer of the example `webhooks`: it refuses the first request.
struct Customer;

/// What the customer was told, and the signature.
static TOLD: std::sync::OnceLock<mpsc::UnboundedSender<(HeaderMap, String)>> = std::sync::OnceLock::new();

impl Module for Customer {
    const NAME: &'static str = "customer";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let told = TOLD.get().unwrap().clone();
        let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let hook = async move |State(()): State<()>, headers: HeaderMap, body: Bytes| {
            told.send((headers, String::from_utf8_lossy(&body).into_owned())).unwrap();
            match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
                0 => StatusCode::INTERNAL_SERVER_ERROR,
                _ => StatusCode::OK,
            }
        };
        host.routes(Router::new().route("/hook", post(hook)).with_state(()));
        Ok(())
    }
}

#[tokio::test]
async fn webhooks_are_signed_and_repeated_and_do_not_lead_into_the_own_network() -> anyhow::Result<()> {
    let (sender, mut told) = mpsc::unbounded_channel();
    TOLD.set(sender).unwrap();
    let customer = perennial::Perennial::new().host::<Customer>().test().embedded().start().await?;
    let setup = Setup::new().program(example("webhooks"));
    let setup = setup
        .set("targets.customers.allow_networks=127.0.0.0/8")
        .set("targets.customers.allow_insecure=true");
    let webhooks = setup.start().await;
    let url = format!("{}/hook", customer.url());
    let hook = webhooks.client().post("/webhooks", &json!({ "url": url })).await.json();
    assert_eq!(webhooks.client().post("/events", &json!("sold")).await.text(), "1");
    let (first, body) = soon("a webhook", told.recv()).await.unwrap();
    let (second, again) = soon("the webhook again", told.recv()).await.unwrap();
    assert_eq!((&*body, &first["webhook-id"]), (&*again, &second["webhook-id"]));
    let of = |name: &str| second[name].to_str().unwrap().to_owned();
    let key = hmac::Key::new(hmac::HMAC_SHA256, hook["secret"].as_str().unwrap().as_bytes());
    let signed = format!("{}.{}.{again}", of("webhook-id"), of("webhook-timestamp"));
    let signature = STANDARD.encode(hmac::sign(&key, signed.as_bytes()));
    assert_eq!(of("webhook-signature"), format!("v1,{signature}"));

    // With the settings that it has by itself, it does not call this machine.
    let careful = start("webhooks").await;
    careful.client().post("/webhooks", &json!({ "url": url.replace("http://", "https://") })).await;
    careful.client().post("/events", &json!("sold")).await;
    let metrics = "perennial_client_calls_total{target=\"customers\",result=\"forbidden\"}";
    eventually("a call is refused", || async {
        careful.admin().get("/metrics").await.text().contains(metrics).then_some(())
    })
    .await;
    customer.stop().await
}

#[tokio::test]
async fn chat_members_hear_each_other_and_are_told_when_the_process_stops() {
    let setup =
        Setup::new().program(example("chat")).set("server.slow_after=200ms").set("server.idle_timeout=2s");
    let mut chat = setup.start().await;
    let host = chat.client().base().replace("http://", "");
    let join = async || {
        let stream = TcpStream::connect(&host).await.unwrap();
        tokio_tungstenite::client_async(format!("ws://{host}/chat"), stream).await.unwrap().0
    };
    let (mut ada, mut ben) = (join().await, join().await);
    let mut listener = Command::new("curl")
        .args(["-sN", &format!("http://{host}/listen")])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(listener.stdout.take().unwrap()));
    eventually("three connections are open", || async {
        let open = chat.admin().get("/connections").await.json();
        let public = open.as_array()?.iter().filter(|open| open["listener"] == "public");
        (public.count() >= 3).then_some(())
    })
    .await;
    ada.send(Message::text("hello")).await.unwrap();
    for member in [&mut ada, &mut ben] {
        assert_eq!(soon("hello", member.next()).await.unwrap().unwrap().to_text().unwrap(), "hello");
    }
    assert_eq!(soon("an event", lines.next_line()).await.unwrap().unwrap(), "data: hello");
    ada.send(Message::text("x".repeat(3000))).await.unwrap();
    let ended = soon("the end of one who says too much", ada.next()).await;
    assert!(!matches!(ended, Some(Ok(Message::Text(_)))), "{ended:?}");
    ben.send(Message::text("still here")).await.unwrap();
    assert_eq!(soon("still here", ben.next()).await.unwrap().unwrap().to_text().unwrap(), "still here");

    let began = Instant::now();
    chat.signal(Signal::SIGTERM);
    let Some(Ok(Message::Close(Some(frame)))) = soon("the close", ben.next()).await else {
        panic!("no close")
    };
    assert_eq!(u16::from(frame.code), 1001);
    assert!(chat.ended().await.success());
    // The drain would last 20 seconds if it waited for them.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let log = chat.log();
    assert!(!log.contains("slow request"), "a long stream is no slow request: {log}");
}

#[tokio::test]
async fn report_reads_a_second_database_row_by_row() {
    let server = postgres::Server::start(&[]).await;
    let url = server.create().await;
    let sql = "CREATE TABLE sales (month text, cents bigint);
               INSERT INTO sales SELECT '2026-' || lpad((n % 12 + 1)::text, 2, '0'), 990 FROM generate_series(1, 1200) n";
    let made = postgres::client("psql").args([&url, "-qc", sql]).output().await.unwrap();
    assert!(made.status.success(), "{made:?}");
    let setup = Setup::new().program(example("report")).set(&format!("databases.warehouse.url={url}"));
    let report = setup.set("databases.warehouse.connect_timeout=300ms").start().await;
    let answer = report.client().get("/report.csv").await;
    let lines: Vec<String> = answer.text().lines().map(str::to_owned).collect();
    assert_eq!((lines.len(), &*lines[0], &*lines[1]), (13, "month,books,sales", "2026-01,100,990.00"));
    assert_eq!(answer.header("content-disposition"), Some("attachment; filename=report.csv"));
    let pools: Value = report.admin().get("/pools").await.json();
    assert!(pools["warehouse"]["size"].as_u64() > Some(0), "{pools}");
    server.signal_all(Signal::SIGQUIT);
    eventually("the warehouse is away", || async {
        // An answer that has begun breaks off.
        let answer = report.client().try_send(http::Method::GET, "/report.csv", None, Bytes::new()).await;
        answer.is_ok_and(|answer| answer.status == 503).then_some(())
    })
    .await;
    assert_eq!(report.admin().get("/readyz").await.status, 200, "the program goes on");
}
