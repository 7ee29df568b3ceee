//! Addresses to listen on, in the form that the settings have.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// One address to listen on: `host:port`, `https://host:port` or `unix:/path`. `tls://host:port` is the same as `https://`,
/// for protocols other than HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Plain HTTP on TCP.
    Http(String),
    /// HTTP over TLS on TCP.
    Https(String),
    /// Plain HTTP on a Unix socket.
    Unix(PathBuf),
}

impl Listen {
    /// Returns true when only this machine can connect: a loopback address, or a Unix socket.
    pub fn is_loopback(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Http(address) | Self::Https(address) => {
                let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
                host == "localhost"
                    || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }
}

/// Error for a text that names no place to listen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("wanted HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:PATH")]
pub struct NoListen;

impl FromStr for Listen {
    type Err = NoListen;

    fn from_str(text: &str) -> Result<Self, NoListen> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(NoListen) } else { Ok(Self::Unix(path.into())) };
        }
        let secure = text.strip_prefix("https://").or_else(|| text.strip_prefix("tls://"));
        let (tls, address) = match secure {
            Some(address) => (true, address),
            None => (false, text.strip_prefix("http://").unwrap_or(text)),
        };
        let (host, port) = address.rsplit_once(':').ok_or(NoListen)?;
        port.parse::<u16>().map_err(|_| NoListen)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.is_empty() || (host.contains(':') && !bracketed) {
            return Err(NoListen);
        }
        Ok(if tls { Self::Https(address.to_owned()) } else { Self::Http(address.to_owned()) })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(address) => f.write_str(address),
            Self::Https(address) => write!(f, "https://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_forms_are_read_and_written() {
        for text in ["127.0.0.1:8080", "localhost:0", "[::1]:80", "https://0.0.0.0:443", "unix:/run/p.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "8080", ":80", "127.0.0.1", "host:99999", "::1:80", "unix:", "ftp://h:1"] {
            assert_eq!(text.parse::<Listen>(), Err(NoListen), "{text}");
        }
    }
}
