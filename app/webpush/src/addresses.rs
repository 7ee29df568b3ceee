//! The addresses of an origin. They are used in turn; an address that fails is set aside for a while.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// First and longest time for which a failed address is set aside. The time doubles with each failure.
const ASIDE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Maximum number of remembered addresses of one name. The names of push services have one to some dozens.
const MAX_ADDRESSES: usize = 256;

/// State of the addresses of one origin; a cheap handle.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServiceAddresses(Arc<Mutex<KnownAddress>>);

#[derive(Debug, Default)]
struct KnownAddress {
    health: HashMap<IpAddr, AddressHealth>,
    /// Number of choices. Of two equally good addresses, the one that was chosen longer ago is next.
    choices: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct AddressHealth {
    open: usize,
    chosen: u64,
    failures: u32,
    aside_until: Option<Instant>,
}

/// Status of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressStatus {
    /// The address.
    pub address: IpAddr,
    /// Number of open connections to it.
    pub connections: usize,
    /// True while the address is set aside after a failure.
    pub aside: bool,
}

impl ServiceAddresses {
    /// Sorts `resolved` in the order in which to try the addresses: healthy ones first, and of these the least used.
    pub(crate) fn in_turn(&self, mut resolved: Vec<IpAddr>, now: Instant) -> Vec<IpAddr> {
        let mut known = self.0.lock();
        resolved.truncate(MAX_ADDRESSES);
        if known.health.len() + resolved.len() > 2 * MAX_ADDRESSES {
            known.health.retain(|_, health| health.open > 0);
        }
        resolved.sort_by_key(|address| {
            let health = known.health.get(address).copied().unwrap_or_default();
            (health.aside_until.filter(|until| *until > now), health.open, health.chosen)
        });
        resolved
    }

    /// Counts a connection that is being opened to `address`.
    pub(crate) fn choose(&self, address: IpAddr) -> ChosenAddress {
        let mut known = self.0.lock();
        known.choices += 1;
        let chosen = known.choices;
        let health = known.health.entry(address).or_default();
        health.open += 1;
        health.chosen = chosen;
        ChosenAddress { addresses: self.clone(), address }
    }

    /// Status of the known addresses.
    pub(crate) fn status(&self, now: Instant) -> Vec<AddressStatus> {
        let known = self.0.lock();
        let status = |(address, health): (&IpAddr, &AddressHealth)| AddressStatus {
            address: *address,
            connections: health.open,
            aside: health.aside_until.is_some_and(|until| until > now),
        };
        let mut all: Vec<_> = known.health.iter().map(status).collect();
        all.sort_by_key(|status| status.address);
        all
    }
}

/// A connection to an address, counted while it lasts.
#[derive(Debug)]
pub(crate) struct ChosenAddress {
    addresses: ServiceAddresses,
    pub(crate) address: IpAddr,
}

impl ChosenAddress {
    /// Records that the address works.
    pub(crate) fn works(&self) {
        if let Some(health) = self.addresses.0.lock().health.get_mut(&self.address) {
            health.failures = 0;
            health.aside_until = None;
        }
    }

    /// Records that the address fails: for a while, other addresses are tried first.
    pub(crate) fn fails(&self, now: Instant) {
        if let Some(health) = self.addresses.0.lock().health.get_mut(&self.address) {
            let (first, last) = ASIDE;
            let aside = first.saturating_mul(2_u32.saturating_pow(health.failures.min(16))).min(last);
            health.failures += 1;
            health.aside_until = Some(now + aside);
        }
    }
}

impl Drop for ChosenAddress {
    fn drop(&mut self) {
        if let Some(health) = self.addresses.0.lock().health.get_mut(&self.address) {
            health.open -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn four() -> Vec<IpAddr> {
        (1..=4).map(|last| IpAddr::from([192, 0, 2, last])).collect()
    }

    #[test]
    fn all_are_used_in_turn_and_evenly() {
        let addresses = ServiceAddresses::default();
        let mut open: Vec<ChosenAddress> = Vec::new();
        for _ in 0..40 {
            open.push(addresses.choose(addresses.in_turn(four(), Instant::now())[0]));
        }
        assert!(addresses.status(Instant::now()).iter().all(|status| status.connections == 10));
        open.retain(|chosen| chosen.address != four()[2]);
        assert_eq!(addresses.in_turn(four(), Instant::now())[0], four()[2], "the one with the fewest");
    }

    #[test]
    fn connections_one_after_the_other_take_turns() {
        let addresses = ServiceAddresses::default();
        let used: Vec<_> =
            (0..8).map(|_| addresses.choose(addresses.in_turn(four(), Instant::now())[0]).address).collect();
        assert_eq!(used, [four(), four()].concat());
    }

    #[test]
    fn one_that_fails_is_set_aside_for_longer_each_time_and_tried_again() {
        let addresses = ServiceAddresses::default();
        let mut now = Instant::now();
        for aside in [1, 2, 4, 8, 16, 32, 60, 60] {
            let bad = addresses.choose(four()[0]);
            bad.fails(now);
            drop(bad);
            let just_before = now + Duration::from_secs(aside) - Duration::from_millis(1);
            assert_eq!(addresses.in_turn(four(), just_before)[3], four()[0], "the last resort");
            now += Duration::from_secs(aside);
            for _ in 0..3 {
                let first = addresses.in_turn(four(), now)[0];
                drop(addresses.choose(first));
            }
            assert_eq!(addresses.in_turn(four(), now)[0], four()[0], "its turn has come");
        }
        addresses.choose(four()[0]).works();
        assert!(addresses.status(now).iter().all(|status| !status.aside));
    }
}
