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

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body, to the end.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON; null when it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The fields that a problem names.
    pub fn fields(&self) -> Vec<String> {
        let errors = self.json()["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().filter_map(|error| error["field"].as_str().map(str::to_owned)).collect()
    }
}

impl Client {
    /// A client of `base`, such as `http://127.0.0.1:8080`.
    pub fn new(base: &str) -> Self {
        let http = HyperClient::builder(TokioExecutor::new()).build_http();
        Self { base: base.to_owned(), key: None, headers: Vec::new(), http }
    }

    /// The same over HTTP/2 with prior knowledge.
    pub fn http2(base: &str) -> Self {
        let http = HyperClient::builder(TokioExecutor::new()).http2_only(true).build_http();
        Self { http, ..Self::new(base) }
    }

    /// The same with a key, or another one.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    /// The same without a key.
    pub fn without_key(&self) -> Self {
        Self { key: None, ..self.clone() }
    }

    /// The same with one more header in every request.
    pub fn with_header(&self, name: &str, value: &str) -> Self {
        let mut headers = self.headers.clone();
        headers.push((name.to_owned(), value.to_owned()));
        Self { headers, ..self.clone() }
    }

    /// Where it sends.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Asks for something.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, None).await
    }

    /// Sends JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, Some(body)).await
    }

    /// Has something deleted.
    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::PATCH, path, Some(body)).await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str, body: Option<&Value>) -> Answer {
        self.send(Method::DELETE, path, body).await
    }

    /// Sends JSON, if any.
    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        let media_type = body.map(|_| "application/json");
        let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        self.send_bytes(method, path, media_type, body).await
    }

    /// Sends anything.
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

    /// Sends anything, and returns an error when there is no answer.
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

/// Whether a request was not looked at, for the server had said that it leaves: GOAWAY was on its way when the
/// client chose that connection. It may be sent again (RFC 9113, section 6.8), and every client does.
pub fn crossed_goaway(error: &anyhow::Error) -> bool {
    error.chain().any(|why| why.to_string().contains("not a result of an error"))
}

/// A TLS handshake with `localhost`, whose certificate is signed by the authority in `ca`.
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
