//! The rules for a message: RFC 8030, 8188, 8291 and 8292, checked as strictly as any push service does. Status and
//! error numbers are those of Mozilla's autopush, where it has one for the case.

use std::time::SystemTime;

use http::request::Parts;
use http::{HeaderMap, HeaderName, StatusCode, Version, header};
use perennial_webpush::{Keys, Topic, Urgency, verify};

/// Longest body, in bytes: every service must take this size (RFC 8030, section 7.2), and some take no more.
pub(super) const MAX_BODY: usize = 4096;
/// Length of the header, in bytes: salt, record size, length of the key id, key id (RFC 8188, section 2.1).
const HEADER: usize = 16 + 4 + 1 + 65;

/// A message that keeps the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Push {
    /// The last part of the endpoint.
    pub token: String,
    /// The time to live, in seconds.
    pub ttl: u32,
    /// The urgency.
    pub urgency: Urgency,
    /// The topic, by which it replaces a waiting message.
    pub topic: Option<String>,
    /// The VAPID key that it was signed with.
    pub vapid_key: Vec<u8>,
    /// The `Authorization` header as it came.
    pub authorization: String,
    /// The `Content-Type` header of the payload.
    pub content_type: Option<String>,
    /// The length of the body.
    pub bytes: usize,
    /// The version of HTTP that it came over.
    pub version: Version,
}

/// A message that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Status of the answer.
    pub status: StatusCode,
    /// Number of autopush for the case.
    pub errno: u16,
    /// The rule that it broke.
    pub message: String,
}

impl Refusal {
    pub(super) fn new(status: u16, errno: u16, message: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, errno, message: message.into() }
    }
}

/// Checks a message to `token` at `origin`, where only `vapid_key` may send if there is one.
pub(super) fn check(
    token: &str,
    head: &Parts,
    body: &[u8],
    origin: &str,
    vapid_key: Option<&[u8]>,
    now: SystemTime,
) -> Result<Push, Refusal> {
    let headers = &head.headers;
    let authorization = single(headers, &header::AUTHORIZATION)
        .map_err(|many| Refusal::new(401, 109, many))?
        .ok_or_else(|| Refusal::new(401, 109, "no Authorization"))?;
    let claims =
        verify(authorization, origin, now).map_err(|error| Refusal::new(401, 109, error.to_string()))?;
    if vapid_key.is_some_and(|key| key != claims.key) {
        return Err(Refusal::new(401, 109, "the subscription was made with another key"));
    }
    let push = Push {
        token: token.to_owned(),
        ttl: ttl(headers)?,
        urgency: urgency(headers)?,
        topic: topic(headers)?,
        authorization: authorization.to_owned(),
        content_type: single(headers, &header::CONTENT_TYPE).ok().flatten().map(str::to_owned),
        bytes: body.len(),
        vapid_key: claims.key,
        version: head.version,
    };
    encoding(headers, body, &push.vapid_key)?;
    Ok(push)
}

/// Reads the value of a header that may occur once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, String> {
    let mut values = headers.get_all(name).iter();
    let value =
        values.next().map(|value| value.to_str().map_err(|_| format!("{name} is no text"))).transpose()?;
    if values.next().is_some() {
        return Err(format!("{name} stands there twice"));
    }
    Ok(value)
}

fn bad(errno: u16) -> impl Fn(String) -> Refusal {
    move |message| Refusal::new(400, errno, message)
}

/// Reads the TTL (RFC 8030, section 5.2).
fn ttl(headers: &HeaderMap) -> Result<u32, Refusal> {
    let ttl = single(headers, &HeaderName::from_static("ttl")).map_err(bad(111))?;
    let ttl = ttl.ok_or_else(|| Refusal::new(400, 111, "no TTL"))?;
    if ttl.starts_with('-') {
        return Err(Refusal::new(400, 114, "the TTL is below 0"));
    }
    if ttl.is_empty() || !ttl.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Refusal::new(400, 111, "the TTL is no whole number"));
    }
    Ok(ttl.parse().unwrap_or(u32::MAX))
}

/// Reads the urgency (RFC 8030, section 5.3).
fn urgency(headers: &HeaderMap) -> Result<Urgency, Refusal> {
    let urgency = single(headers, &HeaderName::from_static("urgency")).map_err(bad(112))?;
    urgency.map_or(Ok(Urgency::Normal), str::parse).map_err(|error| Refusal::new(400, 112, error.to_string()))
}

/// Reads the topic (RFC 8030, section 5.4, and Apple's reading of it).
fn topic(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let topic = single(headers, &HeaderName::from_static("topic")).map_err(bad(113))?;
    let topic = topic.map(str::parse::<Topic>).transpose();
    let topic = topic.map_err(|error| Refusal::new(400, 113, error.to_string()))?;
    Ok(topic.map(|topic| topic.as_str().to_owned()))
}

