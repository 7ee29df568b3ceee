//! The answer of a server, and its body.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::response::Parts;
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::call::{RunningCall, retry_after};
use super::error::{Error, Result};

/// Maximum length of the text of an answer in an error, in bytes.
const TEXT: usize = 300;

/// The answer of a server. The call counts as running until it drops, or its body has been read.
pub struct HttpAnswer {
    target: &'static str,
    parts: Parts,
    body: Incoming,
    /// Deadline for the body, and the time limit that it comes from.
    deadline: (Instant, Duration),
    /// Maximum length of a body that is read into memory, in bytes.
    limit: usize,
    running: RunningCall,
}

impl fmt::Debug for HttpAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpAnswer")
            .field("target", &self.target)
            .field("status", &self.parts.status)
            .finish_non_exhaustive()
    }
}

impl HttpAnswer {
    pub(super) fn new(
        target: &'static str,
        parts: Parts,
        body: Incoming,
        deadline: (Instant, Duration),
        limit: usize,
        running: RunningCall,
    ) -> Self {
        Self { target, parts, body, deadline, limit, running }
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.parts.status
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// The time of `Retry-After`, after which the server wants to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        retry_after(&self.parts.headers)
    }

    /// Returns the answer if its status is a success.
    ///
    /// # Errors
    /// [`Error::Status`] with the beginning of the body.
    pub async fn success(self) -> Result<Self> {
        let (target, status) = (self.target, self.parts.status);
        if status.is_success() {
            return Ok(self);
        }
        let retry_after = self.retry_after();
        let text = String::from_utf8_lossy(&self.beginning().await).into_owned();
        Err(Error::Status { target, status, text, retry_after })
    }

    /// Reads the beginning of the body, as far as it comes in time.
    async fn beginning(self) -> Vec<u8> {
        let Self { mut body, deadline: (deadline, _), .. } = self;
        let mut text = Vec::new();
        while text.len() < TEXT
            && let Ok(Some(Ok(frame))) = tokio::time::timeout_at(deadline, body.frame()).await
        {
            text.extend(frame.data_ref().into_iter().flatten());
        }
        text.truncate(TEXT);
        text
    }

    /// Reads the body into memory.
    ///
    /// # Errors
    /// When it breaks off, does not come in time, or is longer than `targets.NAME.max_answer`.
    pub async fn bytes(self) -> Result<Bytes> {
        let Self { target, body, deadline: (deadline, limit), limit: most, running, .. } = self;
        let read = tokio::time::timeout_at(deadline, Limited::new(body, most).collect()).await;
        drop(running);
        match read {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Error::TooLong { target, limit: most }),
            Ok(Err(source)) => Err(Error::Broken { target, source }),
            Err(_elapsed) => Err(Error::Timeout { target, limit }),
        }
    }

    /// Reads the body as text.
    ///
    /// # Errors
    /// See [`HttpAnswer::bytes`].
    pub async fn text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes().await?).into_owned())
    }

    /// Reads the body of a successful answer as JSON.
    ///
    /// # Errors
    /// [`Error::Status`] when the status is no success, [`Error::Json`] when the body is something else; and see
    /// [`HttpAnswer::bytes`].
    pub async fn json<T: DeserializeOwned>(self) -> Result<T> {
        let target = self.target;
        let bytes = self.success().await?.bytes().await?;
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let (field, reason) = (error.path().to_string(), error.inner().to_string());
            Error::Json { target, reason: format!("{field}: {reason}") }
        })
    }

    /// Reads the body part by part, in flat memory and of any length. Each part may take as long as the whole call
    /// (`targets.NAME.timeout`).
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send {
        let Self { target, body, deadline: (_, limit), running, .. } = self;
        let parts = body.into_data_stream();
        stream::unfold(Some((parts, running)), move |state| async move {
            let (mut parts, running) = state?;
            match tokio::time::timeout(limit, parts.next()).await {
                Ok(None) => None,
                Ok(Some(Ok(part))) => Some((Ok(part), Some((parts, running)))),
                Ok(Some(Err(error))) => Some((Err(Error::Broken { target, source: error.into() }), None)),
                Err(_elapsed) => Some((Err(Error::Timeout { target, limit }), None)),
            }
        })
    }
}
