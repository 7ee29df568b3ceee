//! Cost of web push beside other senders, in one table.
//!
//! `tests/bench/run push` builds the release and prints the table. Rounds are interleaved, since machines are noisy:
//! compare lines of one run, not of two. `PUSH_BENCH=boot,cost,peers,million,import,pace,ramp,spread` chooses parts;
//! `CHARTS=DIR` writes the charts of the last three; `PUSH_SET="push.window=250 .."` tries other settings.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use perennial_webpush::{Keys, Payload, ReceiverKeys, encrypt};
use plotters::prelude::*;
use serde_json::{Value, json};
use support::double::Double;
use support::figures::{line, median};
use support::nginx::Nginx;
use support::process::{Perennial, Setup};

const SUBSCRIPTIONS: usize = 20_000;
const ROUNDS: usize = 5;

fn main() {
    // The figures are printed only by `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let chosen = std::env::var("PUSH_BENCH").unwrap_or_default();
    let wants = |part: &str| chosen.is_empty() || chosen.split(',').any(|one| one == part);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        if wants("boot") {
            boot().await;
        }
        if wants("cost") {
            cost(wants("peers")).await;
        }
        if wants("million") {
            million().await;
        }
        if wants("import") {
            import().await;
        }
        if wants("pace") {
            pace().await;
        }
        if wants("ramp") {
            ramp().await;
        }
        if wants("spread") {
            spread().await;
        }
    });
}

async fn boot() {
    let (mut first, mut next, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut setup = Setup::new();
        for times in [&mut first, &mut next] {
            let began = Instant::now();
            let mut perennial = setup.start().await;
            times.push(began.elapsed().as_secs_f64() * 1000.0);
            tokio::time::sleep(Duration::from_millis(500)).await;
            memory.push(perennial.memory_mib("VmRSS"));
            perennial.stop().await;
            setup = perennial.setup;
        }
    }
    line("start to ready, first boot", first, "ms");
    line("start to ready, next boot", next, "ms");
    line("memory when idle (VmRSS)", memory, "MiB");
}

/// A push service that accepts everything, and the keys of its receiver.
struct Service {
    double: Double,
    nginx: Nginx,
    receiver: Keys,
}

impl Service {
    async fn start() -> Self {
        let double = Double::start().await;
        let nginx = Nginx::start_silent(double.ca_file().parent().unwrap(), 1_000_000_000).await;
        Self { double, nginx, receiver: ReceiverKeys::generate().unwrap().keys() }
    }

    /// Subscriptions with keys of their own, or all with the same keys where no receiver decrypts.
    fn subscriptions(&self, count: usize, distinct: bool) -> impl Iterator<Item = Value> + use<'_> {
        (0..count).map(move |number| {
            let own;
            let keys = if distinct {
                own = ReceiverKeys::generate().unwrap().keys();
                &own
            } else {
                &self.receiver
            };
            json!({
                "endpoint": format!("https://127.0.0.1:{}/wpush/v2/{number:0>180}", self.nginx.port),
                "keys": { "p256dh": base64(keys.p256dh()), "auth": base64(keys.auth()) },
            })
        })
    }

    fn setup(&self) -> Setup {
        let setup = Setup::new().sending_to(&self.double).set("telemetry.log=warn");
        let more = std::env::var("PUSH_SET").unwrap_or_default();
        more.split_whitespace().fold(setup, Setup::set)
    }
}

/// Rate and processor time of each run of a sender.
#[derive(Default)]
struct Costs {
    rate: Vec<f64>,
    cpu: Vec<f64>,
}

impl Costs {
    fn add(&mut self, count: usize, seconds: f64, cpu_seconds: f64) {
        self.rate.push(count as f64 / seconds);
        self.cpu.push(cpu_seconds / count as f64 * 1e6);
    }

    fn print(self, what: &str) -> f64 {
        let cpu = median(&self.cpu);
        line(&format!("{what}: processor time"), self.cpu, "us");
        line(&format!("{what}: rate"), self.rate, "/s");
        cpu
    }
}

