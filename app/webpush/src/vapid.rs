//! Voluntary application server identification: RFC 8292.
//!
//! A push service accepts messages of a key with a signed claim, which names the origin, the expiry, and a contact
//! for problems. The claim is signed once per key and origin, valid for 22 hours and renewed after 20: services
//! cache its verification (RFC 8292, section 5), and Apple asks for at most one new claim an hour.

mod formats;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use http::HeaderValue;
use parking_lot::Mutex;
use pem::Pem;
use url::Url;

use crate::subscription::{POINT, decode, encode};
pub use formats::ImportError;

/// Validity of a claim. RFC 8292, section 2 allows 24 hours; clocks differ.
const VALID: Duration = Duration::from_secs(22 * 3600);
/// Age after which a claim is signed anew.
const RENEW: Duration = Duration::from_secs(20 * 3600);
/// Longest step back of the clock before a cached claim is taken to come from the future.
const STEP_BACK: Duration = Duration::from_secs(300);
/// Longest time that the expiry of a claim may be ahead (RFC 8292, section 2).
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Maximum number of claims that are kept for one origin: a site has one key, and its earlier ones.
const MAX_CLAIMS: usize = 64;

/// Reason why a key or a claim cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VapidError {
    /// The text is not a PEM file with a P-256 private key.
    #[error("not a PEM file with a P-256 private key (PKCS#8 or SEC1)")]
    Key,
    /// Signing or key generation failed.
    #[error("the cryptographic library failed")]
    Crypto,
    /// A received claim is not acceptable.
    #[error("{0}")]
    Claim(&'static str),
}

/// The key pair that identifies an application server. Every subscription is bound to the public key it was
/// made with: losing the private one loses every subscriber.
#[derive(Clone)]
pub struct VapidKey {
    pair: Arc<Pair>,
    contact: Option<Contact>,
    id: Signer,
}

/// Identifies the key that messages are signed with, together with the contact that its claims name. It is the same
/// in every process and after every start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signer(pub i64);

impl Signer {
    fn of(public: &[u8; POINT], contact: Option<&Contact>) -> Self {
        let contact = contact.map_or("", Contact::as_str);
        let digest = digest(&SHA256, &[public, contact.as_bytes()].concat());
        let mut first = [0; 8];
        first.copy_from_slice(&digest.as_ref()[..8]);
        Self(i64::from_be_bytes(first))
    }
}

struct Pair {
    keys: EcdsaKeyPair,
    public: [u8; POINT],
}

