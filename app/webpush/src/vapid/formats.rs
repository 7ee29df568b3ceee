//! The forms in which other senders keep a VAPID key pair.
//!
//! | form | written by |
//! |---|---|
//! | PEM: `PRIVATE KEY` (PKCS#8), `EC PRIVATE KEY` (SEC1) | openssl, web-push-php, `vapid --gen` |
//! | DER of these, or base64 of it | pywebpush |
//! | base64 of the 32 bytes of the private key, alone or in a text beside the public one | web-push, web-push-php, `.env` files |
//! | JSON with a private and a public key; a JWK (RFC 7517, RFC 7518 section 6.2) | web-push, Node, browsers |
//!
//! A public key beside the private key must belong to it.

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::Value;

use super::{VapidError, VapidKey};
use crate::subscription::{POINT, decode};

/// The length of a P-256 private key, in bytes.
const SCALAR: usize = 32;
/// Length of the shortest base64 of a private key, without padding.
const SHORTEST: usize = 42;

/// Reason why no key can be imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// The input has nothing that could be a private key.
    #[error(
        "no private key of P-256: wanted PEM, DER, JWK, or base64 of its 32 bytes, alone or beside the public key"
    )]
    None,
    /// The key is encrypted.
    #[error("the private key is encrypted: decrypt it first, with openssl pkey -in FILE")]
    Encrypted,
    /// The input has only a public key.
    #[error("only a public key: wanted the private one, without which nothing can be signed")]
    PublicOnly,
    /// The input has several private keys.
    #[error("several private keys: wanted one")]
    Several,
    /// The key is of another kind, or damaged.
    #[error("a private key that is none of the curve P-256 (prime256v1), or is damaged")]
    Unusable,
    /// The public key beside the private key does not belong to it.
    #[error("the public key does not belong to the private one")]
    Mismatch,
}

impl VapidKey {
    /// Reads a key pair in a form of other senders: PEM, DER, JWK, JSON, or base64 of the private key, alone or in
    /// a text.
    ///
    /// # Errors
    /// When there is no key, there are several, or the key cannot be used.
    pub fn import(bytes: &[u8]) -> Result<Self, ImportError> {
        let Ok(text) = std::str::from_utf8(bytes) else { return from_bytes(bytes) };
        if text.contains("-----BEGIN ") {
            return from_pem(text);
        }
        if let Ok(Value::Object(fields)) = serde_json::from_str(text) {
            return from_json(&fields);
        }
        let found = FoundKey::in_text(text);
        // The 32 bytes of a raw key may happen to be text.
        if found.key.is_none() && bytes.len() == SCALAR { from_bytes(bytes) } else { found.check() }
    }
}

/// The keys that were found in a text.
#[derive(Default)]
struct FoundKey {
    key: Option<VapidKey>,
    has_several: bool,
    public: Option<Vec<u8>>,
}

impl FoundKey {
    fn in_text(text: &str) -> Self {
        let mut found = Self::default();
        let is_of_base64 = |c: char| c.is_ascii_alphanumeric() || "+/-_".contains(c);
        // `=` separates words: it is padding, or stands between a name and a value.
        for word in text.split(|c: char| !is_of_base64(c)).filter(|word| word.len() >= SHORTEST) {
            let Some(bytes) = decode(word) else { continue };
            if bytes.len() == POINT && bytes[0] == 4 {
                found.public = Some(bytes);
            } else if let Ok(key) = from_bytes(&bytes) {
                let is_other =
                    found.key.as_ref().is_some_and(|known| known.public_bytes() != key.public_bytes());
                found.has_several |= is_other;
                found.key = Some(key);
            }
        }
        found
    }

    fn check(self) -> Result<VapidKey, ImportError> {
        match (self.key, self.public) {
            _ if self.has_several => Err(ImportError::Several),
            (None, Some(_)) => Err(ImportError::PublicOnly),
            (None, None) => Err(ImportError::None),
            (Some(key), Some(public)) if key.public_bytes()[..] != public => Err(ImportError::Mismatch),
            (Some(key), _) => Ok(key),
        }
    }
}

