//! Cost of the host beside its peers in one interleaved run: each round measures all lines of a
//! table, one after the other.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]
#![allow(clippy::cast_precision_loss, reason = "counts are small")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::figures::{line, median};
use support::process::{binary, cpu_seconds, example, memory_kib};
use tempfile::TempDir;

const ROUNDS: usize = 5;
const SECONDS: u64 = 3;
const IDLE: usize = 10_000;

fn main() {
    // The figures are printed only by `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    requests();
    idle_connections();
    mixed();
    shared_port();
}

/// A server under test.
struct Peer {
    child: Child,
    address: String,
    _directory: Option<TempDir>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // nginx and php-fpm end their children only when they get SIGTERM.
        let pid = i32::try_from(self.child.id()).unwrap();
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) && self.child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer {
    fn start(name: &str, threads: usize) -> Self {
        let mut child = Command::new(example("peers"))
            .args([name, &threads.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { child, address: address.trim().to_owned(), _directory: None }
    }

    /// An nginx in front of php-fpm with opcache, both from Debian, connected by a Unix socket that is kept open.
    fn fpm() -> Option<[Self; 2]> {
        let fpm = std::fs::read_dir("/usr/sbin")
            .ok()?
            .filter_map(Result::ok)
            .find(|file| file.file_name().to_string_lossy().starts_with("php-fpm"))?
            .path();
        let directory = TempDir::new().unwrap();
        let at = directory.path().display().to_string();
        let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
        write("hello.php", "<?php echo 'hello';".to_owned());
        write(
            "fpm.conf",
            format!(
                "[global]\nerror_log = {at}/fpm.log\ndaemonize = no\n[www]\nuser = root\ngroup = root\nlisten = {at}/fpm.sock\n\
                 pm = static\npm.max_children = 16\nphp_admin_value[opcache.enable] = 1\n"
            ),
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        write(
            "nginx.conf",
            format!(
                "daemon off; pid {at}/pid; error_log {at}/error.log; worker_processes 1; user root;
                 events {{ worker_connections 4096; }}
                 http {{
                     access_log off; client_body_temp_path {at}; proxy_temp_path {at}; fastcgi_temp_path {at};
                     uwsgi_temp_path {at}; scgi_temp_path {at}; keepalive_requests 100000000;
                     upstream fpm {{ server unix:{at}/fpm.sock; keepalive 16; }}
                     server {{
                         listen 127.0.0.1:{port};
                         location / {{
                             fastcgi_pass fpm; fastcgi_keep_conn on;
                             fastcgi_param SCRIPT_FILENAME {at}/hello.php;
                             fastcgi_param REQUEST_METHOD $request_method;
                         }}
                     }}
                 }}"
            ),
        );
        let start = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok();
        let fpm = start(Command::new(fpm).args([
            "-R",
            "-F",
            "-n",
            "-d",
            "zend_extension=opcache",
            "-y",
            &format!("{at}/fpm.conf"),
        ]))?;
        std::thread::sleep(Duration::from_millis(500));
        let nginx = start(Command::new("nginx").args(["-c", &format!("{at}/nginx.conf"), "-p", &at]))?;
        std::thread::sleep(Duration::from_millis(500));
        let address = format!("127.0.0.1:{port}");
        Some([
            Self { child: fpm, address: String::new(), _directory: None },
            Self { child: nginx, address, _directory: Some(directory) },
        ])
    }

    /// Ids of this process and its children.
    fn pids(&self) -> Vec<u32> {
        let own = self.child.id();
        let children =
            std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        std::iter::once(own).chain(children.split_whitespace().map(|pid| pid.parse().unwrap())).collect()
    }

    fn cpu_seconds(&self) -> f64 {
        self.pids().into_iter().filter_map(cpu_seconds).sum()
    }

    fn memory_kib(&self) -> f64 {
        memory_kib(self.child.id(), "VmRSS").unwrap()
    }
}

/// Result of wrk.
struct Load {
    requests: f64,
    p99: Duration,
}

fn wrk(address: &str, path: &str, connections: usize, seconds: u64) -> Load {
    let out = Command::new("wrk")
        .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s"), "--latency", "--timeout", "20s"])
        .arg(format!("http://{address}{path}"))
        .output()
        .expect("wrk is installed: tests/bench/run does that");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let word =
        |before: &str| text.lines().find(|line| line.contains(before)).unwrap_or_default().trim().to_owned();
    let requests = word("requests in").split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0.0);
    let p99 = word("99%").replace("99%", "").trim().to_owned();
    let number: f64 = p99.trim_end_matches(char::is_alphabetic).parse().unwrap_or(0.0);
    let seconds = match p99.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.') {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        _ => number,
    };
    Load { requests, p99: Duration::from_secs_f64(seconds) }
}

/// HTTP/1.1 with 64 connections, served by one thread.
fn requests() {
    println!(
        "\nprocessor time a request, us: GET over HTTP/1.1, wrk -c64, one serving thread, {ROUNDS} interleaved rounds"
    );
    let mut peers: Vec<(&str, Vec<Peer>)> = ["hyper", "axum", "host", "host-log"]
        .into_iter()
        .map(|name| (name, vec![Peer::start(name, 1)]))
        .collect();
    match Peer::fpm() {
        Some(peer) => peers.push(("nginx + php-fpm", peer.into())),
        None => println!("php-fpm is not installed, and not measured"),
    }
    let mut figures: BTreeMap<usize, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (index, (_, processes)) in peers.iter().enumerate() {
            let address = &processes.last().unwrap().address;
            let used = || processes.iter().map(Peer::cpu_seconds).sum::<f64>();
            let before = used();
            let load = wrk(address, "/hello", 64, SECONDS);
            let used = used() - before;
            let (cost, rate) = figures.entry(index).or_default();
            cost.push(used / load.requests * 1e6);
            rate.push(load.requests / SECONDS as f64);
        }
    }
    let bare = median(&figures[&0].0);
    for (index, (name, _)) in peers.iter().enumerate() {
        let (cost, rate) = &figures[&index];
        let times = median(cost) / bare;
        line(
            &format!("{name:<16} {times:>6.2} x bare hyper, {:>8.0} requests/s", median(rate)),
            cost.clone(),
            "us",
        );
    }
}

