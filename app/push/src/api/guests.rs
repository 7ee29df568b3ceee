//! Limits the number of stored guests. A guest is a subscription that was made without an API key or a user token, and
//! to which nothing has been delivered yet.
//!
//! Any client can make guests, at the cost of one request each. So guests are counted, by address and by site, and the
//! oldest make room for new ones. After its first delivery a subscription is no guest any more and stays.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use parking_lot::Mutex;
use perennial_server::net::network;
use perennial_store::pool::sql;
use tracing::warn;

use crate::metrics;
use crate::store::{Guest, PushStore};
use perennial_host::sites::SiteId;

/// How long a count is used before the store is asked again.
const COUNTED: Duration = Duration::from_secs(30);
/// Share of the limit, in percent, from which on the log warns.
const NEARLY: u64 = 80;
/// Interval between two such warnings.
const WARN_AGAIN: Duration = Duration::from_secs(60);
/// Number of the oldest guests that make room for a new one while the limit is reached.
const EVICTED: usize = 2;
/// Number of bytes that are stored of the hash of an address.
const ADDRESS: usize = 8;

/// Limits on the number of guests; `None` is no limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) per_site: Option<u64>,
    pub(crate) per_address: Option<usize>,
}

/// Counts the guests of each site, and decides when the oldest make room.
#[derive(Debug)]
pub(crate) struct Guests {
    config: Config,
    sites: Mutex<HashMap<SiteId, CountedGuests>>,
}

#[derive(Clone, Copy, Debug)]
struct CountedGuests {
    guests: u64,
    at: Instant,
    warned: Option<Instant>,
}

impl Guests {
    pub(crate) fn new(config: Config) -> Self {
        Self { config, sites: Mutex::default() }
    }

    /// Returns what is stored about a guest from `address`, which is hashed with the site's `key`. An unknown address
    /// and an address of this machine have no limit of their own: they stand for many clients behind a proxy that is
    /// not listed in the settings.
    pub(crate) async fn stranger(
        &self,
        store: &PushStore,
        (site, name): (SiteId, &str),
        key: &hmac::Key,
        address: Option<IpAddr>,
    ) -> sql::Result<Guest> {
        let address = address.filter(|address| !address.to_canonical().is_loopback());
        let hash =
            |address| hmac::sign(key, network(address).to_string().as_bytes()).as_ref()[..ADDRESS].to_vec();
        let evicted = self.must_evict(store, site, name).await?;
        Ok(Guest {
            per_address: self.config.per_address.filter(|_| address.is_some()),
            address: address.map(hash).unwrap_or_default(),
            evicted: if evicted { EVICTED } else { 0 },
        })
    }

    /// Counts one stored guest, and the `evicted` subscriptions that made room.
    pub(crate) fn stored(&self, site: SiteId, name: &str, evicted: u64) {
        if let Some(counted) = self.sites.lock().get_mut(&site) {
            counted.guests = (counted.guests + 1).saturating_sub(evicted);
        }
        if evicted > 0 {
            metrics::evicted(evicted);
            warn!(
                site = name,
                evicted,
                "subscriptions that nothing was delivered to were deleted to make room for new ones (push.guests_per_site, push.guests_per_address)"
            );
        }
    }

    /// Returns true when a site has reached its limit. The count is read from the store from time to time, and `stored`
    /// adjusts it in between.
    async fn must_evict(&self, store: &PushStore, site: SiteId, name: &str) -> sql::Result<bool> {
        let Some(most) = self.config.per_site else { return Ok(false) };
        let known = self.sites.lock().get(&site).copied();
        let mut counted = match known.filter(|counted| counted.at.elapsed() < COUNTED) {
            Some(counted) => counted,
            None => CountedGuests {
                guests: store.guests(site.0).await?,
                at: Instant::now(),
                warned: known.and_then(|known| known.warned),
            },
        };
        metrics::guests(name, counted.guests);
        let is_nearly = counted.guests * 100 >= most * NEARLY;
        if is_nearly && counted.warned.is_none_or(|at| at.elapsed() >= WARN_AGAIN) {
            warn!(
                site = name,
                subscriptions = counted.guests,
                most,
                "strangers have stored nearly as many subscriptions as may be; the oldest that nothing was delivered to will make room (push.guests_per_site)"
            );
            counted.warned = Some(Instant::now());
        }
        self.sites.lock().insert(site, counted);
        Ok(counted.guests >= most)
    }
}
