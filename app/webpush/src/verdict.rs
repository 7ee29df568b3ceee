//! The meaning of a push service's answer for the message and for the subscription, as one pure function.

use std::time::{Duration, SystemTime};

use http::header::{HeaderMap, RETRY_AFTER};
use http::{HeaderName, StatusCode};

/// The longest wait that a service may ask for. A service that asks for a day has a fault of its own.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Outcome of one attempt to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The push service took the message.
    Delivered,
    /// The subscription has ended: forget it.
    Gone,
    /// The service does not accept this key for this subscription. This is often a fault of the settings and
    /// sometimes a passing fault of the service: the subscription stays.
    Unauthorized,
    /// The message is too long for this service.
    TooLarge,
    /// The service refuses this message; another message may be accepted.
    Rejected,
    /// The endpoint, or an address behind it, must not be sent to.
    Forbidden,
    /// The host does not exist at present. It may come back, unless it is below `.invalid`: browsers hand out such
    /// hosts after unsubscribing.
    Unresolvable,
    /// The message was not sent: messages to its push service are held for this long.
    Held(Duration),
    /// Nothing is decided: try again, after the wait when there is one.
    Retry {
        /// Wait that the service asked for, at most [`MAX_RETRY_AFTER`].
        after: Option<Duration>,
        /// True when the service asked us to slow down, rather than being out of order.
        throttled: bool,
    },
}

const WNS_STATUS: HeaderName = HeaderName::from_static("x-wns-notificationstatus");

/// Texts in the body of a 400 which mean that the subscription was made with another key: of FCM and of Apple.
const OTHER_KEY: [&str; 2] = ["UnauthorizedRegistration", "VapidPkHashMismatch"];

/// The verdict on an answer of `host`. `body` is the beginning of the answer's body; `now` serves the date in
/// `Retry-After`.
pub fn verdict(host: &str, status: StatusCode, headers: &HeaderMap, body: &[u8], now: SystemTime) -> Verdict {
    let wns = is_windows(host);
    let retry = |throttled| Verdict::Retry { after: retry_after(headers, now), throttled };
    match status.as_u16() {
        // WNS answers 200 even when it drops the message.
        200 if wns && headers.get(WNS_STATUS).is_some_and(|status| status == "dropped") => Verdict::Rejected,
        200 if wns && headers.get(WNS_STATUS).is_some_and(|status| status == "channelthrottled") => {
            retry(true)
        }
        200..=299 => Verdict::Delivered,
        404 | 410 => Verdict::Gone,
        401 | 403 => Verdict::Unauthorized,
        400 if names_another_key(body) => Verdict::Unauthorized,
        413 => Verdict::TooLarge,
        // WNS answers 406 instead of 429.
        406 if wns => retry(true),
        429 => retry(true),
        408 | 500..=599 => retry(false),
        // Redirects are not followed: their target was never checked.
        _ => Verdict::Rejected,
    }
}

fn names_another_key(body: &[u8]) -> bool {
    OTHER_KEY.iter().any(|reason| body.windows(reason.len()).any(|part| part == reason.as_bytes()))
}

/// Returns true when a host belongs to the Windows Notification Service (WNS).
pub(crate) fn is_windows(host: &str) -> bool {
    host.ends_with(".notify.windows.com")
}

