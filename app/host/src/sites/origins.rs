//! Origins of pages as settings list them: exact ones, and those of all subdomains.
//!
//! A browser writes an origin in one way only (RFC 6454, section 6.2; WHATWG URL, section 4.7): in lower case, without
//! a default port and without a path. A listed origin that is written differently would never match, so it is refused.

use url::Url;

/// Schemes whose pages have an origin of their own, besides http and https: browser extensions and applications
/// that embed a browser.
const APPLICATIONS: [&str; 3] = ["capacitor", "ionic", "tauri"];

/// One origin, or the origins of all subdomains of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    /// `https://www.example.com`
    Exact(String),
    /// `https://*.example.com`, as what comes before the subdomain and what comes after it: `https://`, `.example.com`.
    Subdomains { before: String, after: String },
}

impl Pattern {
    /// Reads one origin of the settings.
    ///
    /// # Errors
    /// The form that was wanted instead.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        if text.contains('*') {
            return Self::read_wildcard(text);
        }
        let (scheme, host) = text.split_once("://").ok_or_else(|| example("an origin with its scheme"))?;
        if is_of_application(scheme) {
            let is_id = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
            return match !host.is_empty() && host.chars().all(is_id) {
                true => Ok(Self::Exact(text.to_owned())),
                false => Err(format!("{scheme}:// and an identifier in lower case, and nothing after it")),
            };
        }
        let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let Some(url) = url else { return Err(example("an http or https origin")) };
        let written = url.origin().ascii_serialization();
        if written == text {
            return Ok(Self::Exact(written));
        }
        Err(format!("{written}, which is how browsers write this origin"))
    }

    fn read_wildcard(text: &str) -> Result<Self, String> {
        let refused = || {
            "each origin by its name, or all subdomains of one name such as https://*.example.com".to_owned()
        };
        let (before, after) = text.split_once('*').ok_or_else(refused)?;
        let name = after.strip_prefix('.').ok_or_else(refused)?;
        // A pattern for everything below a top-level domain would match the sites of strangers.
        if !matches!(before, "http://" | "https://") || !name.contains('.') {
            return Err(refused());
        }
        match Self::read(&format!("{before}{name}")) {
            Ok(_) => Ok(Self::Subdomains { before: before.to_owned(), after: after.to_owned() }),
            Err(wanted) => Err(wanted.replacen("://", "://*.", 1)),
        }
    }

    /// Returns true when the origin that a browser sent is one of these.
    pub(super) fn matches(&self, origin: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == origin,
            Self::Subdomains { before, after } => {
                let middle =
                    origin.strip_prefix(before.as_str()).and_then(|rest| rest.strip_suffix(after.as_str()));
                middle.is_some_and(|labels| !labels.is_empty() && !labels.contains(['/', ':', '@']))
            }
        }
    }

    /// Exactness of the pattern: of two patterns that match, the one with the higher rank counts.
    pub(super) fn rank(&self) -> usize {
        match self {
            Self::Exact(_) => usize::MAX,
            Self::Subdomains { after, .. } => after.len(),
        }
    }
}

fn is_of_application(scheme: &str) -> bool {
    let is_scheme = scheme.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    is_scheme && (scheme.ends_with("-extension") || APPLICATIONS.contains(&scheme))
}

fn example(what: &str) -> String {
    format!("{what}, such as https://www.example.com")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_that_no_browser_sends_are_refused() {
        for (text, wanted) in [
            ("*", "each origin by its name"),
            ("https://*", "each origin by its name"),
            ("https://*.com", "each origin by its name"),
            ("https://a.*.example.com", "each origin by its name"),
            ("https://www.Example.com", "https://www.example.com, which is how"),
            ("HTTPS://www.example.com", "https://www.example.com, which is how"),
            ("https://www.example.com:443", "https://www.example.com, which is how"),
            ("http://www.example.com:80", "http://www.example.com, which is how"),
            ("https://www.example.com/", "https://www.example.com, which is how"),
            ("https://www.example.com/shop", "https://www.example.com, which is how"),
            ("https://user@www.example.com", "https://www.example.com, which is how"),
            ("https://bücher.example", "https://xn--bcher-kva.example, which is how"),
            ("https://*.Example.com", "https://*.example.com, which is how"),
            ("www.example.com", "an origin with its scheme"),
            ("ftp://www.example.com", "an http or https origin"),
            ("file://", "an http or https origin"),
            ("chrome-extension://ABC", "chrome-extension:// and an identifier"),
            ("", "an origin with its scheme"),
        ] {
            let error = Pattern::read(text).unwrap_err();
            assert!(error.starts_with(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn origins_match_exactly_or_by_subdomain() {
        let matches = |pattern: &str, origin: &str| Pattern::read(pattern).unwrap().matches(origin);
        assert!(matches("https://www.example.com", "https://www.example.com"));
        assert!(!matches("https://www.example.com", "https://www.example.com:8443"));
        assert!(matches("https://*.example.com", "https://a.example.com"));
        assert!(matches("https://*.example.com", "https://a.b.example.com"));
        assert!(matches("https://*.example.com:8443", "https://a.example.com:8443"));
        for other in [
            "https://example.com",
            "http://a.example.com",
            "https://aexample.com",
            "https://a.example.com.evil.net",
            "https://evil.net/.example.com",
            "https://a.example.com:444",
            "https://.example.com",
        ] {
            assert!(!matches("https://*.example.com", other), "{other}");
        }
        assert!(matches(
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop"
        ));
        assert!(matches("capacitor://localhost", "capacitor://localhost"));
    }
}
