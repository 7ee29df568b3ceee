//! The client that a proxy names: the PROXY protocol, and the headers `Forwarded` and `X-Forwarded-For`.
//!
//! Only a peer in `server.trusted_proxies` is believed, because any client can write a header.

use std::io;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;
use proxy_header::{Error, ParseConfig, ProxyHeader};
use tokio::io::AsyncReadExt;

use super::connection::Peer;
use super::socket::{Peek, Socket};

/// Maximum size of a PROXY header, in bytes: with addresses it has 52 bytes, and its optional fields are short.
const MAX_HEADER: usize = 1024;

/// Index of the header byte that says whether the proxy connects for a client or for itself.
const COMMAND: usize = 12;
/// Command of a proxy that connects for itself.
const LOCAL: u8 = 0;

/// The crate `http` has no constant for this header.
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Returns true when the statements of a peer about its client are believed. A peer on a Unix socket was let in by the
/// mode of the file, so it is believed as soon as any proxy is trusted.
pub(crate) fn is_trusted(trusted: &[IpNet], peer: Peer) -> bool {
    match peer.ip() {
        Some(address) => contains(trusted, address),
        None => !trusted.is_empty(),
    }
}

fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// Reads a PROXY protocol header, version 2, and returns the client that it names: `None` if the proxy connects for
/// itself, as for a health check.
///
/// Bytes after the header are put back, because they belong to the client.
pub(super) async fn read_header<S: Peek>(socket: &mut Socket<S>) -> io::Result<Option<Peer>> {
    let config = ParseConfig { include_tlvs: false, allow_v1: false, allow_v2: true };
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = Vec::with_capacity(64);
    loop {
        match ProxyHeader::parse(&header, config) {
            Ok((parsed, length)) => {
                let client = parsed.proxied_address().map(|proxied| Peer::Tcp(proxied.source));
                if client.is_none() && header[COMMAND] & 0xf != LOCAL {
                    // Without an address the client would count as the proxy itself, and be believed like it.
                    return Err(invalid("a PROXY header that names no address".to_owned()));
                }
                socket.put_back(&header[length..]);
                return Ok(client);
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

/// The header in which trusted proxies name their clients.
///
/// Only one header counts: a proxy that writes one of them passes the other on as the client wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedHeader {
    /// `X-Forwarded-For`.
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// Returns the client that trusted proxies name in their headers: the last address that is not a trusted proxy.
pub(crate) fn forwarded_for(
    trusted: &[IpNet],
    header: ForwardedHeader,
    headers: &HeaderMap,
) -> Option<IpAddr> {
    let name = match header {
        ForwardedHeader::XForwardedFor => X_FORWARDED_FOR,
        ForwardedHeader::Forwarded => header::FORWARDED,
    };
    let mut client = None;
    for value in headers.get_all(name).iter().rev() {
        // The origin of an entry before an unreadable one is not known.
        let Ok(value) = value.to_str() else { break };
        for element in split(value, ',').into_iter().rev() {
            let named = match header {
                ForwardedHeader::XForwardedFor => address(element),
                ForwardedHeader::Forwarded => for_node(element).and_then(address),
            };
            let Some(named) = named else { return client };
            client = Some(named);
            if !contains(trusted, named) {
                return client;
            }
        }
    }
    client
}

/// Returns the node in the parameter `for` of one element of `Forwarded`.
fn for_node(element: &str) -> Option<&str> {
    let pairs = split(element, ';').into_iter().filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(name, _)| name.trim().eq_ignore_ascii_case("for")).map(|(_, node)| node)
}

/// Splits at a separator, but not within quotes (RFC 9110, section 5.6.4).
fn split(text: &str, separator: char) -> Vec<&str> {
    let (mut quoted, mut escaped) = (false, false);
    let parts = text.split(|c: char| {
        let splits = c == separator && !quoted;
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => {}
        }
        splits
    });
    parts.collect()
}

/// Parses an address as RFC 7239, section 6 writes it, with or without a port.
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
        let value = |text: &&'static str| HeaderValue::from_bytes(text.as_bytes()).unwrap();
        let headers = values.iter().map(|text| (name.clone(), value(text))).collect();
        let trusted = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
        forwarded_for(&trusted, header.parse().unwrap(), &headers).map(|address| address.to_string())
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
            // The entry of the client itself is before an unreadable one, or inside quotes.
            ("x-forwarded-for", &["6.6.6.6", "\u{ff}, 10.1.1.1"], None),
            ("forwarded", &["for=192.0.2.1;host=\"evil,for=6.6.6.6\""], Some("192.0.2.1")),
            ("forwarded", &["for=192.0.2.1;host=\"a\\\",for=6.6.6.6\""], Some("192.0.2.1")),
        ] {
            assert_eq!(client(header, values).as_deref(), expected, "{header}: {values:?}");
        }
    }
}
