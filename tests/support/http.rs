//! A small HTTP client.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;

use crate::soon;

/// A client of one server, with or without a key.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    key: Option<String>,
    headers: Vec<(String, String)>,
    http: HyperClient<HttpConnector, Full<Bytes>>,
}

/// An answer of a server.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status of the answer.
    pub status: StatusCode,
    /// Headers of the answer.
    pub headers: HeaderMap,
    /// Complete body of the answer.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null when the body is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Fields that a problem document names.
    pub fn fields(&self) -> Vec<String> {
        let errors = self.json()["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().filter_map(|error| error["field"].as_str().map(str::to_owned)).collect()
    }
}

impl Client {
    /// Creates a client of `base`, such as `http://127.0.0.1:8080`.
    pub fn new(base: &str) -> Self {
        let http = HyperClient::builder(TokioExecutor::new()).build_http();
        Self { base: base.to_owned(), key: None, headers: Vec::new(), http }
    }

    /// Creates a client of `base` that uses HTTP/2 with prior knowledge.
    pub fn http2(base: &str) -> Self {
        let http = HyperClient::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self { http, ..Self::new(base) }
    }

    /// Returns the same client with this API key.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    /// Returns the same client without a key.
    pub fn without_key(&self) -> Self {
        Self { key: None, ..self.clone() }
    }

    /// Returns the same client with one more header in every request.
    pub fn with_header(&self, name: &str, value: &str) -> Self {
        let mut headers = self.headers.clone();
        headers.push((name.to_owned(), value.to_owned()));
        Self { headers, ..self.clone() }
    }

    /// URL of the server.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a GET request.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, None).await
    }

    /// Sends a POST request with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, Some(body)).await
    }

    /// Sends a PATCH request with a JSON body.
    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::PATCH, path, Some(body)).await
    }

    /// Sends a DELETE request, with a JSON body if there is one.
    pub async fn delete(&self, path: &str, body: Option<&Value>) -> Answer {
        self.send(Method::DELETE, path, body).await
    }

    /// Sends a request, with a JSON body if there is one.
    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        let media_type = body.map(|_| "application/json");
        let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        self.send_bytes(method, path, media_type, body).await
    }

    /// Sends a request with any body. Panics when no answer comes.
    pub async fn send_bytes(
        &self,
        method: Method,
        path: &str,
        media_type: Option<&str>,
        body: Bytes,
    ) -> Answer {
        let what = format!("{method} {path}");
        self.try_send(method, path, media_type, body).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Sends a request with any body, and returns an error when no answer comes.
    pub async fn try_send(
        &self,
        method: Method,
        path: &str,
        media_type: Option<&str>,
        body: Bytes,
    ) -> Result<Answer, anyhow::Error> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if let Some(media_type) = media_type {
            request = request.header(header::CONTENT_TYPE, media_type);
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body))?;
        soon("an answer", async {
            let response = self.http.request(request).await?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Answer { status: parts.status, headers: parts.headers, body })
        })
        .await
    }
}

/// Returns true when the server did not process a request because it was leaving: its GOAWAY was on its way when the
/// client chose that connection. The request may be sent again (RFC 9113, section 6.8), and every client does so.
pub fn crossed_goaway(error: &anyhow::Error) -> bool {
    error.chain().any(|why| why.to_string().contains("not a result of an error"))
}

/// Makes a TLS handshake with `localhost`, whose certificate is signed by the authority in `ca`.
pub async fn tls_connect(
    stream: TcpStream,
    ca: PathBuf,
    alpn: &[&str],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_file_iter(ca).unwrap().map(Result::unwrap));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}