async fn cost(with_peers: bool) {
    let service = Service::start().await;
    let fresh = service.setup().start().await;
    fresh.fill(service.subscriptions(SUBSCRIPTIONS, true));
    let rotating = service.setup().set("push.sender_key=rotating").start().await;
    rotating.fill(service.subscriptions(SUBSCRIPTIONS, true));
    let http1 = service.setup().set("push.sender_key=rotating").set("push.http=1").start().await;
    http1.fill(service.subscriptions(SUBSCRIPTIONS, true));

    let text = "x".repeat(200);
    let (mut of_fresh, mut of_warm, mut of_cold) = (Costs::default(), Costs::default(), Costs::default());
    let (mut of_http1, mut of_h2load, mut crypto) = (Costs::default(), Costs::default(), Vec::new());
    let mut peers: Vec<(Peer, Costs)> = if with_peers { Peer::all() } else { Vec::new() };
    for round in 0..=ROUNDS {
        let ours = [(&fresh, &mut of_fresh), (&rotating, &mut of_warm), (&http1, &mut of_http1)];
        for (perennial, costs) in ours {
            let (seconds, cpu) = broadcast(perennial, &text, SUBSCRIPTIONS).await;
            // The first round opens the connections and agrees on secrets.
            if round > 0 {
                costs.add(SUBSCRIPTIONS, seconds, cpu);
            } else if std::ptr::eq(perennial, &rotating) {
                of_cold.add(SUBSCRIPTIONS, seconds, cpu);
            }
        }
        let (seconds, cpu) = h2load(service.nginx.port);
        if round > 0 {
            of_h2load.add(H2LOAD, seconds, cpu);
            crypto.push(encrypt_alone(&service.receiver, &text));
        }
        for (peer, costs) in &mut peers {
            if let Some((count, seconds, cpu)) = peer.run(&service) {
                costs.add(count, seconds, cpu);
            }
        }
    }
    let alone = median(&crypto);
    line("one RFC 8291 message in aws-lc-rs alone", crypto, "us");
    let request = of_h2load.print("h2load, one request without encryption");
    let fresh_cpu = of_fresh.print("perennial, fresh keys, stored to recorded");
    of_cold.print("perennial, rotating, cold");
    let warm_cpu = of_warm.print("perennial, rotating, warm");
    of_http1.print("perennial, rotating, warm, HTTP/1.1");
    for (peer, costs) in peers.into_iter().filter(|(_, costs)| !costs.cpu.is_empty()) {
        costs.print(peer.name);
    }
    println!("fresh beside message + request: {:.2}", fresh_cpu / (alone + request));
    for (what, cpu) in [("fresh", fresh_cpu), ("rotating, warm", warm_cpu)] {
        println!("cores for 180,000/s, {what}: {:.1}", cpu * 180_000.0 / 1e6);
    }
    let memory = fresh.memory_mib("VmHWM").max(rotating.memory_mib("VmHWM"));
    line("peak memory of the process (VmHWM)", vec![memory], "MiB");
}

/// Sends to all. Returns the seconds and the processor seconds that this took.
async fn broadcast(perennial: &Perennial, text: &str, count: usize) -> (f64, f64) {
    let (began, used) = (Instant::now(), perennial.cpu_seconds());
    let id = perennial.notify(&json!({ "to": {"all": true}, "payload": text })).await;
    let progress = perennial.done_within(&id, Duration::from_secs(900)).await;
    let (took, used) = (began.elapsed().as_secs_f64(), perennial.cpu_seconds() - used);
    assert_eq!(progress["outcomes"], json!({ "delivered": count }));
    (took, used)
}

const H2LOAD: usize = 100_000;

