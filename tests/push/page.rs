//! The page in a real browser: it subscribes, sends, and shows the messages that its service worker decrypted.

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

/// Notifications that the browser shows, as the registration of its service worker lists them.
async fn shown(firefox: &Firefox) -> Vec<Value> {
    let list = "navigator.serviceWorker.ready.then((registration) => registration.getNotifications())
        .then((shown) => JSON.stringify(shown.map(({ title, body, tag }) => ({ title, body, tag }))))";
    serde_json::from_str(&firefox.evaluate(list).await).unwrap()
}

/// The browser's subscription, as the page would send it.
async fn firefox_subscription(firefox: &Firefox) -> Value {
    let text =
        "navigator.serviceWorker.ready.then((registration) => registration.pushManager.getSubscription())
        .then((subscription) => JSON.stringify(subscription))";
    serde_json::from_str(&firefox.evaluate(text).await).unwrap()
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

    // The form sends a notification.
    firefox.evaluate("document.getElementById('title').value = 'Grüße'").await;
    firefox.evaluate("document.getElementById('body').value = 'from the form'").await;
    firefox.click("#send").await;
    let sent = firefox.text_of("#sent", |text| text.starts_with("Done")).await;
    assert_eq!(sent, "Done: 1 delivered.");
    firefox.text_of("#received", |text| text.contains("Grüße: from the form")).await;
    firefox
        .screenshot(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/screenshots/page.png")))
        .await;

    // A backend sends a notification.
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

    // The browser does not know declarative messages: the service worker shows the notification, and not its JSON text.
    let declarative = json!({
        "to": {"all": true}, "declarative": true,
        "notification": { "title": "Declared", "body": "once", "url": "https://example.com/d", "data": { "order": 7 } }
    });
    perennial.notify_and_wait(&declarative).await;
    firefox.text_of("#received", |text| text.contains("Declared: once") && !text.contains("8030")).await;
    let data = "navigator.serviceWorker.ready.then((registration) => registration.getNotifications())
        .then((shown) => JSON.stringify(shown.find(({ title }) => title === 'Declared').data))";
    let data: Value = serde_json::from_str(&firefox.evaluate(data).await).unwrap();
    assert_eq!((&data["url"], &data["order"]), (&json!("https://example.com/d"), &json!(7)), "{data}");

    // A user signs out: the browser stays subscribed, and belongs to no user.
    let id = stored(&perennial).await[0]["id"].clone();
    let mut owned =
        json!({ "subscription": firefox_subscription(&firefox).await, "user": "ann", "tags": ["vip"] });
    owned["metadata"] = json!({ "name": "Ann" });
    assert_eq!(perennial.client().post("/subscriptions", &owned).await.status, 200);
    assert_eq!(stored(&perennial).await[0]["user"], "ann");
    firefox.click("#logout").await;
    firefox.text_of("#state", |text| text.contains("belongs to no user")).await;
    let after = stored(&perennial).await[0].clone();
    assert_eq!((&after["id"], &after["user"], &after["tags"]), (&id, &Value::Null, &json!([])), "{after}");

    // The payload is a text that is no notification of ours, and then it is empty.
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "plain words" })).await;
    firefox.text_of("#received", |text| text.contains("Notification: plain words")).await;
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "payload": "" })).await;
    firefox.text_of("#received", |text| text.matches("Notification").count() == 2).await;
    assert!(double.refused().is_empty(), "{:?}", double.refused());

    // The push service forgets the browser, which subscribes anew and keeps its id.
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
    let scripts = ["/page.js", "/perennial.js", "/push.js", "/sw.js"];
    for path in scripts.into_iter().chain(["/page.css", "/icon.svg", "/page.webmanifest"]) {
        let file = perennial.client().without_key().get(path).await;
        assert_eq!(file.status, 200, "{path}");
        assert!(!file.text().replace("http://www.w3.org/2000/svg", "").contains("://"), "{path}");
    }
}

