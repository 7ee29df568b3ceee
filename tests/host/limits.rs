//! Limits of one route.

use std::time::Duration;

use perennial::axum::body::Bytes;
use perennial::axum::extract::Request;
use perennial::axum::middleware::{Next, from_fn};
use perennial::axum::response::Response;
use perennial::prelude::*;
use perennial::{anyhow, limits};
use serde_json::json;

struct Pictures;

async fn length(body: Bytes) -> String {
    body.len().to_string()
}

async fn wait() -> &'static str {
    tokio::time::sleep(Duration::from_millis(600)).await;
    "waited"
}

async fn after_a_moment(request: Request, next: Next) -> Response {
    tokio::time::sleep(Duration::from_millis(20)).await;
    next.run(request).await
}

impl Module for Pictures {
    const NAME: &'static str = "pictures";

    fn configure(_: &mut Reader<'_>) -> Self {
        Self
    }

    async fn mount(self, host: &mut Host) -> anyhow::Result<()> {
        let seconds = Duration::from_secs;
        let longer = limits::time(seconds(10));
        let routes = Router::new()
            .route("/small", post(length).layer(limits::body(10)))
            .route("/large", post(length).layer(limits::body(5 << 20)))
            .route("/plain", post(length))
            .route("/unread", post(async || "unread"))
            .route("/slow", get(wait))
            .route("/slower", get(wait).layer(longer))
            .route("/slower-behind-a-layer", get(wait).layer(longer).layer(from_fn(after_a_moment)))
            .route(
                "/faster",
                get(wait).layer(limits::time(Duration::from_millis(50))).layer(from_fn(after_a_moment)),
            )
            .route("/login", post(async || "in").layer(limits::rate(3, seconds(60))));
        host.routes(routes);
        Ok(())
    }
}

#[tokio::test]
async fn a_route_has_limits_of_its_own() -> anyhow::Result<()> {
    let test = Perennial::new().host::<Pictures>().test().embedded();
    let pictures = test.set("server.request_timeout=300ms").set("server.body_limit=3MiB").start().await?;
    let client = pictures.client();
    for (path, length, status) in [
        ("/small", 8, 200),
        ("/small", 9, 413),
        // Longer than the limit of the extractors of axum, which does not count.
        ("/plain", (3 << 20) - 2, 200),
        ("/plain", 3 << 20, 413),
        ("/large", (5 << 20) - 2, 200),
        ("/large", 5 << 20, 413),
    ] {
        // A text in JSON has two quotes.
        let answer = client.post(path, &json!("x".repeat(length))).await?;
        assert_eq!(answer.status, status, "{path} {length}: {}", answer.text());
        if status == 413 {
            assert!(answer.json()["detail"].as_str().unwrap().starts_with("the body may have at most"));
        }
    }
    for (path, status) in
        [("/slow", 503), ("/slower", 200), ("/slower-behind-a-layer", 200), ("/faster", 503)]
    {
        let answer = client.get(path).await?;
        assert_eq!(answer.status, status, "{path}: {}", answer.text());
    }
    let nobody = json!({});
    let answers = [(); 4].map(|()| client.post("/login", &nobody));
    let answers = futures_util::future::try_join_all(answers).await?;
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert_eq!(refused.len(), 1);
    let wait: u64 = refused[0].headers["retry-after"].to_str()?.parse()?;
    assert!((1..=20).contains(&wait), "{wait}");
    pictures.stop().await
}
