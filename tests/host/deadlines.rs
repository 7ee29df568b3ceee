//! Every wait for a client has a deadline, is counted by its reason, and affects no other client.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::WebSocketUpgrade;
use axum::routing::{any, get, post};
use futures_util::StreamExt;
use http::Request;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use perennial_runtime::drain::Phase;
use perennial_server::http::Config;
use perennial_server::http::scope::RequestScope;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use support::double::Double;
use support::host::{Host, net, until_closed};
use support::{eventually, soon};

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);
/// Maximum time that a deadline of [`SHORT`] may take on a busy machine.
const SOON: Duration = Duration::from_secs(10);

fn router() -> Router {
    Router::new()
        .route("/id", get(|scope: RequestScope| async move { scope.id().to_string() }))
        .route("/count", post(|body: Bytes| async move { body.len().to_string() }))
        .route("/much", get(|| async { Body::from_stream(endless()) }))
        .route(
            "/ws",
            any(|upgrade: WebSocketUpgrade| async {
                upgrade.on_upgrade(|mut socket| async move { while socket.recv().await.is_some() {} })
            }),
        )
}

fn endless() -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    futures_util::stream::repeat(Bytes::from(vec![b'x'; 16 << 10])).map(Ok)
}

/// Settings whose deadlines are all far away; `change` sets the one under test.
fn only(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = net(|net| {
        net.timeouts.handshake = LONG;
        net.timeouts.head = LONG;
        net.timeouts.idle = LONG;
        net.timeouts.write = LONG;
    });
    change(&mut config);
    config
}

fn is_short(took: Duration) {
    assert!(took >= SHORT - Duration::from_millis(20) && took < SOON, "{took:?}");
}

