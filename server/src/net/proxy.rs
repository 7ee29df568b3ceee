//! Whom a proxy speaks for: the PROXY protocol, and the headers `Forwarded` and `X-Forwarded-For`.
//!
//! Only the word of a peer in `server.trusted_proxies` counts: anybody can write a header.

use std::io;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;
use proxy_header::{Error, ParseConfig, ProxyHeader};
use tokio::io::AsyncReadExt;

use super::connection::{Peek, Peer, Socket};

/// The longest PROXY header that is read, in bytes: addresses take 52, what else may stand in it is short.
const MAX_HEADER: usize = 1024;

/// Not yet in the registry of names that the crate `http` has.
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whether a peer's word counts. Who connects through a Unix socket has been let in by the file's mode.
pub(crate) fn is_trusted(trusted: &[IpNet], peer: Peer) -> bool {
    match peer.ip() {
        Some(address) => contains(trusted, address),
        None => !trusted.is_empty(),
    }
}

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// Reads a PROXY protocol header, version 2, and returns the client that it names.
///
/// Nothing behind it is read: the rest of the connection is the client's.
pub(super) async fn read_header<S: Peek>(socket: &mut Socket<S>) -> io::Result<Peer> {
    let config = ParseConfig { include_tlvs: false, allow_v1: false, allow_v2: true };
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = Vec::with_capacity(64);
    loop {
        match ProxyHeader::parse(&header, config) {
            Ok((parsed, length)) => {
                socket.put_back(&header[length..]);
                let source = parsed.proxied_address().map(|proxied| proxied.source);
                // Without an address it is the proxy's own health check.
                return Ok(source.map_or(socket.connection().socket_peer, Peer::Tcp));
            }
            Err(Error::BufferTooShort) if header.len() < MAX_HEADER => {
                if socket.read_buf(&mut header).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) => return Err(invalid(format!("no PROXY header: {error:?}"))),
        }
    }
}

/// The client that trusted proxies name in their headers: the last address that is none of theirs.
pub(crate) fn forwarded_for(trusted: &[IpNet], headers: &HeaderMap) -> Option<IpAddr> {
    let forwarded = headers.get_all(header::FORWARDED);
    let mut addresses: Vec<Option<IpAddr>> = Vec::new();
    if forwarded.iter().next().is_some() {
        let elements = forwarded.iter().filter_map(|value| value.to_str().ok());
        for element in elements.flat_map(|value| value.split(',')) {
            let pairs = element.split(';').filter_map(|pair| pair.split_once('='));
            let found = pairs.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("for"));
            addresses.push(found.and_then(|(_, node)| address(node)));
        }
    } else {
        let values = headers.get_all(X_FORWARDED_FOR);
        let values = values.iter().filter_map(|value| value.to_str().ok());
        addresses.extend(values.flat_map(|value| value.split(',')).map(address));
    }
    let mut client = None;
    for address in addresses.into_iter().rev() {
        // What stands before something that cannot be read was written by nobody knows whom.
        let Some(address) = address else { break };
        client = Some(address);
        if !contains(trusted, address) {
            break;
        }
    }
    client
}

/// An address as RFC 7239, section 6 writes it, with or without a port.
fn address(node: &str) -> Option<IpAddr> {
    let node = node.trim().trim_matches('"');
    let bracketed = node.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(address, _)| address);
    let address = match bracketed {
        Some(address) => address.parse().ok(),
        None => node.parse().ok().or_else(|| node.parse::<SocketAddr>().ok().map(|socket| socket.ip())),
    };
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn client(header: &'static str, values: &[&'static str]) -> Option<String> {
        let name = HeaderName::from_static(header);
        let headers = values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect();
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        forwarded_for(&trusted, &headers).map(|address| address.to_string())
    }

    #[test]
    fn the_client_is_the_last_address_that_is_no_proxys() {
        for (header, values, expected) in [
            ("x-forwarded-for", &["192.0.2.1"][..], Some("192.0.2.1")),
            ("x-forwarded-for", &["6.6.6.6, 192.0.2.1, 10.1.1.1"], Some("192.0.2.1")),
            ("x-forwarded-for", &["6.6.6.6", "192.0.2.1", "10.1.1.1"], Some("192.0.2.1")),
            ("x-forwarded-for", &["10.2.2.2, 10.1.1.1"], Some("10.2.2.2")),
            ("x-forwarded-for", &["192.0.2.1:4711"], Some("192.0.2.1")),
            ("x-forwarded-for", &["::ffff:192.0.2.1"], Some("192.0.2.1")),
            ("x-forwarded-for", &["6.6.6.6, unknown, 10.1.1.1"], Some("10.1.1.1")),
            ("x-forwarded-for", &["nonsense"], None),
            ("forwarded", &["for=192.0.2.1"], Some("192.0.2.1")),
            ("forwarded", &["For=\"[2001:db8::1]:4711\";proto=https;by=10.0.0.1"], Some("2001:db8::1")),
            ("forwarded", &["for=6.6.6.6, for=192.0.2.1;host=x, for=10.1.1.1"], Some("192.0.2.1")),
            ("forwarded", &["for=6.6.6.6, proto=https, for=10.1.1.1"], Some("10.1.1.1")),
            ("forwarded", &["for=_hidden"], None),
        ] {
            assert_eq!(client(header, values).as_deref(), expected, "{header}: {values:?}");
        }
    }
}
