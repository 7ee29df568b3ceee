//! `Idempotency-Key`: a repeated request is answered like the first.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use perennial_server::http::problem::{FieldError, Problem};

use super::request::NotifyRequest;

/// The longest idempotency key.
const MAX_IDEMPOTENCY_KEY: usize = 255;

/// Idempotency keys of requests that are being accepted now.
#[derive(Clone, Debug, Default)]
pub(crate) struct AcceptingKeys(Arc<Mutex<HashSet<(String, String)>>>);

/// An idempotency key in use; it is released on drop.
pub(super) struct Entered {
    in_flight: AcceptingKeys,
    key: (String, String),
}

impl AcceptingKeys {
    pub(super) fn enter(&self, api_key: &str, key: &str) -> std::result::Result<Entered, Problem> {
        let key = (api_key.to_owned(), key.to_owned());
        if self.0.lock().insert(key.clone()) {
            return Ok(Entered { in_flight: self.clone(), key });
        }
        let detail = "a request with this Idempotency-Key is being accepted just now";
        Err(Problem::new(StatusCode::CONFLICT, detail).retry_after(Duration::from_secs(1)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.in_flight.0.lock().remove(&self.key);
    }
}

/// The `Idempotency-Key` of a request.
pub(super) fn idempotency_key(headers: &HeaderMap) -> std::result::Result<Option<String>, Problem> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    Ok(Some(checked_key(key.to_str().unwrap_or_default())?.to_owned()))
}

/// Checks an idempotency key.
pub(super) fn checked_key(key: &str) -> std::result::Result<&str, FieldError> {
    if !key.is_empty() && key.len() <= MAX_IDEMPOTENCY_KEY {
        return Ok(key);
    }
    Err(FieldError::new("Idempotency-Key", format!("1 to {MAX_IDEMPOTENCY_KEY} printable characters")))
}

/// The fingerprint of a request. It covers the parsed request, not its bytes: white space and the order of fields do not
/// matter.
pub(super) fn fingerprint(request: &NotifyRequest) -> [u8; 32] {
    let canonical = serde_json::to_value(request).unwrap_or_default().to_string();
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    fingerprint
}