/// Sends requests with the headers and the body of a push, by nghttp2's load generator.
fn h2load(port: u16) -> (f64, f64) {
    let body = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(body.path(), [7; 303]).unwrap();
    let authorization = format!("authorization: vapid t={}, k={}", "x".repeat(250), "x".repeat(87));
    let before = children();
    let began = Instant::now();
    let done = Command::new("h2load")
        .args(["-n", &H2LOAD.to_string(), "-c", "4", "-m", "100", "-t", "1", "-H", &authorization])
        .args(["-H", "ttl: 2419200", "-H", "urgency: normal", "-H", "content-encoding: aes128gcm"])
        .arg("-d")
        .arg(body.path())
        .arg(format!("https://127.0.0.1:{port}/wpush/v2/{:0>180}", 7))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let took = began.elapsed().as_secs_f64();
    assert!(
        done.is_ok_and(|status| status.success()),
        "h2load is installed: tests/bench/push/prepare does that"
    );
    (took, children() - before)
}

/// Processor seconds of all children that have ended.
fn children() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Another sender.
struct Peer {
    name: &'static str,
    program: Vec<PathBuf>,
    count: usize,
}

impl Peer {
    /// All senders that are installed.
    fn all() -> Vec<(Self, Costs)> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench");
        let peer = |name, program: &[&str], count| {
            let program = program.iter().map(|part| {
                let path = here.join(part);
                if path.exists() { path } else { PathBuf::from(part) }
            });
            Self { name, program: program.collect(), count }
        };
        vec![
            peer("curl_multi in PHP, HTTP/2", &["php", "push/curl_multi.php"], 2000),
            peer("npm web-push 3.6", &["node", "push/node/send.js"], 2000),
            peer("PyPI pywebpush 2.5", &["push/python/venv/bin/python", "push/python/send.py"], 2000),
            peer("crate web-push 0.11", &["peers/target/release/push"], 2000),
        ]
        .into_iter()
        .map(|peer| (peer, Costs::default()))
        .collect()
    }

    /// One run: number of messages, seconds, and processor seconds; `None` when the sender is not installed.
    fn run(&self, service: &Service) -> Option<(usize, f64, f64)> {
        let keys = &service.receiver;
        let output = Command::new(&self.program[0])
            .args(&self.program[1..])
            .arg("--url")
            .arg(format!("https://127.0.0.1:{}/wpush/v2/", service.nginx.port))
            .arg("--ca")
            .arg(service.double.ca_file())
            .args(["--count", &self.count.to_string()])
            .args(["--p256dh", &base64(keys.p256dh()), "--auth", &base64(keys.auth())])
            .env("SSL_CERT_FILE", service.double.ca_file())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let figures: Value = serde_json::from_slice(&output.stdout).ok()?;
        let sent = usize::try_from(figures["sent"].as_u64()?).ok().filter(|sent| *sent > 0)?;
        Some((sent, figures["seconds"].as_f64()?, figures["cpu_seconds"].as_f64()?))
    }
}

fn encrypt_alone(keys: &Keys, text: &str) -> f64 {
    const MESSAGES: u32 = 5_000;
    let payload = Payload::new(text.to_owned()).unwrap();
    let began = Instant::now();
    for _ in 0..MESSAGES {
        std::hint::black_box(encrypt(keys, &payload).unwrap());
    }
    began.elapsed().as_secs_f64() / f64::from(MESSAGES) * 1e6
}

