//! Protocols beside HTTP, among them the example: the echo daemon as a process.

use std::time::Duration;

use perennial_runtime::drain::{self, Drain, Phase};
use perennial_runtime::tasks::Tasks;
use perennial_server::net::{Config, Inherited};
use perennial_server::tcp::{Server, Stream, TcpHandler};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

use support::host::until_closed;
use support::soon;

#[tokio::test]
async fn myecho_echoes_and_leaves_in_order() {
    let mut child = Command::new(support::process::example("myecho"))
        .arg("127.0.0.1:0")
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut address = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    soon("the address", out.read_line(&mut address)).await.unwrap();
    let mut stream = TcpStream::connect(address.trim()).await.unwrap();
    for text in ["hello", &"x".repeat(100_000)] {
        let (mut reader, mut writer) = stream.split();
        let mut back = vec![0; text.len()];
        let (written, read) =
            futures_util::future::join(writer.write_all(text.as_bytes()), reader.read_exact(&mut back)).await;
        written.unwrap();
        read.unwrap();
        assert_eq!(back, text.as_bytes());
    }
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(soon("the end", child.wait()).await.unwrap().success());
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

/// A handler that sends a greeting first, and then reads for as long as the client sends.
struct Greeter;

impl TcpHandler for Greeter {
    async fn serve(&self, mut stream: Stream, _drain: Drain) -> std::io::Result<()> {
        stream.write_all(b"220 ready\r\n").await?;
        while stream.read(&mut [0; 64]).await? > 0 {}
        Ok(())
    }
}

async fn start(change: impl FnOnce(&mut Config)) -> (Server, String) {
    let mut config = Config::new("greeter", vec!["127.0.0.1:0".parse().unwrap()]);
    change(&mut config);
    let server = Server::bind(config, &Inherited::default()).await.unwrap();
    let address = server.addresses()[0].clone();
    (server, address)
}

#[tokio::test]
async fn a_server_may_speak_first_and_silence_has_an_end() {
    let (server, address) = start(|config| {
        config.timeouts.handshake = Duration::from_millis(100);
        config.timeouts.idle = Duration::from_millis(400);
        config.max_connections = 2;
    })
    .await;
    let connections = server.connections();
    let (trigger, drain) = drain::channel();
    let tasks = Tasks::new(drain.clone());
    tasks.critical("greeter", server.run(Greeter, drain));
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let (greeting, took) = until_closed(&mut stream, b"").await;
    assert_eq!(greeting, "220 ready\r\n");
    assert!(took >= Duration::from_millis(380), "the deadline for HTTP's first byte is not for it: {took:?}");
    let mut talking = TcpStream::connect(&address).await.unwrap();
    for _ in 0..20 {
        talking.write_all(b"x").await.unwrap();
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert_eq!(connections.count(), 1, "whoever speaks stays");
    trigger.advance(Phase::Soft);
    soon("silent ones are not waited for", tasks.ended()).await;
    assert_eq!(connections.count(), 0);
}

/// A handler that panics.
struct Panics;

impl TcpHandler for Panics {
    async fn serve(&self, _stream: Stream, _drain: Drain) -> std::io::Result<()> {
        panic!("a bug");
    }
}

#[tokio::test]
async fn a_panic_ends_its_own_connection_and_is_counted_off() {
    let (server, address) = start(|config| config.max_connections = 1).await;
    let connections = server.connections();
    let (trigger, drain) = drain::channel();
    let tasks = Tasks::new(drain.clone());
    tasks.critical("panics", server.run(Panics, drain));
    for _ in 0..5 {
        let (answer, _) = until_closed(&mut TcpStream::connect(&address).await.unwrap(), b"x").await;
        assert_eq!(answer, "");
    }
    trigger.advance(Phase::Soft);
    soon("the end", tasks.ended()).await;
    assert_eq!(connections.count(), 0);
}

/// A handler that reads ten bytes, in whatever parts they come.
struct Exactly;

impl TcpHandler for Exactly {
    async fn serve(&self, mut stream: Stream, _drain: Drain) -> std::io::Result<()> {
        let mut ten = [0; 10];
        stream.read_exact(&mut ten).await?;
        stream.write_all(&ten).await
    }
}

#[tokio::test]
async fn bytes_that_come_in_parts_are_read_as_one() {
    let (server, address) = start(|_| {}).await;
    let (trigger, drain) = drain::channel();
    let tasks = Tasks::new(drain.clone());
    tasks.critical("exactly", server.run(Exactly, drain));
    let mut stream = TcpStream::connect(&address).await.unwrap();
    for part in [b"01234", b"56789"] {
        stream.write_all(part).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (answer, _) = until_closed(&mut stream, b"").await;
    assert_eq!(answer, "0123456789");
    trigger.advance(Phase::Soft);
    soon("the end", tasks.ended()).await;
}