/// Problems that axe-core finds in the open page, each with its elements.
async fn violations(firefox: &Firefox) -> Vec<String> {
    let axe = support::tools::directory().join("node/node_modules/axe-core/axe.min.js");
    let script = std::fs::read_to_string(&axe).unwrap_or_else(|error| panic!("{}: {error}", axe.display()));
    firefox.run(&script).await;
    let found = "axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice'] }).then((found) =>
        JSON.stringify(found.violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(' ')}`)))";
    serde_json::from_str(&firefox.evaluate(found).await).unwrap()
}

#[tokio::test]
async fn everybody_can_use_the_page() {
    if !firefox::is_installed().await || support::tools::tool("tsc").is_none() {
        return;
    }
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let firefox = Firefox::start(double.browsers()).await;
    firefox.narrow().await;
    firefox.open(&format!("{}/", perennial.client().base())).await;
    firefox.text_of("#state", |text| text == "This browser is not subscribed.").await;
    assert_eq!(violations(&firefox).await, Vec::<String>::new());

    // The focus of the keyboard stays at the same place.
    firefox.evaluate("document.getElementById('subscribe').focus(), ''").await;
    subscribe_by_key(&firefox).await;
    assert_eq!(firefox.evaluate("document.activeElement.id").await, "unsubscribe");

    // Without a key the page says what to do, and focuses the field for the key.
    firefox.click("#send").await;
    let said = firefox.text_of("#sent", |text| text.len() > 3).await;
    assert!(said.starts_with("Sending takes an API key"), "{said}");
    assert_eq!(firefox.evaluate("document.activeElement.id").await, "key");
    assert_eq!(violations(&firefox).await, Vec::<String>::new());

    // A long word does not make the page wider than the window.
    let long = "x".repeat(1500);
    let notification = json!({ "title": long, "body": format!("https://example.com/{long}") });
    perennial.notify_and_wait(&json!({ "to": {"all": true}, "notification": notification })).await;
    firefox.text_of("#received", |text| text.contains("xxx")).await;
    let width = firefox.evaluate("String(document.documentElement.scrollWidth)").await;
    assert!(width.parse::<u32>().unwrap() <= 390, "{width}");

    // A proxy in front of the server answers with a page of its own.
    firefox
        .evaluate(
            "window.fetch = () => Promise.resolve(new Response('<h1>Bad Gateway</h1>', { status: 502 })), ''",
        )
        .await;
    firefox.evaluate("document.getElementById('key').value = 'pk_x', ''").await;
    firefox.click("#send").await;
    firefox.text_of("#sent", |text| text == "The server cannot be reached (502). Please try again.").await;
}

/// Presses the button that has the focus, until the browser's push service has woken up.
async fn subscribe_by_key(firefox: &Firefox) {
    for _ in 0..4 {
        firefox.press_enter().await;
        let state = firefox.text_of("#state", |text| text != "…" && !text.contains("not subscribed")).await;
        if state == "This browser is subscribed." {
            return;
        }
        firefox.evaluate("document.getElementById('subscribe').focus(), document.getElementById('state').textContent = 'This browser is not subscribed.'").await;
    }
    panic!("it does not subscribe");
}

#[tokio::test]
async fn a_browser_that_may_not_show_anything_is_told_the_way_back() {
    if !firefox::is_installed().await {
        return;
    }
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let firefox = Firefox::start(double.browsers()).await;
    firefox.open(&format!("{}/", perennial.client().base())).await;
    firefox.text_of("#state", |text| text == "This browser is not subscribed.").await;
    firefox.evaluate("Notification.requestPermission = () => Promise.resolve('denied'), ''").await;
    firefox.click("#subscribe").await;
    let said = firefox.text_of("#state", |text| text.contains("does not let this page")).await;
    assert!(said.contains("press Subscribe again"), "{said}");
    // A user who takes longer to decide than the push service may take is not given up.
    firefox.evaluate("Notification.requestPermission = () => new Promise((done) => setTimeout(() => done('granted'), 100)), ''").await;
    firefox
        .evaluate("document.getElementById('state').textContent = 'This browser is not subscribed.'")
        .await;
    subscribe(&firefox).await;
    assert_eq!(stored(&perennial).await.len(), 1);
}

#[tokio::test]
async fn the_interface_is_rendered_under_our_policy() {
    if !firefox::is_installed().await {
        return;
    }
    let double = Double::start().await;
    let perennial = Setup::new().start().await;
    let page = perennial.client().without_key().get("/reference").await;
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'self'"));
    for file in ["reference.js", "swagger-ui.css", "swagger-ui-bundle.js"] {
        assert_eq!(perennial.client().get(&format!("/reference/{file}")).await.status, 200, "{file}");
    }
    assert_eq!(perennial.client().get("/reference/index.html").await.status, 404);
    let firefox = Firefox::start(double.browsers()).await;
    firefox.open(&format!("{}/reference", perennial.client().base())).await;
    firefox
        .text_of("#reference", |text| text.contains("/notify") && text.contains("/subscriptions/{id}"))
        .await;
    firefox
        .screenshot(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/screenshots/reference.png")))
        .await;
}
