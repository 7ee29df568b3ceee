//! Errors as `application/problem+json` (RFC 9457): the error, the fields that caused it, and the wanted values.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// The media type of a [`Problem`].
pub const MEDIA_TYPE: &str = "application/problem+json";

/// An error as a client sees it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Problem {
    /// The HTTP status code.
    status: u16,
    /// The kind of problem, the same for every occurrence.
    title: &'static str,
    /// What happened in this case.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    /// The fields of the request that are not valid.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldError>,
    #[serde(skip)]
    retry_after: Option<Duration>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.detail.is_empty() { self.title } else { &self.detail })?;
        self.errors.iter().try_for_each(|error| write!(f, "; {}: wanted {}", error.field, error.wanted))
    }
}

/// One field of a request that is not valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct FieldError {
    /// The path of the field: `to.tags`, `subscription.keys.auth`.
    pub field: String,
    /// A description of the wanted value.
    pub wanted: String,
    /// The first character of a text, counted from 0, that could not be parsed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<usize>,
}

/// Maximum number of fields of one request that are named.
const MAX_ERRORS: usize = 20;
/// Maximum length of a text in an answer that may repeat input of the client, in bytes.
const MAX_TEXT: usize = 512;

/// Shortens a text for an answer. A long text keeps its beginning and its end, where parsers say what they wanted.
fn cut(text: String) -> String {
    if text.len() <= MAX_TEXT {
        return text;
    }
    let head = text.floor_char_boundary(MAX_TEXT / 2);
    let tail = text.ceil_char_boundary(text.len() - MAX_TEXT / 2);
    format!("{}…{}", &text[..head], &text[tail..])
}

/// The fields of a request that are not valid. Only the first twenty are kept.
#[derive(Clone, Debug, Default)]
pub struct Errors(Vec<FieldError>);

impl Errors {
    /// Adds a field, unless twenty are kept already.
    pub fn push(&mut self, error: FieldError) {
        if !self.is_full() {
            self.0.push(error);
        }
    }

    /// Returns true when no more fields are kept, so that a further search makes no sense.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MAX_ERRORS
    }

    /// Returns true when all fields are valid.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Errors> for Problem {
    fn from(errors: Errors) -> Self {
        Self::invalid(errors.0)
    }
}

impl FieldError {
    /// Creates the error of a field, with a description of the wanted value. The middle of long texts is left out,
    /// because a client may have chosen them.
    pub fn new(field: impl Into<String>, wanted: impl Into<String>) -> Self {
        Self { field: cut(field.into()), wanted: cut(wanted.into()), position: None }
    }

    /// Sets the position in the text: the character, counted from 0.
    #[must_use]
    pub fn at(mut self, position: usize) -> Self {
        self.position = Some(position);
        self
    }
}

impl Problem {
    /// Creates a problem of this status; `detail` says what happened in this case. The middle of a long text
    /// is left out.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            status: status.as_u16(),
            title: status.canonical_reason().unwrap_or("Error"),
            detail: cut(detail.into()),
            errors: Vec::new(),
            retry_after: None,
        }
    }

    /// Creates a problem of status 422: the request was understood, and cannot be done because of these fields.
    pub fn invalid(mut errors: Vec<FieldError>) -> Self {
        errors.truncate(MAX_ERRORS);
        let fields: Vec<&str> = errors.iter().map(|error| error.field.as_str()).collect();
        let detail = format!("not as wanted: {}", fields.join(", "));
        Self { errors, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail) }
    }

    /// Sets the time after which the client may try again, for the header `Retry-After`.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// The status code.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl From<FieldError> for Problem {
    fn from(error: FieldError) -> Self {
        Self::invalid(vec![error])
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (self.status(), [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        if self.status() == StatusCode::UNAUTHORIZED {
            // RFC 9110, section 11.6.1: a 401 says how to authenticate.
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(wait) = self.retry_after {
            // Rounded up: a client that comes back a moment early is refused again.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_has_sent_is_repeated_in_part_only() {
        let long = "ä".repeat(1_000_000);
        let error = FieldError::new(long.clone(), format!("unknown field `{long}`, expected `to`"));
        assert!(error.field.len() <= MAX_TEXT + 3 && error.wanted.len() <= MAX_TEXT + 3);
        assert!(error.wanted.starts_with("unknown field `ä") && error.wanted.ends_with("`, expected `to`"));
        let problem = Problem::invalid(vec![error; 100_000]);
        assert_eq!(problem.errors.len(), MAX_ERRORS);
        assert!(problem.detail.len() <= MAX_TEXT + 3);
    }

    #[test]
    fn no_more_errors_are_kept_than_are_named() {
        let mut errors = Errors::default();
        (0..1000).for_each(|number| errors.push(FieldError::new(format!("to.users[{number}]"), "a user id")));
        assert!(errors.is_full());
        assert_eq!(errors.0.len(), MAX_ERRORS);
    }
}
