//! What is read off the URL of a subscription.

use aws_lc_rs::digest;

/// The scheme, the host and the port of an endpoint.
pub(crate) fn origin(endpoint: &str) -> &str {
    let ends = endpoint.match_indices('/').nth(2).map_or(endpoint.len(), |(at, _)| at);
    &endpoint[..ends]
}

/// What an endpoint is found by: shorter than itself, and no shorter than it takes to be unique.
pub(crate) fn endpoint_hash(endpoint: &str) -> [u8; 16] {
    let digest = digest::digest(&digest::SHA256, endpoint.as_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest.as_ref()[..16]);
    hash
}
