//! The description of the public interface, made from its handlers: `GET /openapi.json`, and for people
//! `GET /reference`.

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

use crate::program;

/// Security scheme of API keys. A handler that needs no key declares `security(())`, or `security((), ("key" = []))` if
/// a key is possible. All other handlers need a key.
const KEY: &str = "key";

/// Returns these routes, and the routes that describe them.
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

/// Completes the description: its title, the scheme of keys, and the form of errors.
fn described(mut openapi: OpenApi) -> OpenApi {
    let identity = program::identity();
    let (name, about) = match (&*identity.name, &*identity.about) {
        ("perennial", "") => {
            ("Perennial", "Web push: subscriptions, notifications, and what became of them.")
        }
        names => names,
    };
    let mut info = Info::new(name, &*identity.version);
    info.description = Some(about.to_owned()).filter(|about| !about.is_empty());
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

/// Adds to one operation the security and the errors that all operations of its kind have.
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
    // Whether the operation can have the error, the status of the error, and its description.
    let possible = [
        (has_body || of_path || of_query, StatusCode::BAD_REQUEST, "The request cannot be read"),
        (takes_key, StatusCode::UNAUTHORIZED, "The key is missing, or not valid"),
        (takes_key, StatusCode::FORBIDDEN, "The key, or the page, has no right to do this"),
        (of_path, StatusCode::NOT_FOUND, "The resource does not exist"),
        (needs_key && has_body, StatusCode::CONFLICT, "The request conflicts with what is stored"),
        (has_body, StatusCode::PAYLOAD_TOO_LARGE, "The body is too long"),
        (has_body, StatusCode::UNSUPPORTED_MEDIA_TYPE, "The body is of another type"),
        (has_body || of_path || of_query, StatusCode::UNPROCESSABLE_ENTITY, "A field does not fit"),
        (true, StatusCode::TOO_MANY_REQUESTS, "Too many requests; Retry-After says when to try again"),
        (true, StatusCode::SERVICE_UNAVAILABLE, "Not available now; Retry-After says when to try again"),
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
    responses.entry("default".to_owned()).or_insert_with(|| problem("The error").into());
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
