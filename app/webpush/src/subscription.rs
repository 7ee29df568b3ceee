//! The keys of a browser's subscription, checked once, when they come in.

use aws_lc_rs::agreement::{ECDH_P256, ParsedPublicKey, UnparsedPublicKey};
use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// The length of an uncompressed P-256 point, in bytes.
pub(crate) const POINT: usize = 65;
/// The length of the authentication secret, in bytes (RFC 8291, section 2.1).
pub(crate) const AUTH: usize = 16;

/// Browsers write base64url without padding; some libraries on the way add it.
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
const BASE64URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
const BASE64: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);

/// The public key and the authentication secret of one subscription.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    p256dh: [u8; POINT],
    auth: [u8; AUTH],
}

/// Reason why a subscription's keys cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// `p256dh` is not base64url of 65 bytes.
    #[error("p256dh is not the base64url form of 65 bytes, an uncompressed P-256 point")]
    P256dhShape,
    /// `p256dh` is not a point of the curve (RFC 8291, section 7).
    #[error("p256dh is not a point on the P-256 curve")]
    P256dhCurve,
    /// `auth` is not base64url of 16 bytes.
    #[error("auth is not the base64url form of 16 bytes")]
    Auth,
}

impl Keys {
    /// Reads the keys as `PushSubscription.toJSON()` writes them.
    ///
    /// # Errors
    /// When one of them has the wrong form or length, or the point is not on the curve.
    pub fn parse(p256dh: &str, auth: &str) -> Result<Self, KeysError> {
        let p256dh = decode(p256dh).ok_or(KeysError::P256dhShape)?;
        let auth = decode(auth).ok_or(KeysError::Auth)?;
        Self::from_bytes(&p256dh, &auth)
    }

    /// Reads the keys as they are stored: see [`Keys::p256dh`] and [`Keys::auth`].
    ///
    /// # Errors
    /// As [`Keys::parse`].
    pub fn from_bytes(p256dh: &[u8], auth: &[u8]) -> Result<Self, KeysError> {
        let keys = Self::from_store(p256dh, auth)?;
        if keys.p256dh[0] != 0x04 {
            return Err(KeysError::P256dhShape);
        }
        if keys.are_valid() { Ok(keys) } else { Err(KeysError::P256dhCurve) }
    }

    /// Reads the keys of a subscription that was checked when it was stored. Only their form is checked here; the
    /// curve is checked when they are used.
    ///
    /// # Errors
    /// When one of them has the wrong form or length.
    pub fn from_store(p256dh: &[u8], auth: &[u8]) -> Result<Self, KeysError> {
        let p256dh: [u8; POINT] = p256dh.try_into().map_err(|_| KeysError::P256dhShape)?;
        let auth = auth.try_into().map_err(|_| KeysError::Auth)?;
        Ok(Self { p256dh, auth })
    }

    /// Returns true when the public key is a point of the curve (RFC 8291, section 7).
    pub(crate) fn are_valid(&self) -> bool {
        ParsedPublicKey::try_from(&UnparsedPublicKey::new(&ECDH_P256, self.p256dh)).is_ok()
    }

    /// Decodes the authentication secret alone. A client that knows it proves that it had the subscription.
    ///
    /// # Errors
    /// [`KeysError::Auth`] when it is not base64url of 16 bytes.
    pub fn decode_auth(auth: &str) -> Result<[u8; AUTH], KeysError> {
        decode(auth).and_then(|auth| auth.try_into().ok()).ok_or(KeysError::Auth)
    }

    /// The browser's public key: an uncompressed point of 65 bytes.
    pub fn p256dh(&self) -> &[u8; POINT] {
        &self.p256dh
    }

    /// The authentication secret: 16 bytes.
    pub fn auth(&self) -> &[u8; AUTH] {
        &self.auth
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret is not shown: it is enough to write messages that the browser accepts.
        f.write_str("Keys")
    }
}

/// Decodes base64 in either alphabet, with or without padding; `None` when the text is neither.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    BASE64URL.decode(text).or_else(|_| BASE64.decode(text)).ok()
}

/// Encodes as base64url without padding.
pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const P256DH: &str =
        "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
    const AUTH: &str = "BTBZMqHH6r4Tts7J_aSIgg";

    #[test]
    fn both_alphabets_and_padding_are_read() {
        let keys = Keys::parse(P256DH, AUTH).unwrap();
        let standard = |text: &str| text.replace('-', "+").replace('_', "/");
        assert_eq!(Keys::parse(&format!("{}=", standard(P256DH)), &format!("{AUTH}==")), Ok(keys));
    }

    #[test]
    fn bad_keys_are_errors_that_name_the_key() {
        let off_curve = {
            let mut point = decode(P256DH).unwrap();
            point[64] ^= 1;
            encode(point)
        };
        let compressed = encode([&[2u8][..], &[7; 32]].concat());
        let infinity = encode([0u8]);
        let zeros = encode([&[4u8][..], &[0; 64]].concat());
        for (p256dh, auth, error) in [
            (&*off_curve, AUTH, KeysError::P256dhCurve),
            (&zeros, AUTH, KeysError::P256dhCurve),
            (&compressed, AUTH, KeysError::P256dhShape),
            (&infinity, AUTH, KeysError::P256dhShape),
            ("", AUTH, KeysError::P256dhShape),
            ("!", AUTH, KeysError::P256dhShape),
            (&P256DH[..80], AUTH, KeysError::P256dhShape),
            (P256DH, "", KeysError::Auth),
            (P256DH, "AAAA", KeysError::Auth),
            (P256DH, "not base64!", KeysError::Auth),
        ] {
            assert_eq!(Keys::parse(p256dh, auth), Err(error), "{p256dh} {auth}");
        }
    }
}
