//! The trace that a request belongs to: W3C Trace Context, <https://www.w3.org/TR/trace-context/>, section 3.2.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Request header in which a caller names its trace.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Response header that tells a caller the trace of its request (Trace Context, level 2, section 3.5).
pub(super) const TRACERESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// A `traceparent`: `00-`, 32 hexadecimal digits of the trace, 16 of the caller, and flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace(Box<str>);

/// Position of the trace id in a `traceparent`.
const ID: std::ops::Range<usize> = 3..35;

impl Trace {
    /// Returns the caller's trace, or a new one. The id of a new trace has the digits of the request id if that is a
    /// UUID.
    pub(super) fn of(headers: &HeaderMap, request: &str) -> Self {
        let mut named = headers.get_all(TRACEPARENT).iter();
        // Of two headers neither is believed.
        let only = named.next().filter(|_| named.next().is_none());
        let text = only.and_then(|value| value.to_str().ok());
        text.and_then(Self::parse).unwrap_or_else(|| Self::begin(request))
    }

    /// Parses a `traceparent`; `None` if it is malformed. Later versions may append further fields (section 3.2.4).
    pub fn parse(text: &str) -> Option<Self> {
        let is_hex =
            |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let is_zero = |part: &str| part.bytes().all(|byte| byte == b'0');
        let mut parts = text.split('-');
        let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lengths = [version, trace, parent, flags].map(str::len);
        let is_well_formed = lengths == [2, 32, 16, 2]
            && [version, trace, parent, flags].into_iter().all(is_hex)
            && version != "ff"
            && !is_zero(trace)
            && !is_zero(parent)
            && (version != "00" || parts.next().is_none());
        is_well_formed.then(|| Self(format!("00-{trace}-{parent}-{flags}").into()))
    }

    fn begin(request: &str) -> Self {
        let digits: String =
            request.chars().filter(char::is_ascii_hexdigit).collect::<String>().to_ascii_lowercase();
        let id = if digits.len() == 32 && request.len() == 36 { digits } else { random(32) };
        Self(format!("00-{id}-{}-01", random(16)).into())
    }

    /// Returns the id of the trace, which all its parts have.
    pub fn id(&self) -> &str {
        &self.0[ID]
    }

    /// Returns the `traceparent` as it is passed on.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn header(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.0).ok()
    }
}

/// Returns random hexadecimal digits, not all of them zero. They are names, not secrets.
fn random(digits: usize) -> String {
    let number = u128::from(fastrand::u64(1..)) << 64 | u128::from(fastrand::u64(1..));
    format!("{number:032x}")[32 - digits..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_callers_trace_is_kept_and_any_other_begins_with_the_request() {
        let headers = |text: &str| HeaderMap::from_iter([(TRACEPARENT, text.parse().unwrap())]);
        let request = "01a21e7b-bd29-7044-a469-5bd2101244fc";
        let kept = Trace::of(&headers(GIVEN), request);
        assert_eq!((kept.as_str(), kept.id()), (GIVEN, "4bf92f3577b34da6a3ce929d0e0e4736"));
        for none in [
            "",
            "x",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            let begun = Trace::of(&headers(none), request);
            assert_eq!(begun.id(), "01a21e7bbd297044a4695bd2101244fc", "{none}");
            assert_eq!(Trace::parse(begun.as_str()), Some(begun), "{none}");
        }
        let later = Trace::of(&headers(&format!("01{}-more", &GIVEN[2..])), request);
        assert_eq!(later.as_str(), GIVEN, "a later version");
        let two = [(TRACEPARENT, GIVEN.parse().unwrap()), (TRACEPARENT, GIVEN.parse().unwrap())];
        let mut both = HeaderMap::new();
        two.into_iter().for_each(|(name, value)| _ = both.append(name, value));
        assert_ne!(Trace::of(&both, request).as_str(), GIVEN);
        let named = Trace::of(&HeaderMap::new(), "order-4711");
        assert_eq!(Trace::parse(named.as_str()), Some(named), "whatever the request is called");
    }
}
