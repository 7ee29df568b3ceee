//! The page that answers while no program runs: it shows the messages of the compiler, and reloads itself.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::middleware::map_response;
use axum::response::{Html, IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use perennial_runtime::drain::{self, Phase, Trigger};
use tokio::task::JoinSet;

use crate::dev::{BuildState, DevLink};

/// Time that open connections get for their end.
const PATIENCE: Duration = Duration::from_secs(1);

/// The page, which is served until it is stopped.
pub(super) struct WaitingPage {
    trigger: Trigger,
    serving: JoinSet<()>,
}

impl WaitingPage {
    /// Serves the page on the socket.
    pub(super) fn start(listener: TcpListener, state: PathBuf) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (trigger, drain) = drain::channel();
        let dev = DevLink::without_program(state.clone());
        let script = dev.script();
        let page = move || std::future::ready(page(&state, &script));
        // A connection that stayed open would never reach the program.
        let routes =
            Router::new().fallback(page).merge(dev.routes(drain.clone())).layer(map_response(closing));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let stopped = async move { drain.soft().await };
            let _ = axum::serve(listener, routes).with_graceful_shutdown(stopped).await;
        });
        Ok(Self { trigger, serving })
    }

    pub(super) async fn stop(mut self) {
        self.trigger.advance(Phase::Soft);
        let _ = tokio::time::timeout(PATIENCE, self.serving.join_next()).await;
    }
}

async fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn page(state: &PathBuf, script: &str) -> Response {
    let text = std::fs::read_to_string(state).unwrap_or_default();
    let messages =
        serde_json::from_str(&text).map_or_else(|_| String::new(), |state: BuildState| state.messages);
    let messages = messages.replace('&', "&amp;").replace('<', "&lt;");
    let page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Building</title><body><pre>{messages}</pre>{script}"
    );
    (StatusCode::SERVICE_UNAVAILABLE, [(header::CACHE_CONTROL, "no-store")], Html(page)).into_response()
}
