//! Connections that cannot be served leave a trace: a counter, and a line in the log with their address.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use support::certificates::Certificates;
use support::eventually;
use support::process::{Perennial, Setup};

/// Sends bytes to a port, and returns all that is answered until the end.
async fn say(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address.trim_start_matches("http://").trim_start_matches("https://"))
        .await
        .unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Returns true when an answer is a problem document that has the length in its head.
fn is_problem(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    head.contains("content-type: application/problem+json")
        && head.contains(&format!("content-length: {}", body.len()))
        && serde_json::from_str::<serde_json::Value>(body).is_ok_and(|problem| problem["detail"].is_string())
}

async fn counted(perennial: &Perennial, reason: &str) {
    let line = format!("perennial_http_refused_total{{listener=\"public\",reason=\"{reason}\"}} 1");
    eventually(&line, || async {
        perennial.admin().get("/metrics").await.text().contains(&line).then_some(())
    })
    .await;
    let told = eventually("the log tells of it", || async {
        perennial.log_lines().into_iter().find(|told| told["reason"] == reason)
    })
    .await;
    assert!(told["peer"].as_str().unwrap().starts_with("127.0.0.1"), "{told}");
}

#[tokio::test]
async fn what_is_no_http_is_counted_by_reason_and_told_with_its_address() {
    let perennial = Setup::new().start().await;
    let address = perennial.client().base().to_owned();
    let long = format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "x".repeat(70_000));
    let wide = format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(70_000));
    let answer = say(&address, b"NONSENSE\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert!(is_problem(&answer), "{answer}");
    counted(&perennial, "bad_head").await;
    let answer = say(&address, wide.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431") && is_problem(&answer), "{answer}");
    for odd in [
        "GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: localhost\r\nno colon\r\n\r\n",
        "GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ] {
        let answer = say(&address, odd.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400") && is_problem(&answer), "{odd}: {answer}");
    }
    counted(&perennial, "head_too_large").await;
    let answer = say(&address, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 414") || answer.starts_with("HTTP/1.1 431"), "{answer}");
    // A browser opens the port with https.
    assert_eq!(say(&address, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await, "");
    counted(&perennial, "tls_on_plain_port").await;
}

#[tokio::test]
async fn plain_http_on_a_port_with_tls_is_answered_with_a_word() {
    let certificates = Certificates::new();
    let perennial = Setup::new()
        .set("server.listen=127.0.0.1:0,https://127.0.0.1:0")
        .set(&format!("server.tls.cert_file={}", certificates.certificate().display()))
        .set(&format!("server.tls.key_file={}", certificates.key().display()))
        .start()
        .await;
    let addresses: serde_json::Value =
        serde_json::from_slice(&std::fs::read(perennial.setup.data_dir().join("addresses.json")).unwrap())
            .unwrap();
    let tls = addresses["server"][1].as_str().unwrap();
    let answer = say(tls, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 400 Bad Request") && answer.contains("this port speaks https"),
        "{answer}"
    );
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("content-length: {}", body.len())), "{answer}");
    assert!(serde_json::from_str::<serde_json::Value>(body).is_ok(), "{body}");
    counted(&perennial, "plain_on_tls_port").await;
    let _ = say(tls, b"\x16\x03\x01\x00\x05hello").await;
    counted(&perennial, "tls_handshake").await;
}

#[tokio::test]
async fn a_proxy_that_does_not_say_whom_it_speaks_for_is_refused_with_a_trace() {
    let perennial =
        Setup::new().set("server.proxy_protocol=true").set("server.trusted_proxies=127.0.0.1").start().await;
    let address = perennial.client().base().to_owned();
    let _ = say(&address, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    counted(&perennial, "bad_proxy_header").await;
}

/// A request that is refused by its head is refused before the client is asked for its body.
#[tokio::test]
async fn a_body_that_is_kept_back_is_not_asked_for_in_vain() {
    let perennial = Setup::new().start().await;
    let made = perennial.setup.run(&["keys", "add", "reader", "--scopes", "read"]).await;
    let reader = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    let right = std::fs::read_to_string(perennial.setup.data_dir().join("api.key")).unwrap();
    for (key, begins) in
        [("nope", "HTTP/1.1 401"), (reader.as_str(), "HTTP/1.1 403"), (right.trim(), "HTTP/1.1 100 Continue")]
    {
        let head = format!(
            "POST /notify HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
             content-length: 2\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
        );
        let address = perennial.client().base().trim_start_matches("http://").to_owned();
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 21];
        stream.read_exact(&mut answer).await.unwrap();
        assert!(answer.starts_with(begins.as_bytes()), "{begins}: {}", String::from_utf8_lossy(&answer));
    }
}
