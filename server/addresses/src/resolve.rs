//! Resolves a host name to its addresses: pinned ones first, else those of DNS, cached by their TTL.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use tracing::warn;

/// Longest time for the answer of one name server.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Reason why a name has no addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The name does not exist, or has no addresses.
    #[error("{0} does not exist")]
    NotFound(String),
    /// No name server has answered: the name, and the reason.
    #[error("{0} cannot be looked up: {1}")]
    Failed(String, String),
}

/// Fixed addresses of a host name, used instead of those of DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The host name.
    pub host: String,
    /// The addresses of the host.
    pub addresses: Vec<IpAddr>,
}

/// Looks names up. Names of strangers may have name servers that never answer: no thread waits for them.
#[derive(Debug)]
pub struct Resolver {
    pins: HashMap<String, Vec<IpAddr>>,
    dns: Option<TokioResolver>,
}

impl Resolver {
    /// Reads the system's configuration; without one, only pinned names have addresses.
    pub fn new(pins: Vec<Pin>) -> Self {
        let dns = TokioResolver::builder_tokio().and_then(|mut builder| {
            let options = builder.options_mut();
            options.timeout = TIMEOUT;
            options.attempts = 2;
            options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
            builder.build()
        });
        let dns = dns
            .inspect_err(|error| warn!(%error, "no DNS: only names with fixed addresses can be looked up"))
            .ok();
        Self { pins: pins.into_iter().map(|pin| (pin.host, pin.addresses)).collect(), dns }
    }

    /// All addresses of `host`: at least one.
    ///
    /// # Errors
    /// When the name has no addresses, or cannot be looked up.
    pub async fn resolve(&self, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        // RFC 6761, section 6.4: no name server needs to be asked.
        if host.ends_with(".invalid") {
            return Err(ResolveError::NotFound(host.to_owned()));
        }
        if let Some(addresses) = self.pins.get(host) {
            return Ok(addresses.clone());
        }
        let failed = |why: String| ResolveError::Failed(host.to_owned(), why);
        let dns = self.dns.as_ref().ok_or_else(|| failed("there is no name server".to_owned()))?;
        // The dot at the end makes the name absolute, so that no search domain is appended.
        match dns.lookup_ip(format!("{}.", host.trim_end_matches('.'))).await {
            Ok(found) => {
                let addresses: Vec<IpAddr> = found.iter().collect();
                if addresses.is_empty() {
                    Err(ResolveError::NotFound(host.to_owned()))
                } else {
                    Ok(addresses)
                }
            }
            Err(error) if has_none(&error) => Err(ResolveError::NotFound(host.to_owned())),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

/// Returns true when a name server states that there are no addresses. A broken one (SERVFAIL, REFUSED) sends none
/// either.
fn has_none(error: &NetError) -> bool {
    let NetError::Dns(DnsError::NoRecordsFound(none)) = error else { return false };
    matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError)
}
