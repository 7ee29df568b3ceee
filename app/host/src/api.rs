//! Shared parts of the HTTP interfaces of all modules: JSON is read strictly, and there is one place where an error
//! becomes a status.

mod wanted;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError};
use perennial_server::http::BodyError;
use perennial_server::http::problem::{Errors, FieldError, Problem};
use perennial_server::http::scope::RequestScope;
use perennial_store::pool::{redis, sql, sqlite, with_causes};
use perennial_workers::queue;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::error::Category;
use tracing::error;

use crate::{http_client, locks, passwords};

pub(crate) use wanted::wanted;

/// `Retry-After` for a queue that is full.
const FULL: Duration = Duration::from_secs(5);

/// The result of a handler.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of a handler.
#[derive(Debug)]
pub enum Error {
    /// A problem that the client can act on.
    Problem(Problem),
    /// An error of the store.
    Store(queue::Error),
    /// A mistake in the program.
    Bug(anyhow::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Problem(problem) => problem.fmt(f),
            Self::Store(error) => error.fmt(f),
            Self::Bug(error) => error.fmt(f),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Problem(_) => None,
            Self::Store(error) => error.source(),
            Self::Bug(error) => error.source(),
        }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<FieldError> for Error {
    fn from(error: FieldError) -> Self {
        Self::Problem(error.into())
    }
}

impl From<sqlite::Error> for Error {
    fn from(error: sqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl From<sql::Error> for Error {
    fn from(error: sql::Error) -> Self {
        Self::Store(error.into())
    }
}

impl From<Errors> for Error {
    fn from(errors: Errors) -> Self {
        Self::Problem(errors.into())
    }
}

/// Converts the error of a password: 503 while the threads for the processor have too much to do.
impl From<passwords::Error> for Error {
    fn from(error: passwords::Error) -> Self {
        match error {
            passwords::Error::TooLong => FieldError::new("password", error.to_string()).into(),
            passwords::Error::Busy(_) => busy(error.to_string()).into(),
            passwords::Error::Failed(_) => Self::Bug(error.into()),
        }
    }
}

/// Converts the error of a lock: 503 while others have it.
impl From<locks::Error> for Error {
    fn from(error: locks::Error) -> Self {
        match error {
            locks::Error::Held(_) => busy(error.to_string()).into(),
            locks::Error::Store(error) => error.into(),
            locks::Error::Invalid => Self::Bug(error.into()),
        }
    }
}

impl From<redis::Error> for Error {
    fn from(error: redis::Error) -> Self {
        Self::Problem(store_failed(&error, error.is_passing()))
    }
}

/// Converts the error of a call to another server: 503 if the call may succeed in a moment, else 502.
impl From<http_client::Error> for Error {
    fn from(error: http_client::Error) -> Self {
        error!(error = with_causes(&error), "a call to another server failed");
        let status = match error.is_transient() {
            true => StatusCode::SERVICE_UNAVAILABLE,
            false => StatusCode::BAD_GATEWAY,
        };
        let problem = Problem::new(status, "a server that is needed for this has not answered as it should");
        match error.retry_after().filter(|_| error.is_transient()) {
            Some(wait) => problem.retry_after(wait).into(),
            None if error.is_transient() => problem.retry_after(FULL).into(),
            None => problem.into(),
        }
    }
}

/// Converts the error of a cache load, for which other requests may have waited, too.
impl From<Arc<sql::Error>> for Error {
    fn from(error: Arc<sql::Error>) -> Self {
        Self::Problem(store_failed(&*error, error.is_passing()))
    }
}

impl From<queue::Error> for Error {
    fn from(error: queue::Error) -> Self {
        match error {
            queue::Error::Misfit { field, reason, .. } => {
                let field = if field == "." { "payload".to_owned() } else { format!("payload.{field}") };
                FieldError::new(field, wanted(&reason)).into()
            }
            queue::Error::Full { .. } => busy(error.to_string()).into(),
            error => Self::Store(error),
        }
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Self::Bug(error)
    }
}

/// Makes the answer for work that may succeed in a moment.
fn busy(detail: String) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail).retry_after(FULL)
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            Self::Problem(problem) => problem,
            Self::Store(error) => store_failed(&error, error.is_passing()),
            Self::Bug(error) => failed(&*error),
        }
        .into_response()
    }
}

