//! Message encryption for web push: RFC 8291, which is RFC 8188 with one record and its own key agreement.
//!
//! A body is
//!
//! ```text
//! salt (16) ‖ record size (4, big endian) ‖ 65 ‖ sender's public key (65) ‖ AES-128-GCM(plaintext ‖ 0x02)
//! ```

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, ECDH_P256, PrivateKey, UnparsedPublicKey};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::rand;
use hkdf::Hkdf;
use sha2::Sha256;

use crate::message::Payload;
use crate::subscription::{AUTH, Keys, POINT};

/// The length of a salt, in bytes.
pub(crate) const SALT: usize = 16;
/// The length of the input keying material, in bytes: one output of HMAC-SHA-256.
pub(crate) const IKM: usize = 32;
const TAG: usize = 16;
/// RFC 8188, section 2.1: salt, record size, length of the key id, key id.
pub(crate) const HEADER: usize = SALT + 4 + 1 + POINT;
/// Delimiter of the last record (RFC 8188, section 2).
const DELIMITER: u8 = 2;
/// Record size, in bytes. One record holds any message that a push service must take, so the size says nothing
/// about the message. RFC 8291, section 4 requires more than the plaintext with delimiter and tag: 3993 + 1 + 16.
const RECORD_SIZE: u32 = 4096;

/// The cryptographic library failed: there is no randomness, or it refuses a point. It does not say which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cryptographic library failed")]
pub struct CryptoError;

impl From<Unspecified> for CryptoError {
    fn from(_: Unspecified) -> Self {
        Self
    }
}

/// Encrypts a payload for one subscription with a new key pair and a new salt. The result is the body of a request
/// with `Content-Encoding: aes128gcm`.
///
/// # Errors
/// When the system's random generator fails, or the subscription's point is refused by the curve arithmetic.
pub fn encrypt(keys: &Keys, payload: &Payload) -> Result<Vec<u8>, CryptoError> {
    let mut salt = [0; SALT];
    rand::fill(&mut salt)?;
    Ok(seal_with(keys, payload.as_bytes(), &PrivateKey::generate(&ECDH_P256)?, salt)?)
}

/// The deterministic part of [`encrypt`]. `sender` must never be a VAPID key (RFC 8292, section 3.2).
fn seal_with(
    keys: &Keys,
    plaintext: &[u8],
    sender: &PrivateKey,
    salt: [u8; SALT],
) -> Result<Vec<u8>, Unspecified> {
    let public = sender.compute_public_key()?.as_ref().try_into().map_err(|_| Unspecified)?;
    seal(&input_keying_material(sender, keys, &public)?, &public, plaintext, salt)
}

/// Encrypts with a secret that was agreed on before. A salt must never be used twice with the same secret (RFC
/// 8188, section 2.1).
pub(crate) fn seal(
    ikm: &[u8; IKM],
    sender_public: &[u8; POINT],
    plaintext: &[u8],
    salt: [u8; SALT],
) -> Result<Vec<u8>, Unspecified> {
    let (key, nonce) = content_key(ikm, &salt)?;
    let mut body = Vec::with_capacity(HEADER + plaintext.len() + 1 + TAG);
    body.extend_from_slice(&salt);
    body.extend_from_slice(&RECORD_SIZE.to_be_bytes());
    body.push(65);
    body.extend_from_slice(sender_public);
    body.extend_from_slice(plaintext);
    body.push(DELIMITER);
    let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut body[HEADER..])?;
    body.extend_from_slice(tag.as_ref());
    Ok(body)
}

/// The sender's side of the key agreement. It fails for a point that is not on the curve.
pub(crate) fn input_keying_material(
    sender: &PrivateKey,
    keys: &Keys,
    public: &[u8; POINT],
) -> Result<[u8; IKM], Unspecified> {
    agree(sender, keys.p256dh(), keys.auth(), keys.p256dh(), public)
}

/// The ECDH secret, bound to both public keys and the authentication secret (RFC 8291, sections 3.3 and 3.4).
fn agree(
    own: &PrivateKey,
    peer: &[u8; POINT],
    auth: &[u8; AUTH],
    receiver_public: &[u8],
    sender_public: &[u8],
) -> Result<[u8; IKM], Unspecified> {
    let peer = UnparsedPublicKey::new(&ECDH_P256, peer);
    agreement::agree(own, peer, Unspecified, |secret| {
        let info = [b"WebPush: info\0", receiver_public, sender_public];
        let mut ikm = [0; IKM];
        let prk = Hkdf::<Sha256>::new(Some(auth), secret);
        prk.expand_multi_info(&info, &mut ikm).map_err(|_| Unspecified)?;
        Ok(ikm)
    })
}

