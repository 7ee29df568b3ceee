//! What is read off the URL of a subscription.

/// The scheme, the host and the port of an endpoint.
pub(crate) fn origin(endpoint: &str) -> &str {
    let ends = endpoint.match_indices('/').nth(2).map_or(endpoint.len(), |(at, _)| at);
    &endpoint[..ends]
}
