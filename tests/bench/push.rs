//! What web push costs: boot, idle memory, and a broadcast over HTTP/2 with TLS to nginx.
//!
//! `tests/bench/run` builds the release and prints the table. Rounds are interleaved, since machines are
//! noisy: compare lines of one run, not of two.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]

use std::time::{Duration, Instant};

use support::figures::line;

use perennial_webpush::{Keys, Payload, ReceiverKeys, encrypt};
use serde_json::{Value, json};
use support::double::Double;
use support::nginx::Nginx;
use support::process::Setup;

const SUBSCRIPTIONS: usize = 20_000;
const ROUNDS: usize = 5;

fn main() {
    // Only `cargo bench` asks for the figures.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        boot().await;
        broadcast().await;
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

async fn broadcast() {
    let double = Double::start().await;
    let nginx = Nginx::start_silent(double.ca_file().parent().unwrap(), 1_000_000).await;
    let receiver = ReceiverKeys::generate().unwrap().keys();
    let subscription = |number: usize| {
        json!({
            "endpoint": format!("https://127.0.0.1:{}/wpush/v2/{number:0>180}", nginx.port),
            "keys": { "p256dh": base64(receiver.p256dh()), "auth": base64(receiver.auth()) },
        })
    };
    let perennial = Setup::new().sending_to(&double).set("telemetry.log=warn").start().await;
    perennial.fill((0..SUBSCRIPTIONS).map(subscription));

    let text = "x".repeat(200);
    let (mut rate, mut cpu, mut crypto) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (began, used) = (Instant::now(), perennial.cpu_seconds());
        let progress = sent(&perennial, &text).await;
        let (took, used) = (began.elapsed().as_secs_f64(), perennial.cpu_seconds() - used);
        assert_eq!(progress["outcomes"], json!({ "delivered": SUBSCRIPTIONS }));
        let alone = encrypt_alone(&receiver, &text);
        // The first round opens the connections.
        if round > 0 {
            #[expect(clippy::cast_precision_loss, reason = "twenty thousand")]
            let count = SUBSCRIPTIONS as f64;
            rate.push(count / took);
            cpu.push(used / count * 1e6);
            crypto.push(alone);
        }
    }
    line("pushes, 20,000 subscriptions, HTTP/2 + TLS to nginx", rate, "/s");
    line("processor time a push, stored to recorded", cpu, "us");
    line("of it: one RFC 8291 message, alone", crypto, "us");
    line("peak memory of the process (VmHWM)", vec![perennial.memory_mib("VmHWM")], "MiB");
}

async fn sent(perennial: &support::process::Perennial, text: &str) -> Value {
    let id = perennial.notify(&json!({ "to": {"all": true}, "payload": text })).await;
    perennial.done_within(&id, Duration::from_secs(300)).await
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

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}