/// The content encryption key and the nonce (RFC 8188, sections 2.2 and 2.3).
fn content_key(ikm: &[u8; IKM], salt: &[u8]) -> Result<(LessSafeKey, Nonce), Unspecified> {
    let prk = Hkdf::<Sha256>::new(Some(salt), ikm);
    let (mut key, mut nonce) = ([0; 16], [0; 12]);
    prk.expand(b"Content-Encoding: aes128gcm\0", &mut key).map_err(|_| Unspecified)?;
    prk.expand(b"Content-Encoding: nonce\0", &mut nonce).map_err(|_| Unspecified)?;
    Ok((LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key)?), Nonce::assume_unique_for_key(nonce)))
}

/// The browser's side of a subscription: its private key and its authentication secret. It serves tests and push
/// services that developers run themselves.
pub struct ReceiverKeys {
    private: PrivateKey,
    public: [u8; POINT],
    auth: [u8; AUTH],
}

/// Reason why a body cannot be decrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecryptError {
    /// The body is shorter than header, delimiter and tag.
    #[error("the body is shorter than its header")]
    Short,
    /// The record size is too small: RFC 8188 requires at least 18, RFC 8291 the whole message in one record.
    #[error("the record size does not exceed the message with its delimiter and tag")]
    RecordSize,
    /// The key id is not a P-256 point of 65 bytes.
    #[error("the key id is not an uncompressed point of 65 bytes")]
    KeyId,
    /// The body was made for another subscription, or changed on the way.
    #[error("the ciphertext does not authenticate")]
    Forged,
    /// The last record does not end with the delimiter 2.
    #[error("the last record does not end with delimiter 2")]
    Delimiter,
}

impl ReceiverKeys {
    /// Makes new keys, as a browser does when it subscribes.
    ///
    /// # Errors
    /// When the system's random generator fails.
    pub fn generate() -> Result<Self, CryptoError> {
        let mut auth = [0; AUTH];
        rand::fill(&mut auth)?;
        let private = PrivateKey::generate(&ECDH_P256)?;
        Ok(Self::new(private, auth)?)
    }

    fn new(private: PrivateKey, auth: [u8; AUTH]) -> Result<Self, Unspecified> {
        let public = private.compute_public_key()?.as_ref().try_into().map_err(|_| Unspecified)?;
        Ok(Self { private, public, auth })
    }

    /// Decrypts a body that a sender made for these keys.
    ///
    /// # Errors
    /// When the body breaks RFC 8188 or RFC 8291, or was made for other keys.
    pub fn decrypt(&self, body: &[u8]) -> Result<Vec<u8>, DecryptError> {
        if body.len() < HEADER + 1 + TAG {
            return Err(DecryptError::Short);
        }
        let (header, sealed) = body.split_at(HEADER);
        let (salt, rest) = header.split_at(SALT);
        let (record_size, key_id) = rest.split_at(4);
        let record_size = u32::from_be_bytes(record_size.try_into().map_err(|_| DecryptError::Short)?);
        // One record: RFC 8291, section 4.
        if record_size < 18 || record_size as usize <= sealed.len() {
            return Err(DecryptError::RecordSize);
        }
        let sender: &[u8; POINT] = key_id[1..].try_into().map_err(|_| DecryptError::KeyId)?;
        if key_id[0] != 65 || sender[0] != 4 {
            return Err(DecryptError::KeyId);
        }
        let ikm = agree(&self.private, sender, &self.auth, &self.public, sender)
            .map_err(|_| DecryptError::KeyId)?;
        let (key, nonce) = content_key(&ikm, salt).map_err(|_| DecryptError::Forged)?;
        let mut sealed = sealed.to_vec();
        let open = key.open_in_place(nonce, Aad::empty(), &mut sealed).map_err(|_| DecryptError::Forged)?;
        let end = open.iter().rposition(|byte| *byte != 0).ok_or(DecryptError::Delimiter)?;
        if open[end] != DELIMITER {
            return Err(DecryptError::Delimiter);
        }
        Ok(open[..end].to_vec())
    }

    /// The public half, as a sender needs it.
    pub fn keys(&self) -> Keys {
        // A point that was computed from a private key is on the curve.
        #[expect(clippy::expect_used, reason = "computed from a private key")]
        Keys::from_bytes(&self.public, &self.auth).expect("a computed point")
    }
}

