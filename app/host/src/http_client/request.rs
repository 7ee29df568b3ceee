//! A request that is being built.

use std::fmt;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use jiff::Timestamp;
use perennial_server::http::trace::Trace;
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use uuid::Uuid;

use super::answer::HttpAnswer;
use super::call;
use super::error::{Error, Result};
use super::{HttpClient, retry, webhook};
use crate::program;

/// Header with which a server recognises a request that comes again (draft-ietf-httpapi-idempotency-key-header).
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Header that names the trace of a request.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A request that is being built. A mistake in it is the error of [`HttpRequest::send`].
#[must_use = "a request is sent by `send`"]
pub struct HttpRequest {
    pub(super) client: HttpClient,
    pub(super) method: Method,
    pub(super) place: String,
    pub(super) headers: HeaderMap,
    pub(super) body: RequestBody,
    pub(super) is_idempotent: bool,
    pub(super) retries: u32,
    pub(super) timeout: Duration,
    pub(super) owner: Option<String>,
    mistake: Option<String>,
}

/// The body of a request.
pub(super) enum RequestBody {
    /// In memory, so that it can be sent again.
    Bytes(Bytes),
    /// Sent once, while it is made.
    Stream(Body),
}

impl fmt::Debug for HttpRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpRequest")
            .field("client", &self.client)
            .field("method", &self.method)
            .finish_non_exhaustive()
    }
}

impl HttpRequest {
    pub(super) fn new(client: HttpClient, method: Method, place: String) -> Self {
        let agent = HeaderValue::from_str(&format!("{}/{}", program::name(), program::identity().version));
        let mut headers = HeaderMap::new();
        headers.extend(agent.ok().map(|agent| (USER_AGENT, agent)));
        let (retries, timeout) = (client.0.config.retries, client.0.config.timeout);
        let is_idempotent = method.is_idempotent();
        let body = RequestBody::Bytes(Bytes::new());
        let (owner, mistake) = (None, None);
        Self { client, method, place, headers, body, is_idempotent, retries, timeout, owner, mistake }
    }

