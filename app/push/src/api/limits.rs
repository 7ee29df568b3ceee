//! Rate limits for callers without an API key: per address, and for all addresses of a site together.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::StatusCode;
use perennial_server::http::problem::Problem;
use perennial_server::net::network;

use crate::metrics;
use perennial_host::sites::SiteId;

/// Interval at which addresses that have kept within their limits are forgotten.
pub(crate) const FORGET_EVERY: Duration = Duration::from_secs(60);

/// Number of remembered addresses from which on the site's limit is checked first, so that it bounds the growth of the
/// table.
const MANY: usize = 100_000;

/// Limits of an address and of a site: requests at once, and requests per minute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) address_burst: u32,
    pub(crate) address_per_minute: u32,
    pub(crate) site_burst: u32,
    pub(crate) site_per_minute: u32,
}

/// Recent requests without an API key, by address and by site.
pub(crate) struct AddressLimits {
    addresses: DefaultKeyedRateLimiter<(SiteId, IpAddr)>,
    sites: DefaultKeyedRateLimiter<SiteId>,
    clock: DefaultClock,
}

impl std::fmt::Debug for AddressLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limits")
    }
}

impl AddressLimits {
    pub(crate) fn new(config: Config) -> Self {
        let quota = |per_minute, burst| {
            let at_least_one = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
            Quota::per_minute(at_least_one(per_minute)).allow_burst(at_least_one(burst))
        };
        Self {
            addresses: RateLimiter::keyed(quota(config.address_per_minute, config.address_burst)),
            sites: RateLimiter::keyed(quota(config.site_per_minute, config.site_burst)),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request from `address` for `site`. A request without an address comes from this machine.
    ///
    /// The site's limit is checked second, so that one address cannot use it up. It is checked first when [`MANY`]
    /// addresses are remembered.
    pub(crate) fn check(&self, site: SiteId, address: Option<IpAddr>) -> Result<(), Problem> {
        let over = |what, wait: Duration| {
            metrics::limited(what);
            let detail = format!("too many requests without an API key from this {what}");
            Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(wait)
        };
        let of_site = || {
            let allowed = self.sites.check_key(&site);
            allowed.map_err(|until| over("site", until.wait_time_from(self.clock.now())))
        };
        let many = self.addresses.len() >= MANY;
        if many {
            of_site()?;
        }
        if let Some(address) = address {
            let allowed = self.addresses.check_key(&(site, network(address)));
            allowed.map_err(|until| over("address", until.wait_time_from(self.clock.now())))?;
        }
        if many { Ok(()) } else { of_site() }
    }

    /// Forgets the addresses that have kept within their limits.
    pub(crate) fn forget(&self) {
        self.addresses.retain_recent();
        self.addresses.shrink_to_fit();
    }

    /// Number of remembered addresses.
    pub(crate) fn len(&self) -> usize {
        self.addresses.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> AddressLimits {
        AddressLimits::new(Config {
            address_burst: 2,
            address_per_minute: 1,
            site_burst: 5,
            site_per_minute: 1,
        })
    }

    fn call(limits: &AddressLimits, address: &str) -> bool {
        limits.check(SiteId::DEFAULT, Some(address.parse().unwrap())).is_ok()
    }

    #[test]
    fn each_address_has_its_own_burst() {
        let limits = limits();
        assert_eq!([(); 3].map(|()| call(&limits, "192.0.2.1")), [true, true, false]);
        assert!(call(&limits, "192.0.2.2"));
    }

    #[test]
    fn an_ipv6_network_is_one_address_and_a_mapped_address_is_itself() {
        let limits = limits();
        assert!(call(&limits, "2001:db8:1:2::1") && call(&limits, "2001:db8:1:2:ffff::"));
        assert!(!call(&limits, "2001:db8:1:2::3"));
        assert!(call(&limits, "2001:db8:1:3::1"));
        assert!(
            call(&limits, "192.0.2.1") && call(&limits, "::ffff:192.0.2.1") && !call(&limits, "192.0.2.1")
        );
    }

    #[test]
    fn what_is_used_up_at_one_site_is_not_at_another() {
        let limits = limits();
        let shop = SiteId(2);
        for last in 1..=6 {
            let _ = limits.check(shop, Some(format!("192.0.2.{last}").parse().unwrap()));
        }
        assert!(limits.check(shop, Some("192.0.2.9".parse().unwrap())).is_err());
        assert!(call(&limits, "192.0.2.1") && call(&limits, "192.0.2.9"));
    }

    #[test]
    fn all_addresses_together_have_a_limit() {
        let limits = limits();
        let calls: Vec<bool> = (1..=6).map(|last| call(&limits, &format!("192.0.2.{last}"))).collect();
        assert_eq!(calls, [true, true, true, true, true, false]);
    }
}
