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
    // The last second: its last milliseconds cannot be read back.
    let end = Timestamp::MAX.as_second() * 1000;
    now.saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX)).min(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_without_end_is_read_back_as_the_last_timestamp_and_not_as_1970() {
        let due = timestamp(later(now_ms(), Duration::MAX));
        assert_eq!(due.as_second(), Timestamp::MAX.as_second());
    }
}
