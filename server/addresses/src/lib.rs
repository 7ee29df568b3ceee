//! Which IP addresses are on the public internet. A request to a URL that a stranger has chosen must not reach the
//! network of the server (server-side request forgery): its addresses are checked after the name was looked up, and the
//! connection goes to the address that was checked.

mod resolve;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use resolve::{Pin, ResolveError, Resolver};

/// Returns true when an address is on the public internet, or in one of the allowed networks.
pub fn is_allowed(address: IpAddr, networks: &[IpNet]) -> bool {
    let listed = |address: IpAddr| networks.iter().any(|network| network.contains(&address));
    match address {
        IpAddr::V4(v4) => listed(address) || is_public_v4(v4),
        IpAddr::V6(v6) => match embedded(v6) {
            // An IPv6 address that stands for an IPv4 one is judged by both.
            Some(Embedding::Mapped(v4)) => listed(address) || listed(v4.into()),
            Some(Embedding::Translated(v4)) => listed(address) && (listed(v4.into()) || is_public_v4(v4)),
            None => listed(address) || is_public_v6(v6),
        },
    }
}

enum Embedding {
    /// `::ffff:a.b.c.d`: the same host.
    Mapped(Ipv4Addr),
    /// NAT64 and 6to4: a gateway to that host.
    Translated(Ipv4Addr),
}

fn embedded(address: Ipv6Addr) -> Option<Embedding> {
    let octets = address.octets();
    let v4 = |at: usize| Ipv4Addr::new(octets[at], octets[at + 1], octets[at + 2], octets[at + 3]);
    if let Some(mapped) = address.to_ipv4_mapped() {
        return Some(Embedding::Mapped(mapped));
    }
    // RFC 6052, section 2.1: the well-known prefix of NAT64.
    if octets[..12] == [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0] {
        return Some(Embedding::Translated(v4(12)));
    }
    // RFC 3056: 6to4.
    if octets[..2] == [0x20, 0x02] {
        return Some(Embedding::Translated(v4(2)));
    }
    None
}

/// IPv4 networks that are not globally reachable by the IANA registries of special-purpose addresses, and addresses
/// that are reachable but answer only from inside a cloud.
const NOT_PUBLIC_V4: [Ipv4Net; 19] = [
    v4(0, 0, 0, 0, 8),        // this network
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // carrier-grade NAT; 100.100.100.200 is Alibaba's metadata service
    v4(127, 0, 0, 0, 8),      // loopback
    v4(168, 63, 129, 16, 32), // Azure's host agent
    v4(169, 254, 0, 0, 16),   // link-local; 169.254.169.254 is the usual metadata service
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // protocol assignments; 192.0.0.192 is Oracle's metadata service
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 31, 196, 0, 24),  // AS112
    v4(192, 52, 193, 0, 24),  // AMT
    v4(192, 88, 99, 0, 24),   // 6to4 relays
    v4(192, 168, 0, 0, 16),   // private
    v4(192, 175, 48, 0, 24),  // AS112
    v4(198, 18, 0, 0, 15),    // benchmarks
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(224, 0, 0, 0, 4),      // multicast
    v4(240, 0, 0, 0, 4),      // reserved, broadcast
];

const NOT_PUBLIC_V6: [Ipv6Net; 14] = [
    v6([0, 0, 0, 0, 0, 0, 0, 0], 96), // unspecified, loopback, v4-compatible
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), // local-use NAT64
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64), // discard
    v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64), // dummy
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23), // protocol assignments, Teredo among them
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), // documentation
    v6([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48), // AS112
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20), // documentation
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16), // segment routing
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7), // unique local; fd00:ec2::254 is AWS's metadata service
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), // link-local
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10), // site-local
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), // multicast
    v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96), // IPv4-translated (RFC 2765)
];

/// The networks that nothing is sent to unless they are allowed. A firewall can have the same rules.
pub fn not_public() -> impl Iterator<Item = IpNet> {
    let v4 = NOT_PUBLIC_V4.into_iter().map(IpNet::V4);
    v4.chain(NOT_PUBLIC_V6.into_iter().map(IpNet::V6))
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(s: [u16; 8], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]), prefix)
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !NOT_PUBLIC_V4.iter().any(|network| network.contains(&address))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    !NOT_PUBLIC_V6.iter().any(|network| network.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_and_allowed_networks_are_allowed() {
        let allowed: [IpNet; 1] = ["10.1.0.0/16".parse().unwrap()];
        for (address, is_public, is_listed) in [
            ("192.0.43.8", true, true),
            ("2001:4860:4860::8888", true, true),
            ("10.1.2.3", false, true),
            ("10.2.0.1", false, false),
            ("127.0.0.1", false, false),
            ("169.254.169.254", false, false),
            ("::ffff:10.1.2.3", false, true),
            ("fd00:ec2::254", false, false),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(
                (is_allowed(address, &[]), is_allowed(address, &allowed)),
                (is_public, is_listed),
                "{address}"
            );
        }
    }
}