/// A million subscriptions.
async fn million() {
    const COUNT: usize = 1_000_000;
    let service = Service::start().await;
    let mut perennial = service.setup().set("push.sender_key=fresh").start().await;
    perennial.fill(service.subscriptions(COUNT, true));
    for (keying, settings) in [
        ("fresh", ["push.sender_key=fresh", "push.sender_key_cache=64MiB"]),
        ("rotating, a cache for two thirds", ["push.sender_key=rotating", "push.sender_key_cache=64MiB"]),
        ("rotating, a cache for all", ["push.sender_key=rotating", "push.sender_key_cache=128MiB"]),
    ] {
        assert_eq!(perennial.stop().await, Some(0));
        perennial = settings.iter().fold(perennial.setup, |setup, one| setup.set(one)).start().await;
        let before = perennial.memory_mib("VmRSS");
        let first = broadcast(&perennial, "x", COUNT).await;
        let (once, peak) = (perennial.memory_mib("VmRSS"), perennial.memory_mib("VmHWM"));
        let second = broadcast(&perennial, "x", COUNT).await;
        for (which, (seconds, cpu)) in [("first", first), ("second", second)] {
            line(&format!("1,000,000, {keying}, the {which}: rate"), vec![COUNT as f64 / seconds], "/s");
            line(&format!("1,000,000, {keying}, the {which}"), vec![cpu / COUNT as f64 * 1e6], "us");
        }
        let memory = vec![before, once, perennial.memory_mib("VmRSS")];
        line(&format!("1,000,000, {keying}: memory before, after one and two"), memory, "MiB");
        let peaks = vec![peak, perennial.memory_mib("VmHWM")];
        line(&format!("1,000,000, {keying}: peak memory, after one and two"), peaks, "MiB");
    }
}

async fn import() {
    const COUNT: usize = 200_000;
    let service = Service::start().await;
    let mut rates = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let perennial = service.setup().start().await;
        let file = perennial.setup.file("import.ndjson");
        let lines: Vec<String> = service
            .subscriptions(COUNT, false)
            .map(|subscription| json!({ "subscription": subscription }).to_string())
            .collect();
        std::fs::write(&file, lines.join("\n")).unwrap();
        for rates in [&mut rates.0, &mut rates.1] {
            let began = Instant::now();
            let mut command = perennial.setup.command(&["subscriptions", "import", file.to_str().unwrap()]);
            assert!(command.status().await.unwrap().success());
            rates.push(COUNT as f64 / began.elapsed().as_secs_f64());
        }
    }
    line("import, new rows (synchronous=FULL)", rates.0, "/s");
    line("import, rows that are known", rates.1, "/s");
}

/// Arrival times of all messages, in seconds since the first.
async fn arrivals(rate: f64, ramp: Option<&str>, count: usize) -> Vec<f64> {
    let double = Double::start().await;
    let nginx = Nginx::start_timed(double.ca_file().parent().unwrap()).await;
    let service = Service { double, nginx, receiver: ReceiverKeys::generate().unwrap().keys() };
    let perennial = service.setup().set("push.sender_key=rotating").start().await;
    perennial.fill(service.subscriptions(count, false));
    let mut request = json!({ "to": {"all": true}, "payload": "x", "rate": rate });
    if let Some(ramp) = ramp {
        request["ramp_up"] = ramp.into();
    }
    let id = perennial.notify(&request).await;
    perennial.done_within(&id, Duration::from_secs(300)).await;
    let times = service.nginx.times().await;
    assert_eq!(times.len(), count);
    times.iter().map(|time| time - times[0]).collect()
}

/// 5,000 messages a second, counted in windows of 100 ms.
async fn pace() {
    const RATE: f64 = 5000.0;
    let (mut low, mut high, mut mean, mut all) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let times = arrivals(RATE, None, 50_000).await;
        let mut windows = vec![0.0; 98];
        // The first and the last window are not whole.
        for time in &times {
            let window = (time * 10.0) as usize;
            if (1..=98).contains(&window) {
                windows[window - 1] += 1.0;
            }
        }
        windows.sort_by(f64::total_cmp);
        low.push(windows[1]);
        high.push(windows[96]);
        mean.push(windows.iter().sum::<f64>() / 9.8);
        all = windows;
    }
    line("5,000/s: p1 of the windows of 100 ms", low, "");
    line("5,000/s: p99", high, "");
    line("5,000/s: mean", mean, "/s");
    chart("pacing.svg", |root| {
        let mut chart = ChartBuilder::on(&root)
            .caption("5,000 a second: messages in each 100 ms", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d((450_u32..550).step(5).into_segmented(), 0_u32..60)?;
        chart.configure_mesh().disable_x_mesh().x_desc("messages within 100 ms").y_desc("windows").draw()?;
        let data = all.iter().map(|count| ((*count as u32 / 5 * 5).clamp(450, 550), 1));
        chart.draw_series(Histogram::vertical(&chart).style(INK.filled()).margin(1).data(data))?;
        root.present()
    });
}

