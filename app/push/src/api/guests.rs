//! How much strangers may have stored: subscriptions that were made without a key, and that nothing was delivered to yet.
//!
//! Anybody can make such rows, and a row costs nothing but its request. So they are counted, by address and in all, and
//! the oldest make room for new ones; whatever was delivered to is no guest any more, and stays.

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

/// How long a count is believed.
const COUNTED: Duration = Duration::from_secs(30);
/// From this share of what is allowed on, in percent, the log warns, and how often.
const NEARLY: u64 = 80;
const WARN_AGAIN: Duration = Duration::from_secs(60);
/// How many of the oldest make room for a new one while there are too many.
const EVICTED: usize = 2;
/// How many bytes of the hash of an address are kept.
const ADDRESS: usize = 8;

/// How many may be kept; none is no limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) per_site: Option<u64>,
    pub(crate) per_address: Option<usize>,
}

/// See the module.
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

    /// What is stored of a stranger from `address`, whose site's key is `key`. A caller whose address is not known, or is on
    /// this machine, stands for many: a proxy that is not listed.
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

    /// Notes that one was stored, and how many made room.
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

    /// Whether a site has as many as it may. Counted anew from time to time; in between, by what comes.
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
