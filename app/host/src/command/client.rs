//! The client with which commands call the running server.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::request::Builder;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Maximum length of an answer, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A client of one server.
#[derive(Clone, Debug)]
pub struct Client {
    timeout: Duration,
    base: String,
    key: Option<String>,
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// The server refused the request (4xx), and would refuse it again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

/// An answer of the server, with any status.
#[derive(Debug)]
pub struct ServerAnswer {
    /// The status.
    pub status: StatusCode,
    /// The body; null if it is not JSON.
    pub body: Value,
}

impl Client {
    /// Makes a client of the server at `base`, such as `http://127.0.0.1:8080`; `timeout` is the limit for each answer.
    pub fn new(base: &str, key: Option<String>, timeout: Duration) -> anyhow::Result<Self> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let tls = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider);
        let connector = tls.context("no certificate authorities")?.https_or_http().enable_http1().build();
        let http = HttpClient::builder(TokioExecutor::new()).build(connector);
        Ok(Self { timeout, base: base.trim_end_matches('/').to_owned(), key, http })
    }

    /// Sends a request, with a JSON body if there is one, and returns the answer with any status.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        extra: Option<(&str, &str)>,
    ) -> anyhow::Result<ServerAnswer> {
        let mut request = self.request(method, path)?;
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some((name, value)) = extra {
            request = request.header(name, value);
        }
        self.send(request, Bytes::from(body.map(Value::to_string).unwrap_or_default())).await
    }

    /// Posts lines of JSON, and returns the answer with any status.
    pub async fn post_lines(&self, path: &str, lines: Bytes) -> anyhow::Result<ServerAnswer> {
        let request = self.request(Method::POST, path)?;
        self.send(request.header(header::CONTENT_TYPE, "application/x-ndjson"), lines).await
    }

    fn request(&self, method: Method, path: &str) -> anyhow::Result<Builder> {
        let uri: Uri =
            format!("{}{path}", self.base).parse().with_context(|| format!("{} is no URL", self.base))?;
        let request = Request::builder().method(method).uri(uri);
        Ok(match &self.key {
            Some(key) => request.header(header::AUTHORIZATION, format!("Bearer {key}")),
            None => request,
        })
    }

    async fn send(&self, request: Builder, body: Bytes) -> anyhow::Result<ServerAnswer> {
        tokio::time::timeout(self.timeout, self.answer(request.body(Full::new(body))?))
            .await
            .with_context(|| format!("{} does not answer", self.base))?
    }

    async fn answer(&self, request: Request<Full<Bytes>>) -> anyhow::Result<ServerAnswer> {
        let response =
            self.http.request(request).await.with_context(|| format!("cannot reach {}", self.base))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error)).context("the answer broke off")?.to_bytes();
        Ok(ServerAnswer { status, body: serde_json::from_slice(&body).unwrap_or_default() })
    }

    /// Sends a request, and returns the body of a successful answer; any other status is an error.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        self.call_with(method, path, body, None).await
    }

    /// Does the same as [`call`](Self::call), with one more header.
    pub async fn call_with(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        extra: Option<(&str, &str)>,
    ) -> anyhow::Result<Value> {
        self.ask(method, path, body, extra).await?.success()
    }
}

impl ServerAnswer {
    /// Returns the body of a successful answer; any other status is an error.
    pub fn success(self) -> anyhow::Result<Value> {
        let Self { status, body } = self;
        if status.is_success() {
            return Ok(body);
        }
        let part = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let errors = body["errors"].as_array().into_iter().flatten();
        let errors: Vec<String> =
            errors.map(|error| format!("{}: {}", part(error, "field"), part(error, "wanted"))).collect();
        let text = match (errors.as_slice(), part(&body, "detail")) {
            ([], detail) if detail.is_empty() => {
                format!("the server answered {status}, and not as a Perennial would: is it one?")
            }
            ([], detail) => detail,
            (errors, _) => errors.join("\n"),
        };
        if status.is_client_error() {
            return Err(Refused(text).into());
        }
        bail!(text)
    }
}