fn from_pem(text: &str) -> Result<VapidKey, ImportError> {
    let blocks = pem::parse_many(text).map_err(|_| ImportError::Unusable)?;
    let is_encrypted = |block: &pem::Pem| {
        block.tag() == "ENCRYPTED PRIVATE KEY" || block.headers().get("Proc-Type").is_some()
    };
    if blocks.iter().any(is_encrypted) {
        return Err(ImportError::Encrypted);
    }
    let mut keys = blocks.iter().filter(|block| block.tag().ends_with("PRIVATE KEY"));
    match (keys.next(), keys.next()) {
        (Some(key), None) => of_der(key.contents()),
        (Some(_), Some(_)) => Err(ImportError::Several),
        (None, _) if blocks.iter().any(|block| block.tag().ends_with("PUBLIC KEY")) => {
            Err(ImportError::PublicOnly)
        }
        (None, _) => Err(ImportError::None),
    }
}

/// Reads a JWK, or any object with field names that contain `private` and `public`.
fn from_json(fields: &serde_json::Map<String, Value>) -> Result<VapidKey, ImportError> {
    let text = |name: &str| fields.get(name).and_then(Value::as_str);
    if let Some(kind) = text("kty") {
        if kind != "EC" || text("crv") != Some("P-256") {
            return Err(ImportError::Unusable);
        }
        let key = from_scalar(&text("d").and_then(decode).ok_or(ImportError::PublicOnly)?)?;
        let half = |name: &str| text(name).and_then(decode).unwrap_or_default();
        let public = [vec![4], half("x"), half("y")].concat();
        let is_same = public.len() == 1 || public == key.public_bytes()[..];
        return if is_same { Ok(key) } else { Err(ImportError::Mismatch) };
    }
    let named = |part: &str| {
        let mut values = fields.iter().filter(|(name, _)| name.to_ascii_lowercase().contains(part));
        values.find_map(|(_, value)| value.as_str())
    };
    match (named("private"), named("public")) {
        // The value may have any of the other forms.
        (Some(private), public) => {
            let key = VapidKey::import(private.as_bytes())?;
            let is_other = public.and_then(decode).is_some_and(|public| public != key.public_bytes()[..]);
            if is_other { Err(ImportError::Mismatch) } else { Ok(key) }
        }
        (None, Some(_)) => Err(ImportError::PublicOnly),
        // The keys may be nested, as in settings of frameworks.
        (None, None) => {
            let nested = fields.values().filter_map(Value::as_object).map(from_json);
            nested
                .into_iter()
                .find(|found| *found != Err(ImportError::None))
                .unwrap_or(Err(ImportError::None))
        }
    }
}

/// Reads DER, or the bytes of the private key itself.
fn from_bytes(bytes: &[u8]) -> Result<VapidKey, ImportError> {
    match bytes.len() {
        SCALAR => from_scalar(bytes),
        // Old tools drop a leading zero.
        31 => from_scalar(&[&[0], bytes].concat()),
        _ if bytes.first() == Some(&0x30) => of_der(bytes),
        _ => Err(ImportError::None),
    }
}

fn of_der(der: &[u8]) -> Result<VapidKey, ImportError> {
    if let Ok(keys) = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_FIXED_SIGNING, der) {
        return VapidKey::new(keys).map_err(unusable);
    }
    // A DER without the public key.
    let private = PrivateKey::from_private_key_der(&ECDH_P256, der).map_err(|_| ImportError::Unusable)?;
    let public = private.compute_public_key().map_err(|_| ImportError::Unusable)?;
    let scalar = scalar_of(&private)?;
    pair(&scalar, public.as_ref())
}

fn from_scalar(scalar: &[u8]) -> Result<VapidKey, ImportError> {
    let private = PrivateKey::from_private_key(&ECDH_P256, scalar).map_err(|_| ImportError::Unusable)?;
    let public = private.compute_public_key().map_err(|_| ImportError::Unusable)?;
    pair(scalar, public.as_ref())
}

fn scalar_of(private: &PrivateKey) -> Result<Vec<u8>, ImportError> {
    use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
    let bytes: EcPrivateKeyBin<'_> = private.as_be_bytes().map_err(|_| ImportError::Unusable)?;
    Ok(bytes.as_ref().to_vec())
}

