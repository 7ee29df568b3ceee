//! The page, in a real browser: it subscribes, sends, and shows what its service worker decrypted.

use std::path::Path;

use serde_json::{Value, json};

use support::double::Double;
use support::eventually;
use support::firefox::{self, Firefox};
use support::process::{Perennial, Setup};

/// Presses "Subscribe" until the browser's push service has woken up.
async fn subscribe(firefox: &Firefox) {
    for _ in 0..4 {
        firefox.text_of("#state", |text| text == "This browser is not subscribed.").await;
        firefox.click("#subscribe").await;
        let state = firefox.text_of("#state", |text| text != "…" && !text.contains("not subscribed")).await;
        if state == "This browser is subscribed." {
            return;
        }
        firefox
            .evaluate("document.getElementById('state').textContent = 'This browser is not subscribed.'")
            .await;
    }
    panic!("it does not subscribe");
}

/// What the browser shows, as its service worker's registration lists it.
async fn shown(firefox: &Firefox) -> Vec<Value> {
    let list = "navigator.serviceWorker.ready.then((registration) => registration.getNotifications())
        .then((shown) => JSON.stringify(shown.map(({ title, body, tag }) => ({ title, body, tag }))))";
    serde_json::from_str(&firefox.evaluate(list).await).unwrap()
}

async fn stored(perennial: &Perennial) -> Vec<Value> {
    perennial.client().get("/subscriptions").await.json()["subscriptions"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_browser_subscribes_sends_and_shows_what_it_decrypted() {
    if !firefox::is_installed().await {
        eprintln!("not run: firefox-esr is not installed");
        return;
    }
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let firefox = Firefox::start(double.browsers()).await;
    firefox.narrow().await;
    let key = std::fs::read_to_string(perennial.setup.data_dir().join("api.key")).unwrap();
    firefox.open(&format!("{}/#key={}", perennial.client().base(), key.trim())).await;
    assert_eq!(firefox.evaluate("location.hash").await, "", "the key does not stay in the address bar");

    subscribe(&firefox).await;
    let subscriptions = stored(&perennial).await;
    assert_eq!(subscriptions.len(), 1);

    // The form.
    firefox.evaluate("document.getElementById('title').value = 'Grüße'").await;
    firefox.evaluate("document.getElementById('body').value = 'from the form'").await;
    firefox.click("#send").await;
    let sent = firefox.text_of("#sent", |text| text.starts_with("Done")).await;
    assert_eq!(sent, "Done: 1 delivered.");
    firefox.text_of("#received", |text| text.contains("Grüße: from the form")).await;
    firefox
        .screenshot(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/screenshots/page.png")))
        .await;

    // A backend.
    let notification = json!({ "title": "Order 42", "body": "is on its way", "url": "/orders/42" });
    let progress =
        perennial.notify_and_wait(&json!({ "to": {"all": true}, "notification": notification })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    firefox.text_of("#received", |text| text.contains("Order 42: is on its way")).await;
    let titles = shown(&firefox).await;
    let order = titles.iter().find(|shown| shown["title"] == "Order 42");
    let order = order.unwrap_or_else(|| panic!("{titles:?}"));
    assert_eq!(
        (order["body"].as_str(), order["tag"].clone()),
        (Some("is on its way"), progress["id"].clone())
    );

    // A text that is no notification of ours, and nothing at all.
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "plain words" })).await;
    firefox.text_of("#received", |text| text.contains("Notification: plain words")).await;
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "" })).await;
    firefox.text_of("#received", |text| text.matches("Notification").count() == 2).await;
    assert!(double.refused().is_empty(), "{:?}", double.refused());

    // The push service loses its memory: the browser subscribes anew, and stays who it was.
    let before = subscriptions[0].clone();
    double.disconnect_browsers();
    let after = eventually("the service worker has told of its new subscription", || async {
        let now = stored(&perennial).await;
        (now.len() == 1 && now[0]["endpoint"] != before["endpoint"]).then(|| now[0].clone())
    })
    .await;
    assert_eq!(after["id"], before["id"]);
    let progress = perennial
        .notify_and_wait(&json!({ "to": {"all": true}, "notification": {"title": "Again", "body": "here"} }))
        .await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    firefox.text_of("#received", |text| text.contains("Again: here")).await;

    firefox.click("#unsubscribe").await;
    firefox.text_of("#state", |text| text == "This browser is not subscribed.").await;
    assert_eq!(stored(&perennial).await.len(), 0);
}

#[tokio::test]
async fn the_page_may_be_turned_off() {
    let perennial = Setup::new().set("push.page=false").start().await;
    assert_eq!(perennial.client().get("/").await.status, 404);
    assert_eq!(perennial.client().get("/sw.js").await.status, 404);
    assert_eq!(perennial.client().get("/push/key").await.status, 200);
}

#[tokio::test]
async fn the_page_loads_nothing_from_elsewhere() {
    let perennial = Setup::new().start().await;
    let page = perennial.client().without_key().get("/").await;
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'self'") && policy.contains("frame-ancestors 'none'"),
        "{policy}"
    );
    for path in ["/page.css", "/page.js", "/push.js", "/sw.js", "/icon.svg", "/page.webmanifest"] {
        let file = perennial.client().without_key().get(path).await;
        assert_eq!(file.status, 200, "{path}");
        assert!(!file.text().replace("http://www.w3.org/2000/svg", "").contains("://"), "{path}");
    }
}