/// Resident memory of connections that were used once and are kept alive.
fn idle_connections() {
    println!("\nresident memory of an idle keep-alive connection, KiB, {IDLE} of them");
    for name in ["hyper", "host"] {
        let mut figures = Vec::new();
        for _ in 0..3 {
            let peer = Peer::start(name, 1);
            wrk(&peer.address, "/hello", 64, 1);
            let before = peer.memory_kib();
            let mut open = Vec::with_capacity(IDLE);
            for _ in 0..IDLE {
                let mut stream = TcpStream::connect(&peer.address).unwrap();
                stream.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
                assert!(stream.read(&mut [0; 512]).unwrap() > 0);
                open.push(stream);
            }
            std::thread::sleep(Duration::from_secs(2));
            figures.push((peer.memory_kib() - before) / IDLE as f64);
        }
        line(name, figures, "KiB");
    }
}

/// The mix of the seed talk: requests that wait, requests that compute, and light ones between them.
fn mixed() {
    let peer = Peer::start("host", 2);
    println!("\n10,000 requests that sleep for a second, at once");
    let mut open: Vec<TcpStream> = (0..IDLE).map(|_| TcpStream::connect(&peer.address).unwrap()).collect();
    let mut last = Vec::new();
    for _ in 0..3 {
        let began = Instant::now();
        for stream in &mut open {
            stream.write_all(b"GET /sleep HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        }
        for stream in &mut open {
            assert!(stream.read(&mut [0; 512]).unwrap() > 0);
        }
        last.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    line("from the first request to the last answer", last, "ms");
    drop(open);

    println!("\np99 of a light route (16 connections) while others compute fib(30)");
    let (mut idle, mut pooled, mut inline) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (path, figures) in [("", &mut idle), ("/fib", &mut pooled), ("/fib-inline", &mut inline)] {
            let address = peer.address.clone();
            let computing =
                (!path.is_empty()).then(|| std::thread::spawn(move || wrk(&address, path, 4, SECONDS + 1)));
            std::thread::sleep(Duration::from_millis(300));
            figures.push(wrk(&peer.address, "/hello", 16, SECONDS).p99.as_secs_f64() * 1000.0);
            if let Some(computing) = computing {
                computing.join().unwrap();
            }
        }
    }
    line("alone", idle, "ms");
    line("beside 4 x fib(30) through scope.cpu", pooled, "ms");
    line("beside 4 x fib(30) in the handler itself", inline, "ms");
}

/// Two processes share a port by `SO_REUSEPORT`, and one stops while the kernel has already given it connections.
fn shared_port() {
    const STOPS: usize = 10;
    const CLIENTS: usize = 8;
    println!(
        "\nSO_REUSEPORT: requests that failed when one of two processes left, {CLIENTS} clients that connect anew"
    );
    let (mut lost, mut asked) = (Vec::new(), 0);
    for _ in 0..STOPS {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut both: Vec<Sharing> = (0..2).map(|_| Sharing::start(&address)).collect();
        let over = AtomicBool::new(false);
        let counts = std::thread::scope(|scope| {
            let asking = || {
                let (mut asked, mut failed) = (0, 0);
                while !over.load(Ordering::Relaxed) {
                    asked += 1;
                    failed += usize::from(ask(&address).is_err());
                }
                (asked, failed)
            };
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(asking)).collect();
            std::thread::sleep(Duration::from_millis(300));
            both.pop();
            std::thread::sleep(Duration::from_millis(300));
            over.store(true, Ordering::Relaxed);
            clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<(usize, usize)>>()
        });
        asked += counts.iter().map(|(asked, _)| asked).sum::<usize>();
        lost.push(counts.iter().map(|(_, failed)| failed).sum::<usize>() as f64);
    }
    line(&format!("each time, of {} requests", asked / STOPS), lost, "");
}

/// A server that shares its port and is stopped when this is dropped.
struct Sharing {
    child: Child,
    _directory: TempDir,
}

impl Sharing {
    fn start(address: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let child = Command::new(binary())
            .env("PERENNIAL_DATA_DIR", directory.path().join("data"))
            .args(["--set", "server.reuse_port=true", "--set", &format!("server.listen={address}")])
            .args(["--set", "admin.listen=127.0.0.1:0"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while !directory.path().join("data/addresses.json").exists() || ask(address).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, _directory: directory }
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn ask(address: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /push/key HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200") { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
}
