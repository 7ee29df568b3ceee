//! The message: a payload and the three headers of RFC 8030, each valid by construction.

use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;

use crate::connect::HttpVersion;

/// The longest payload, in bytes: the rest of the 4096 that every push service must take (RFC 8030, section 7.2)
/// after the header of 86, the delimiter of 1 and the tag of 16 (RFC 8291, section 4).
pub const MAX_PAYLOAD: usize = 3993;

/// Reason why a message cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("the payload has {0} bytes, at most {MAX_PAYLOAD} are possible")]
    TooLong(usize),
    /// The topic does not have 1 to 32 characters of the base64url alphabet (RFC 8030, section 5.4).
    #[error("a topic has 1 to 32 characters out of A-Z a-z 0-9 - _")]
    TopicAlphabet,
    /// The topic has a length that Apple refuses: it decodes topics as base64url and answers 400 `BadWebPushTopic`.
    #[error(
        "a topic of this length is refused by Apple, which decodes it: its length must not leave a remainder of 1 when divided by 4"
    )]
    TopicLength,
    /// The urgency is not one of the four words of RFC 8030, section 5.3.
    #[error("urgency is one of very-low, low, normal, high")]
    Urgency,
}

/// The plaintext of a message: up to [`MAX_PAYLOAD`] bytes. An empty payload is sent without a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload(Bytes);

impl Payload {
    /// Makes a payload of up to [`MAX_PAYLOAD`] bytes.
    ///
    /// # Errors
    /// When there are more bytes.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, MessageError> {
        let bytes = bytes.into();
        if bytes.len() > MAX_PAYLOAD {
            return Err(MessageError::TooLong(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// How soon a device should be woken for a message (RFC 8030, section 5.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, strum::IntoStaticStr, strum::EnumString)]
#[strum(serialize_all = "kebab-case")]
#[strum(parse_err_ty = MessageError, parse_err_fn = no_urgency)]
pub enum Urgency {
    /// For a device on power and Wi-Fi. Example: advertisements.
    VeryLow,
    /// For a device on power or Wi-Fi. Example: topic updates.
    Low,
    /// For a device on neither power nor Wi-Fi. Example: chat.
    #[default]
    Normal,
    /// For a device even when its battery is low. Examples: a call, a password reset.
    High,
}

impl Urgency {
    /// The value of the header `Urgency`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// A name under which a later message replaces one that is still waiting (RFC 8030, section 5.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic(String);

impl Topic {
    /// The topic as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn no_urgency(_: &str) -> MessageError {
    MessageError::Urgency
}

impl FromStr for Topic {
    type Err = MessageError;

    fn from_str(text: &str) -> Result<Self, MessageError> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if text.is_empty() || text.len() > 32 || !text.bytes().all(known) {
            return Err(MessageError::TopicAlphabet);
        }
        if text.len() % 4 == 1 {
            return Err(MessageError::TopicLength);
        }
        Ok(Self(text.to_owned()))
    }
}

/// One message, for any number of subscriptions.
#[derive(Clone, Debug)]
pub struct Message {
    pub(crate) payload: Payload,
    pub(crate) ttl: u32,
    pub(crate) urgency: Urgency,
    pub(crate) topic: Option<HeaderValue>,
    pub(crate) bulk: bool,
    pub(crate) http: HttpVersion,
    pub(crate) content_type: &'static str,
}

impl Message {
    /// A message of normal urgency that the push service need not keep: TTL 0.
    pub fn new(payload: Payload) -> Self {
        Self {
            payload,
            ttl: 0,
            urgency: Urgency::default(),
            topic: None,
            bulk: false,
            http: HttpVersion::Auto,
            content_type: "application/octet-stream",
        }
    }

    /// Sets how long the push service keeps the message for a device that is offline, in whole seconds.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
        self
    }

    /// Sets how soon the device should be woken.
    #[must_use]
    pub fn urgency(mut self, urgency: Urgency) -> Self {
        self.urgency = urgency;
        self
    }

    /// Sets whether the message is one of many. Such messages leave a quarter of a push service's permits to others.
    #[must_use]
    pub fn bulk(mut self, bulk: bool) -> Self {
        self.bulk = bulk;
        self
    }

    /// Returns true when the message is one of many.
    pub fn is_bulk(&self) -> bool {
        self.bulk
    }

    /// Sets the HTTP version; [`HttpVersion::Auto`] means the version of the sender's settings.
    #[must_use]
    pub fn http(mut self, http: HttpVersion) -> Self {
        self.http = http;
        self
    }

    /// Lets a browser show the message without a service worker: Declarative Web Push (Push API, section 3.3).
    #[must_use]
    pub fn declarative(mut self) -> Self {
        self.content_type = "application/notification+json";
        self
    }

    /// The same message with another payload.
    #[must_use]
    pub fn with_payload(&self, payload: Payload) -> Self {
        Self { payload, ..self.clone() }
    }

    /// Sets the topic: the message replaces a waiting one with the same topic.
    #[must_use]
    pub fn topic(mut self, topic: &Topic) -> Self {
        self.topic = HeaderValue::from_str(topic.as_str()).ok();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_that_a_service_would_refuse_are_refused_here() {
        for good in ["ab", "abc", "abcd", "new-event_1", &"x".repeat(32)] {
            assert_eq!(good.parse::<Topic>().unwrap().as_str(), good);
        }
        for alphabet in ["", "a b", "ä", "a.b", "ab==", &"x".repeat(33)] {
            assert_eq!(alphabet.parse::<Topic>(), Err(MessageError::TopicAlphabet), "{alphabet}");
        }
        for apple in ["a", "abcde", "new_event", &"x".repeat(13)] {
            assert_eq!(apple.parse::<Topic>(), Err(MessageError::TopicLength), "{apple}");
        }
    }

    #[test]
    fn payloads_end_at_3993_bytes() {
        assert!(Payload::new(vec![0; MAX_PAYLOAD]).is_ok());
        assert_eq!(Payload::new(vec![0; MAX_PAYLOAD + 1]), Err(MessageError::TooLong(3994)));
    }

    #[test]
    fn urgency_has_four_words() {
        for word in ["very-low", "low", "normal", "high"] {
            assert_eq!(word.parse::<Urgency>().unwrap().as_str(), word);
        }
        assert_eq!("High".parse::<Urgency>(), Err(MessageError::Urgency));
    }
}