fn pair(scalar: &[u8], public: &[u8]) -> Result<VapidKey, ImportError> {
    let keys =
        EcdsaKeyPair::from_private_key_and_public_key(&ECDSA_P256_SHA256_FIXED_SIGNING, scalar, public);
    VapidKey::new(keys.map_err(|_| ImportError::Unusable)?).map_err(unusable)
}

fn unusable(_: VapidError) -> ImportError {
    ImportError::Unusable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads one of the files with the same key, which the tools of the senders wrote.
    fn fixture(name: &str) -> Vec<u8> {
        let file = format!("{}/../../tests/fixtures/keys/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    #[test]
    fn every_form_is_the_same_key() {
        let public = String::from_utf8(fixture("public.txt")).unwrap();
        for name in [
            "web-push-cli.txt",
            "web-push-cli.json",
            "web-push-php-var_dump.txt",
            "web-push-php-print_r.txt",
            "web-push-php-readme-private_key.txt",
            "laravel-webpush-vapid-show.txt",
            "laravel.env",
            "django-webpush-settings.py",
            "vapid-gen-private_key.pem",
            "openssl-ecparam-genkey.pem",
            "openssl-ecparam-genkey-crlf.pem",
            "sec1.pem",
            "sec1.der",
            "sec1-no-public.pem",
            "pkcs8.pem",
            "pkcs8.der",
            "pkcs8-no-public.pem",
            "pywebpush-pkcs8-der-base64url.txt",
            "pywebpush-sec1-der-base64.txt",
            "raw-base64url.txt",
            "jwk-node.json",
            "jwk-webcrypto.json",
        ] {
            match VapidKey::import(&fixture(name)) {
                Ok(key) => assert_eq!(key.public_key(), public.trim(), "{name}"),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }

    #[test]
    fn the_raw_private_key_is_read_in_both_alphabets_padded_or_not() {
        let text = String::from_utf8(fixture("raw-base64url.txt")).unwrap();
        let text = text.trim().trim_end_matches('=');
        let standard = text.replace('-', "+").replace('_', "/");
        let public = VapidKey::import(text.as_bytes()).unwrap().public_key();
        for form in [format!("{text}="), standard.clone(), format!("{standard}=\n"), format!("  {text}\r\n")]
        {
            assert_eq!(VapidKey::import(form.as_bytes()).unwrap().public_key(), public, "{form:?}");
        }
        let raw = decode(text).unwrap();
        assert_eq!(VapidKey::import(&raw).unwrap().public_key(), public);
    }

    #[test]
    fn what_is_no_such_key_says_what_it_is() {
        let import = |bytes: &[u8]| VapidKey::import(bytes).map(|key| key.public_key());
        for entry in
            std::fs::read_dir(format!("{}/../../tests/fixtures/keys/bad", env!("CARGO_MANIFEST_DIR")))
                .unwrap()
        {
            let file = entry.unwrap().path();
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            let error = import(&std::fs::read(&file).unwrap());
            match () {
                // The same curve with its parameters spelled out: some libraries read it.
                () if name.contains("explicit") => {}
                () if name.contains("encrypted") => assert_eq!(error, Err(ImportError::Encrypted), "{name}"),
                () if name.contains("public") => assert_eq!(error, Err(ImportError::PublicOnly), "{name}"),
                () if name.contains("mismatch") => assert_eq!(error, Err(ImportError::Mismatch), "{name}"),
                () => assert!(error.is_err(), "{name}: {error:?}"),
            }
        }
        assert_eq!(import(b""), Err(ImportError::None));
        assert_eq!(import(b"{}"), Err(ImportError::None));
        assert_eq!(import(b"BAD"), Err(ImportError::None));
        assert_eq!(import(&fixture("public.txt")), Err(ImportError::PublicOnly));
        let two =
            [fixture("sec1.pem"), VapidKey::generate().unwrap().to_pem().unwrap().into_bytes()].concat();
        assert_eq!(import(&two), Err(ImportError::Several));
    }
}
