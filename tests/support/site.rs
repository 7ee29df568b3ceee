//! A site with pages of its own, on another origin than the server.

use axum::Router;
use axum::routing::get;
use tokio::task::JoinSet;

/// Serves a page at `/` and a service worker at `/sw.js`, until the returned task is dropped. Returns the origin.
pub async fn serve(page: String, worker: String) -> (String, JoinSet<std::io::Result<()>>) {
    let typed = |media: &'static str, text: String| {
        get(move || std::future::ready(([("content-type", media)], text.clone())))
    };
    let router =
        Router::new().route("/", typed("text/html", page)).route("/sw.js", typed("text/javascript", worker));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, router).await });
    (origin, serving)
}
