//! The target and the host of a request (RFC 9112, section 3.2; RFC 9113, section 8.3.1).
//!
//! After the check the host is in one place, the `Host` header, whatever form the request had.

use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Version, header};

use super::problem::Problem;

/// How a request is answered.
#[derive(Debug)]
pub(super) enum Target {
    /// By a route.
    Route,
    /// By the server itself: `OPTIONS *` asks for the methods of the whole server.
    Server,
    /// By a problem: the request is refused.
    Refused(Problem),
}

/// The methods that routes may have.
pub(super) const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// Checks the target and the host of a request, and writes the host of the target into the `Host` header.
pub(super) fn check<B>(request: &mut Request<B>) -> Target {
    let bad = |detail: &str| Target::Refused(Problem::new(StatusCode::BAD_REQUEST, detail));
    if request.method() == Method::CONNECT {
        let detail = "CONNECT is not supported here";
        return Target::Refused(Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail));
    }
    let version = request.version();
    let host = match host(request.headers()) {
        Ok(host) => host,
        Err(detail) => return bad(detail),
    };
    match request.uri().authority().cloned() {
        Some(authority) if authority.as_str().contains('@') => {
            return bad("wanted a target without a user name");
        }
        Some(authority) => {
            // In HTTP/2 both must be the same; in HTTP/1.1 an absolute target takes precedence over the Host header.
            let is_other = host.as_ref().is_some_and(|host| !same(host, &authority));
            if is_other && version >= Version::HTTP_2 {
                return bad("wanted the same host in :authority and in host");
            }
            if host.is_none() && version == Version::HTTP_11 {
                return bad("wanted one Host header");
            }
            if let Ok(value) = HeaderValue::from_str(authority.as_str()) {
                request.headers_mut().insert(header::HOST, value);
            }
        }
        // HTTP/1.0 does not require the Host header.
        None if host.is_none() && version != Version::HTTP_10 => return bad("wanted one Host header"),
        None => {}
    }
    if request.uri().path() == "*" {
        return if request.method() == Method::OPTIONS {
            Target::Server
        } else {
            bad("wanted a path: the target * is for OPTIONS")
        };
    }
    Target::Route
}

fn same(one: &Authority, other: &Authority) -> bool {
    one.as_str().eq_ignore_ascii_case(other.as_str())
}

/// Returns the host in the `Host` header, if there is one.
fn host(headers: &HeaderMap) -> Result<Option<Authority>, &'static str> {
    let mut all = headers.get_all(header::HOST).iter();
    let Some(first) = all.next() else { return Ok(None) };
    if all.next().is_some() {
        return Err("wanted one Host header, not several");
    }
    let host = first.to_str().ok().and_then(|text| text.parse::<Authority>().ok());
    let is_port = |host: &Authority| match host.as_str().rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => {
            !name.is_empty() && (port.is_empty() || host.port().is_some())
        }
        _ => true,
    };
    let harmless = |c: char| c.is_ascii_alphanumeric() || "-._~:[]%!$&'()*+,;=".contains(c);
    match host {
        Some(host) if !host.host().is_empty() && host.as_str().chars().all(harmless) && is_port(&host) => {
            Ok(Some(host))
        }
        _ => Err("wanted a host name, and a port if there is one, in the Host header"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(method: &str, target: &str, version: Version, hosts: &[&str]) -> (String, String) {
        let mut request = Request::builder().method(method).uri(target).version(version);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        let mut request = request.body(()).unwrap();
        let answer = match check(&mut request) {
            Target::Route => "route".to_owned(),
            Target::Server => "server".to_owned(),
            Target::Refused(problem) => problem.status().as_str().to_owned(),
        };
        let host = request.headers().get(header::HOST).map_or("", |host| host.to_str().unwrap_or_default());
        (answer, host.to_owned())
    }

    #[test]
    fn there_is_one_host_and_it_is_one() {
        let on = |hosts: &[&str]| checked("GET", "/", Version::HTTP_11, hosts).0;
        for good in ["example.com", "example.com:8080", "[::1]:80", "127.0.0.1", "a_b", "example.com:"] {
            assert_eq!(on(&[good]), "route", "{good}");
        }
        for bad in ["", " ", "a b", "a@b", "http://a", "a/b", "a:b", "a:99999999", ":80", "a,b c", "é"] {
            assert_eq!(on(&[bad]), "400", "{bad:?}");
        }
        assert_eq!(on(&[]), "400");
        assert_eq!(on(&["a", "a"]), "400");
        assert_eq!(checked("GET", "/", Version::HTTP_10, &[]).0, "route");
    }

    #[test]
    fn an_absolute_target_beats_the_header() {
        let (answer, host) = checked("GET", "http://shop.example/x", Version::HTTP_11, &["other.example"]);
        assert_eq!((&*answer, &*host), ("route", "shop.example"));
        assert_eq!(checked("GET", "http://shop.example/x", Version::HTTP_11, &[]).0, "400");
        let (answer, host) = checked("GET", "https://shop.example/x", Version::HTTP_2, &[]);
        assert_eq!((&*answer, &*host), ("route", "shop.example"));
        let differ = checked("GET", "https://shop.example/x", Version::HTTP_2, &["other.example"]);
        assert_eq!(differ.0, "400");
    }

    #[test]
    fn other_forms_have_their_answers() {
        assert_eq!(checked("OPTIONS", "*", Version::HTTP_11, &["a"]).0, "server");
        assert_eq!(checked("GET", "*", Version::HTTP_11, &["a"]).0, "400");
        assert_eq!(checked("CONNECT", "a.example:443", Version::HTTP_11, &["a.example:443"]).0, "405");
    }
}