/// A ramp of 10 seconds to 2,000 messages a second.
async fn ramp() {
    let times = arrivals(2000.0, Some("10s"), 20_000).await;
    let mut seconds = vec![0.0; 30];
    for time in &times {
        seconds[(time * 2.0) as usize] += 2.0;
    }
    let wanted = |time: f64| if time < 10.0 { 200.0 * time } else { 2000.0 };
    let off = (0..26)
        .map(|half: u32| (seconds[half as usize] - wanted(f64::from(half) / 2.0 + 0.25)).abs() / 2000.0);
    line("ramp of 10 s to 2,000/s: furthest from the line", vec![off.fold(0.0, f64::max) * 100.0], "%");
    chart("ramp.svg", |root| {
        let mut chart = ChartBuilder::on(&root)
            .caption("A ramp of 10 s to 2,000 a second", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..14.0, 0.0..2400.0)?;
        chart.configure_mesh().x_desc("seconds").y_desc("messages a second").draw()?;
        let line = (0..=140).map(|tenth| f64::from(tenth) / 10.0).map(|time| (time, wanted(time)));
        chart.draw_series(LineSeries::new(line, WANTED.stroke_width(2)))?;
        let points = (0_u32..28).map(|half| (f64::from(half) / 2.0 + 0.25, seconds[half as usize]));
        chart.draw_series(points.map(|point| Circle::new(point, 3, INK.filled())))?;
        root.present()
    });
}

/// A name with four addresses.
async fn spread() {
    const COUNT: usize = 40_000;
    let double = Double::start().await;
    let certificates = double.ca_file().parent().unwrap().to_owned();
    let port = support::free_port();
    let mut services = Vec::new();
    for last in 1..=4 {
        services.push(Nginx::start_at(&certificates, &format!("127.0.0.{last}:{port}")).await);
    }
    let pin = r#"push.resolve=[{ host = "localhost", addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"] }]"#;
    let perennial = Setup::new().sending_to(&double).set(pin).set("telemetry.log=warn").start().await;
    let keys = ReceiverKeys::generate().unwrap().keys();
    perennial.fill((0..COUNT).map(|number| {
        json!({
            "endpoint": format!("https://localhost:{port}/{number}"),
            "keys": { "p256dh": base64(keys.p256dh()), "auth": base64(keys.auth()) },
        })
    }));
    broadcast(&perennial, "x", COUNT).await;
    let mut counts = Vec::new();
    for service in &services {
        counts.push(service.answered().await as f64 / COUNT as f64 * 100.0);
    }
    line("one name on four addresses: share of each", counts.clone(), "%");
    chart("spread.svg", |root| {
        let mut chart = ChartBuilder::on(&root)
            .caption("One name on four addresses: 40,000 messages", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d((1_u32..4).into_segmented(), 0.0..40.0)?;
        chart.configure_mesh().disable_x_mesh().x_desc("127.0.0.x").y_desc("% of the messages").draw()?;
        let data = (1_u32..).zip(counts.iter().copied());
        chart.draw_series(Histogram::vertical(&chart).style(INK.filled()).margin(16).data(data))?;
        root.present()
    });
}

const INK: RGBColor = RGBColor(43, 108, 176);
const WANTED: RGBColor = RGBColor(190, 190, 190);

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Writes a chart if `CHARTS` names a directory.
fn chart(name: &str, draw: impl FnOnce(DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Drawn) {
    let Some(directory) = std::env::var_os("CHARTS") else { return };
    std::fs::create_dir_all(&directory).unwrap();
    let file = Path::new(&directory).join(name);
    let root = SVGBackend::new(&file, (640, 320)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    draw(root).unwrap();
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}
