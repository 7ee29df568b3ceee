//! `GET /`: a page that subscribes this browser and sends notifications to it. Its files are compiled into the binary.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::HeaderName;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};

use super::ApiState;

/// A file of the page: its path, its type, its content.
struct File(&'static str, &'static str, &'static str);

const FILES: [File; 7] = [
    File("/", "text/html; charset=utf-8", include_str!("../../page/index.html")),
    File("/page.css", "text/css; charset=utf-8", include_str!("../../page/page.css")),
    File("/page.js", JAVASCRIPT, include_str!("../../page/page.js")),
    File("/push.js", JAVASCRIPT, FORMER),
    File("/sw.js", JAVASCRIPT, include_str!("../../page/sw.js")),
    File("/icon.svg", "image/svg+xml", include_str!("../../page/icon.svg")),
    File("/page.webmanifest", "application/manifest+json", include_str!("../../page/page.webmanifest")),
];

/// The browser's part of web push, which pages of any site load from here. It is served without the page, too.
const SCRIPT: File = File("/perennial.js", JAVASCRIPT, include_str!("../../page/perennial.js"));

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// The script with the names that it had at its former path.
const FORMER: &str = concat!(include_str!("../../page/perennial.js"), include_str!("../../page/push.js"));

/// Allows no other origin, no inline code and no frame, because the page holds an API key.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of the page.
pub(crate) fn routes() -> Router<ApiState> {
    FILES
        .iter()
        .fold(Router::new(), |router, file| router.route(file.0, get(|| std::future::ready(serve(file)))))
}

/// The route of the script for pages of any site.
pub(crate) fn script() -> Router<ApiState> {
    // A page that lets in only files that allow it (COEP) may load the script, too.
    let allowed = [(HeaderName::from_static("cross-origin-resource-policy"), "cross-origin")];
    Router::new().route(SCRIPT.0, get(move || std::future::ready((allowed, serve(&SCRIPT)))))
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
