//! The program while `perennial dev` runs it: its pages load a script that reloads them when a new build runs, and that
//! shows the messages of the compiler when there is none.
//!
//! | route | answer |
//! |---|---|
//! | `GET /_dev/events` | the state of the build, as server-sent events |
//! | `GET /_dev/reload.js` | the script |

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::middleware::map_response;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http_body::Body as _;
use http_body_util::BodyExt;
use perennial_runtime::drain::Drain;
use serde::{Deserialize, Serialize};

/// Variable with the file of the state of the build.
pub(crate) const STATE: &str = "PERENNIAL_DEV_STATE";
/// Variable with the number of the build that runs.
pub(crate) const BUILD: &str = "PERENNIAL_DEV_BUILD";

/// Interval at which the file is read.
const LOOK: Duration = Duration::from_millis(100);
/// Longest page that gets the script, in bytes.
const MAX_PAGE: u64 = 4 << 20;

/// The state of the build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BuildState {
    /// Number of the last build that succeeded.
    pub(crate) build: u64,
    pub(crate) stage: BuildStage,
    /// Messages of the compiler, or the reason why no program runs.
    pub(crate) messages: String,
}

/// The stage of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BuildStage {
    /// The compiler runs.
    Building,
    /// The last build runs.
    Running,
    /// There is no build, or its program has ended.
    Failed,
}

/// The connection of a program to `perennial dev`.
#[derive(Clone, Debug)]
pub(crate) struct DevLink {
    state: PathBuf,
    build: String,
}

impl DevLink {
    /// Returns the connection, if `perennial dev` runs this program.
    pub(crate) fn of_environment() -> Option<Self> {
        let state = std::env::var_os(STATE)?.into();
        Some(Self { state, build: std::env::var(BUILD).unwrap_or_default() })
    }

    /// The page of `perennial dev` itself, while no program runs.
    pub(crate) fn without_program(state: PathBuf) -> Self {
        Self { state, build: "0".to_owned() }
    }

    /// The element that loads the script.
    pub(crate) fn script(&self) -> String {
        format!("<script src=\"/_dev/reload.js\" data-build=\"{}\" defer></script>", self.build)
    }

    /// Adds the routes, and the script to every page of `router`.
    pub(crate) fn around(self, router: Router, drain: Drain) -> Router {
        let script: Arc<str> = self.script().into();
        let pages = router.layer(map_response(move |page| with_script(page, Arc::clone(&script))));
        pages.merge(self.routes(drain))
    }

    pub(crate) fn routes(self, drain: Drain) -> Router {
        let script =
            || std::future::ready(([(CONTENT_TYPE, "text/javascript")], include_str!("dev/reload.js")));
        let events = move || std::future::ready(events(self.state.clone(), drain.clone()));
        Router::new().route("/_dev/events", get(events)).route("/_dev/reload.js", get(script))
    }
}

/// Sends the state whenever it has changed, until the drain begins.
fn events(state: PathBuf, drain: Drain) -> Response {
    let events = stream::unfold((String::new(), state, drain), |(before, state, drain)| async move {
        loop {
            let now = std::fs::read_to_string(&state).unwrap_or_default();
            if now != before && serde_json::from_str::<BuildState>(&now).is_ok() {
                let event = Event::default().data(now.trim());
                return Some((Ok::<_, std::convert::Infallible>(event), (now, state, drain)));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = drain.soft() => return None,
            }
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

/// Appends the script to a page.
async fn with_script(response: Response, script: Arc<str>) -> Response {
    let is_page =
        response.headers().get(CONTENT_TYPE).is_some_and(|of| of.as_bytes().starts_with(b"text/html"));
    let is_whole = response.body().size_hint().exact().is_some_and(|length| (1..MAX_PAGE).contains(&length));
    if !is_page || !is_whole || response.headers().contains_key(CONTENT_ENCODING) {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(CONTENT_LENGTH);
    match body.collect().await {
        Ok(page) => {
            let page = [&page.to_bytes(), script.as_bytes()].concat();
            Response::from_parts(parts, Body::from(page))
        }
        Err(_) => Response::from_parts(parts, Body::empty()),
    }
}
