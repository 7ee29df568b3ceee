//! The origin and the hash of an endpoint, the URL of a subscription.

use aws_lc_rs::digest;
use perennial_webpush::TargetError;

/// The scheme, the host and the port of an endpoint.
pub(crate) fn origin(endpoint: &str) -> &str {
    let ends = endpoint.match_indices('/').nth(2).map_or(endpoint.len(), |(at, _)| at);
    &endpoint[..ends]
}

/// Hash by which an endpoint is found: the first 16 bytes of its SHA-256, shorter than the URL and still unique.
pub(crate) fn endpoint_hash(endpoint: &str) -> [u8; 16] {
    let digest = digest::digest(&digest::SHA256, endpoint.as_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest.as_ref()[..16]);
    hash
}

/// Says why an endpoint is refused, with the setting that decides about it, if there is one.
pub(crate) fn refused(error: &TargetError) -> String {
    let setting = match error {
        TargetError::Port => "push.allow_ports",
        TargetError::Host(_) => "push.allow_hosts",
        TargetError::Address(_) => "push.allow_networks",
        TargetError::Length
        | TargetError::Form
        | TargetError::Scheme
        | TargetError::UserInfo
        | TargetError::NoSuchHost(_)
        | TargetError::NotLookedUp(_) => return error.to_string(),
    };
    format!("{error} ({setting})")
}
