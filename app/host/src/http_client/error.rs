//! Why a call has no answer.

use std::time::Duration;

use http::StatusCode;
use perennial_runtime::breaker::Open;

/// Why a call has no answer, or none that can be used. Texts have the name of the target, and no part of a URL but its
/// host: paths and queries may be secrets.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request cannot be built.
    #[error("{target}: {reason}")]
    Request {
        /// Name of the target.
        target: &'static str,
        /// What was wanted.
        reason: String,
    },
    /// The URL leads to an address that is not public.
    #[error("{target}: {host} is not on the public internet")]
    Forbidden {
        /// Name of the target.
        target: &'static str,
        /// Host of the URL.
        host: String,
    },
    /// Too many calls run already.
    #[error("{target}: too many calls run at once")]
    Busy {
        /// Name of the target.
        target: &'static str,
    },
    /// The circuit breaker is open.
    #[error(transparent)]
    Open(#[from] Open),
    /// No connection could be made. Nothing was sent.
    #[error("{target}: no connection can be made")]
    Connect {
        /// Name of the target.
        target: &'static str,
        /// Reason of the last attempt.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection broke off. The server may have done what was asked.
    #[error("{target}: the connection broke off")]
    Broken {
        /// Name of the target.
        target: &'static str,
        /// Reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There was no whole answer in time. The server may have done what was asked.
    #[error("{target}: no answer within {limit:?}")]
    Timeout {
        /// Name of the target.
        target: &'static str,
        /// The time limit.
        limit: Duration,
    },
    /// The server answered with a status that is no success.
    #[error("{target}: the server answered {status}: {text}")]
    Status {
        /// Name of the target.
        target: &'static str,
        /// The status.
        status: StatusCode,
        /// Beginning of the body, which often has a reason.
        text: String,
        /// Time after which the server wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The answer is longer than `targets.NAME.max_answer`.
    #[error("{target}: the answer is longer than {limit} bytes")]
    TooLong {
        /// Name of the target.
        target: &'static str,
        /// The limit, in bytes.
        limit: usize,
    },
    /// The answer is not the JSON that was wanted.
    #[error("{target}: the answer is not as wanted: {reason}")]
    Json {
        /// Name of the target.
        target: &'static str,
        /// Field and reason.
        reason: String,
    },
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns true when the same call may succeed in a moment.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Busy { .. }
            | Self::Open(_)
            | Self::Connect { .. }
            | Self::Broken { .. }
            | Self::Timeout { .. } => true,
            Self::Status { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
            }
            Self::Request { .. } | Self::Forbidden { .. } | Self::TooLong { .. } | Self::Json { .. } => false,
        }
    }

    /// Time after which another call makes sense, where that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Open(open) => Some(open.retry_after),
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
