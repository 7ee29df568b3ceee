//! The policy: which endpoints, and which addresses behind them, may be sent to.
//!
//! An endpoint is a URL that any visitor may hand in, and we send requests to it from inside our network:
//! without this file that is a server-side request forgery. The URL is checked when a subscription is made
//! and again when something is sent to it. The addresses are checked each time a name is resolved, in the
//! step that chooses one to connect to, so that a name cannot change its addresses in between.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};
use ipnet::IpNet;
use url::{Host, Url};

/// The push services of the browsers. Each is the only one that its browsers use.
pub const DEFAULT_HOSTS: [&str; 6] = [
    // Chrome, Chromium, Opera, Samsung Internet, Brave: Firebase Cloud Messaging.
    "fcm.googleapis.com",
    // Chromium without Google Play services, and some of Google's own test traffic.
    "jmt17.google.com",
    // Firefox: autopush.
    "*.push.services.mozilla.com",
    // Safari on macOS, iOS and iPadOS.
    "*.push.apple.com",
    // Edge: Windows Notification Service.
    "*.notify.windows.com",
    // Subscriptions of Chrome that are older than FCM's own host.
    "android.googleapis.com",
];

/// The longest endpoint that is accepted, in bytes. Those in use have 150 to 500.
const MAX_ENDPOINT: usize = 2048;

/// Rules for the endpoints and addresses that may be sent to.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The hosts of push services.
    pub hosts: Vec<HostPattern>,
    /// Networks that may be sent to although they are not on the public internet.
    pub networks: Vec<IpNet>,
    /// Ports that may be sent to.
    pub ports: Vec<u16>,
    /// True when `http` and any port may be used: for development and tests.
    pub insecure: bool,
}

impl Default for Policy {
    /// The push services of the browsers, on the public internet.
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "a test parses them all")]
        let hosts = DEFAULT_HOSTS.iter().map(|host| host.parse().expect("a pattern")).collect();
        Self { hosts, networks: Vec::new(), ports: vec![443], insecure: false }
    }
}

/// A host name, `*.` and a suffix, or `*` for any host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// Any host whose addresses are allowed.
    Any,
    /// Exactly this host.
    Exact(String),
    /// Any host below this one.
    Below(String),
}

/// Error for a text that is no host pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted a host name, *. and a host name, or *")]
pub struct NoHostPattern;

impl FromStr for HostPattern {
    type Err = NoHostPattern;

    fn from_str(text: &str) -> Result<Self, NoHostPattern> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (below, host) = match text.strip_prefix("*.") {
            Some(host) => (true, host),
            None => (false, text),
        };
        if host.contains('*') {
            return Err(NoHostPattern);
        }
        let host = Host::parse(host).map_err(|_| NoHostPattern)?.to_string();
        Ok(if below { Self::Below(host) } else { Self::Exact(host) })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(host) => f.write_str(host),
            Self::Below(host) => write!(f, "*.{host}"),
        }
    }
}

impl HostPattern {
    /// Sort key: lower for patterns that let in fewer hosts.
    fn reach(&self) -> (u8, std::cmp::Reverse<usize>) {
        match self {
            Self::Exact(host) => (0, std::cmp::Reverse(host.len())),
            Self::Below(suffix) => (1, std::cmp::Reverse(suffix.len())),
            Self::Any => (2, std::cmp::Reverse(0)),
        }
    }

    fn matches(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => host == exact,
            Self::Below(suffix) => host
                .strip_suffix(suffix)
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|label| !label.is_empty()),
        }
    }
}

/// Reason why an endpoint must not be sent to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The endpoint is longer than those of any push service.
    #[error("an endpoint has at most {MAX_ENDPOINT} bytes")]
    Length,
    /// The endpoint is not a URL as browsers write it: two readers could take it for two hosts.
    #[error("an endpoint is a URL exactly as the browser gave it")]
    Form,
    /// The scheme is not `https`.
    #[error("an endpoint starts with https://")]
    Scheme,
    /// The endpoint contains a user name or a password.
    #[error("an endpoint has no user name or password")]
    UserInfo,
    /// The port is not allowed.
    #[error("an endpoint has a port that is not allowed")]
    Port,
    /// The host is not in the list of push services.
    #[error("{0} is not a known push service")]
    Host(String),
    /// DNS does not know the host.
    #[error("{0} does not exist, as the name servers of this machine say")]
    NoSuchHost(String),
    /// The host cannot be looked up now, and is not known.
    #[error("{0} cannot be looked up now")]
    NotLookedUp(String),
    /// The address is not on the public internet.
    #[error("{0} is not on the public internet")]
    Address(IpAddr),
}