/// Makes the answer for an error of the store, and logs the error: 503 with `Retry-After` if it is transient, else 500.
pub fn store_failed(error: &(dyn StdError + 'static), is_passing: bool) -> Problem {
    if !is_passing {
        return failed(error);
    }
    error!(error = with_causes(error), "the store is not available");
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the store is not available")
        .retry_after(Duration::from_secs(1))
}

fn failed(error: &(dyn StdError + 'static)) -> Problem {
    error!(error = with_causes(error), "a request failed");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "the request failed; the log has the reason")
}

/// Returns the number of entries to list: `limit`, or `usual` if there is none.
///
/// # Errors
/// 422 for 0, and for more than `most`.
pub fn within_page(limit: Option<usize>, usual: usize, most: usize) -> std::result::Result<usize, Problem> {
    let limit = limit.unwrap_or(usual);
    if (1..=most).contains(&limit) {
        return Ok(limit);
    }
    Err(FieldError::new("limit", format!("a whole number from 1 to {most}")).into())
}

/// Returns the trace that joins a job to the request that enqueued it: the trace of the caller (`traceparent`), or a
/// new one that begins with the request, whose id has the digits of the id of the request.
pub fn trace(scope: &RequestScope) -> String {
    scope.trace().as_str().to_owned()
}

/// Makes a 404 for a resource with an id; `what` is the name of its type.
pub fn not_found(what: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no such {what}"))
}

/// A JSON body of a request or of an answer. A value that does not fit is refused with the name of its field. Unknown
/// fields are refused, too, since a misspelt field would silently do nothing.
#[derive(Clone, Copy, Debug)]
pub struct Json<T>(pub T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

impl<T, S> FromRequest<S> for Json<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> std::result::Result<Self, Problem> {
        parse(&read_as(request, "application/json").await?).map(Self)
    }
}

/// The query of a URL. A value that does not fit is refused with the name of its parameter.
#[derive(Clone, Copy, Debug)]
pub struct Query<T>(pub T);

impl<T, S> FromRequestParts<S> for Query<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> std::result::Result<Self, Problem> {
        let query = axum::extract::Query::try_from_uri(&parts.uri);
        query.map(|axum::extract::Query(query)| Self(query)).map_err(|rejection| {
            let text = rejection.body_text();
            let text = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
            of_query(text).into()
        })
    }
}

/// The body of a form, as browsers send it. A value that does not fit is refused with the name of its field.
#[derive(Clone, Copy, Debug)]
pub struct Form<T>(pub T);

impl<T, S> FromRequest<S> for Form<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> std::result::Result<Self, Problem> {
        let body = read_as(request, "application/x-www-form-urlencoded").await?;
        let fields = serde_urlencoded::Deserializer::new(url::form_urlencoded::parse(&body));
        serde_path_to_error::deserialize(fields)
            .map(Self)
            .map_err(|error| of_query(&error.to_string()).into())
    }
}

/// Reads the body of a request, which must have this media type and not be compressed.
async fn read_as(request: Request, wanted: &str) -> std::result::Result<bytes::Bytes, Problem> {
    let (parts, body) = request.into_parts();
    let unsupported = |detail: String| Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail);
    let media_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = media_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case(wanted) {
        return Err(unsupported(format!("wanted Content-Type: {wanted}")));
    }
    let encodings = parts.headers.get_all(header::CONTENT_ENCODING);
    if encodings.iter().any(|encoding| encoding != "identity") {
        return Err(unsupported("wanted the body as it is, without Content-Encoding".to_owned()));
    }
    read(body).await
}

/// Makes the error for a query. The library puts the name of the parameter in front of its message, or into it.
fn of_query(text: &str) -> FieldError {
    if let Some((name, reason)) = text.split_once(": ")
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && name != "invalid length"
    {
        return FieldError::new(name, wanted(reason));
    }
    let quoted = ["unknown field `", "missing field `", "duplicate field `"];
    let name = quoted.iter().find_map(|prefix| text.strip_prefix(prefix)?.split('`').next());
    FieldError::new(name.unwrap_or("query"), wanted(text))
}

/// The parameters of a path. A path that does not fit, or is not UTF-8, is refused without the name of a parameter.
#[derive(Clone, Copy, Debug)]
pub struct Path<T>(pub T);

