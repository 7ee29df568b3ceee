//! Handover by SIGUSR2: one process follows another on the same sockets, and no connection is refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use support::eventually;
use support::http::{Client, crossed_goaway};
use support::process::{Setup, is_gone};

/// Returns true for errors after which browsers and proxies send the request again by themselves: the connection
/// had been used before, and ended before any byte of an answer came back.
fn may_be_sent_again(error: &anyhow::Error) -> bool {
    crossed_goaway(error)
        || error.chain().any(|why| why.to_string().contains("closed before message completed"))
}

/// Sends requests without a pause until `stop` is set. Returns the failures.
async fn load(
    client: Client,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    again: Arc<AtomicUsize>,
) -> Vec<String> {
    let mut failures = Vec::new();
    let mut first = true;
    while !stop.load(Ordering::SeqCst) {
        let answer = client.try_send(Method::GET, "/push/key", None, Bytes::new()).await;
        match &answer {
            Err(error) if first && may_be_sent_again(error) => {
                again.fetch_add(1, Ordering::SeqCst);
                first = false;
                continue;
            }
            _ => first = true,
        }
        match answer {
            Ok(answer) if answer.status.is_success() => {
                answered.fetch_add(1, Ordering::SeqCst);
            }
            Ok(answer) => failures.push(answer.status.to_string()),
            Err(error) => failures.push(format!("{error:#}: {:?}", error.source())),
        }
    }
    failures
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn successors_take_over_without_a_refused_connection() {
    let (successions, requests) = if support::full() { (10, 200_000) } else { (2, 4000) };
    let mut perennial = Setup::new().start().await;
    let base = perennial.client().base().to_owned();
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let again = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for number in 0..8 {
        let client = if number % 2 == 0 { Client::new(&base) } else { Client::http2(&base) };
        clients.spawn(load(client, Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&again)));
    }
    let mut pauses = Vec::new();
    for number in 0..successions {
        let due = requests * (number + 1) / (successions + 1);
        eventually("requests are answered", || async {
            (answered.load(Ordering::SeqCst) >= due).then_some(())
        })
        .await;
        let before = perennial.setup.holder().unwrap();
        let began = Instant::now();
        kill(Pid::from_raw(before), Signal::SIGUSR2).unwrap();
        eventually("another process has the lock", || async {
            perennial.setup.holder().is_some_and(|now| now != before).then_some(())
        })
        .await;
        pauses.push(began.elapsed());
        perennial.ready_again().await;
    }
    eventually("requests are answered", || async {
        (answered.load(Ordering::SeqCst) >= requests).then_some(())
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    let failures: Vec<String> = clients.join_all().await.into_iter().flatten().collect();
    println!(
        "{successions} successions, {} requests, {} sent again, {} failed, from signal to lock {pauses:?}",
        answered.load(Ordering::SeqCst),
        again.load(Ordering::SeqCst),
        failures.len()
    );
    assert!(failures.is_empty(), "{} failed: {:?}", failures.len(), failures.first());
    let last = perennial.setup.holder().unwrap();
    kill(Pid::from_raw(last), Signal::SIGTERM).unwrap();
    eventually("the last one ends", || async { is_gone(last).then_some(()) }).await;
    assert_eq!(perennial.ended().await.code(), Some(0), "the first one left in order");
}

#[tokio::test]
async fn a_successor_that_cannot_start_changes_nothing() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let unusable = [
        "[server]\nnonsense = 1\n".to_owned(),
        format!("[server]\nlisten = \"{}\"\n", taken.local_addr().unwrap()),
    ];
    let setup = Setup::listening_as_configured();
    let file = setup.file("settings.toml");
    std::fs::write(&file, "[server]\nlisten = \"127.0.0.1:0\"\n").unwrap();
    let path = file.display().to_string();
    let mut perennial = setup.config(&path).start().await;
    for (number, settings) in unusable.into_iter().enumerate() {
        std::fs::write(&file, settings).unwrap();
        perennial.signal(Signal::SIGUSR2);
        eventually("it says so", || async {
            (perennial.log().matches("no successor; going on").count() > number).then_some(())
        })
        .await;
        assert_eq!(perennial.client().get("/push/key").await.status, 200);
    }
    assert!(perennial.log().contains("the successor ended before it could take over"));
    assert_eq!(perennial.stop().await, Some(0));
}

#[tokio::test]
async fn a_client_that_is_slow_holds_up_a_successor_for_a_bounded_time() {
    let mut perennial = Setup::new().set("drain.succession=500ms").start().await;
    let address = perennial.client().base().trim_start_matches("http://").to_owned();
    let mut slow = tokio::net::TcpStream::connect(&address).await.unwrap();
    let head = "POST /subscriptions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    let admin = perennial.admin().clone();
    eventually("it runs", || async {
        (admin.get("/requests").await.text().contains("/subscriptions")).then_some(())
    })
    .await;
    let before = perennial.pid();
    perennial.signal(Signal::SIGUSR2);
    // The client connects at once and waits in the backlog.
    let began = Instant::now();
    eventually("the successor has the lock", || async {
        perennial.setup.holder().is_some_and(|now| now != i32::try_from(before).unwrap()).then_some(())
    })
    .await;
    let client = Client::new(perennial.client().base());
    assert_eq!(client.get("/push/key").await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    perennial.ended().await;
    kill(Pid::from_raw(perennial.setup.holder().unwrap()), Signal::SIGTERM).unwrap();
}