impl VapidKey {
    /// Makes a new key pair.
    ///
    /// # Errors
    /// When the system's random generator fails.
    pub fn generate() -> Result<Self, VapidError> {
        let keys =
            EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).map_err(|_| VapidError::Crypto)?;
        Self::new(keys)
    }

    /// Reads a PEM file: `PRIVATE KEY` (PKCS#8) or `EC PRIVATE KEY` (SEC1, as openssl writes it).
    ///
    /// # Errors
    /// When the file has no such key.
    pub fn from_pem(text: &str) -> Result<Self, VapidError> {
        Self::all_from_pem(text)?.into_iter().next().ok_or(VapidError::Key)
    }

    /// Reads all keys of a PEM file, in their order: the key in use, then the earlier ones.
    ///
    /// # Errors
    /// When the file has no key, or a key cannot be read.
    pub fn all_from_pem(text: &str) -> Result<Vec<Self>, VapidError> {
        // openssl puts a block of curve parameters in front of the key.
        let blocks = pem::parse_many(text).map_err(|_| VapidError::Key)?;
        let private = blocks.iter().filter(|block| block.tag().ends_with("PRIVATE KEY"));
        let keys = private.map(|block| {
            let keys = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_FIXED_SIGNING, block.contents());
            Self::new(keys.map_err(|_| VapidError::Key)?)
        });
        let keys: Vec<Self> = keys.collect::<Result<_, _>>()?;
        if keys.is_empty() { Err(VapidError::Key) } else { Ok(keys) }
    }

    fn new(keys: EcdsaKeyPair) -> Result<Self, VapidError> {
        let public = keys.public_key().as_ref().try_into().map_err(|_| VapidError::Key)?;
        let id = Signer::of(&public, None);
        Ok(Self { pair: Arc::new(Pair { keys, public }), contact: None, id })
    }

    /// The same key with a contact, which its claims name.
    #[must_use]
    pub fn with_contact(self, contact: Contact) -> Self {
        let id = Signer::of(&self.pair.public, Some(&contact));
        Self { contact: Some(contact), id, ..self }
    }

    /// The same key with this contact, if it has none of its own.
    #[must_use]
    pub fn or_contact(self, contact: Option<&Contact>) -> Self {
        match contact {
            Some(contact) if self.contact.is_none() => self.with_contact(contact.clone()),
            _ => self,
        }
    }

    /// Identity of the key: its public half, and the contact that its claims name.
    pub fn signer(&self) -> Signer {
        self.id
    }

    /// The key as a PEM file. This is the secret itself.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn to_pem(&self) -> Result<String, VapidError> {
        let der = self.pair.keys.to_pkcs8v1().map_err(|_| VapidError::Crypto)?;
        Ok(pem::encode(&Pem::new("PRIVATE KEY", der.as_ref())))
    }

    /// The public key, an uncompressed point of 65 bytes.
    pub fn public_bytes(&self) -> &[u8; POINT] {
        &self.pair.public
    }

    /// The public key as a browser wants it: the `applicationServerKey`, base64url.
    pub fn public_key(&self) -> String {
        encode(self.pair.public)
    }

    /// The value of an `Authorization` header for one origin.
    fn authorize(&self, audience: &str, now: SystemTime) -> Result<HeaderValue, VapidError> {
        let mut claims = serde_json::json!({ "aud": audience, "exp": unix(now + VALID) });
        if let Some(contact) = &self.contact {
            claims["sub"] = contact.as_str().into();
        }
        let head = encode(br#"{"typ":"JWT","alg":"ES256"}"#);
        let signed = format!("{head}.{}", encode(claims.to_string()));
        let signature =
            self.pair.keys.sign(&SystemRandom::new(), signed.as_bytes()).map_err(|_| VapidError::Crypto)?;
        let value = format!("vapid t={signed}.{}, k={}", encode(signature), self.public_key());
        let mut value = HeaderValue::from_str(&value).map_err(|_| VapidError::Crypto)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

impl PartialEq for VapidKey {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for VapidKey {}

impl fmt::Debug for VapidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VapidKey({})", self.public_key())
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Signed claims for one origin, one per key.
#[derive(Debug, Default)]
pub(crate) struct Claimed(Mutex<Vec<Claim>>);

#[derive(Clone, Debug)]
struct Claim {
    signer: Signer,
    header: HeaderValue,
    signed: SystemTime,
}

impl Claimed {
    /// Returns the header for `origin`, which must be the same in every call. It is signed now when there is none
    /// for the key, or it is too old.
    pub(crate) fn header(
        &self,
        key: &VapidKey,
        origin: &str,
        now: SystemTime,
    ) -> Result<HeaderValue, VapidError> {
        let mut claims = self.0.lock();
        let is_same = |claim: &Claim| claim.signer == key.id;
        if let Some(claim) = claims.iter().find(|claim| is_same(claim) && claim.is_fresh(now)) {
            return Ok(claim.header.clone());
        }
        let header = key.authorize(origin, now)?;
        claims.retain(|claim| !is_same(claim));
        if claims.len() >= MAX_CLAIMS {
            claims.remove(0);
        }
        claims.push(Claim { signer: key.id, header: header.clone(), signed: now });
        Ok(header)
    }
}

impl Claim {
    fn is_fresh(&self, now: SystemTime) -> bool {
        match now.duration_since(self.signed) {
            Ok(age) => age < RENEW,
            Err(early) => early.duration() < STEP_BACK,
        }
    }
}

/// Contact for a push service when something is wrong: the `sub` of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact(String);

/// Reason why a contact cannot be used. Apple answers 403 `BadJwtToken` to each of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContactError {
    /// The contact starts neither with `mailto:` nor with `https:` (RFC 8292, section 2.1).
    #[error("a contact that starts with mailto: or https:, such as mailto:name@example.com")]
    Scheme,
    /// The contact has no address, or one with a space or brackets.
    #[error(
        "a contact written as mailto:name@example.com, without spaces or brackets, or https://example.com/"
    )]
    Form,
    /// The address cannot be reached from outside.
    #[error("a contact that is reachable from outside: no localhost, no .local, no .invalid")]
    Unreachable,
}

impl Contact {
    /// The contact as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Contact {
    type Err = ContactError;

