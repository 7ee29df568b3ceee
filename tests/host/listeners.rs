//! Listeners of modules: other protocols than HTTP, with everything that the host does around them. The program is the
//! example `lines`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use perennial::anyhow;
use perennial::listeners::{Datagram, Listener, Stream, TcpHandler, UdpHandler};
use perennial::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use support::process::{self, Perennial as Process, Setup, is_gone};
use support::{eventually, soon};

/// The address of a listener, as `addresses.json` has it.
fn address(setup: &Setup, listener: &str) -> String {
    let file = std::fs::read_to_string(setup.data_dir().join("addresses.json")).unwrap();
    let addresses: Value = serde_json::from_str(&file).unwrap();
    addresses["listeners"][listener][0].as_str().unwrap().to_owned()
}

fn lines() -> Setup {
    let setup = Setup::new().program(process::example("lines"));
    setup.set("listeners.lines.listen=127.0.0.1:0").set("listeners.counts.listen=127.0.0.1:0")
}

/// A conversation with the example.
struct Talk(BufReader<TcpStream>);

impl Talk {
    async fn with(address: &str) -> Self {
        Self(BufReader::new(TcpStream::connect(address).await.unwrap()))
    }

    async fn say(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await.unwrap();
        self.hear().await
    }

    async fn hear(&mut self) -> String {
        let mut answer = String::new();
        soon("an answer", self.0.read_line(&mut answer)).await.unwrap();
        answer.trim_end().to_owned()
    }
}

