//! The description of the public interface, made from its handlers: `GET /openapi.json`, and for people `GET /reference`.

#[cfg(feature = "reference")]
mod reference;

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::{StatusCode, header};
use perennial_server::http::problem::{FieldError, MEDIA_TYPE, Problem};
use utoipa::PartialSchema;
use utoipa::openapi::path::{Operation, Parameter, ParameterIn};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Info, License, OpenApi, Ref, RefOr, Response, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;

/// What handlers without a key say in their description: `security(())`, or `security((), ("key" = []))` where a key is
/// possible. All others take one.
const KEY: &str = "key";

/// These routes, and the ones that describe them.
pub(crate) fn with_description(routes: OpenApiRouter) -> Router {
    let (router, openapi) = routes.split_for_parts();
    let openapi = described(openapi);
    let openapi = Bytes::from(openapi.to_json().unwrap_or_default());
    let openapi = move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], openapi.clone()));
    let router = router.route("/openapi.json", get(openapi));
    #[cfg(feature = "reference")]
    let router = router.merge(reference::routes());
    router
}

/// What every description of the interface says: who may call, and what an error looks like.
fn described(mut openapi: OpenApi) -> OpenApi {
    let mut info = Info::new("Perennial", env!("CARGO_PKG_VERSION"));
    info.description = Some("Web push: subscriptions, notifications, and what became of them.".to_owned());
    let mut licence = License::new("MIT OR Apache-2.0");
    licence.identifier = Some("MIT OR Apache-2.0".to_owned());
    info.license = Some(licence);
    openapi.info = info;
    let components = openapi.components.get_or_insert_default();
    components.add_security_scheme(KEY, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    for (name, schema) in [("Problem", Problem::schema()), ("FieldError", FieldError::schema())] {
        components.schemas.insert(name.to_owned(), schema);
    }
    for item in openapi.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            describe(operation);
        }
    }
    openapi
}

/// Adds to one operation what holds for all of its kind.
fn describe(operation: &mut Operation) {
    let needs_key = operation.security.is_none();
    let key = || SecurityRequirement::new(KEY, std::iter::empty::<String>());
    operation.security.get_or_insert_with(|| vec![key()]);
    let takes_key = operation.security.iter().flatten().any(|requirement| *requirement == key());
    let parameters = operation.parameters.as_deref().unwrap_or_default();
    let has = |place: &ParameterIn| {
        let is_there = |one: &RefOr<Parameter>| matches!(one, RefOr::T(one) if one.parameter_in == *place);
        parameters.iter().any(is_there)
    };
    let (of_path, of_query) = (has(&ParameterIn::Path), has(&ParameterIn::Query));
    let has_body = operation.request_body.is_some();
    // Browsers may send what has no body with one.
    let possible = [
        (has_body || of_path || of_query, StatusCode::BAD_REQUEST, "It could not be read"),
        (takes_key, StatusCode::UNAUTHORIZED, "The key is missing, or not good"),
        (takes_key, StatusCode::FORBIDDEN, "The key, or the page, may not do this"),
        (of_path, StatusCode::NOT_FOUND, "There is none"),
        (needs_key && has_body, StatusCode::CONFLICT, "It contradicts what is there"),
        (has_body, StatusCode::PAYLOAD_TOO_LARGE, "The body is too long"),
        (has_body, StatusCode::UNSUPPORTED_MEDIA_TYPE, "The body is of another type"),
        (has_body || of_path || of_query, StatusCode::UNPROCESSABLE_ENTITY, "A field is not as wanted"),
        (true, StatusCode::TOO_MANY_REQUESTS, "Too many requests; Retry-After says when to come again"),
        (true, StatusCode::SERVICE_UNAVAILABLE, "Not now; Retry-After says when to come again"),
    ];
    let responses = &mut operation.responses.responses;
    for (_, status, description) in possible.into_iter().filter(|(is_possible, ..)| *is_possible) {
        let error = problem(description);
        let response = responses.entry(status.as_str().to_owned()).or_insert_with(|| error.clone().into());
        if let RefOr::T(response) = response
            && response.content.is_empty()
        {
            *response = error;
        }
    }
    responses.entry("default".to_owned()).or_insert_with(|| problem("What was wrong").into());
    for (status, response) in responses {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            let reason = status.parse::<StatusCode>().ok().and_then(|status| status.canonical_reason());
            response.description = reason.unwrap_or("An answer").to_owned();
        }
    }
}

fn problem(description: &str) -> Response {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    ResponseBuilder::new().description(description).content(MEDIA_TYPE, content).build()
}
