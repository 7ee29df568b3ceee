//! `GET /reference`: the description of the interface for people, rendered by Swagger UI, which is part of the binary.
//!
//! The page of the library has an inline script. This page has the script in a file, so that its content security
//! policy can forbid inline scripts.

use axum::Router;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderName, Request, StatusCode};
use swagger_ui_dist::{ApiDefinition, OpenApiSource};
use tower::ServiceExt;

/// Path of the page.
const PLACE: &str = "/reference";
/// The files of the library that the page loads, and their types.
const FILES: [(&str, &str); 2] = [
    ("swagger-ui.css", "text/css; charset=utf-8"),
    ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
];

const PAGE: &str = include_str!("../../reference/reference.html");
const SCRIPT: &str = include_str!("../../reference/reference.js");

/// Content security policy: nothing from other origins, and nothing inline. The style sheet of the library has its
/// images as `data:` URLs.
const POLICY: &str =
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Router {
    let library = swagger_ui_dist::generate_routes(ApiDefinition {
        uri_prefix: PLACE,
        api_definition: OpenApiSource::Uri("/openapi.json"),
        title: None,
    });
    let file = move |Path(name): Path<String>| async move {
        let Some((name, media_type)) = FILES.into_iter().find(|(known, _)| *known == name) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let Ok(request) = Request::get(format!("{PLACE}/{name}")).body(axum::body::Body::empty()) else {
            return StatusCode::NOT_FOUND.into_response();
        };
        let answer = library.oneshot(request).await.into_response();
        // Browsers keep the large files for an hour. A new binary has new files, so they are not kept for longer: the
        // page is rarely opened.
        (headers(media_type, "max-age=3600"), answer.into_body()).into_response()
    };
    Router::new()
        .route(PLACE, get(|| std::future::ready(own("text/html; charset=utf-8", PAGE))))
        .route(
            "/reference/reference.js",
            get(|| std::future::ready(own("text/javascript; charset=utf-8", SCRIPT))),
        )
        .route("/reference/{file}", get(file))
}

fn own(media_type: &'static str, content: &'static str) -> Response {
    (headers(media_type, "no-cache"), content).into_response()
}

fn headers(media_type: &'static str, cache: &'static str) -> [(HeaderName, &'static str); 5] {
    [
        (CONTENT_TYPE, media_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, cache),
    ]
}
