//! The HTTP client of modules, against real servers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use perennial::anyhow;
use perennial::axum::body::{Body, Bytes};
use perennial::http::HeaderMap;
use perennial::http_client::{Error, HttpClient, Target};
use perennial::prelude::*;
use perennial::secrecy::SecretString;
use perennial::server::http::trace::Trace;
use perennial::testing::TestProgram;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use support::certificates::Certificates;
use support::eventually;
use support::tinyproxy::TinyProxy;

/// The server that is called.
struct Peer;

/// Number of requests that were answered.
static ASKED: AtomicU32 = AtomicU32::new(0);

impl Module for Peer {
    const NAME: &'static str = "peer";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let routes = Router::new()
            .route("/v1/echo", post(echo).get(echo))
            .route("/v1/fails/{times}", get(fails).post(fails))
            .route("/v1/slow", get(async || tokio::time::sleep(Duration::from_secs(5)).await))
            .route("/v1/long", get(long))
            .route(
                "/v1/moved",
                get(async || ([("location", "/v1/echo")], perennial::http::StatusCode::FOUND)),
            );
        host.routes(routes);
        Ok(())
    }
}

async fn echo(headers: HeaderMap, uri: perennial::http::Uri, body: Bytes) -> Json<Value> {
    let of = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    Json(json!({
        "query": uri.query(), "body": String::from_utf8_lossy(&body), "trace": of("traceparent"),
        "agent": of("user-agent"), "authorization": of("authorization"), "key": of("idempotency-key"),
    }))
}

/// Answers with 503 so many times, and then well.
async fn fails(
    Path(times): Path<u32>,
) -> std::result::Result<&'static str, (perennial::http::StatusCode, &'static str)> {
    match ASKED.fetch_add(1, Ordering::SeqCst) < times {
        true => Err((perennial::http::StatusCode::SERVICE_UNAVAILABLE, "not yet")),
        false => Ok("well"),
    }
}

/// 40 MiB.
async fn long() -> Body {
    let parts = futures_util::stream::iter(
        (0..640).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 64 << 10]))),
    );
    Body::from_stream(parts)
}

/// The program that calls.
struct Caller;

static CLIENTS: OnceLock<(HttpClient, HttpClient)> = OnceLock::new();

impl Module for Caller {
    const NAME: &'static str = "caller";
    const TARGETS: &'static [Target] = &[Target::new("peer", "http://127.0.0.1:1/v1"), Target::any("hooks")];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        anyhow::ensure!(host.http_client("nobody").is_err());
        let _ = CLIENTS.set((host.http_client("peer")?, host.http_client("hooks")?));
        let peer = host.http_client("peer")?;
        let ask = async move || -> Result<String> {
            Ok(peer.get("/echo").send().await?.success().await?.text().await?)
        };
        host.routes(Router::new().route("/ask", get(ask)));
        Ok(())
    }
}

/// Starts the server that is called, and a program that calls it, with further settings.
async fn started(set: &[&str]) -> anyhow::Result<(TestProgram, TestProgram)> {
    let peer = Perennial::new().host::<Peer>().test().embedded().start().await?;
    let url = format!("targets.peer.url={}/v1/", peer.url());
    let caller = Perennial::new().host::<Caller>().test().embedded().set(url);
    let caller = set.iter().fold(caller, |caller, setting| caller.set(*setting)).start().await?;
    Ok((peer, caller))
}

fn peer() -> &'static HttpClient {
    &CLIENTS.get().unwrap().0
}

fn hooks() -> &'static HttpClient {
    &CLIENTS.get().unwrap().1
}

async fn stop(programs: (TestProgram, TestProgram)) -> anyhow::Result<()> {
    programs.1.stop().await?;
    programs.0.stop().await
}