impl std::fmt::Debug for ReceiverKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReceiverKeys")
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::encoding::AsBigEndian;
    use web_push_native::{Auth, p256};

    use super::*;
    use crate::message::MAX_PAYLOAD;
    use crate::subscription::{decode, encode};

    /// RFC 8291, section 5 and Appendix A.
    mod rfc8291 {
        pub(super) const PLAINTEXT: &[u8] = b"When I grow up, I want to be a watermelon";
        pub(super) const SENDER_PRIVATE: &str = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw";
        pub(super) const RECEIVER_PRIVATE: &str = "q1dXpw3UpT5VOmu_cf_v6ih07Aems3njxI-JWgLcM94";
        pub(super) const RECEIVER_PUBLIC: &str =
            "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
        pub(super) const AUTH: &str = "BTBZMqHH6r4Tts7J_aSIgg";
        pub(super) const SALT: &str = "DGv6ra1nlYgDCS1FRnbzlw";
        pub(super) const IKM: &str = "S4lYMb_L0FxCeq0WhDx813KgSYqU26kOyzWUdsXYyrg";
        pub(super) const BODY: &str = "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN";
    }

    fn private(text: &str) -> PrivateKey {
        PrivateKey::from_private_key(&ECDH_P256, &decode(text).unwrap()).unwrap()
    }

    fn receiver() -> ReceiverKeys {
        let auth = decode(rfc8291::AUTH).unwrap().try_into().unwrap();
        ReceiverKeys::new(private(rfc8291::RECEIVER_PRIVATE), auth).unwrap()
    }

    #[test]
    fn rfc_8291_appendix_a_byte_for_byte() {
        let keys = Keys::parse(rfc8291::RECEIVER_PUBLIC, rfc8291::AUTH).unwrap();
        let sender = private(rfc8291::SENDER_PRIVATE);
        let public = sender.compute_public_key().unwrap().as_ref().try_into().unwrap();
        let ikm = input_keying_material(&sender, &keys, &public);
        assert_eq!(encode(ikm.unwrap()), rfc8291::IKM);

        let salt = decode(rfc8291::SALT).unwrap().try_into().unwrap();
        let body = seal_with(&keys, rfc8291::PLAINTEXT, &sender, salt).unwrap();
        assert_eq!(encode(&body), rfc8291::BODY);
        assert_eq!(body.len(), 144);
        assert_eq!(receiver().decrypt(&body).unwrap(), rfc8291::PLAINTEXT);
    }

    #[test]
    fn an_independent_implementation_reads_every_size() {
        for size in [0, 1, 100, 2700, MAX_PAYLOAD] {
            let receiver = ReceiverKeys::generate().unwrap();
            let plaintext: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let body = encrypt(&receiver.keys(), &Payload::new(plaintext.clone()).unwrap()).unwrap();
            assert!(body.len() <= 4096, "a push service must take it");

            let secret =
                AsBigEndian::<aws_lc_rs::encoding::EcPrivateKeyBin<'_>>::as_be_bytes(&receiver.private);
            let secret = p256::SecretKey::from_slice(secret.unwrap().as_ref()).unwrap();
            let auth = Auth::clone_from_slice(&receiver.auth);
            assert_eq!(web_push_native::decrypt(body.clone(), &secret, &auth).unwrap(), plaintext);
            assert_eq!(receiver.decrypt(&body).unwrap(), plaintext);
        }
    }

    #[test]
    fn every_message_has_its_own_key_and_salt() {
        let keys = ReceiverKeys::generate().unwrap().keys();
        let [one, two] = [0, 0].map(|_| encrypt(&keys, &Payload::new("same").unwrap()).unwrap());
        assert_ne!(one[..SALT], two[..SALT]);
        assert_ne!(one[SALT + 5..HEADER], two[SALT + 5..HEADER]);
    }

    #[test]
    fn a_receiver_refuses_what_breaks_the_rules() {
        let body = decode(rfc8291::BODY).unwrap();
        let broken = |at: usize, byte: u8| {
            let mut body = body.clone();
            body[at] = byte;
            receiver().decrypt(&body).unwrap_err()
        };
        assert_eq!(receiver().decrypt(&body[..HEADER]), Err(DecryptError::Short));
        assert_eq!(broken(SALT + 2, 0), DecryptError::RecordSize, "a record size of 0");
        assert_eq!(broken(SALT + 4, 64), DecryptError::KeyId);
        assert_eq!(broken(SALT + 10, 0xff), DecryptError::KeyId, "a point off the curve");
        assert_eq!(broken(0, 0), DecryptError::Forged);
        assert_eq!(broken(143, 0), DecryptError::Forged);
        assert_eq!(ReceiverKeys::generate().unwrap().decrypt(&body), Err(DecryptError::Forged));
    }
}
