//! `GET /reference`: the description of the interface for people, rendered by Swagger UI, which is part of the binary.
//!
//! The page that the library brings has its script inline; ours has it in a file, so that the policy that forbids inline
//! scripts holds for it, too.

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

/// Where the page is.
const PLACE: &str = "/reference";
/// The files of the library that the page loads, and their types.
const FILES: [(&str, &str); 2] = [
    ("swagger-ui.css", "text/css; charset=utf-8"),
    ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
];

const PAGE: &str = include_str!("../../reference/reference.html");
const SCRIPT: &str = include_str!("../../reference/reference.js");

/// Nothing from elsewhere and nothing inline; pictures of the library are in its style sheet.
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
        // A new binary has new ones; the library is large, and the page is not looked at often.
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