#[tokio::test]
async fn a_server_is_called_with_json_a_query_a_token_and_a_trace() -> anyhow::Result<()> {
    let programs = started(&[]).await?;
    let trace = Trace::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
    let request = peer().post("/echo?a=1").query(&[("b", "x y")]).json(&json!({ "title": "Momo" }));
    let request = request.bearer(&SecretString::from("s3cret")).traced(&trace).idempotency("book-17");
    assert!(!format!("{request:?}").contains("s3cret"));
    let echo: Value = request.send().await?.json().await?;
    assert_eq!((&echo["query"], &echo["body"]), (&json!("a=1&b=x+y"), &json!(r#"{"title":"Momo"}"#)));
    assert_eq!((&echo["trace"], &echo["key"]), (&json!(trace.as_str()), &json!("book-17")));
    assert_eq!(echo["authorization"], "Bearer s3cret");
    assert!(echo["agent"].as_str().unwrap().contains('/'));
    let form: Value = peer().post("/echo").form(&[("a", "ü")]).send().await?.json().await?;
    assert_eq!(form["body"], "a=%C3%BC");
    let parts = futures_util::stream::iter(["a", "b"].map(|part| Ok::<_, std::io::Error>(Bytes::from(part))));
    let streamed: Value = peer().post("/echo").stream(Body::from_stream(parts)).send().await?.json().await?;
    assert_eq!(streamed["body"], "ab");
    let moved = peer().get("/moved").send().await?;
    assert_eq!(moved.status(), 302, "redirects are not followed");
    drop(moved);

    #[derive(Debug, Deserialize)]
    struct Other {
        #[expect(dead_code, reason = "only its type counts")]
        query: u32,
    }
    let other = peer().get("/echo?x").send().await?.json::<Other>().await.unwrap_err().to_string();
    assert!(other.starts_with("peer: the answer is not as wanted: query:"), "{other}");
    let missing = peer().get("/nothing").send().await?.success().await.unwrap_err();
    assert!(matches!(&missing, Error::Status { status, .. } if *status == 404) && !missing.is_transient());
    for (place, reason) in [("echo", "begins with a slash"), ("@evil.example/", "begins with a slash")] {
        let error = peer().get(place).send().await.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let error = peer().get("/echo").header("a b", "c").send().await.unwrap_err().to_string();
    assert!(error.contains("no name of a header"), "{error}");

    let metrics = programs.1.admin().get("/metrics").await?.text();
    for line in [
        "perennial_client_calls_total{target=\"peer\",result=\"200\"}",
        "perennial_client_calls_total{target=\"peer\",result=\"404\"} 1",
        "perennial_client_calls_in_flight{target=\"peer\"} 0",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    let targets = programs.1.admin().get("/targets").await?.json();
    assert_eq!((&targets["peer"]["host"], &targets["peer"]["running"]), (&json!("127.0.0.1"), &json!(0)));
    assert_eq!(targets["peer"]["breaker"]["state"], "closed");
    stop(programs).await
}

#[tokio::test]
async fn what_may_be_sent_again_is_sent_again_and_nothing_else() -> anyhow::Result<()> {
    let programs = started(&[]).await?;
    assert_eq!(peer().get("/fails/2").send().await?.text().await?, "well");
    assert_eq!(ASKED.swap(0, Ordering::SeqCst), 3);
    assert_eq!(peer().post("/fails/2").send().await?.status(), 503);
    assert_eq!(ASKED.swap(0, Ordering::SeqCst), 1, "it may have been done");
    assert_eq!(peer().post("/fails/2").idempotency("a").send().await?.status(), 200);
    assert_eq!(ASKED.swap(0, Ordering::SeqCst), 3);
    assert_eq!(peer().get("/fails/1").retries(0).send().await?.status(), 503);
    stop(programs).await
}

#[tokio::test]
async fn a_server_that_is_silent_or_fails_is_given_up_in_time_and_then_left_alone() -> anyhow::Result<()> {
    let programs = started(&["targets.peer.timeout=300ms", "targets.peer.retries=0"]).await?;
    let began = Instant::now();
    for _ in 0..5 {
        let error = peer().get("/slow").send().await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(15));
    let error = peer().get("/echo").send().await.unwrap_err();
    assert!(matches!(error, Error::Open(_)) && error.is_transient(), "{error:?}");
    let answer = programs.1.client().get("/ask").await?;
    assert_eq!(answer.status, 503);
    assert!(answer.headers.contains_key("retry-after"), "{answer:?}");
    assert_eq!(programs.1.admin().get("/targets").await?.json()["peer"]["breaker"]["state"], "open");
    eventually("the server is called again", || async { peer().get("/echo").send().await.ok().map(drop) })
        .await;
    stop(programs).await
}

#[tokio::test]
async fn a_long_answer_is_read_in_parts_or_not_at_all() -> anyhow::Result<()> {
    let programs = started(&["targets.peer.max_answer=1MiB"]).await?;
    let error = peer().get("/long").send().await?.bytes().await.unwrap_err();
    assert!(matches!(error, Error::TooLong { limit, .. } if limit == 1 << 20), "{error:?}");
    let mut parts = std::pin::pin!(peer().get("/long").send().await?.into_stream());
    let mut length = 0;
    while let Some(part) = parts.next().await {
        length += part?.len();
    }
    assert_eq!(length, 40 << 20);
    stop(programs).await
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_error_of_its_reader() -> anyhow::Result<()> {
    let server = TcpListener::bind("127.0.0.1:0").await?;
    let address = server.local_addr()?;
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        while let Ok((mut stream, _)) = server.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await;
        }
    });
    let url = format!("targets.peer.url=http://{address}");
    let caller = Perennial::new().host::<Caller>().test().embedded().set(url).start().await?;
    let error = peer().get("/").send().await?.text().await.unwrap_err();
    assert!(matches!(error, Error::Broken { .. }), "{error:?}");
    caller.stop().await
}

#[tokio::test]
async fn urls_of_strangers_do_not_lead_into_the_own_network() -> anyhow::Result<()> {
    let programs = started(&["targets.hooks.allow_insecure=true", "targets.hooks.timeout=5s"]).await?;
    let port = programs.0.url().rsplit_once(':').unwrap().1.to_owned();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "10.0.0.1",
        "0.0.0.0",
        // Other ways to write 127.0.0.1, which the system understands.
        "2130706433",
        "0x7f.1",
        "127.1",
    ] {
        let error =
            hooks().get(format!("http://{host}:{port}/v1/echo?token=s3cret")).send().await.unwrap_err();
        let is_refused =
            matches!(&error, Error::Forbidden { .. } | Error::Connect { .. } | Error::Request { .. });
        assert!(is_refused && !format!("{error:?} {error}").contains("s3cret"), "{host}: {error:?}");
    }
    for place in ["/echo", "ftp://a.example/", "http://user:s3cret@a.example/", "https:///x"] {
        let error = hooks().get(place).send().await.unwrap_err();
        assert!(
            matches!(&error, Error::Request { .. }) && !error.to_string().contains("s3cret"),
            "{error:?}"
        );
    }
    stop(programs).await
}

#[tokio::test]
async fn urls_of_strangers_are_encrypted_unless_a_setting_says_otherwise() -> anyhow::Result<()> {
    let programs = started(&["targets.hooks.allow_networks=127.0.0.0/8"]).await?;
    let port = programs.0.url().rsplit_once(':').unwrap().1.to_owned();
    let error = hooks().get(format!("http://127.0.0.1:{port}/")).send().await.unwrap_err().to_string();
    assert!(error.contains("wanted an https:// URL"), "{error}");
    stop(programs).await
}

#[tokio::test]
async fn a_slow_host_of_a_stranger_takes_no_places_of_others() -> anyhow::Result<()> {
    let set = ["targets.hooks.allow_insecure=true", "targets.hooks.allow_networks=127.0.0.0/8"];
    let programs =
        started(&[&set[..], &["targets.hooks.calls_per_host=2", "targets.hooks.calls=3"]].concat()).await?;
    let slow = format!("{}/v1/slow", programs.0.url());
    let mut calls: JoinSet<_> = (0..4).map(|_| hooks().get(&slow).send()).collect();
    eventually("two calls run", || async {
        let targets = programs.1.admin().get("/targets").await.ok()?.json();
        (targets["hooks"]["running"] == 2).then_some(())
    })
    .await;
    let other = slow.replace("127.0.0.1", "127.0.0.2").replace("/slow", "/echo");
    // Another address of this machine: the server does not listen there, but the call has a place.
    let error = hooks().get(other).retries(0).send().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    let mut busy = 0;
    while let Some(call) = calls.join_next().await {
        busy += i32::from(matches!(call?, Err(Error::Busy { .. })));
    }
    assert_eq!(busy, 2);
    stop(programs).await
}

#[tokio::test]
async fn calls_go_through_a_proxy_and_trust_an_authority_of_ones_own() -> anyhow::Result<()> {
    let (proxy, certificates) = (TinyProxy::start().await, Certificates::new());
    let tls = |name: &str, file: std::path::PathBuf| format!("{name}={}", file.display());
    let server = Perennial::new().host::<Peer>().test().embedded().set("server.listen=https://127.0.0.1:0");
    let server = server.set(tls("server.tls.cert_file", certificates.certificate()));
    let server = server.set(tls("server.tls.key_file", certificates.key())).start().await?;
    let caller = Perennial::new().host::<Caller>().test().embedded();
    let caller =
        caller.set(format!("targets.peer.url={}/v1", server.url().replace("127.0.0.1", "localhost")));
    let caller = caller.set(tls("targets.peer.ca_file", certificates.authority()));
    let caller = caller.set(format!("targets.peer.proxy=http://127.0.0.1:{}", proxy.port)).start().await?;
    let echo: Value = peer().get("/echo?x=1").send().await?.json().await?;
    assert_eq!(echo["query"], "x=1");
    let log = proxy.log();
    assert!(log.contains("CONNECT localhost:") && !log.contains("echo"), "{log}");
    caller.stop().await?;
    server.stop().await
}

#[tokio::test]
async fn settings_of_targets_are_checked() {
    for (setting, wanted) in [
        ("targets.peer.url=ftp://a.example", "a URL such as https://api.example.com/v1"),
        ("targets.peer.proxy=proxy.example", "http://host:port, or nothing"),
        ("targets.hooks.allow_networks=everything", "networks such as 10.1.0.0/16"),
        ("targets.peer.calls_per_host=4", "there is no such setting"),
        ("targets.peer.ca_file=/nowhere", "a file that can be read"),
    ] {
        let error =
            Perennial::new().host::<Caller>().test().embedded().set(setting).start().await.unwrap_err();
        assert!(error.to_string().contains(wanted), "{setting}: {error}");
    }
}
