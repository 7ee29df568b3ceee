//! The client of a program within a test.

use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde_json::Value;

/// Time limit for an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A client of a program within a test. It sends the API key that the program has made.
#[derive(Clone, Debug)]
pub struct TestClient {
    base: String,
    headers: HeaderMap,
    http: Client<HttpConnector, Full<Bytes>>,
}

/// An answer, with any status.
#[derive(Clone, Debug)]
pub struct TestAnswer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl TestAnswer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; null when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

impl TestClient {
    pub(super) fn new(base: String, key: Option<String>) -> Self {
        let client = Self {
            base,
            headers: HeaderMap::new(),
            http: Client::builder(TokioExecutor::new()).build(HttpConnector::new()),
        };
        match key {
            Some(key) => client.with_header("authorization", &format!("Bearer {key}")),
            None => client,
        }
    }

    /// A client that sends no key.
    #[must_use]
    pub fn without_key(mut self) -> Self {
        self.headers.remove(header::AUTHORIZATION);
        self
    }

    /// A client that sends one more header.
    ///
    /// # Panics
    /// When the header is not valid.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: &str) -> Self {
        #[expect(clippy::expect_used, reason = "a mistake of the test, which ends with it")]
        let (name, value) =
            (name.parse::<HeaderName>().expect("a name"), value.parse::<HeaderValue>().expect("a value"));
        self.headers.insert(name, value);
        self
    }

    /// Sends a GET request.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<TestAnswer> {
        self.send(Method::GET, path, None, Bytes::new()).await
    }

    /// Sends a POST request with a JSON body.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn post(&self, path: &str, body: &impl Serialize) -> anyhow::Result<TestAnswer> {
        self.with_json(Method::POST, path, body).await
    }

    /// Sends a PUT request with a JSON body.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn put(&self, path: &str, body: &impl Serialize) -> anyhow::Result<TestAnswer> {
        self.with_json(Method::PUT, path, body).await
    }

    /// Sends a DELETE request.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn delete(&self, path: &str) -> anyhow::Result<TestAnswer> {
        self.send(Method::DELETE, path, None, Bytes::new()).await
    }

    /// Sends a form as browsers do.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn post_form(&self, path: &str, form: &impl Serialize) -> anyhow::Result<TestAnswer> {
        let body = serde_urlencoded::to_string(form)?.into();
        self.send(Method::POST, path, Some("application/x-www-form-urlencoded"), body).await
    }

    async fn with_json(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<TestAnswer> {
        self.send(method, path, Some("application/json"), serde_json::to_vec(body)?.into()).await
    }

    /// Sends any request.
    ///
    /// # Errors
    /// When there is no answer within 30 seconds.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        media_type: Option<&'static str>,
        body: Bytes,
    ) -> anyhow::Result<TestAnswer> {
        let mut request =
            Request::builder().method(method).uri(format!("{}{path}", self.base)).body(Full::new(body))?;
        *request.headers_mut() = self.headers.clone();
        if let Some(media_type) = media_type {
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
        }
        let answer = async {
            let (parts, body) = self.http.request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(TestAnswer { status: parts.status, headers: parts.headers, body })
        };
        tokio::time::timeout(PATIENCE, answer).await.with_context(|| format!("no answer from {path}"))?
    }
}
