//! User tokens: a backend gives one to its page, so that the page may name the user of the browser.
//!
//! ```text
//! v1.EXPIRES.base64url(HMAC-SHA256(secret, "v1." SITE "." EXPIRES "." USER))
//! ```
//!
//! `EXPIRES` is in seconds since 1970, and `SITE` is the name of the site in the settings. Before `v1`, a token was the
//! HMAC of the user alone, valid for ever and at every site with the same secret. Tokens of this old form are accepted
//! until the day that the settings name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;

use perennial_webpush::decode_base64;

/// Longest time for which a token may be valid.
pub(crate) const LONGEST: Duration = Duration::from_secs(31 * 24 * 3600);
/// Tolerated difference between the clocks of the backend and of this server.
const SKEW: Duration = Duration::from_secs(60);

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("user_token is not of the form v1.EXPIRES.SIGNATURE")]
    Form,
    #[error("user_token has expired; the backend makes a new one")]
    Expired,
    #[error("user_token is good for more than 31 days; make one that ends sooner")]
    TooLong,
    #[error("user_token does not fit this user and this site")]
    Signature,
    #[error("user_token is of the old form, without site and expiry, which is not taken any more")]
    Old,
}

/// Checks a token. Tokens of the old form are accepted until `old_until`.
pub(crate) fn verify(
    secret: &[u8],
    site: &str,
    user: &str,
    token: &str,
    now: SystemTime,
    old_until: Option<SystemTime>,
) -> Result<(), Error> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let is_signed = |text: &str, signature: &str| {
        let signature = decode_base64(signature).unwrap_or_default();
        hmac::verify(&key, text.as_bytes(), &signature).map_err(|_| Error::Signature)
    };
    let Some(rest) = token.strip_prefix("v1.") else {
        if token.contains('.') {
            return Err(Error::Form);
        }
        is_signed(user, token)?;
        return if old_until.is_some_and(|until| now < until) { Ok(()) } else { Err(Error::Old) };
    };
    let (expires, signature) = rest.split_once('.').ok_or(Error::Form)?;
    let seconds: u64 = expires.parse().map_err(|_| Error::Form)?;
    is_signed(&format!("v1.{site}.{expires}.{user}"), signature)?;
    let ends = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(Error::Form)?;
    if ends + SKEW <= now {
        return Err(Error::Expired);
    }
    if ends > now + LONGEST + SKEW {
        return Err(Error::TooLong);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    const SECRET: &[u8] = b"correct horse battery";

    fn sign(text: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET);
        URL_SAFE_NO_PAD.encode(hmac::sign(&key, text.as_bytes()))
    }

    fn token(site: &str, expires: u64, user: &str) -> String {
        format!("v1.{expires}.{}", sign(&format!("v1.{site}.{expires}.{user}")))
    }

    fn check(token: &str, old_until: u64) -> Result<(), Error> {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        verify(SECRET, "shop", "ann", token, at(1_000_000), Some(at(old_until)))
    }

    #[test]
    fn a_token_is_good_for_its_user_at_its_site_until_it_ends() {
        assert_eq!(check(&token("shop", 1_003_600, "ann"), 0), Ok(()));
        assert_eq!(check(&token("shop", 1_003_600, "bob"), 0), Err(Error::Signature));
        assert_eq!(check(&token("blog", 1_003_600, "ann"), 0), Err(Error::Signature));
        assert_eq!(check(&token("shop", 999_000, "ann"), 0), Err(Error::Expired));
        assert_eq!(check(&token("shop", 1_000_000 + 40 * 24 * 3600, "ann"), 0), Err(Error::TooLong));
        let later = token("shop", 999_000, "ann").replace("999000", "1003600");
        assert_eq!(check(&later, 0), Err(Error::Signature), "the expiry is signed");
    }

    #[test]
    fn what_is_no_token_says_so() {
        for text in ["v1.", "v1.x.y", "v2.1.x", "v1.1003600"] {
            assert_eq!(check(text, 2_000_000), Err(Error::Form), "{text}");
        }
        assert_eq!(check("", 2_000_000), Err(Error::Signature));
    }

    #[test]
    fn old_tokens_are_taken_for_a_while() {
        assert_eq!(check(&sign("ann"), 1_000_001), Ok(()));
        assert_eq!(check(&sign("ann"), 1_000_000), Err(Error::Old));
        assert_eq!(check(&sign("bob"), 1_000_001), Err(Error::Signature));
    }
}