    fn from_str(text: &str) -> Result<Self, ContactError> {
        let host = if let Some(address) = text.strip_prefix("mailto:") {
            let (name, host) = address.rsplit_once('@').ok_or(ContactError::Form)?;
            let harmless = |c: char| c.is_ascii_graphic() && !"<>()[],;:\\\"".contains(c);
            if name.is_empty() || host.is_empty() || !address.chars().all(harmless) {
                return Err(ContactError::Form);
            }
            host.to_owned()
        } else if text.starts_with("https:") {
            let url = Url::parse(text).map_err(|_| ContactError::Form)?;
            url.host_str().ok_or(ContactError::Form)?.to_owned()
        } else {
            return Err(ContactError::Scheme);
        };
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let local = ["localhost", "local", "invalid", "test", "internal", "example"];
        let last = host.rsplit('.').next().unwrap_or_default();
        let literal = last.chars().all(|c| c.is_ascii_digit()) || host.contains(':');
        if literal || local.contains(&last) || !host.contains('.') {
            return Err(ContactError::Unreachable);
        }
        Ok(Self(text.to_owned()))
    }
}

/// Content of an `Authorization` header, as a push service reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The key that signed: an uncompressed point of 65 bytes.
    pub key: Vec<u8>,
    /// The contact, if one was given.
    pub subject: Option<String>,
    /// Expiry of the claim, in seconds since 1970.
    pub expires: u64,
}

