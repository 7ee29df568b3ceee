//! The host alone: connections, protocols, scopes, panics, limits, and the watchdog.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::{get, post};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::{TokioExecutor, TokioIo};
use perennial_runtime::drain::{self, Phase};
use perennial_runtime::health::{self, Health};
use perennial_runtime::tasks::Tasks;
use perennial_server::http::Config;
use perennial_server::http::scope::RequestScope;
use perennial_server::net::Listen;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use support::double::Double;
use support::host::{Host, config, net};
use support::http::{Client, tls_connect};
use support::{eventually, soon};

fn echo_id() -> Router {
    Router::new().route("/id", get(|scope: RequestScope| async move { scope.id().to_string() }))
}

#[tokio::test]
async fn plain_connections_speak_http_1_and_http_2() {
    let (host, http1) = Host::plain(echo_id()).await;
    let http2 = Client::http2(http1.base());
    for client in [http1, http2] {
        let answer = client.get("/id").await;
        assert_eq!(
            answer.header("x-request-id").unwrap(),
            answer.text(),
            "the id of the scope is the answer's"
        );
    }
    host.stop().await;
}

#[tokio::test]
async fn tls_connections_agree_on_a_protocol_by_alpn() {
    let double = Double::start().await;
    let host = Host::start(
        net(|net| {
            net.listen = vec!["https://127.0.0.1:0".parse().unwrap()];
            net.tls = Some(double.identity());
        }),
        echo_id(),
    )
    .await;
    let address = host.addresses[0].strip_prefix("https://").unwrap().to_owned();
    for (offered, expected) in
        [(&["h2", "http/1.1"][..], Some("h2")), (&["http/1.1"][..], Some("http/1.1")), (&[][..], None)]
    {
        let stream = TcpStream::connect(&address).await.unwrap();
        let stream = tls_connect(stream, double.ca_file(), offered).await;
        let agreed =
            stream.get_ref().1.alpn_protocol().map(|agreed| String::from_utf8(agreed.to_vec()).unwrap());
        assert_eq!(agreed.as_deref(), expected);
        let request = Request::get("https://localhost/id")
            .header("host", "localhost")
            .body(Empty::<Bytes>::new())
            .unwrap();
        let io = TokioIo::new(stream);
        let response = if expected == Some("h2") {
            let (mut send, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
            drive(connection);
            send.send_request(request).await.unwrap()
        } else {
            let (mut send, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
            drive(connection);
            send.send_request(request).await.unwrap()
        };
        assert_eq!(response.status(), 200);
    }
    // A client that sends nothing does not delay the handshakes of others.
    let _silent = TcpStream::connect(&address).await.unwrap();
    tls_connect(TcpStream::connect(&address).await.unwrap(), double.ca_file(), &["h2"]).await;
    host.stop().await;
}

#[expect(clippy::disallowed_methods, reason = "the client's side of a connection, which ends with it")]
fn drive(connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
    tokio::spawn(connection);
}

#[tokio::test]
async fn a_unix_socket_is_a_listener_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.sock");
    // The socket file of a process that was killed must not prevent the bind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let listen = Listen::Unix(path.clone());
    let host = Host::start(net(|net| net.listen = vec![listen]), echo_id()).await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /id HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    host.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_request_id_is_taken_over_only_when_it_is_trusted() {
    let id = "order-42";
    let (host, client) = Host::plain(echo_id()).await;
    let own = client.with_header("x-request-id", id).get("/id").await.text();
    assert_eq!(own.len(), 36, "a UUID of our own: {own}");
    host.stop().await;
    let trusting = Config { trust_request_id: true, ..config(&["127.0.0.1:0"]) };
    let host = Host::start(trusting, echo_id()).await;
    let client = Client::new(&format!("http://{}", host.addresses[0]));
    assert_eq!(client.with_header("x-request-id", id).get("/id").await.text(), id);
    assert_eq!(client.with_header("x-request-id", "a b\tc").get("/id").await.text().len(), 36);
    host.stop().await;
}

#[tokio::test]
async fn a_panic_is_a_500_and_the_connection_lives_on() {
    let router = echo_id().route("/panic", get(|| async { panic!("a bug") as () }));
    let (host, _client) = Host::plain(router).await;
    let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
    let mut ask = async |path: &str| {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = vec![0; 4096];
        let count = soon("an answer", stream.read(&mut answer)).await.unwrap();
        String::from_utf8_lossy(&answer[..count]).into_owned()
    };
    let answer = ask("/panic").await;
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    assert!(answer.contains("application/problem+json") && !answer.contains("a bug"), "{answer}");
    assert!(ask("/id").await.starts_with("HTTP/1.1 200"), "on the same connection");
    host.stop().await;
}

#[tokio::test]
async fn a_handler_that_takes_too_long_is_answered_for() {
    let router = echo_id().route("/slow", get(|| async { std::future::pending::<()>().await }));
    let quick = Config { request_timeout: Duration::from_millis(200), ..config(&["127.0.0.1:0"]) };
    let host = Host::start(quick, router).await;
    let client = Client::new(&format!("http://{}", host.addresses[0]));
    let answer = client.get("/slow").await;
    assert_eq!((answer.status, answer.header("retry-after")), (StatusCode::SERVICE_UNAVAILABLE, Some("1")));
    assert_eq!(client.get("/id").await.status, 200);
    host.stop().await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_announced_or_not() {
    let router = Router::new().route("/count", post(|body: Bytes| async move { body.len().to_string() }));
    let (host, client) = Host::plain(router).await;
    let send = |length: usize| client.send_bytes(Method::POST, "/count", None, Bytes::from(vec![0; length]));
    assert_eq!(send(1000).await.text(), "1000");
    assert_eq!(send(1001).await.status, 413);
    assert_eq!(send(5_000_000).await.status, 413, "the answer arrives although the body was not read");
    let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
    let head = "POST /count HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("320\r\n{}\r\n", "x".repeat(800));
    stream.write_all(format!("{chunk}{chunk}0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let count = soon("an answer", stream.read(&mut answer)).await.unwrap();
    assert!(String::from_utf8_lossy(&answer[..count]).starts_with("HTTP/1.1 413"));
    host.stop().await;
}

#[tokio::test]
async fn more_connections_than_allowed_wait_their_turn() {
    let one = net(|net| net.max_connections = 1);
    let never = get(|| async { std::future::pending::<()>().await });
    let host = Host::start(one, echo_id().route("/never", never)).await;
    let request = b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut first = TcpStream::connect(&host.addresses[0]).await.unwrap();
    first.write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    support::eventually("it runs", || async { (host.connections.requests().len() == 1).then_some(()) }).await;
    let mut second = TcpStream::connect(&host.addresses[0]).await.unwrap();
    let mut buffer = [0; 1024];
    second.write_all(request).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(200), second.read(&mut buffer)).await;
    assert!(waits.is_err(), "the first is busy");
    drop(first);
    assert!(soon("an answer", second.read(&mut buffer)).await.unwrap() > 0);
    drop(second);
    host.stop().await;
}

/// Connections over HTTP/1.1 and HTTP/2 that are idle between requests or stuck in a head do not
/// keep a new client waiting.
#[tokio::test]
async fn connections_that_do_nothing_make_room_for_a_new_client_at_the_limit() {
    let host = Host::start(net(|net| net.max_connections = 30), echo_id()).await;
    let mut idle = Vec::new();
    for number in 0..30 {
        let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
        let (bytes, is_answered): (&[u8], _) = match number % 3 {
            0 => (b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n", true),
            1 => (b"GET /id HTTP/1.1\r\nhost: ", false),
            _ => (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", true),
        };
        stream.write_all(bytes).await.unwrap();
        if is_answered {
            assert!(soon("an answer", stream.read(&mut [0; 1024])).await.unwrap() > 0);
        }
        idle.push(stream);
    }
    // Each new connection takes the place of an idle one.
    for _ in 0..40 {
        let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
        stream.write_all(b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 1024];
        let length = soon("an answer beside idle connections", stream.read(&mut answer)).await.unwrap();
        assert!(
            answer[..length].starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&answer[..length])
        );
        idle.push(stream);
    }
    drop(idle);
    host.stop().await;
}

/// RFC 9112, section 3.2, with the bytes of real requests.
#[tokio::test]
async fn a_request_has_one_host_and_it_is_a_host() {
    let router = Router::new().route(
        "/host",
        get(|headers: http::HeaderMap| async move {
            headers.get("host").map(|host| host.to_str().unwrap_or_default().to_owned()).unwrap_or_default()
        }),
    );
    let host = Host::start(net(|_| {}), router).await;
    for (request, status, body) in [
        ("GET /host HTTP/1.1\r\nhost: a.example\r\n\r\n", "200", "a.example"),
        ("GET /host HTTP/1.1\r\nhost: [::1]:80\r\n\r\n", "200", "[::1]:80"),
        ("GET /host HTTP/1.0\r\n\r\n", "200", ""),
        ("GET /host HTTP/1.1\r\n\r\n", "400", ""),
        ("GET /host HTTP/1.1\r\nhost: a.example\r\nhost: a.example\r\n\r\n", "400", ""),
        ("GET /host HTTP/1.1\r\nhost: a.example/b\r\n\r\n", "400", ""),
        ("GET /host HTTP/1.1\r\nhost: user@a.example\r\n\r\n", "400", ""),
        ("GET /host HTTP/1.1\r\nhost: a b\r\n\r\n", "400", ""),
        ("GET http://b.example/host HTTP/1.1\r\nhost: a.example\r\n\r\n", "200", "b.example"),
        ("GET http://b.example/host HTTP/1.1\r\n\r\n", "400", ""),
        ("CONNECT a.example:443 HTTP/1.1\r\nhost: a.example:443\r\n\r\n", "405", ""),
        ("OPTIONS * HTTP/1.1\r\nhost: a.example\r\n\r\n", "204", ""),
        ("GET * HTTP/1.1\r\nhost: a.example\r\n\r\n", "400", ""),
    ] {
        let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.get(9..12) == Some(status), "{request:?}: {answer}");
        if status == "200" {
            assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{request:?}: {answer}");
        }
    }
    host.stop().await;
}

#[tokio::test]
async fn what_is_in_the_backlog_when_the_listener_closes_is_served() {
    let one = net(|net| net.max_connections = 1);
    let host = Host::start(one, echo_id()).await;
    let mut first = TcpStream::connect(&host.addresses[0]).await.unwrap();
    let request = b"GET /id HTTP/1.1\r\nhost: x\r\n\r\n";
    first.write_all(request).await.unwrap();
    assert!(soon("an answer", first.read(&mut [0; 1024])).await.unwrap() > 0, "the first is accepted");
    let mut waiting = TcpStream::connect(&host.addresses[0]).await.unwrap();
    waiting.write_all(request).await.unwrap();
    host.trigger.advance(Phase::Soft);
    let mut answer = String::new();
    soon("an answer", waiting.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    drop(first);
    host.stop().await;
}

/// The watchdog: when every worker of the serving runtime is blocked, probes on another runtime notice it.
#[test]
fn blocking_every_worker_turns_the_probes_and_unblocking_turns_them_back() {
    let serving = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let control = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limits = health::Config {
        unready_after: Duration::from_millis(600),
        stall_after: Duration::from_millis(1500),
    };
    let health = Health::new(limits);
    let (_trigger, drain) = drain::channel();
    let beats: Tasks = {
        let _on_serving = serving.enter();
        let tasks = Tasks::new(drain.clone());
        tasks.critical("heartbeat", health.clone().heartbeat(drain));
        tasks
    };
    health.started();
    control.block_on(async {
        let (live, ready) = (health.clone(), health.clone());
        let probe = |well: bool| if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let router = Router::new()
            .route("/livez", get(move || std::future::ready(probe(live.live().is_ok()))))
            .route("/readyz", get(move || std::future::ready(probe(ready.ready().is_ok()))));
        let (_host, client) = Host::plain(router).await;
        let turns = async |path: &str, status: u16| {
            eventually(&format!("{path} says {status}"), || async {
                (client.get(path).await.status == status).then_some(())
            })
            .await;
        };
        turns("/readyz", 200).await;
        turns("/livez", 200).await;
        let (unblock, blocked) = gate(2);
        for _ in 0..2 {
            let blocked = blocked.clone();
            let _on_serving = serving.enter();
            beats.critical("blocker", async move {
                blocked.wait();
                Ok::<(), Infallible>(())
            });
        }
        let began = Instant::now();
        turns("/readyz", 503).await;
        assert!(health.ready().unwrap_err()[0].contains("has run no task"));
        assert_eq!(client.get("/livez").await.status, 200, "not ready comes before not alive");
        turns("/livez", 503).await;
        assert!(began.elapsed() >= Duration::from_secs(1));
        unblock();
        turns("/readyz", 200).await;
        turns("/livez", 200).await;
    });
    serving.shutdown_background();
}

/// A barrier on which threads block, and a function that opens it.
fn gate(threads: usize) -> (impl FnOnce(), Arc<std::sync::Barrier>) {
    let barrier = Arc::new(std::sync::Barrier::new(threads + 1));
    let opener = Arc::clone(&barrier);
    let open = move || {
        opener.wait();
    };
    (open, barrier)
}

#[tokio::test]
async fn a_connection_may_be_closed_or_aborted_by_its_handler() {
    let router = echo_id()
        .route("/close", get(|scope: RequestScope| async move { scope.connection().close() }))
        .route(
            "/abort",
            get(|scope: RequestScope| async move {
                scope.connection().abort();
                std::future::pending::<()>().await;
            }),
        );
    let (host, _client) = Host::plain(router).await;
    for (path, answered) in [("/close", true), ("/abort", false)] {
        let mut stream = TcpStream::connect(&host.addresses[0]).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
        assert_eq!(answer.starts_with(b"HTTP/1.1 200"), answered, "{path}");
    }
    host.stop().await;
}

/// A connection that has been idle for a while is parked: it keeps only its socket, and its client does not notice.
#[tokio::test]
async fn a_connection_that_has_rested_goes_on_as_before() {
    const REST: Duration = Duration::from_millis(1500);
    let router = echo_id().route("/count", post(|body: Bytes| async move { body.len().to_string() }));
    let (host, _client) = Host::plain(router).await;
    let request = "GET /id HTTP/1.1\r\nhost: x\r\n\r\n";
    let body = "POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n12345";
    let too_long =
        format!("POST /count HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n{}", "x".repeat(2000));
    // Parts of the requests that come after the connection was parked, and the number of answers.
    let cases: [(&[&str], usize); 5] = [
        (&[request], 1),
        (&["GET /id HT", "TP/1.1\r\nhost: x\r\n\r\n"], 1),
        (&[&request.repeat(3)], 3),
        (&[body], 1),
        (&[&too_long], 1),
    ];
    let mut streams = Vec::new();
    for _ in &cases {
        let mut stream = host.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(soon("an answer", stream.read(&mut [0; 1024])).await.unwrap() > 0);
        streams.push(stream);
    }
    for round in 0..2 {
        tokio::time::sleep(REST).await;
        for ((parts, answers), stream) in cases.iter().zip(&mut streams) {
            for part in *parts {
                stream.write_all(part.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let mut answer = String::new();
            while answer.matches("HTTP/1.1 ").count() < *answers {
                let mut buffer = [0; 4096];
                let count = soon("an answer", stream.read(&mut buffer)).await.unwrap();
                assert!(count > 0, "round {round}, {parts:?}: {answer}");
                answer.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        }
    }
    assert_eq!(host.connections.count(), cases.len());
    // Parked connections leave with the drain, and the end of one is noticed.
    tokio::time::sleep(REST).await;
    drop(streams.pop());
    host.open(cases.len() - 1).await;
    host.trigger.advance(Phase::Soft);
    for mut stream in streams {
        assert_eq!(soon("the end", stream.read(&mut [0; 16])).await.unwrap_or(0), 0);
    }
    soon("the end", host.tasks.ended()).await;
}

/// A handler may have given the body away, and another task may still hold it after the request has been answered.
#[tokio::test]
async fn a_body_that_is_still_to_come_is_never_the_next_request() {
    let kept = Arc::new(std::sync::Mutex::new(Vec::new()));
    let keep = {
        let kept = Arc::clone(&kept);
        post(move |body: axum::body::Body| async move { kept.lock().unwrap().push(body) })
    };
    let (host, _client) = Host::plain(echo_id().route("/keep", keep)).await;
    let mut stream = host.connect().await;
    stream.write_all(b"POST /keep HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\nbegin").await.unwrap();
    let mut buffer = [0; 1024];
    let count = soon("an answer", stream.read(&mut buffer)).await.unwrap();
    assert!(buffer[..count].starts_with(b"HTTP/1.1 200"));
    // This is long enough for the connection to be parked, if it were idle.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    stream.write_all(b"GET /id HTTP/1.1\r\nhost: smuggled\r\n\r\n").await.unwrap();
    let more = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut buffer)).await;
    assert!(more.is_err() || more.unwrap().unwrap_or(0) == 0, "it was taken for a request");
    assert!(host.connections.requests().is_empty());
    kept.lock().unwrap().clear();
    drop(stream);
    host.stop().await;
}
