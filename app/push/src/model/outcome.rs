//! The final outcome of a notification for one subscription.

use perennial_webpush::Verdict;

/// The outcomes by which deliveries are counted. Their counts add up to the audience.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    strum::IntoStaticStr,
    strum::EnumString,
    strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
pub(crate) enum Outcome {
    /// The push service took it.
    Delivered,
    /// The subscription had ended (404, 410), and was deleted.
    Gone,
    /// The push service refused this message (400 and the like).
    Rejected,
    /// The push service refused our key for this subscription (401, 403).
    Unauthorized,
    /// The message was too long for this push service (413).
    TooLarge,
    /// The endpoint, or an address behind it, must not be sent to.
    Forbidden,
    /// The push service was out of order, asked to wait or had no address in every attempt.
    Unreachable,
    /// The time to live ended before the message could be tried again.
    Expired,
    /// A value that the text needs is missing in the subscription's metadata.
    Incomplete,
    /// The notification was cancelled before this subscription was tried.
    Cancelled,
    /// A failure of this server: the job that should have sent the message was given up.
    Failed,
}

impl Outcome {
    /// The word for the outcome, in the store and in answers.
    pub(crate) fn as_str(self) -> &'static str {
        self.into()
    }

    /// The outcome that a word stands for.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        word.parse().ok()
    }

    /// The outcome of a final verdict; `None` when the message is to be tried again.
    pub(crate) fn of(verdict: Verdict) -> Option<Self> {
        match verdict {
            Verdict::Delivered => Some(Self::Delivered),
            Verdict::Gone => Some(Self::Gone),
            Verdict::Rejected => Some(Self::Rejected),
            Verdict::Unauthorized => Some(Self::Unauthorized),
            Verdict::TooLarge => Some(Self::TooLarge),
            Verdict::Forbidden => Some(Self::Forbidden),
            Verdict::Unresolvable | Verdict::Retry { .. } | Verdict::Held(_) => None,
        }
    }
}