/// A checked endpoint.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub(crate) uri: Uri,
    pub(crate) origin: Arc<Origin>,
}

/// Scheme, host and port. Connections and claims belong to an origin.
#[derive(Debug)]
pub(crate) struct Origin {
    /// The serialisation of RFC 6454, section 6.2: no slash, no default port.
    pub(crate) name: String,
    pub(crate) tls: bool,
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The pattern that lets it in: of several patterns the most specific one.
    pub(crate) pattern: HostPattern,
    authority: Authority,
}

impl Origin {
    /// Returns true when the policy lists it by its host or a suffix, rather than allowing any host.
    pub(crate) fn is_listed(&self) -> bool {
        self.pattern != HostPattern::Any
    }

    /// Returns true when the policy names its host.
    pub(crate) fn is_named(&self) -> bool {
        matches!(self.pattern, HostPattern::Exact(_))
    }
}

impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Origin {}

impl Hash for Origin {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Endpoint {
    /// Makes an endpoint at an origin that has been checked: no text after an origin and a slash leads to another
    /// host.
    pub(crate) fn at(origin: &Arc<Origin>, url: &Bytes) -> Result<Self, TargetError> {
        if url.len() > MAX_ENDPOINT {
            return Err(TargetError::Length);
        }
        if url.contains(&b'#') {
            return Err(TargetError::Form);
        }
        let path = PathAndQuery::from_maybe_shared(url.slice(origin.name.len()..));
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(if origin.tls { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = Some(origin.authority.clone());
        parts.path_and_query = Some(path.map_err(|_| TargetError::Form)?);
        let uri = Uri::from_parts(parts).map_err(|_| TargetError::Form)?;
        Ok(Self { uri, origin: Arc::clone(origin) })
    }

    /// The URL, byte for byte as it was given.
    pub fn url(&self) -> String {
        self.uri.to_string()
    }

    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.origin.host
    }

    /// Scheme, host and port, without a slash and without the default port: `https://fcm.googleapis.com`.
    pub fn origin(&self) -> &str {
        &self.origin.name
    }
}

/// The part of a URL that may be its origin: all before the third slash.
pub(crate) fn origin_of(url: &str) -> Option<&str> {
    let authority = url.find("://")? + 3;
    let path = url[authority..].find('/')?;
    Some(&url[..authority + path])
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // At some services, the whole URL is enough to send to the subscription.
        write!(f, "Endpoint({}/…)", self.origin)
    }
}

impl Policy {
    /// Checks a URL, without looking up its host.
    ///
    /// # Errors
    /// [`TargetError`] says which rule it breaks.
    pub fn check(&self, url: &str) -> Result<Endpoint, TargetError> {
        if url.len() > MAX_ENDPOINT {
            return Err(TargetError::Length);
        }
        let parsed = Url::parse(url).map_err(|_| TargetError::Form)?;
        let tls = match parsed.scheme() {
            "https" => true,
            "http" if self.insecure => false,
            _ => return Err(TargetError::Scheme),
        };
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(TargetError::UserInfo);
        }
        // Browsers serialise endpoints by the same standard that this parser follows. A URL that comes out
        // differently (a backslash, a tab, an octal address) was written to be read in two ways.
        if parsed.as_str() != url || parsed.fragment().is_some() {
            return Err(TargetError::Form);
        }
        let port = parsed.port_or_known_default().ok_or(TargetError::Form)?;
        if !self.ports.contains(&port) && !self.insecure {
            return Err(TargetError::Port);
        }
        let host = match parsed.host().ok_or(TargetError::Form)? {
            Host::Domain(name) if is_host_name(name) => name.to_owned(),
            Host::Domain(_) => return Err(TargetError::Form),
            Host::Ipv4(address) => self.check_address(address.into()).map(|()| address.to_string())?,
            Host::Ipv6(address) => self.check_address(address.into()).map(|()| address.to_string())?,
        };
        let matching = self.hosts.iter().filter(|pattern| pattern.matches(&host));
        let Some(pattern) = matching.min_by_key(|pattern| pattern.reach()).cloned() else {
            return Err(TargetError::Host(host));
        };
        // The URL is sent byte for byte as it was given: some services sign it.
        let uri: Uri = url.parse().map_err(|_| TargetError::Form)?;
        let authority = uri.authority().cloned().ok_or(TargetError::Form)?;
        let name = origin_of(url).unwrap_or(url).to_owned();
        Ok(Endpoint { uri, origin: Arc::new(Origin { name, tls, host, port, pattern, authority }) })
    }