/// Reads `Retry-After`: delta-seconds or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const MOZILLA: &str = "updates.push.services.mozilla.com";
    const WINDOWS: &str = "wns2-par02p.notify.windows.com";

    fn on(host: &str, status: u16, headers: &[(&'static str, &str)]) -> Verdict {
        on_body(host, status, headers, b"")
    }

    fn on_body(host: &str, status: u16, headers: &[(&'static str, &str)], body: &[u8]) -> Verdict {
        let headers =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        // Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110's examples.
        verdict(
            host,
            StatusCode::from_u16(status).unwrap(),
            &headers.collect(),
            body,
            UNIX_EPOCH + Duration::from_secs(784_111_777),
        )
    }

    fn again(after: Option<u64>, throttled: bool) -> Verdict {
        Verdict::Retry { after: after.map(Duration::from_secs), throttled }
    }

    #[test]
    fn success_is_delivered() {
        for status in [200, 201, 202, 204] {
            assert_eq!(on(MOZILLA, status, &[]), Verdict::Delivered, "{status}");
        }
    }

    #[test]
    fn redirects_are_refused() {
        for status in [301, 302, 303, 307, 308] {
            assert_eq!(
                on(MOZILLA, status, &[("location", "http://169.254.169.254/")]),
                Verdict::Rejected,
                "{status}"
            );
        }
    }

    #[test]
    fn a_bad_request_is_permanent_for_the_message() {
        for status in [400, 402, 405, 406, 415, 422, 451] {
            assert_eq!(on(MOZILLA, status, &[]), Verdict::Rejected, "{status}");
        }
    }

    #[test]
    fn authentication_failures_keep_the_subscription() {
        assert_eq!(on(MOZILLA, 401, &[]), Verdict::Unauthorized);
        assert_eq!(on(MOZILLA, 403, &[]), Verdict::Unauthorized);
        for body in [&br#"{"reason":"VapidPkHashMismatch"}"#[..], b"<HTML><TITLE>UnauthorizedRegistration"] {
            assert_eq!(on_body("web.push.apple.com", 400, &[], body), Verdict::Unauthorized);
        }
        let topic = br#"{"reason":"BadWebPushTopic"}"#;
        assert_eq!(on_body("web.push.apple.com", 400, &[], topic), Verdict::Rejected);
    }

    #[test]
    fn not_found_and_gone_end_the_subscription() {
        assert_eq!(on(MOZILLA, 404, &[]), Verdict::Gone);
        assert_eq!(on(MOZILLA, 410, &[]), Verdict::Gone);
    }

    #[test]
    fn timeouts_and_server_errors_are_tried_again() {
        for status in [408, 500, 502, 503, 504] {
            assert_eq!(on(MOZILLA, status, &[]), again(None, false), "{status}");
        }
        assert_eq!(on(MOZILLA, 503, &[("retry-after", "120")]), again(Some(120), false));
    }

    #[test]
    fn too_many_requests_is_throttling() {
        assert_eq!(on(MOZILLA, 429, &[]), again(None, true));
        assert_eq!(on(MOZILLA, 429, &[("retry-after", " 7 ")]), again(Some(7), true));
    }

    #[test]
    fn a_date_is_a_wait_too_and_no_wait_is_longer_than_an_hour() {
        let date = |text| on(MOZILLA, 429, &[("retry-after", text)]);
        assert_eq!(date("Sun, 06 Nov 1994 08:50:07 GMT"), again(Some(30), true));
        assert_eq!(date("Sun, 06 Nov 1994 08:00:00 GMT"), again(Some(0), true), "a date that has passed");
        assert_eq!(date("Mon, 07 Nov 1994 08:00:00 GMT"), again(Some(3600), true));
        assert_eq!(date("86400"), again(Some(3600), true));
        assert_eq!(date("soon"), again(None, true));
    }

    #[test]
    fn windows_throttles_with_406_and_drops_with_200() {
        assert_eq!(on(WINDOWS, 406, &[("retry-after", "60")]), again(Some(60), true));
        assert_eq!(on(WINDOWS, 200, &[("x-wns-notificationstatus", "received")]), Verdict::Delivered);
        assert_eq!(on(WINDOWS, 200, &[("x-wns-notificationstatus", "dropped")]), Verdict::Rejected);
        assert_eq!(on(WINDOWS, 200, &[("x-wns-notificationstatus", "channelthrottled")]), again(None, true));
        assert_eq!(on(MOZILLA, 200, &[("x-wns-notificationstatus", "dropped")]), Verdict::Delivered);
    }

    #[test]
    fn too_large_is_reported() {
        assert_eq!(on(MOZILLA, 413, &[]), Verdict::TooLarge);
    }
}
