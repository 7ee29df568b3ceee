//! A connection is counted off whatever ends it, and the limits go on admitting exactly their number.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::routing::{get, post};
use perennial_server::http::Config;
use perennial_server::http::scope::RequestScope;
use perennial_server::net::AtLimit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use support::double::Double;
use support::host::{Host, net, until_closed};
use support::process::Setup;
use support::{eventually, soon};

const REQUEST: &[u8] = b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n";

fn router() -> Router {
    Router::new()
        .route("/id", get(|scope: RequestScope| async move { scope.id().to_string() }))
        .route("/count", post(|body: Bytes| async move { body.len().to_string() }))
        .route("/panic", get(|| async { panic!("a bug") as () }))
        .route("/never", get(|| async { std::future::pending::<()>().await }))
}

/// Opens a connection from one of the loopback addresses.
async fn connect_from(number: usize, to: SocketAddr) -> std::io::Result<TcpStream> {
    let [_, b, c, d] = u32::try_from(number % 60_000 + 2).unwrap().to_be_bytes();
    let socket = TcpSocket::new_v4()?;
    // The port is chosen when the socket connects, since there are more connections than ports.
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, b, c, d), 0)))?;
    socket.connect(to).await
}

/// Opens a connection and ends it in a way that depends on `number`.
async fn cut_somewhere(number: usize, plain: SocketAddr, tls: SocketAddr) -> std::io::Result<()> {
    let (to, bytes): (_, &[u8]) = match number % 10 {
        0 => (plain, b""),
        1 => (plain, b"GET /id HT"),
        2 => (plain, b"POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\nhalf"),
        3 => (plain, b"GET /panic HTTP/1.1\r\nhost: x\r\n\r\n"),
        4 => (plain, b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n"),
        5 => (tls, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03garbage"),
        6 => (tls, b"GET / HTTP/1.1\r\n\r\n"),
        7 => (plain, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
        8 => (plain, b"\x00\xff nonsense \r\n\r\n"),
        _ => (plain, REQUEST),
    };
    let mut stream = connect_from(number, to).await?;
    stream.write_all(bytes).await?;
    match number % 7 {
        // The connection ends with a reset, with an orderly end, or after the answer.
        0 | 1 => rustix_linger(&stream),
        2 | 3 => stream.shutdown().await?,
        4 => drop(tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0; 64])).await),
        _ => {}
    }
    Ok(())
}

