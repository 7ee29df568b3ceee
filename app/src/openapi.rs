//! The description of the public interface, made from its handlers: `GET /openapi.json`.

use axum::Router;
use axum::routing::get;
use bytes::Bytes;
use http::header;
use perennial_server::http::problem::{FieldError, MEDIA_TYPE, Problem};
use utoipa::PartialSchema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Info, OpenApi, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;

/// These routes, and the one that describes them.
pub(crate) fn with_description(routes: OpenApiRouter) -> Router {
    let (router, openapi) = routes.split_for_parts();
    let openapi = described(openapi);
    let openapi = Bytes::from(openapi.to_json().unwrap_or_default());
    let openapi = move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], openapi.clone()));
    router.route("/openapi.json", get(openapi))
}

/// What every description of the interface says: who may call, and what an error looks like.
fn described(mut openapi: OpenApi) -> OpenApi {
    openapi.info = Info::new("Perennial", env!("CARGO_PKG_VERSION"));
    let components = openapi.components.get_or_insert_default();
    components.add_security_scheme("key", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    for (name, schema) in [("Problem", Problem::schema()), ("FieldError", FieldError::schema())] {
        components.schemas.insert(name.to_owned(), schema);
    }
    let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    let error = ResponseBuilder::new().description("What was wrong").content(MEDIA_TYPE, problem).build();
    for item in openapi.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".to_owned(), error.clone().into());
            let key = SecurityRequirement::new("key", std::iter::empty::<String>());
            operation.security.get_or_insert_default().push(key);
        }
    }
    openapi
}