async fn count(lines: &Process, wanted: i64) {
    let mut talk = Talk::with(&address(&lines.setup, "lines")).await;
    let mut found = String::new();
    for _ in 0..500 {
        found = talk.say("get apples").await;
        if found == wanted.to_string() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("there are {found} apples, and {wanted} were wanted");
}

#[tokio::test]
async fn lines_and_datagrams_are_served_counted_and_shown() {
    let mut lines = lines().set("listeners.counts.max_per_address=1000").start().await;
    let mut talk = Talk::with(&address(&lines.setup, "lines")).await;
    assert_eq!(talk.say("add apples 3").await, "3");
    assert_eq!(talk.say("eat apples").await, "error: wanted get NAME or add NAME NUMBER");
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let counts = address(&lines.setup, "counts");
    for datagram in ["apples:4|c", "no count", "apples:many|c"] {
        socket.send_to(datagram.as_bytes(), &counts).await.unwrap();
    }
    count(&lines, 7).await;

    let connections = lines.admin().get("/connections").await.json();
    let open = connections.as_array().unwrap().iter();
    let open = open.filter(|open| open["listener"] == "lines" && open["protocol"] == "tcp").count();
    assert!(open >= 1, "{connections}");
    let metrics = lines.admin().get("/metrics").await.text();
    for line in [
        "perennial_http_connections{listener=\"lines\"}",
        "perennial_datagrams_total{listener=\"counts\",result=\"failed\"} 1",
        "perennial_datagrams_total{listener=\"counts\",result=\"handled\"} 2",
        "perennial_datagrams_in_flight{listener=\"counts\"} 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }

    lines.signal(Signal::SIGTERM);
    assert_eq!(talk.hear().await, "goodbye");
    assert!(lines.ended().await.success());
}

#[tokio::test]
async fn more_connections_than_a_listener_allows_are_turned_away() {
    let lines = lines().set("listeners.lines.max_per_address=2").start().await;
    let mut first = Talk::with(&address(&lines.setup, "lines")).await;
    let mut second = Talk::with(&address(&lines.setup, "lines")).await;
    assert_eq!((first.say("get a").await, second.say("get a").await), ("0".to_owned(), "0".to_owned()));
    let mut third = TcpStream::connect(address(&lines.setup, "lines")).await.unwrap();
    assert_eq!(soon("the end", third.read(&mut [0; 1])).await.unwrap_or(0), 0);
    assert_eq!(first.say("get a").await, "0", "others are not affected");
}

#[tokio::test]
async fn settings_of_listeners_are_checked_before_anything_is_opened() {
    for (setting, wanted) in [
        ("listeners.lines.listen=7000", "listeners.lines.listen"),
        ("listeners.lines.listen=tls://127.0.0.1:0", "server.tls.cert_file for tls:// addresses"),
        ("listeners.counts.listen=unix:/tmp/counts.sock", "listeners.counts.listen"),
        ("listeners.lines.max_conections=5", "did you mean listeners.lines.max_connections?"),
        ("listeners.line.listen=127.0.0.1:0", "there is no such setting"),
    ] {
        let output = lines().set(setting).run(&["check"]).await;
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(wanted), "{setting}: {text}");
    }
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let setting = format!("listeners.lines.listen={}", taken.local_addr().unwrap());
    let output = lines().set(&setting).run(&["serve"]).await;
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("listeners.lines.listen: another program listens there"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_over_listeners_without_a_refused_connection_or_a_lost_datagram() {
    let lines = lines().set("drain.succession=500ms").start().await;
    let (tcp, udp) = (address(&lines.setup, "lines"), address(&lines.setup, "counts"));
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let mut clients = JoinSet::new();
    clients.spawn({
        let stop = Arc::clone(&stop);
        async move {
            let mut talks = 0;
            while !stop.load(Ordering::SeqCst) {
                let mut stream = TcpStream::connect(&tcp).await.expect("no connection is refused");
                stream.write_all(b"get pears\n").await.unwrap();
                let mut answer = String::new();
                soon("an answer", BufReader::new(&mut stream).read_line(&mut answer)).await.unwrap();
                assert!(answer == "0\n" || answer == "goodbye\n", "{answer:?}");
                talks += 1;
            }
            assert!(talks > 10, "{talks}");
        }
    });
    let before = lines.setup.holder().unwrap();
    kill(Pid::from_raw(before), Signal::SIGUSR2).unwrap();
    eventually("another process has the lock", || async {
        lines.setup.holder().is_some_and(|now| now != before).then_some(())
    })
    .await;
    // The predecessor has ended, and the successor may not read yet: the kernel keeps the datagrams.
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for _ in 0..20 {
        socket.send_to(b"apples:1|c", &udp).await.unwrap();
        sent.fetch_add(1, Ordering::SeqCst);
    }
    lines.ready_again().await;
    assert_eq!(address(&lines.setup, "counts"), udp, "the same sockets");
    count(&lines, sent.load(Ordering::SeqCst)).await;
    stop.store(true, Ordering::SeqCst);
    soon("the clients", clients.join_all()).await;
    // The successor is no child of the test.
    let last = lines.setup.holder().unwrap();
    kill(Pid::from_raw(last), Signal::SIGTERM).unwrap();
    eventually("the successor ends", || async { lines.setup.holder().is_none_or(is_gone).then_some(()) })
        .await;
}

/// Forgets to hand in a handler, or hands in one for a listener that it does not name.
struct Forgetful<const LISTENER: bool>;

impl<const LISTENER: bool> Module for Forgetful<LISTENER> {
    const NAME: &'static str = "forgetful";
    const LISTENERS: &'static [Listener] =
        if LISTENER { &[Listener::tcp("chat", "127.0.0.1:0")] } else { &[] };

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        if !LISTENER {
            host.listen_udp("chat", Slow);
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_listener_and_its_handler_belong_together() {
    let error = Perennial::new().host::<Forgetful<true>>().test().embedded().start().await.unwrap_err();
    assert!(error.to_string().contains("the listener chat has no handler"), "{error}");
    let error = Perennial::new().host::<Forgetful<false>>().test().embedded().start().await.unwrap_err();
    assert!(error.to_string().contains("the handler chat has no listener"), "{error}");
}

/// Handles datagrams for longer than they may take, and panics over one; greets on TCP.
struct Slow;

impl UdpHandler for Slow {
    async fn receive(&self, datagram: Datagram) -> std::io::Result<()> {
        match &datagram.bytes[..] {
            b"panic" => panic!("over a datagram"),
            b"echo" => datagram.reply(b"echo").await,
            _ => std::future::pending().await,
        }
    }
}

impl TcpHandler for Slow {
    async fn serve(&self, mut stream: Stream, _: Drain) -> std::io::Result<()> {
        stream.write_all(b"hello\n").await
    }
}

impl Module for Slow {
    const NAME: &'static str = "slow";
    const LISTENERS: &'static [Listener] =
        &[Listener::udp("slow", "127.0.0.1:0"), Listener::tcp("greeter", "127.0.0.1:0")];

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        host.listen_udp("slow", Self);
        host.listen_tcp("greeter", Self);
        Ok(())
    }
}

#[tokio::test]
async fn datagrams_that_take_too_long_or_panic_keep_nobody_out() -> anyhow::Result<()> {
    let test = Perennial::new().host::<Slow>().test().embedded();
    let slow = test.set("listeners.slow.max_running=2").set("listeners.slow.timeout=100ms").start().await?;
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(slow.listener("slow")).await?;
    for datagram in ["panic", "wait", "wait", "wait", "echo"] {
        socket.send(datagram.as_bytes()).await?;
    }
    let mut answer = [0; 16];
    let length = soon("the echo", socket.recv(&mut answer)).await?;
    assert_eq!(&answer[..length], b"echo");
    let mut greeter = TcpStream::connect(slow.listener("greeter")).await?;
    let mut greeting = String::new();
    soon("a greeting", greeter.read_to_string(&mut greeting)).await?;
    assert_eq!(greeting, "hello\n");
    slow.stop().await
}

#[tokio::test]
async fn one_address_does_not_take_all_the_places_for_datagrams() -> anyhow::Result<()> {
    let test = Perennial::new().host::<Slow>().test().embedded().set("listeners.slow.max_running=3");
    let slow = test.set("listeners.slow.max_per_address=2").set("listeners.slow.timeout=60s").start().await?;
    let flood = UdpSocket::bind("127.0.0.2:0").await?;
    for _ in 0..100 {
        flood.send_to(b"wait", slow.listener("slow")).await?;
    }
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(slow.listener("slow")).await?;
    socket.send(b"echo").await?;
    let mut answer = [0; 16];
    let length = soon("the echo", socket.recv(&mut answer)).await?;
    assert_eq!(&answer[..length], b"echo");
    let view = slow.admin().get("/metrics").await?.text();
    assert!(view.contains("result=\"address limit\"") || view.is_empty(), "{}", json!(view));
    // The handlers wait for longer than the drain: they are cut off, and the program stops all the same.
    drop(slow);
    Ok(())
}
