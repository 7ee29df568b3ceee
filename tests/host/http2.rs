//! HTTP/2 as attackers speak it: an attack ends its own connection and affects no other.

use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use perennial_server::http::scope::RequestScope;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use support::host::{Host, net};
use support::soon;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `GET path` in HPACK, made of static table entries and of literals that are not indexed.
fn get_request(path: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    block.extend(path.as_bytes());
    block.extend([0x01, 1, b'x']);
    block
}

async fn open(host: &Host) -> TcpStream {
    let mut stream = host.connect().await;
    stream.write_all(PREFACE).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    stream
}

fn router() -> Router {
    Router::new()
        .route("/id", get(|scope: RequestScope| async move { scope.id().to_string() }))
        .route("/never", get(|| async { std::future::pending::<()>().await }))
        .route("/much", get(|| async { vec![b'x'; 1 << 20] }))
}

/// Sends `frames` again and again until the connection ends. Returns the time until then.
async fn flood(host: &Host, mut frames: impl FnMut(u32) -> Vec<u8>) -> Duration {
    let (mut reader, mut writer) = open(host).await.into_split();
    let began = Instant::now();
    let writing = async {
        for round in 0.. {
            if writer.write_all(&frames(round)).await.is_err() {
                return;
            }
        }
    };
    let reading = async {
        let mut buffer = vec![0; 64 << 10];
        while reader.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    };
    soon("the attack ends", async {
        tokio::select! {
            () = writing => {}
            () = reading => {}
        }
    })
    .await;
    began.elapsed()
}

/// Checks that other clients are served while an attack goes on.
async fn is_served(host: &Host) {
    assert_eq!(host.client().get("/id").await.status, 200);
    assert_eq!(support::http::Client::http2(host.client().base()).get("/id").await.status, 200);
}

#[tokio::test]
async fn rapid_resets_end_their_connection() {
    let host = Host::start(net(|_| {}), router()).await;
    for path in ["/id", "/never"] {
        flood(&host, |round| {
            let stream = round * 2 + 1;
            let mut frames = frame(HEADERS, END_HEADERS | END_STREAM, stream, &get_request(path));
            frames.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
            frames
        })
        .await;
        is_served(&host).await;
    }
    assert!(host.connections.requests().is_empty());
    host.stop().await;
}

#[tokio::test]
async fn resets_that_are_slow_enough_to_be_served_end_it_too() {
    let host = Host::start(net(|_| {}), router()).await;
    let mut stream = open(&host).await;
    let attack = async {
        for number in (1..).step_by(2) {
            let mut frames = frame(HEADERS, END_HEADERS | END_STREAM, number, &get_request("/never"));
            frames.extend(frame(PING, 0, 0, &[0; 8]));
            if stream.write_all(&frames).await.is_err() {
                return number;
            }
            // The request runs by now: its handler has been started for nothing.
            tokio::task::yield_now().await;
            if stream.write_all(&frame(RST_STREAM, 0, number, &8_u32.to_be_bytes())).await.is_err() {
                return number;
            }
        }
        unreachable!()
    };
    soon("the attack ends", attack).await;
    host.open(0).await;
    host.stop().await;
}

#[tokio::test]
async fn floods_of_frames_that_ask_for_nothing_end_their_connection() {
    let host = Host::start(net(|_| {}), router()).await;
    flood(&host, |_| frame(PING, 0, 0, &[0; 8]).repeat(100)).await;
    flood(&host, |_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(100)).await;
    // A request head that never ends.
    flood(&host, |round| match round {
        0 => frame(HEADERS, END_STREAM, 1, &get_request("/id")),
        _ => frame(CONTINUATION, 0, 1, &[0x00, 1, b'x', 1, b'y'].repeat(100)),
    })
    .await;
    is_served(&host).await;
    host.stop().await;
}

#[tokio::test]
async fn streams_and_headers_have_limits_that_are_told() {
    let host = Host::start(net(|_| {}), router()).await;
    let mut stream = open(&host).await;
    for number in (1..).step_by(2).take(150) {
        stream
            .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, number, &get_request("/never")))
            .await
            .unwrap();
    }
    let mut refused = 0;
    while refused < 50 {
        let mut head = [0; 9];
        soon("a frame", stream.read_exact(&mut head)).await.unwrap();
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        soon("its payload", stream.read_exact(&mut vec![0; length])).await.unwrap();
        refused += usize::from(head[3] == RST_STREAM);
        assert_ne!(head[3], GOAWAY);
    }
    assert_eq!(host.connections.requests().len(), 100);
    drop(stream);
    host.open(0).await;

    let client = support::http::Client::http2(host.client().base());
    let large = client.with_header("x-large", &"x".repeat(20_000)).get("/id").await;
    assert_eq!(large.status, 431);
    host.stop().await;
}

#[tokio::test]
async fn a_window_of_zero_holds_no_more_than_its_share_and_ends() {
    let host = Host::start(
        net(|net| {
            net.timeouts.write = Duration::from_millis(500);
            net.timeouts.idle = Duration::from_millis(500);
        }),
        router(),
    )
    .await;
    let mut attackers = Vec::new();
    for _ in 0..10 {
        let mut stream = host.connect().await;
        stream.write_all(PREFACE).await.unwrap();
        // With INITIAL_WINDOW_SIZE 0 the server may not send any body.
        stream.write_all(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0])).await.unwrap();
        for number in (1..).step_by(2).take(100) {
            stream
                .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, number, &get_request("/much")))
                .await
                .unwrap();
        }
        attackers.push(stream);
    }
    is_served(&host).await;
    drop(host.client());
    support::eventually("they are cut", || async { (host.connections.count() <= 2).then_some(()) }).await;
    drop(attackers);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_answer_pings_is_given_up() {
    let mut config = net(|_| {});
    config.http2.ping_every = Duration::from_millis(200);
    config.http2.ping_timeout = Duration::from_millis(200);
    let host = Host::start(config, router()).await;
    let mut stream = open(&host).await;
    // The request waits for an answer, so the connection is not idle.
    stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &get_request("/never"))).await.unwrap();
    let (began, mut pings, mut buffer) = (Instant::now(), 0, vec![0; 4096]);
    while let Ok(count) = soon("pings, and then the end", stream.read(&mut buffer)).await
        && count > 0
    {
        let ping = frame(PING, 0, 0, &[])[3..5].to_vec();
        pings += buffer[..count].windows(2).filter(|bytes| *bytes == ping).count();
    }
    assert!(pings > 0, "it was asked");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    host.open(0).await;
    host.stop().await;
}