/// The receiving side: checks an `Authorization` header for `audience` as strictly as RFC 8292 allows.
///
/// # Errors
/// [`VapidError::Claim`] says which rule was broken.
pub fn verify(authorization: &str, audience: &str, now: SystemTime) -> Result<Claims, VapidError> {
    let wrong = VapidError::Claim;
    let parameters = authorization.strip_prefix("vapid ").ok_or(wrong("the scheme is not vapid"))?;
    let parameter = |name: &str| {
        let mut parameters = parameters.split(',').filter_map(|parameter| parameter.trim().split_once('='));
        parameters.find(|(found, _)| *found == name).map(|(_, value)| value)
    };
    let token = parameter("t").ok_or(wrong("the parameter t is missing"))?;
    let key = parameter("k").ok_or(wrong("the parameter k is missing"))?;
    if key.contains('=') {
        return Err(wrong("k is padded"));
    }
    let key = decode(key).filter(|key| key.len() == POINT).ok_or(wrong("k is not a point of 65 bytes"))?;
    let (signed, signature) = token.rsplit_once('.').ok_or(wrong("t is not a JWT"))?;
    let signature = decode(signature).ok_or(wrong("t is not a JWT"))?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &key)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| wrong("the signature does not verify with k"))?;

    let (head, claims) = signed.split_once('.').ok_or(wrong("t is not a JWT"))?;
    let json = |part: &str| -> Option<serde_json::Value> { serde_json::from_slice(&decode(part)?).ok() };
    let head = json(head).ok_or(wrong("the JWT's header is not JSON"))?;
    let claims = json(claims).ok_or(wrong("the JWT's claims are not JSON"))?;
    if head["alg"] != "ES256" {
        return Err(wrong("alg is not ES256"));
    }
    if claims["aud"] != audience {
        return Err(wrong("aud is not the origin of the push service"));
    }
    let expires = claims["exp"].as_u64().ok_or(wrong("exp is missing or no number"))?;
    if expires <= unix(now) {
        return Err(wrong("exp has passed"));
    }
    if expires > unix(now + LONGEST) {
        return Err(wrong("exp is more than 24 hours ahead"));
    }
    let subject = claims.get("sub").map(|sub| sub.as_str().ok_or(wrong("sub is no text"))).transpose()?;
    if subject.is_some_and(|sub| !sub.starts_with("mailto:") && !sub.starts_with("https:")) {
        return Err(wrong("sub is neither mailto: nor https:"));
    }
    Ok(Claims { key, subject: subject.map(str::to_owned), expires })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: &str = "https://push.example.net:8443";

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn header(claims: &Claimed, key: &VapidKey, origin: &str, now: SystemTime) -> String {
        claims.header(key, origin, now).unwrap().to_str().unwrap().to_owned()
    }

    /// RFC 8292, section 2.4 (its line breaks removed).
    #[test]
    fn the_example_of_rfc_8292_verifies() {
        let header = "vapid t=eyJ0eXAiOiJKV1QiLCJhbGciOiJFUzI1NiJ9.eyJhdWQiOiJodHRwczovL3B1c2guZXhhbXBsZS5uZXQiLCJleHAiOjE0NTM1MjM3NjgsInN1YiI6Im1haWx0bzpwdXNoQGV4YW1wbGUuY29tIn0.i3CYb7t4xfxCDquptFOepC9GAu_HLGkMlMuCGSK2rpiUfnK9ojFwDXb1JrErtmysazNjjvW2L9OkSSHzvoD1oA, k=BA1Hxzyi1RUM1b5wjxsn7nGxAszw2u61m164i3MrAIxHF6YK5h4SDYic-dRuU_RCPCfA5aq9ojSwk5Y2EmClBPs";
        let claims = verify(header, "https://push.example.net", at(1_453_500_000)).unwrap();
        assert_eq!(claims.subject.as_deref(), Some("mailto:push@example.com"));
        assert_eq!(claims.expires, 1_453_523_768);
        let late = verify(header, "https://push.example.net", at(1_453_523_768));
        assert_eq!(late, Err(VapidError::Claim("exp has passed")));
        let early = verify(header, "https://push.example.net", at(1_453_000_000));
        assert_eq!(early, Err(VapidError::Claim("exp is more than 24 hours ahead")));
    }

    #[test]
    fn a_claim_names_origin_port_contact_and_key() {
        let key = VapidKey::generate().unwrap();
        let contact: Contact = "mailto:ops@shop.example.com".parse().unwrap();
        let key = key.with_contact(contact);
        let header = Claimed::default().header(&key, ORIGIN, at(1_000_000)).unwrap();
        assert!(header.is_sensitive());
        let claims = verify(header.to_str().unwrap(), ORIGIN, at(1_000_000)).unwrap();
        assert_eq!(claims.key, key.public_bytes());
        assert_eq!(claims.subject.as_deref(), Some("mailto:ops@shop.example.com"));
        assert_eq!(claims.expires, 1_000_000 + 22 * 3600);
        for other in ["https://push.example.net", "https://push.example.net:8443/"] {
            assert!(verify(header.to_str().unwrap(), other, at(1_000_000)).is_err(), "{other}");
        }
    }

    #[test]
    fn a_claim_is_signed_once_in_twenty_hours_per_key_and_origin() {
        let (claims, key) = (Claimed::default(), VapidKey::generate().unwrap());
        let now = 1_000_000;
        let first = header(&claims, &key, ORIGIN, at(now));
        assert_eq!(header(&claims, &key, ORIGIN, at(now + 20 * 3600 - 1)), first);
        assert_eq!(header(&claims, &key, ORIGIN, at(now - 60)), first, "clocks step back a little");
        assert_ne!(header(&claims, &VapidKey::generate().unwrap(), ORIGIN, at(now)), first);
        let second = header(&claims, &key, ORIGIN, at(now + 20 * 3600));
        assert_ne!(second, first);
        assert_ne!(header(&claims, &key, ORIGIN, at(now)), second, "and sometimes a lot");
    }

    #[test]
    fn a_key_survives_its_pem_file() {
        let key = VapidKey::generate().unwrap();
        let again = VapidKey::from_pem(&key.to_pem().unwrap()).unwrap();
        assert_eq!(again.public_key(), key.public_key());
        assert_eq!(VapidKey::from_pem("no PEM").unwrap_err(), VapidError::Key);
        assert!(!format!("{key:?}").contains("PRIVATE"));
    }

    #[test]
    fn the_pem_files_of_openssl_are_read() {
        // openssl ecparam -genkey -name prime256v1
        let sec1 = "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n\
            -----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBiOWU1NAxluQdPQF+ofDSnevDvEFNHxp6Oi2UqAn2FeoAoGCCqGSM49\n\
            AwEHoUQDQgAE55mKpS0VZiA3cbkfMRc6vr9Qd8K2uHJjlYZOVkWA8Gasi5sFya25\n\
            ZVIZkRzzM5RIbOjbUE0ayjGoV7UgNXjYvQ==\n-----END EC PRIVATE KEY-----\n";
        assert!(VapidKey::from_pem(sec1).is_ok());
    }

    #[test]
    fn a_contact_that_apple_refuses_is_refused_here() {
        for good in
            ["mailto:ops@example.com", "https://shop.example.com/contact", "mailto:a+b@mail.example.org"]
        {
            assert_eq!(good.parse::<Contact>().unwrap().as_str(), good);
        }
        for (bad, error) in [
            ("", ContactError::Scheme),
            ("ops@example.com", ContactError::Scheme),
            ("http://example.com", ContactError::Scheme),
            ("mailto:", ContactError::Form),
            ("mailto: ops@example.com", ContactError::Form),
            ("mailto:<ops@example.com>", ContactError::Form),
            ("mailto:@example.com", ContactError::Form),
            ("https:", ContactError::Form),
            ("mailto:ops@localhost", ContactError::Unreachable),
            ("mailto:ops@host.local", ContactError::Unreachable),
            ("mailto:ops@example.invalid", ContactError::Unreachable),
            ("https://localhost/", ContactError::Unreachable),
            ("https://10.0.0.1/", ContactError::Unreachable),
        ] {
            assert_eq!(bad.parse::<Contact>(), Err(error), "{bad:?}");
        }
    }
}
