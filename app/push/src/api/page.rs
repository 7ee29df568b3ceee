//! `GET /`: a page that subscribes this browser and sends notifications to it. Its files are compiled into the binary.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};

use super::ApiState;

/// A file of the page: its path, its type, its content.
struct File(&'static str, &'static str, &'static str);

const FILES: [File; 8] = [
    File("/", "text/html; charset=utf-8", include_str!("../../page/index.html")),
    File("/page.css", "text/css; charset=utf-8", include_str!("../../page/page.css")),
    File("/page.js", "text/javascript; charset=utf-8", include_str!("../../page/page.js")),
    File("/perennial.js", "text/javascript; charset=utf-8", include_str!("../../page/perennial.js")),
    File("/push.js", "text/javascript; charset=utf-8", FORMER),
    File("/sw.js", "text/javascript; charset=utf-8", include_str!("../../page/sw.js")),
    File("/icon.svg", "image/svg+xml", include_str!("../../page/icon.svg")),
    File("/page.webmanifest", "application/manifest+json", include_str!("../../page/page.webmanifest")),
];

/// The script with the names that it had at its former path.
const FORMER: &str = concat!(include_str!("../../page/perennial.js"), include_str!("../../page/push.js"));

/// Allows no other origin, no inline code and no frame, because the page holds an API key.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(crate) fn routes() -> Router<ApiState> {
    FILES
        .iter()
        .fold(Router::new(), |router, file| router.route(file.0, get(|| std::future::ready(serve(file)))))
}

fn serve(File(_, media_type, content): &'static File) -> Response {
    let headers = [
        (CONTENT_TYPE, *media_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // A new binary may have a new page, so browsers must revalidate.
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, *content).into_response()
}
