//! How values stand in stores: JSON, and times in milliseconds since 1970.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

/// Returns JSON for a column. The types that are written here always serialize.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Reads what [`json`] wrote. Returns the default without a text, and for a text that does not fit.
pub(crate) fn read_json<T: DeserializeOwned + Default>(text: Option<String>) -> T {
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Returns a stored payload as JSON, for operators; `None` if it is no JSON.
pub(crate) fn from_json(payload: String) -> Option<Box<RawValue>> {
    RawValue::from_string(payload).ok()
}

/// Returns the time now by this machine's clock, in milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// Returns the timestamp of a time in milliseconds since 1970.
pub(crate) fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or_default()
}

/// Returns a wait in milliseconds.
pub(crate) fn millis(wait: Duration) -> i64 {
    later(0, wait)
}

/// Returns `now` plus `wait` in milliseconds, but no later than a timestamp can be.
pub(crate) fn later(now: i64, wait: Duration) -> i64 {
    const END: i64 = 253_402_300_799_000;
    now.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)).min(END)
}