impl<T, S> FromRequestParts<S> for Path<T>
where
    T: DeserializeOwned + Send,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> std::result::Result<Self, Problem> {
        let path = axum::extract::Path::from_request_parts(parts, state).await;
        path.map(|axum::extract::Path(path)| Self(path)).map_err(|rejection| match rejection.status() {
            StatusCode::BAD_REQUEST => Problem::new(StatusCode::BAD_REQUEST, "wanted a path in UTF-8"),
            status => Problem::new(status, "the path cannot be read"),
        })
    }
}

/// Reads a field for which null is not the same as a missing field. The field also needs `#[serde(default)]`.
///
/// # Errors
/// When the value is neither null nor a `T`.
pub fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Option<T>>, D::Error> {
    Option::<T>::deserialize(from).map(Some)
}

async fn read(body: Body) -> std::result::Result<bytes::Bytes, Problem> {
    match body.collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if is_too_long(&error) => {
            Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "the body is longer than server.body_limit"))
        }
        Err(_) => Err(Problem::new(StatusCode::BAD_REQUEST, "the body broke off")),
    }
}

/// Returns true when a body was cut off at its limit.
pub fn is_too_long(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let is_limit = matches!(error.downcast_ref(), Some(BodyError::TooLong));
        if is_limit || error.is::<LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Problem> {
    parse_json(body).map_err(|(path, error)| {
        if error.classify() != Category::Data {
            return Problem::new(StatusCode::BAD_REQUEST, format!("the body is no JSON: {error}"));
        }
        FieldError::new(if path == "." { "body" } else { &path }, wanted(&error.to_string())).into()
    })
}

/// Parses one line of a body with several lines of JSON.
///
/// # Errors
/// The path of the field that does not fit, and the value that was wanted.
pub fn parse_line<T: DeserializeOwned>(line: &[u8]) -> std::result::Result<T, String> {
    parse_json(line).map_err(|(path, error)| {
        if error.classify() != Category::Data {
            return format!("it is no JSON: {error}");
        }
        let wanted = wanted(&error.to_string());
        if path == "." { format!("wanted {wanted}") } else { format!("{path}: wanted {wanted}") }
    })
}

/// Parses JSON. An error comes with the path of its field; a dot is the whole value.
fn parse_json<T: DeserializeOwned>(text: &[u8]) -> std::result::Result<T, (String, serde_json::Error)> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let parsed = serde_path_to_error::deserialize(&mut json);
    let value = parsed.map_err(|error| (error.path().to_string(), error.into_inner()))?;
    json.end().map_err(|error| (".".to_owned(), error))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsing is of interest")]
    struct Outer {
        inner: Numbered,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsing is of interest")]
    struct Numbered {
        number: u8,
    }

    fn problem(body: &str) -> serde_json::Value {
        serde_json::to_value(parse::<Outer>(body.as_bytes()).unwrap_err()).unwrap()
    }

    #[test]
    fn a_body_that_does_not_fit_names_the_field() {
        let unknown = problem(r#"{"inner": {"numbr": 1}}"#);
        assert_eq!(unknown["errors"][0]["field"], "inner.numbr");
        assert_eq!(unknown["errors"][0]["wanted"], "no field but number; there is no numbr");
        let wrong = problem(r#"{"inner": {"number": 300}}"#);
        assert_eq!(wrong["errors"][0]["field"], "inner.number");
        assert_eq!(problem(r#"{"inner": {}}"#)["errors"][0]["field"], "inner");
        assert_eq!(problem("[]")["status"], 422);
    }

    #[test]
    fn a_query_that_does_not_fit_names_the_parameter() {
        let said = |text: &str| {
            let problem = serde_json::to_value(Problem::from(of_query(text))).unwrap();
            problem["errors"][0].clone()
        };
        let limit = said("limit: invalid digit found in string");
        assert_eq!((&limit["field"], &limit["wanted"]), (&"limit".into(), &"a whole number".into()));
        let unknown = said("unknown field `limt`, expected `limit`");
        assert_eq!(unknown["field"], "limt");
        assert_eq!(said("something else")["field"], "query");
    }

    #[test]
    fn a_body_that_is_no_json_names_the_place() {
        for body in ["", "{", r#"{"inner": {"number": 1}} x"#] {
            let problem = problem(body);
            assert_eq!(problem["status"], 400, "{body}");
            assert!(problem["detail"].as_str().unwrap().contains("line 1"), "{problem}");
        }
    }
}