/// Checks the encoding (RFC 8188, section 2, as narrowed by RFC 8291, section 4).
fn encoding(headers: &HeaderMap, body: &[u8], vapid_key: &[u8]) -> Result<(), Refusal> {
    let wrong = |message: &str| Err(Refusal::new(400, 110, message));
    let encoding = single(headers, &header::CONTENT_ENCODING).map_err(bad(110))?;
    if headers.contains_key("crypto-key") || headers.contains_key("encryption") {
        return wrong("Crypto-Key and Encryption belong to an older encoding");
    }
    if body.is_empty() {
        return if encoding.is_none() { Ok(()) } else { wrong("a Content-Encoding without a body") };
    }
    if encoding != Some("aes128gcm") {
        return wrong("Content-Encoding is not aes128gcm");
    }
    if body.len() > MAX_BODY {
        return Err(Refusal::new(413, 104, "the body has more than 4096 bytes"));
    }
    if body.len() < HEADER + 1 + 16 {
        return wrong("the body is shorter than its header, a delimiter and a tag");
    }
    let record_size = u32::from_be_bytes([body[16], body[17], body[18], body[19]]) as usize;
    if record_size < 18 {
        return wrong("the record size is below 18");
    }
    if record_size <= body.len() - HEADER {
        return wrong("the record size does not exceed the message with its delimiter and tag");
    }
    if body[20] != 65 {
        return wrong("the key id has not 65 bytes");
    }
    let sender = &body[21..HEADER];
    if Keys::from_bytes(sender, &[0; 16]).is_err() {
        return wrong("the key id is not a point on the curve");
    }
    // RFC 8292, section 3.2.
    if sender == vapid_key {
        return wrong("the message is encrypted with the VAPID key");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_a_service_would_refuse_are_refused() {
        let headers = |pairs: &[(&'static str, &str)]| -> HeaderMap {
            let pairs =
                pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
            pairs.collect()
        };
        for (ttl_value, errno) in [("", 111), ("1.5", 111), ("-1", 114), ("soon", 111), ("+5", 111)] {
            assert_eq!(ttl(&headers(&[("ttl", ttl_value)])).unwrap_err().errno, errno, "{ttl_value}");
        }
        assert_eq!(ttl(&headers(&[])).unwrap_err().errno, 111);
        assert_eq!(ttl(&headers(&[("ttl", "60")])), Ok(60));
        assert!(urgency(&headers(&[("urgency", "bogus")])).is_err());
        let mut twice = headers(&[("urgency", "low")]);
        twice.append("urgency", "low".parse().unwrap());
        assert!(urgency(&twice).is_err());
        assert!(topic(&headers(&[("topic", "new_event")])).is_err());
        assert_eq!(topic(&headers(&[("topic", "newEvent")])), Ok(Some("newEvent".to_owned())));
    }

    #[test]
    fn bodies_that_break_a_rule_are_refused() {
        let keys = perennial_webpush::ReceiverKeys::generate().unwrap().keys();
        let body = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut body = vec![7; 16];
            body.extend(4096_u32.to_be_bytes());
            body.push(65);
            body.extend(keys.p256dh());
            body.extend([1; 40]);
            change(&mut body);
            body
        };
        let aes128gcm: HeaderMap =
            [(header::CONTENT_ENCODING, "aes128gcm".parse().unwrap())].into_iter().collect();
        let refused = |body: &[u8], vapid_key: &[u8]| {
            encoding(&aes128gcm, body, vapid_key).err().map(|error| error.message)
        };
        let good = body(&|_| {});
        assert_eq!(refused(&good, &[4; 65]), None);
        assert_eq!(refused(&good, keys.p256dh()).unwrap(), "the message is encrypted with the VAPID key");
        assert_eq!(
            refused(&good[..90], &[]).unwrap(),
            "the body is shorter than its header, a delimiter and a tag"
        );
        let size = |size: u32| {
            refused(&body(&|body| body[16..20].copy_from_slice(&size.to_be_bytes())), &[]).unwrap()
        };
        assert_eq!(size(17), "the record size is below 18");
        assert_eq!(size(40), "the record size does not exceed the message with its delimiter and tag");
        assert_eq!(refused(&body(&|body| body[20] = 64), &[]).unwrap(), "the key id has not 65 bytes");
        let off_curve = body(&|body| body[85] ^= 1);
        assert_eq!(refused(&off_curve, &[]).unwrap(), "the key id is not a point on the curve");
        assert_eq!(refused(&vec![0; 4097], &[]).unwrap(), "the body has more than 4096 bytes");
        assert!(encoding(&HeaderMap::new(), &good, &[]).is_err(), "no Content-Encoding");
        assert!(encoding(&aes128gcm, &[], &[]).is_err(), "nothing to be encoded");
    }
}