/// Makes the close of the connection a reset.
fn rustix_linger(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_many_connections_cut_anywhere_every_count_is_zero_and_the_limit_is_what_it_was() {
    const LIMIT: usize = 200;
    let total = if support::full() { 100_000 } else { 10_000 };
    let double = Double::start().await;
    let config = net(|net| {
        net.listen = ["127.0.0.1:0", "https://127.0.0.1:0"].map(|listen| listen.parse().unwrap()).to_vec();
        net.tls = Some(double.identity());
        net.max_connections = LIMIT;
        net.max_per_address = 3;
    });
    let host = Host::start(Config { max_requests: LIMIT, ..config }, router()).await;
    let plain: SocketAddr = host.addresses[0].parse().unwrap();
    let tls: SocketAddr = host.addresses[1].trim_start_matches("https://").parse().unwrap();
    let mut running = JoinSet::new();
    for number in 0..total {
        running.spawn(cut_somewhere(number, plain, tls));
        while running.len() >= 100 {
            let _ = running.join_next().await;
        }
    }
    while running.join_next().await.is_some() {}
    // A listener accepts connections in their order: when the last one is answered or closed, the backlog is empty.
    for (number, listener) in [plain, tls].into_iter().enumerate() {
        let mut last = connect_from(number, listener).await.unwrap();
        last.write_all(b"GET /id HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let _ = soon("the last connection ends", last.read_to_end(&mut Vec::new())).await;
    }
    host.open(0).await;
    assert!(host.connections.requests().is_empty());

    // Exactly as many connections as before get in. None of them is idle, so one more has to wait.
    let mut open = Vec::new();
    for number in 0..LIMIT {
        let mut stream = connect_from(number, plain).await.unwrap();
        stream.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        open.push(stream);
    }
    eventually("all run", || async { (host.connections.requests().len() == LIMIT).then_some(()) }).await;
    let mut more = connect_from(LIMIT, plain).await.unwrap();
    more.write_all(REQUEST).await.unwrap();
    let mut buffer = [0; 1024];
    let waits = tokio::time::timeout(Duration::from_millis(200), more.read(&mut buffer)).await;
    assert!(waits.is_err(), "it waits");
    open.pop();
    assert!(soon("its turn", more.read(&mut buffer)).await.unwrap() > 0);
    drop((open, more));
    host.open(0).await;
    println!("{total} connections cut, 0 left");
    host.stop().await;
}

#[tokio::test]
async fn the_gauges_of_the_process_fall_to_zero() {
    let perennial = Setup::new().start().await;
    let to: SocketAddr = perennial.client().base().trim_start_matches("http://").parse().unwrap();
    for number in 0..300 {
        let _ = cut_somewhere(number, to, to).await;
    }
    eventually("every gauge is zero", || async {
        let metrics = perennial.admin().get("/metrics").await.text();
        let zero = |name: &str| metrics.contains(&format!("{name}{{listener=\"public\"}} 0"));
        (zero("perennial_http_connections") && zero("perennial_http_requests_in_flight")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn at_the_limit_connections_may_be_told_so() {
    let config = net(|net| {
        net.max_connections = 1;
        net.at_limit = AtLimit::Reject;
    });
    let host = Host::start(config, router()).await;
    let first = host.connect().await;
    host.open(1).await;
    let (answer, _) = until_closed(&mut host.connect().await, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    drop(first);
    host.open(0).await;
    let mut stream = host.connect().await;
    stream.write_all(REQUEST).await.unwrap();
    assert!(soon("an answer", stream.read(&mut [0; 1024])).await.unwrap() > 0);
    drop(stream);
    host.stop().await;
}

#[tokio::test]
async fn one_address_may_not_take_all_connections() {
    let host = Host::start(net(|net| net.max_per_address = 2), router()).await;
    let to: SocketAddr = host.addresses[0].parse().unwrap();
    let mine = [connect_from(7, to).await.unwrap(), connect_from(7, to).await.unwrap()];
    host.open(2).await;
    let (answer, _) = until_closed(&mut connect_from(7, to).await.unwrap(), REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    let mut other = connect_from(8, to).await.unwrap();
    other.write_all(REQUEST).await.unwrap();
    assert!(soon("an answer", other.read(&mut [0; 1024])).await.unwrap() > 0);
    drop((mine, other));
    host.stop().await;
}

#[tokio::test]
async fn too_many_requests_are_sent_away_at_once_and_the_rest_go_on() {
    let host = Host::start(Config { max_requests: 2, ..net(|_| {}) }, router()).await;
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let mut stream = host.connect().await;
        stream.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stuck.push(stream);
    }
    eventually("both run", || async { (host.connections.requests().len() == 2).then_some(()) }).await;
    let client = host.client();
    let shed = client.get("/id").await;
    assert_eq!((shed.status.as_u16(), shed.header("retry-after")), (503, Some("1")));
    assert_eq!(shed.header("content-type"), Some("application/problem+json"));
    // A request with a body that no handler will read is shed too, and its connection goes on.
    let body = Bytes::from(vec![b'x'; 900]);
    assert_eq!(client.send_bytes(http::Method::POST, "/count", None, body).await.status, 503);
    stuck.pop();
    eventually("there is room again", || async { (client.get("/id").await.status == 200).then_some(()) })
        .await;
    drop(stuck);
    host.stop().await;
}
