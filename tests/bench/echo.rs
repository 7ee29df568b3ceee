//! The echo daemon in four designs: a process for each connection, xinetd, one loop around poll, and ours.
//!
//! Two measurements. A conversation is a connect, a first exchange and a second one. "At once" means many open
//! connections, each of which sends one message and waits for its echo.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::figures::{line, median};
use tempfile::TempDir;

const ROUNDS: usize = 5;
const CONVERSATIONS: usize = 200;
const MESSAGE: &[u8] = b"hello, world\n";

fn main() {
    // The figures are printed only by `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let directory = TempDir::new().unwrap();
    let servers = servers(directory.path());
    let mut figures = BTreeMap::<(usize, usize), Vec<f64>>::new();
    for _ in 0..ROUNDS {
        for (index, server) in servers.iter().enumerate() {
            let measured = conversations(&server.address).into_iter();
            let measured = measured.chain([100, 1000].map(|count| at_once(&server.address, count)));
            for (number, value) in measured.enumerate() {
                figures.entry((number, index)).or_default().push(value);
            }
        }
    }
    let what = [
        ("connect, us", 1e6),
        ("first exchange, us", 1e6),
        ("second exchange, us", 1e6),
        ("100 connections, one message each, ms", 1e3),
        ("1,000 connections, one message each, ms", 1e3),
    ];
    for (number, (what, unit)) in what.into_iter().enumerate() {
        println!("\n{what}: {ROUNDS} interleaved rounds");
        for (index, server) in servers.iter().enumerate() {
            let values = figures[&(number, index)].iter().map(|seconds| seconds * unit).collect();
            line(server.name, values, "");
        }
    }
}

struct Server {
    name: &'static str,
    address: String,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts all servers that are available.
fn servers(directory: &Path) -> Vec<Server> {
    let compiled = |name: &str| -> PathBuf {
        let program = directory.join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/echo").join(format!("{name}.c"));
        let built = Command::new("cc").args(["-O2", "-o"]).arg(&program).arg(source).status().unwrap();
        assert!(built.success(), "{name}.c");
        program
    };
    let printing = |name: &'static str, mut command: Command| {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Server { name, address: address.trim().to_owned(), child }
    };
    let mut myecho = Command::new(support::process::example("myecho"));
    myecho.arg("127.0.0.1:0");
    let mut servers = vec![
        printing("a process for each connection (C)", Command::new(compiled("fork"))),
        printing("one loop around poll (C)", Command::new(compiled("poll"))),
        printing("myecho, on the host", myecho),
    ];
    match xinetd(directory, &compiled("inetd")) {
        Some(server) => servers.insert(1, server),
        None => println!("xinetd is not installed, and not measured"),
    }
    servers
}

fn xinetd(directory: &Path, program: &Path) -> Option<Server> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = directory.join("xinetd.conf");
    let config = format!(
        "service myecho\n{{\n type = UNLISTED\n socket_type = stream\n protocol = tcp\n wait = no\n user = root\n \
         bind = 127.0.0.1\n port = {port}\n server = {}\n instances = UNLIMITED\n per_source = UNLIMITED\n \
         cps = 1000000 1\n}}\n",
        program.display()
    );
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new("xinetd");
    command.args(["-dontfork", "-f"]).arg(&file).arg("-pidfile").arg(directory.join("xinetd.pid"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
    let address = format!("127.0.0.1:{port}");
    let began = Instant::now();
    while TcpStream::connect(&address).is_err() {
        if began.elapsed() > Duration::from_secs(5) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(Server { name: "xinetd", address, child })
}

fn exchange(stream: &mut TcpStream) -> f64 {
    let began = Instant::now();
    stream.write_all(MESSAGE).unwrap();
    stream.read_exact(&mut [0; MESSAGE.len()]).unwrap();
    began.elapsed().as_secs_f64()
}

/// Median times of the connect, the first exchange and the second one, over conversations one after the other.
fn conversations(address: &str) -> [f64; 3] {
    let (mut connects, mut firsts, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..CONVERSATIONS {
        let began = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        connects.push(began.elapsed().as_secs_f64());
        firsts.push(exchange(&mut stream));
        seconds.push(exchange(&mut stream));
    }
    [median(&connects), median(&firsts), median(&seconds)]
}

/// Seconds until `count` open connections all have their echo.
fn at_once(address: &str, count: usize) -> f64 {
    let began = Instant::now();
    let mut open: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in &mut open {
        stream.write_all(MESSAGE).unwrap();
    }
    for stream in &mut open {
        stream.read_exact(&mut [0; MESSAGE.len()]).unwrap();
    }
    began.elapsed().as_secs_f64()
}
