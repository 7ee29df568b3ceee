//! The crate web-push as its documents show it. `push --url URL --ca FILE --count N --p256dh KEY --auth KEY` sends
//! N messages, 64 at once, and prints the cost. The authority comes through SSL_CERT_FILE.

use std::time::Instant;

use futures::{StreamExt, stream};
use web_push::{
    ContentEncoding, HyperWebPushClient, SubscriptionInfo, VapidSignatureBuilder, WebPushClient, WebPushMessageBuilder,
};

const AT_ONCE: usize = 64;
/// A VAPID key made for this bench.
const VAPID: &str = "IQ9Ur0ykXoHS9gzfYX0aBjy9lvdrjx_PFUXmie9YRcY";

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<f64> = stat.rsplit(')').next().expect("fields").split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // The state is no number and has been left out. Indexes 10 and 11 are user and system time, in
    // hundredths of a second.
    (fields[10] + fields[11]) / 100.0
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name).expect("an argument");
        arguments[at + 1].clone()
    };
    let count: usize = argument("--count").parse().expect("a number");
    let (url, p256dh, auth) = (argument("--url"), argument("--p256dh"), argument("--auth"));
    let client = HyperWebPushClient::new();
    let text = "x".repeat(200);
    let (began, used) = (Instant::now(), cpu_seconds());
    let sent = stream::iter(0..count)
        .map(|number| {
            let subscription = SubscriptionInfo::new(format!("{url}{number:0>180}"), p256dh.clone(), auth.clone());
            let (client, text) = (&client, &text);
            async move {
                let signature = VapidSignatureBuilder::from_base64(VAPID, &subscription)?.build()?;
                let mut message = WebPushMessageBuilder::new(&subscription);
                message.set_payload(ContentEncoding::Aes128Gcm, text.as_bytes());
                message.set_vapid_signature(signature);
                client.send(message.build()?).await
            }
        })
        .buffer_unordered(AT_ONCE)
        .filter(|sent| futures::future::ready(sent.is_ok()))
        .count()
        .await;
    let (seconds, cpu_seconds) = (began.elapsed().as_secs_f64(), cpu_seconds() - used);
    println!("{{\"sent\": {sent}, \"seconds\": {seconds}, \"cpu_seconds\": {cpu_seconds}}}");
}
