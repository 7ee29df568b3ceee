//! Several sites in one process: the data of one site does not exist for another.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Method;
use serde_json::{Value, json};

use support::double::{Double, status_answer};
use support::eventually;
use support::http::{Answer, Client};
use support::keys::add_key;
use support::postgres::Database;
use support::process::{Perennial, Setup};
use support::stores::on_postgres;

const SHOP: &str = "https://shop.example";
const NEWS: &str = "https://news.example";

fn two_sites(double: &Double) -> Setup {
    Setup::new()
        .sending_to(double)
        .set(&format!("sites.shop.origins={SHOP}"))
        .set("sites.shop.contact=mailto:push@shop.example.com")
        .set("sites.shop.public_tags=sale")
        .set(&format!("sites.news.origins={NEWS}"))
        .set("sites.news.hosts=push.news.example")
        .set("sites.news.public_tags=sport")
}

async fn subscribed(client: &Client, request: Value) -> i64 {
    let answer = client.post("/subscriptions", &request).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["id"].as_i64().unwrap()
}

async fn key_of(client: &Client) -> String {
    client.get("/push/key").await.json()["key"].as_str().unwrap().to_owned()
}

async fn until_done(client: &Client, accepted: &Answer) -> Value {
    assert_eq!(accepted.status, 202, "{}", accepted.text());
    let path = format!("/notifications/{}", accepted.json()["id"].as_str().unwrap());
    eventually("it is done", || async {
        let progress = client.get(&path).await.json();
        (progress["state"] == "done").then_some(progress)
    })
    .await
}

#[tokio::test]
async fn a_page_belongs_to_the_site_of_its_origin_or_host() {
    let double = Double::start().await;
    let perennial = two_sites(&double).start().await;
    let anybody = perennial.client().without_key();
    let of_shop = key_of(&anybody.with_header("origin", SHOP)).await;
    let of_news = key_of(&anybody.with_header("origin", NEWS)).await;
    let of_default = key_of(&anybody).await;
    assert!(of_shop != of_news && of_news != of_default && of_shop != of_default);
    assert_eq!(key_of(&anybody.with_header("host", "push.news.example")).await, of_news);
    assert_eq!(key_of(&anybody.with_header("host", "PUSH.news.example:8443")).await, of_news);
    let own_page =
        anybody.with_header("host", "push.news.example").with_header("origin", "https://push.news.example");
    assert_eq!(key_of(&own_page).await, of_news);
    let strange = anybody.with_header("origin", "https://strange.example").get("/push/key").await;
    assert_eq!(strange.status, 403, "{}", strange.text());

    // Pages of each site may read their answers, and set the public tags of their own site.
    let shop = anybody.with_header("origin", SHOP);
    let answer = shop.get("/push/key").await;
    assert_eq!(answer.header("access-control-allow-origin"), Some(SHOP));
    let with_tag = |tag: &str| json!({ "subscription": double.mint_for(&of_shop), "tags": [tag] });
    assert_eq!(shop.post("/subscriptions", &with_tag("sale")).await.status, 201);
    let refused = shop.post("/subscriptions", &with_tag("sport")).await;
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("sites.shop.public_tags"), "{}", refused.text());
    // The VAPID key of another site is refused.
    let other = json!({ "subscription": double.mint(), "key": of_news });
    assert_eq!(shop.post("/subscriptions", &other).await.status, 422);

    // An API key of one site does not open the pages of another.
    let news_key = add_key(&perennial.setup, "reader", &["--site", "news"]).await;
    let mixed = shop.with_key(&news_key).get("/subscriptions").await;
    assert_eq!(mixed.status, 403, "{}", mixed.text());
}