const REQUEST: &[u8] = b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn silence_and_half_a_preface_are_cut_off() {
    let host = Host::start(only(|config| config.net.timeouts.handshake = SHORT), router()).await;
    for beginning in ["", "PRI * HT", "PRI * HTTP/2.0\r\n\r\nSM\r\n"] {
        let (answer, took) = until_closed(&mut host.connect().await, beginning.as_bytes()).await;
        assert_eq!(answer, "", "{beginning:?}");
        is_short(took);
    }
    // Sent byte by byte, the text is either still a preface, or the beginning of a method that HTTP does not define.
    for (text, answer) in
        [("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", None), ("PRIVATE /id HTTP/1.1\r\nhost: x\r\n\r\n", Some("405"))]
    {
        let mut stream = host.connect().await;
        stream.set_nodelay(true).unwrap();
        for byte in text.as_bytes() {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut buffer = [0; 1024];
        let count = soon("an answer", stream.read(&mut buffer)).await.unwrap();
        match answer {
            Some(status) => assert!(String::from_utf8_lossy(&buffer[..count]).contains(status)),
            None => assert_eq!(buffer[3], 4, "a SETTINGS frame"),
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn a_slow_handshake_delays_nobody_else_and_has_an_end() {
    let double = Double::start().await;
    let tls = |config: &mut Config| {
        config.net.listen = vec!["https://127.0.0.1:0".parse().unwrap()];
        config.net.tls = Some(double.identity());
        config.net.timeouts.handshake = SHORT;
    };
    let host = Host::start(only(tls), router()).await;
    let address = host.addresses[0].trim_start_matches("https://").to_owned();
    let began = Instant::now();
    let mut slow: Vec<TcpStream> = Vec::new();
    for beginning in ["", "\x16\x03\x01", "GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    // This client finishes its handshake, and then never sends its HTTP/2 preface.
    slow.push(TcpStream::connect(&address).await.unwrap());
    let silent = support::http::tls_connect(slow.pop().unwrap(), double.ca_file(), &["h2"]).await;
    for mut stream in slow {
        until_closed(&mut stream, b"").await;
    }
    let (mut silent, _) = tokio::io::split(silent);
    let mut settings = Vec::new();
    let _ = soon("the end", silent.read_to_end(&mut settings)).await;
    is_short(began.elapsed());
    host.stop().await;
}

#[tokio::test]
async fn a_request_head_has_a_deadline_from_its_first_byte() {
    let host = Host::start(only(|config| config.net.timeouts.head = SHORT), router()).await;
    for before in [&b""[..], REQUEST] {
        let mut stream = host.connect().await;
        if !before.is_empty() {
            stream.write_all(before).await.unwrap();
            assert!(soon("an answer", stream.read(&mut [0; 1024])).await.unwrap() > 0);
            // The connection may be idle between two requests for longer than the deadline of a head.
            tokio::time::sleep(SHORT * 2).await;
        }
        let began = Instant::now();
        let dripping = async {
            for byte in b"GET /id HTTP/1.1\r\nhost: x\r\nx: ".iter().chain(std::iter::repeat(&b'y')) {
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        soon("dripping does not help", dripping).await;
        is_short(began.elapsed());
    }
    host.stop().await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_an_http_2_one_is_told_first() {
    let host = Host::start(only(|config| config.net.timeouts.idle = SHORT), router()).await;
    let (answer, took) = until_closed(&mut host.connect().await, REQUEST).await;
    assert!(answer.starts_with("HTTP/1.1 200"));
    is_short(took);

    let io = TokioIo::new(host.connect().await);
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let request = Request::get("http://x/id").body(Empty::<Bytes>::new()).unwrap();
    let ended = async {
        let response = send.send_request(request).await.unwrap();
        response.into_body().collect().await.unwrap();
        send
    };
    let (end, _send) = soon("GOAWAY", futures_util::future::join(connection, ended)).await;
    end.expect("it ends in order");
    host.stop().await;
}

#[tokio::test]
async fn a_body_has_a_deadline_for_each_part_and_for_the_whole() {
    let idle = Host::start(only(|config| config.body_idle_timeout = SHORT), router()).await;
    let mut stream = idle.connect().await;
    let head = b"POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n12345";
    let (answer, took) = until_closed(&mut stream, head).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    is_short(took);
    idle.stop().await;

    let total = Host::start(only(|config| config.body_timeout = SHORT), router()).await;
    let (mut reader, mut writer) = total.connect().await.into_split();
    let began = Instant::now();
    writer.write_all(b"POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let dripping = async {
        while writer.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        _ = soon("an answer", reader.read_to_string(&mut answer)) => {}
        () = dripping => {}
    }
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    is_short(began.elapsed());
    total.stop().await;

    // The same over HTTP/2, where one slow stream does not affect the others.
    let host = Host::start(only(|config| config.body_idle_timeout = SHORT), router()).await;
    let io = TokioIo::new(host.connect().await);
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let asked = async {
        let stalled = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let slow = Request::post("http://x/count").body(BodyExt::boxed(stalled)).unwrap();
        let quick = Request::get("http://x/id").body(BodyExt::boxed(Empty::new())).unwrap();
        let (slow, quick) = (send.send_request(slow), send.clone().send_request(quick));
        let (slow, quick) = futures_util::future::join(slow, quick).await;
        (slow.unwrap().status(), quick.unwrap().status())
    };
    let statuses = tokio::select! {
        statuses = soon("answers", asked) => statuses,
        _ = connection => panic!("the connection ended"),
    };
    assert_eq!((statuses.0.as_u16(), statuses.1.as_u16()), (408, 200));
    host.trigger.advance(Phase::Hard);
    soon("the end", host.tasks.ended()).await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off() {
    let host = Host::start(only(|config| config.net.timeouts.write = SHORT), router()).await;
    let mut stream = host.connect().await;
    stream.write_all(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    // The client reads nothing: the buffers of the kernel fill up, and then the host waits.
    eventually("it is cut", || async { (host.connections.count() == 0).then_some(()) }).await;

    // Over HTTP/2 the socket takes everything, while the stream's window is used up.
    let io = TokioIo::new(host.connect().await);
    let (mut send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(1000)
        .handshake(io)
        .await
        .unwrap();
    let request = Request::get("http://x/much").body(Empty::<Bytes>::new()).unwrap();
    let asked = async {
        let response = send.send_request(request).await.unwrap();
        // The response is held and never read.
        std::future::pending::<()>().await;
        drop(response);
    };
    tokio::select! {
        end = soon("it is cut", connection) => drop(end),
        () = asked => {}
    }
    host.open(0).await;

    // A client that goes on reading is not cut off, however long the answer is.
    let mut stream = host.connect().await;
    stream.write_all(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (began, mut buffer) = (Instant::now(), vec![0; 64 << 10]);
    while began.elapsed() < SHORT * 4 {
        assert!(soon("more", stream.read(&mut buffer)).await.unwrap() > 0);
    }
    drop(stream);
    host.stop().await;
}

#[tokio::test]
async fn an_old_connection_ends_with_its_next_answer() {
    let host = Host::start(only(|config| config.net.timeouts.age = SHORT), router()).await;
    let mut stream = host.connect().await;
    let mut answers = 0;
    let closing = loop {
        stream.write_all(REQUEST).await.unwrap();
        let mut buffer = [0; 1024];
        let count = soon("an answer", stream.read(&mut buffer)).await.unwrap();
        let answer = String::from_utf8_lossy(&buffer[..count]).into_owned();
        assert!(answer.starts_with("HTTP/1.1 200"), "no request is lost: {answer}");
        answers += 1;
        if answer.contains("connection: close") {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(answers > 3, "not at once: {closing}");
    assert_eq!(soon("the end", stream.read(&mut [0; 1])).await.unwrap(), 0);
    host.stop().await;
}

#[tokio::test]
async fn an_upgraded_connection_is_counted_is_left_alone_and_ends_with_the_drain() {
    let short = only(|config| {
        config.net.timeouts.idle = SHORT;
        config.net.timeouts.head = SHORT;
        config.net.timeouts.handshake = SHORT;
    });
    let host = Host::start(short, router()).await;
    let address = format!("ws://{}/ws", host.addresses[0]);
    let (mut socket, _) = tokio_tungstenite::connect_async(&address).await.unwrap();
    tokio::time::sleep(SHORT * 4).await;
    assert_eq!(host.connections.count(), 1, "the host's deadlines are for HTTP");
    assert_eq!(serde_json::to_value(&host.connections.view()[0]).unwrap()["phase"], "upgraded");
    host.trigger.advance(Phase::Soft);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(host.connections.count(), 1, "what runs may finish");
    host.trigger.advance(Phase::Hard);
    soon("the server ends", host.tasks.ended()).await;
    assert!(soon("the end", socket.next()).await.is_none_or(|end| end.is_err()));
}

#[tokio::test]
async fn cuts_are_counted_by_their_reason() {
    let perennial = support::process::Setup::new()
        .set("server.handshake_timeout=100ms")
        .set("server.head_timeout=100ms")
        .start()
        .await;
    let address = perennial.client().base().trim_start_matches("http://").to_owned();
    for beginning in ["", "GET / HTTP/1.1\r\nhost"] {
        until_closed(&mut TcpStream::connect(&address).await.unwrap(), beginning.as_bytes()).await;
    }
    let metrics = perennial.admin().get("/metrics").await.text();
    for reason in ["handshake timeout", "head timeout"] {
        let line = format!(r#"perennial_http_connections_cut_total{{reason="{reason}"}} 1"#);
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    assert!(metrics.contains(r#"perennial_http_connections{listener="public"} 0"#), "{metrics}");
}

#[tokio::test]
async fn what_is_left_of_a_body_is_no_request_head() {
    let config = only(|config| {
        config.net.timeouts.head = SHORT;
        config.body_limit = 10;
    });
    let host = Host::start(config, router()).await;
    let mut stream = host.connect().await;
    stream.write_all(b"POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n12345").await.unwrap();
    assert!(soon("413", stream.read(&mut [0; 1024])).await.unwrap() > 0);
    for part in [50, 45] {
        stream.write_all(&vec![b'x'; part]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(SHORT * 3).await;
    stream.write_all(REQUEST).await.unwrap();
    assert!(soon("it goes on", stream.read(&mut [0; 1024])).await.unwrap() > 0);
    drop(stream);
    host.stop().await;
}

#[tokio::test]
async fn a_client_that_is_sent_away_again_and_again_keeps_its_connection() {
    let config = only(|config| {
        config.net.timeouts.head = SHORT;
        config.max_requests = 0;
    });
    let host = Host::start(config, router()).await;
    let mut stream = host.connect().await;
    for _ in 0..10 {
        stream.write_all(REQUEST).await.unwrap();
        let mut buffer = [0; 1024];
        let count = soon("503", stream.read(&mut buffer)).await.unwrap();
        assert!(buffer[..count].starts_with(b"HTTP/1.1 503"));
        tokio::time::sleep(SHORT / 3).await;
    }
    drop(stream);
    host.stop().await;
}

/// The owner of the upgraded connection only writes, and the client never reads.
#[tokio::test]
async fn whoever_writes_to_an_upgraded_connection_is_told_of_its_end() {
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let upgrade = move |request: axum::extract::Request| {
        let ended = ended.clone();
        async move {
            let upgrade = hyper::upgrade::on(request);
            let mut owner = tokio::task::JoinSet::new();
            owner.spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                while io.write_all(&[0; 4096]).await.is_ok() {}
                let _ = ended.send(());
            });
            owner.detach_all();
            (http::StatusCode::SWITCHING_PROTOCOLS, [("upgrade", "bytes"), ("connection", "upgrade")])
        }
    };
    let config = only(|config| config.net.timeouts.write = SHORT);
    let host = Host::start(config, Router::new().route("/bytes", get(upgrade))).await;
    let mut stream = host.connect().await;
    stream
        .write_all(b"GET /bytes HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: bytes\r\n\r\n")
        .await
        .unwrap();
    soon("the end", end.recv()).await.unwrap();
    host.open(0).await;
    drop(stream);
    host.stop().await;
}

/// The download is slower than every deadline, but never idle.
#[tokio::test]
async fn a_slow_download_is_neither_idle_nor_cut_off_by_the_drain() {
    const LENGTH: usize = 200_000;
    let config = only(|config| {
        config.net.timeouts.idle = SHORT;
        config.net.timeouts.write = Duration::from_secs(5);
    });
    let file = Router::new().route("/file", get(|| async { vec![b'x'; LENGTH] }));
    let host = Host::start(config, file).await;
    let io = TokioIo::new(host.connect().await);
    let (mut send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(5000)
        .initial_connection_window_size(5000)
        .handshake(io)
        .await
        .unwrap();
    let request = Request::get("http://x/file").body(Empty::<Bytes>::new()).unwrap();
    let downloading = async {
        let mut body = send.send_request(request).await.unwrap().into_body();
        let mut received = 0;
        while let Some(frame) = body.frame().await {
            received += frame.expect("not cut off").into_data().unwrap().len();
            tokio::time::sleep(Duration::from_millis(100)).await;
            if received > LENGTH / 4 {
                host.trigger.advance(Phase::Soft);
            }
        }
        received
    };
    // The connection future of the client ends with GOAWAY, while the bytes go on.
    let (received, _end) = soon("all of it", futures_util::future::join(downloading, connection)).await;
    assert_eq!(received, LENGTH);
    soon("the server ends", host.tasks.ended()).await;
}