    /// Checks an address that a name was resolved to.
    ///
    /// # Errors
    /// When it is not on the public internet, nor in an allowed network.
    pub fn check_address(&self, address: IpAddr) -> Result<(), TargetError> {
        match perennial_addresses::is_allowed(address, &self.networks) {
            true => Ok(()),
            false => Err(TargetError::Address(address)),
        }
    }
}

/// Returns true when DNS can carry a name, as it is written in a URL: labels of 1 to 63 letters, digits, hyphens
/// (not at an end) and underscores, 253 bytes in all (RFC 1035, section 2.3.4; RFC 1123, section 2.1). A dot at the
/// end is refused: browsers give none.
fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=63).contains(&label.len())
            && label.bytes().all(known)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> Policy {
        Policy { hosts: vec![HostPattern::Any], ..Policy::default() }
    }

    #[test]
    fn the_endpoints_of_the_browsers_are_taken_byte_for_byte() {
        for url in [
            "https://fcm.googleapis.com/fcm/send/dNB8:APA91bF",
            "https://fcm.googleapis.com/wp/dNB8:APA91bF",
            "https://jmt17.google.com/fcm/send/x",
            "https://android.googleapis.com/gcm/send/x",
            "https://updates.push.services.mozilla.com/wpush/v2/gAAAAABk_x-y",
            "https://web.push.apple.com/QGuQyavXutnMH",
            "https://wns2-par02p.notify.windows.com/w/?token=BQYAAAC%2b%2fx%3d%3d",
        ] {
            let endpoint = Policy::default().check(url).unwrap();
            assert_eq!(endpoint.url(), url);
            assert_eq!(endpoint.uri.to_string(), url);
            assert!(!format!("{endpoint:?}").contains("APA91"), "an endpoint is a capability");
        }
    }

    #[test]
    fn an_origin_is_written_as_rfc_6454_says() {
        let policy = Policy {
            networks: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            insecure: true,
            ..open()
        };
        for (url, origin) in [
            ("https://push.example.net/x", "https://push.example.net"),
            ("https://push.example.net:8443/x", "https://push.example.net:8443"),
            ("http://127.0.0.1:8080/x?y", "http://127.0.0.1:8080"),
            ("http://[::1]/x", "http://[::1]"),
        ] {
            assert_eq!(policy.check(url).unwrap().origin.to_string(), origin);
        }
    }

    #[test]
    fn hostile_endpoints_are_refused_by_the_default_policy() {
        use TargetError::{Form, Host, Port, Scheme, UserInfo};
        let host = |name: &str| Host(name.to_owned());
        for (url, error) in [
            ("", Form),
            ("fcm.googleapis.com/x", Form),
            ("//fcm.googleapis.com/x", Form),
            ("https://", Form),
            ("https:///x", Form),
            ("https:fcm.googleapis.com/x", Form),
            ("http://fcm.googleapis.com/x", Scheme),
            ("ftp://fcm.googleapis.com/x", Scheme),
            ("file:///etc/passwd", Scheme),
            ("gopher://fcm.googleapis.com/x", Scheme),
            ("javascript:alert(1)", Scheme),
            ("https://user@fcm.googleapis.com/x", UserInfo),
            ("https://user:pass@fcm.googleapis.com/x", UserInfo),
            ("https://@fcm.googleapis.com/x", Form),
            ("https://fcm.googleapis.com@evil.example/x", UserInfo),
            ("https://fcm.googleapis.com:8443/x", Port),
            ("https://fcm.googleapis.com:80/x", Port),
            ("https://fcm.googleapis.com:443/x", Form),
            ("https://fcm.googleapis.com/x#fragment", Form),
            ("https://FCM.googleapis.com/x", Form),
            ("https://fcm.googleapis.com", Form),
            ("https://fcm.googleapis.com\\@evil.example/x", Form),
            ("https://fcm.googleapis.com/a/../b", Form),
            ("https://fcm.googleapis.com/\ta", Form),
            ("https://fcm.googleapis.com/a\r\nHost: evil", Form),
            (" https://fcm.googleapis.com/x", Form),
            ("https://evil.example/fcm.googleapis.com", host("evil.example")),
            ("https://fcm.googleapis.com.evil.example/x", host("fcm.googleapis.com.evil.example")),
            ("https://evilfcm.googleapis.com/x", host("evilfcm.googleapis.com")),
            ("https://fcm.googleapis.com./x", Form),
            ("https://push.apple.com/x", host("push.apple.com")),
            ("https://evilpush.apple.com/x", host("evilpush.apple.com")),
            ("https://.push.apple.com/x", Form),
            ("https://a..push.apple.com/x", Form),
            ("https://-a.push.apple.com/x", Form),
            ("https://a-.push.apple.com/x", Form),
            ("https://a!.push.apple.com/x", Form),
            ("https://a~b.push.apple.com/x", Form),
            ("https://a'b.push.apple.com/x", Form),
            ("https://a;b.push.apple.com/x", Form),
            ("https://a,b.push.apple.com/x", Form),
            ("https://$(id).push.apple.com/x", Form),
            ("https://permanently-removed.invalid/x", host("permanently-removed.invalid")),
            ("https://localhost/x", host("localhost")),
            ("https://metadata.google.internal/x", host("metadata.google.internal")),
        ] {
            assert_eq!(Policy::default().check(url), Err(error), "{url}");
        }
        for host in
            [format!("{}.push.apple.com", "x".repeat(64)), format!("{}push.apple.com", "x.".repeat(121))]
        {
            assert_eq!(Policy::default().check(&format!("https://{host}/x")), Err(Form), "{host}");
        }
        let long = format!("https://fcm.googleapis.com/{}", "x".repeat(MAX_ENDPOINT));
        assert_eq!(Policy::default().check(&long), Err(TargetError::Length));
    }

    #[test]
    fn hostile_addresses_are_refused_although_any_host_is_allowed() {
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.254",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::ffff:0:127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            let ip: IpAddr = address.parse().unwrap();
            assert_eq!(open().check_address(ip), Err(TargetError::Address(ip)), "{address}");
            let url = if ip.is_ipv6() { format!("https://[{ip}]/x") } else { format!("https://{ip}/x") };
            assert!(open().check(&url).is_err(), "{url}");
        }
        // Other spellings of 127.0.0.1.
        for host in [
            "2130706433",
            "0x7f000001",
            "0177.0.0.1",
            "127.1",
            "127.0.1",
            "0x7f.1",
            "127.0.0.1.",
            "①②⑦.0.0.1",
        ] {
            assert!(open().check(&format!("https://{host}/x")).is_err(), "{host}");
        }
        for address in
            ["8.8.8.8", "142.250.74.42", "100.128.0.1", "172.32.0.1", "2a00:1450:4001:82a::200a", "2600::1"]
        {
            assert_eq!(open().check_address(address.parse().unwrap()), Ok(()), "{address}");
        }
    }

    #[test]
    fn an_allowed_network_opens_only_itself() {
        let allow = |network: &str| Policy { networks: vec![network.parse().unwrap()], ..open() };
        let permits = |policy: &Policy, address: &str| policy.check_address(address.parse().unwrap()).is_ok();
        let loopback = allow("127.0.0.0/8");
        assert!(permits(&loopback, "127.0.0.1") && permits(&loopback, "::ffff:127.0.0.1"));
        assert!(!permits(&loopback, "10.0.0.1") && !permits(&loopback, "::1"));
        let nat64 = allow("64:ff9b::/96");
        assert!(permits(&nat64, "64:ff9b::808:808"), "IPv6-only networks reach the world like this");
        assert!(!permits(&nat64, "64:ff9b::7f00:1"), "and their own machines too");
    }

    #[test]
    fn patterns_are_names_suffixes_or_everything() {
        for text in ["*", "push.example.net", "*.push.example.net", "127.0.0.1"] {
            assert_eq!(text.parse::<HostPattern>().unwrap().to_string(), text);
        }
        for text in ["", "*.", "a b", "https://x", "x/y", "*x"] {
            assert_eq!(text.parse::<HostPattern>(), Err(NoHostPattern), "{text}");
        }
    }
}