#[tokio::test]
async fn messages_are_signed_for_their_site() {
    let double = Double::start().await;
    let perennial = two_sites(&double).start().await;
    for site in ["shop", "news"] {
        let origin = if site == "shop" { SHOP } else { NEWS };
        let page = perennial.client().without_key().with_header("origin", origin);
        let key = key_of(&page).await;
        // The push service accepts only messages that are signed with this key.
        subscribed(&page, json!({ "subscription": double.mint_for(&key) })).await;
        let backend =
            perennial.client().with_key(&add_key(&perennial.setup, "backend", &["--site", site]).await);
        let sent = backend.post("/notify", &json!({ "to": { "all": true }, "payload": site })).await;
        assert_eq!(until_done(&backend, &sent).await["outcomes"], json!({ "delivered": 1 }));
        let inline = json!({ "to": { "push": [double.mint_for(&key)] }, "payload": site });
        let sent = backend.post("/notify", &inline).await;
        assert_eq!(until_done(&backend, &sent).await["outcomes"], json!({ "delivered": 1 }));
    }
    assert!(double.refused().is_empty());
    for taken in double.taken() {
        let token =
            taken.push.authorization.split_once("t=").unwrap().1.split(',').next().unwrap().to_owned();
        let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
        let claims: Value = serde_json::from_slice(&claims).unwrap();
        let contact = claims.get("sub").and_then(Value::as_str);
        assert_eq!(contact, (taken.text == "shop").then_some("mailto:push@shop.example.com"));
    }
}