    /// Sets a header. The value of a header that may be secret is not printed.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        match (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            (Ok(name), Ok(value)) => _ = self.headers.insert(name, value),
            (Err(_), _) => self.mistake = Some(format!("{name:?} is no name of a header")),
            (_, Err(_)) => {
                self.mistake = Some(format!("the value of the header {name} has bytes that no header has"));
            }
        }
        self
    }

    /// Sets `Authorization: Bearer ..`.
    pub fn bearer(mut self, token: &SecretString) -> Self {
        match HeaderValue::try_from(format!("Bearer {}", token.expose_secret())) {
            Ok(mut value) => {
                value.set_sensitive(true);
                self.headers.insert(AUTHORIZATION, value);
            }
            Err(_) => self.mistake = Some("the token has bytes that no header has".to_owned()),
        }
        self
    }

    /// Adds parameters to the query of the URL.
    pub fn query(mut self, parameters: &impl Serialize) -> Self {
        match serde_urlencoded::to_string(parameters) {
            Ok(query) if query.is_empty() => {}
            Ok(query) => {
                self.place.push(if self.place.contains('?') { '&' } else { '?' });
                self.place.push_str(&query);
            }
            Err(error) => self.mistake = Some(format!("the query cannot be written: {error}")),
        }
        self
    }

    /// Sets a body in JSON.
    pub fn json(self, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(json) => self.typed("application/json", json),
            Err(error) => Self { mistake: Some(format!("the body cannot be written: {error}")), ..self },
        }
    }

    /// Sets a body as a form sends it.
    pub fn form(self, value: &impl Serialize) -> Self {
        match serde_urlencoded::to_string(value) {
            Ok(form) => self.typed("application/x-www-form-urlencoded", form),
            Err(error) => Self { mistake: Some(format!("the form cannot be written: {error}")), ..self },
        }
    }

    fn typed(mut self, media_type: &'static str, body: impl Into<Bytes>) -> Self {
        self.headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        self.body(body)
    }

    /// Sets a body of bytes.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = RequestBody::Bytes(body.into());
        self
    }

    /// Sets a body that is sent while it is made, such as `Body::from_stream`. The request is then never sent again.
    pub fn stream(mut self, body: Body) -> Self {
        self.body = RequestBody::Stream(body);
        self
    }

    /// Names the request, so that the server does it only once (`Idempotency-Key`): it may then be sent again.
    pub fn idempotency(mut self, key: &str) -> Self {
        self.is_idempotent = true;
        self.header(IDEMPOTENCY_KEY.as_str(), key)
    }

    /// Signs the request by Standard Webhooks (1.0): the receiver checks with the secret who has sent the body, and tells by
    /// the id that it comes again. A body that is a stream cannot be signed.
    pub fn webhook(mut self, id: Uuid, secret: &SecretString) -> Self {
        let RequestBody::Bytes(body) = &self.body else {
            self.mistake = Some("a body that is a stream cannot be signed".to_owned());
            return self;
        };
        let at = Timestamp::now().as_second();
        let signature = webhook::sign(secret, id, at, body);
        self.is_idempotent = true;
        self.header("webhook-id", &id.to_string())
            .header("webhook-timestamp", &at.to_string())
            .header("webhook-signature", &signature)
    }

    /// Says that to do this twice is the same as to do it once: it may then be sent again.
    pub fn idempotent(mut self) -> Self {
        self.is_idempotent = true;
        self
    }

    /// Makes the call a part of a trace, such as that of the request that caused it.
    pub fn traced(self, trace: &Trace) -> Self {
        self.header(TRACEPARENT.as_str(), trace.as_str())
    }

    /// Names the one who has chosen the URL, such as a customer: `targets.NAME.calls_per_host` then counts the calls of this
    /// owner instead of those to one host. A stranger may have many names for one slow server.
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// Sets the time limit of this call, instead of `targets.NAME.timeout`.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Sets how often this call is tried again, instead of `targets.NAME.retries`.
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Sends the request, and returns the answer with any status. Its body follows.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn send(mut self) -> Result<HttpAnswer> {
        let target = self.client.0.config.name;
        if let Some(reason) = self.mistake.take() {
            return Err(Error::Request { target, reason });
        }
        let uri = self.uri()?;
        Box::pin(call::run(self, uri)).await
    }

    pub(super) fn repeatable(&self) -> retry::Repeatable {
        retry::Repeatable {
            is_replayable: matches!(self.body, RequestBody::Bytes(_)),
            is_idempotent: self.is_idempotent,
        }
    }

    /// The URL to call.
    fn uri(&self) -> Result<Uri> {
        let config = &self.client.0.config;
        let wrong = |reason: &str| Error::Request { target: config.name, reason: reason.to_owned() };
        let Some(base) = &config.base else {
            let uri: Uri = self.place.parse().map_err(|_| wrong("wanted a whole URL"))?;
            let is_insecure = config.any.as_ref().is_some_and(|any| any.is_insecure);
            let is_internal = config.any.as_ref().is_some_and(|any| any.is_internal);
            let uri = if is_internal { without_user(uri) } else { uri };
            let has_user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
            return match uri.scheme_str() {
                _ if uri.host().is_none() || has_user => {
                    Err(wrong("wanted a URL with a host, and without a user"))
                }
                Some("https") => Ok(uri),
                Some("http") if is_insecure => Ok(uri),
                _ => Err(wrong("wanted an https:// URL (see allow_insecure)")),
            };
        };
        // Without the slash, the text would be the rest of the host.
        if !self.place.starts_with('/') {
            return Err(wrong("wanted a path that begins with a slash"));
        }
        let path = format!("{}{}", base.path().trim_end_matches('/'), self.place);
        let path =
            PathAndQuery::try_from(path).map_err(|_| wrong("the path has characters that no path has"))?;
        let mut parts = base.clone().into_parts();
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).map_err(|_| wrong("the path cannot be used"))
    }
}

/// Removes the user of a URL that an operator has written: it is not sent.
fn without_user(uri: Uri) -> Uri {
    let host = uri.authority().and_then(|authority| authority.as_str().rsplit_once('@'));
    let host = host.map(|(_, host)| host.to_owned());
    host.map_or(uri.clone(), |host| with_authority(uri, &host))
}

/// Replaces the host and the port of a URL; one that is no authority changes nothing.
pub(super) fn with_authority(uri: Uri, authority: &str) -> Uri {
    let Ok(authority) = authority.parse() else { return uri };
    let mut parts = uri.clone().into_parts();
    parts.authority = Some(authority);
    Uri::from_parts(parts).unwrap_or(uri)
}