/// A push service that refuses the key of one site is still sent to for the other sites.
#[tokio::test]
async fn a_key_that_is_refused_stops_its_own_site_only() {
    let double = Double::start().await;
    let perennial = two_sites(&double).start().await;
    let page = |origin: &str| perennial.client().without_key().with_header("origin", origin);
    let bad = URL_SAFE_NO_PAD.decode(key_of(&page(SHOP)).await).unwrap();
    double.script(move |push| status_answer(if push.vapid_key == bad { 403 } else { 201 }, &[]));
    let backend = async |site| {
        perennial.client().with_key(&add_key(&perennial.setup, "backend", &["--site", site]).await)
    };
    let (shop, news) = (backend("shop").await, backend("news").await);
    for _ in 0..40 {
        subscribed(&shop, json!({ "subscription": double.mint() })).await;
    }
    subscribed(&news, json!({ "subscription": double.mint() })).await;
    let request = json!({ "to": { "all": true }, "payload": "x" });
    assert_eq!(shop.post("/notify", &request).await.status, 202);
    eventually("the service is not sent to any more", || async {
        let origins = perennial.admin().get("/origins").await.json();
        (origins[0]["held"] == "unauthorized").then_some(())
    })
    .await;
    // This is long before the service would be tried again for the other site.
    let began = Instant::now();
    let sent = news.post("/notify", &request).await;
    assert_eq!(until_done(&news, &sent).await["outcomes"], json!({ "delivered": 1 }));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// One site calls every route of the interface with ids of another site.
#[tokio::test]
async fn no_route_shows_or_changes_what_another_site_has() {
    let double = Double::start().await;
    for setup in [two_sites(&double), on_postgres(two_sites(&double), Database::new().await.url()).await] {
        isolated(&double, setup.start().await).await;
    }
}

async fn isolated(double: &Double, perennial: Perennial) {
    let shop = perennial.client().with_key(&add_key(&perennial.setup, "backend", &["--site", "shop"]).await);
    let news = perennial.client().with_key(&add_key(&perennial.setup, "backend", &["--site", "news"]).await);
    let shared = double.mint();
    let request = json!({ "subscription": shared, "user": "ann", "tags": ["vip"] });
    let theirs = subscribed(&shop, request.clone()).await;
    let to_all = json!({ "to": { "all": true }, "payload": "x", "log": "all" });
    let sent = until_done(&shop, &shop.post("/notify", &to_all).await).await;
    let notification = sent["id"].as_str().unwrap();
    let later = json!({ "to": { "all": true }, "payload": "x", "at": "2027-06-01T00:00:00Z" });
    let scheduled = shop.post("/notify", &later).await.json()["id"].as_str().unwrap().to_owned();
    let before = shop.get(&format!("/notifications/{scheduled}")).await.json();

    let described = perennial.client().get("/openapi.json").await.json();
    for (path, operations) in described["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let id = if path.ends_with("/deliveries") { notification } else { &scheduled };
            let asked = path.replace("/subscriptions/{id}", &format!("/subscriptions/{theirs}"));
            let asked = asked.replace("{id}", id).replace("{user}", "ann").replace("{kind}", "push.deliver");
            let (expected, body) = match (method.as_str(), path.as_str()) {
                // These routes belong to no site, or to the caller's own.
                ("GET", "/push/key") | ("POST", "/subscriptions") => continue,
                ("GET", "/subscriptions" | "/notifications") | (_, "/users/{user}") => (200, None),
                ("DELETE", "/subscriptions") => {
                    let auth = &shared["keys"]["auth"];
                    (404, Some(json!({ "endpoint": shared["endpoint"], "auth": auth })))
                }
                ("PATCH", _) => (404, Some(json!({ "rate": 5 }))),
                ("POST", "/notify") => {
                    let to = json!({ "subscriptions": [theirs] });
                    (202, Some(json!({ "to": to, "payload": "stolen" })))
                }
                ("POST", "/jobs/{kind}") => (404, Some(json!({ "payload": {} }))),
                _ => (404, None),
            };
            let answer = news.send(method.clone(), &asked, body.as_ref()).await;
            assert_eq!(answer.status, expected, "{method} {path}: {}", answer.text());
            let text = answer.text();
            let endpoint = shared["endpoint"].as_str().unwrap();
            assert!(!text.contains(endpoint) && !text.contains(notification), "{method} {path}: {text}");
            if path == "/notify" {
                assert_eq!(until_done(&news, &answer).await["audience"], 0);
            }
        }
    }
    for to in [json!({ "all": true }), json!({ "user": "ann" }), json!({ "tags": "vip" })] {
        let dry = news.post("/notify", &json!({ "to": to, "payload": "x", "dry_run": true })).await;
        assert_eq!(dry.json()["audience"], 0, "{}", dry.text());
    }
    // Nothing has changed, and the same endpoint is another subscription at another site.
    assert_eq!(shop.get(&format!("/notifications/{scheduled}")).await.json(), before);
    assert_eq!(shop.get(&format!("/subscriptions/{theirs}")).await.status, 200);
    assert!(double.taken().iter().all(|taken| taken.text != "stolen"));
    let own = subscribed(&news, request).await;
    assert_eq!(news.delete("/users/ann", None).await.status, 200);
    assert_eq!(news.get(&format!("/subscriptions/{own}")).await.status, 404);
    assert_eq!(shop.get("/users/ann").await.json()["subscriptions"].as_array().unwrap().len(), 1);
    // Each site has its own Idempotency-Keys.
    let keyed = |client: &Client| client.with_header("idempotency-key", "same");
    let of_shop = keyed(&shop).post("/notify", &to_all).await.json()["id"].clone();
    let of_news = keyed(&news).post("/notify", &to_all).await.json()["id"].clone();
    assert_ne!(of_shop, of_news);

    let exported = |output: std::process::Output| String::from_utf8(output.stdout).unwrap();
    let export = exported(perennial.setup.run(&["subscriptions", "export", "--site", "shop"]).await);
    assert_eq!(export.lines().count(), 1);
    std::fs::write(perennial.setup.file("lines"), &export).unwrap();
    let lines = perennial.setup.file("lines").display().to_string();
    let import = perennial.setup.run(&["subscriptions", "import", "--site", "news", &lines]).await;
    // The subscription was made with a key that this site does not have.
    assert!(!import.status.success());
    assert!(exported(perennial.setup.run(&["subscriptions", "export", "--site", "news"]).await).is_empty());
    let unknown = perennial.setup.run(&["subscriptions", "export", "--site", "zoo"]).await;
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("the name of a site"));
}

#[tokio::test]
async fn what_two_sites_claim_is_refused() {
    let setup = Setup::new()
        .set(&format!("sites.shop.origins={SHOP},{NEWS}"))
        .set(&format!("sites.news.origins={NEWS}"))
        .set("sites.shop.hosts=push.example")
        .set("sites.news.hosts=Push.example")
        .set("sites.news.hots=typo");
    let refused = setup.run(&["check"]).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        text.contains(
            "sites.news.hots (from --set): there is no such setting; did you mean sites.news.hosts?"
        ),
        "{text}"
    );
    let setup = Setup::new()
        .set(&format!("sites.shop.origins={SHOP},{NEWS}"))
        .set(&format!("sites.news.origins={NEWS}"))
        .set("sites.shop.hosts=push.example")
        .set("sites.news.hosts=Push.example");
    let refused = setup.run(&["check"]).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2));
    assert!(text.contains("https://news.example in one site only"), "{text}");
    assert!(text.contains("push.example in one site only"), "{text}");
}
