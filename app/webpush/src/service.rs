//! The state of a push service, shared by all senders.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, header};
use parking_lot::Mutex;
use tracing::warn;

use crate::addresses::{AddressStatus, ServiceAddresses};
use crate::circuit_breaker::{Cause, HeldFor, Signal};
use crate::reputation::{Gates, Reputation, Ticket};
use crate::target::{Endpoint, HostPattern, Origin, Policy, TargetError, origin_of};
use crate::vapid::{Claimed, Signer, VapidKey};
use crate::verdict::is_windows;

/// Maximum number of known push services that one pattern of the policy lets in: `*`, a suffix, or a name (at its
/// ports). Any visitor can bring services of the first two, which take no room from services of other patterns.
const MAX_OF_ANY: usize = 512;
const MAX_OF_SUFFIX: usize = 128;
const MAX_OF_NAME: usize = 64;
/// Maximum number of known keys at one service.
const MAX_KEYS: usize = 64;
/// Clock difference above which a warning is logged: claims are valid for a limited time.
const SKEW: Duration = Duration::from_secs(30);
/// A service's clock is compared with one answer in this number, and at most once in `LOOK_AT_CLOCK`.
const LOOK_AT_ONE_IN: u64 = 256;
const LOOK_AT_CLOCK: Duration = Duration::from_secs(300);
/// Number of failed lookups of a name, and their shortest duration, after which it counts as nonexistent.
const LOST: (u32, Duration) = (3, Duration::from_secs(600));

/// State of one push service.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) origin: Arc<Origin>,
    pub(crate) claimed: Claimed,
    pub(crate) addresses: ServiceAddresses,
    known: Mutex<KnownKey>,
    clock: Mutex<ServiceClock>,
    answers: AtomicU64,
    /// Time at which the last connection was opened, or will be. All senders together open them one after the other.
    dialed: Mutex<Option<Instant>>,
    /// Time since which the name cannot be looked up, and the number of failed lookups.
    lost: Mutex<Option<(Instant, u32)>>,
}

/// State that follows from a service's answers.
#[derive(Debug)]
struct KnownKey {
    gates: Gates,
    /// State of each key, with its own circuit breakers: a fault of one key does not affect the others.
    keys: Vec<KeyKnown>,
    used: Instant,
    /// Time at which all holds were last ended by order. What was sent before proves no new hold.
    opened: Option<Instant>,
}

/// State of one key at a push service.
#[derive(Debug)]
struct KeyKnown {
    signer: Signer,
    /// Circuit breakers of the key, from its first refusal on.
    gates: Option<Box<Gates>>,
    /// Time at which a message with this key was last accepted; `None` when that was reported.
    accepted: Option<SystemTime>,
    /// Time at which a message with this key was last accepted, reported or not.
    delivered: Option<Instant>,
}

/// Difference between a service's clock and ours.
#[derive(Debug, Default)]
struct ServiceClock {
    looked: Option<Instant>,
    ahead_seconds: i64,
}

/// Status of one push service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Origin of the service: `https://fcm.googleapis.com`.
    pub origin: String,
    /// Remaining time of a hold, its cause, and the subscriptions that it is for; `None` without a hold.
    pub held: Option<(Duration, Cause, HeldFor)>,
    /// True when the policy names its host, or it has delivered a message.
    pub is_trusted: bool,
    /// Status of its addresses.
    pub addresses: Vec<AddressStatus>,
    /// Time that its clock is ahead of ours, in seconds; negative when it is behind.
    pub clock_ahead_seconds: i64,
}

/// A push service has accepted a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// Origin of the service.
    pub origin: String,
    /// Signer of the message.
    pub signer: Signer,
    /// Time of the last accepted message.
    pub at: SystemTime,
}

/// Properties of the message that asks for a permit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking<'a> {
    pub(crate) key: &'a VapidKey,
    pub(crate) who: Reputation,
    pub(crate) urgent: bool,
}

impl KnownKey {
    fn key(&mut self, signer: Signer) -> Option<&mut KeyKnown> {
        self.keys.iter_mut().find(|known| known.signer == signer)
    }

    fn gates_of(&mut self, signer: Signer) -> Option<&mut Gates> {
        self.key(signer)?.gates.as_deref_mut()
    }

    /// Returns the state of a key, and adds it when it is new. When there is no room, the oldest key that is not
    /// refused is removed, or else the oldest one.
    fn key_or_new(&mut self, signer: Signer) -> &mut KeyKnown {
        let at = self.keys.iter().position(|known| known.signer == signer).unwrap_or_else(|| {
            if self.keys.len() >= MAX_KEYS {
                let oldest = self.keys.iter().position(|known| known.gates.is_none()).unwrap_or(0);
                self.keys.remove(oldest);
            }
            self.keys.push(KeyKnown { signer, gates: None, accepted: None, delivered: None });
            self.keys.len() - 1
        });
        &mut self.keys[at]
    }

    /// Records the outcome of a message for its key. Returns true when it opened a circuit breaker of that key.
    fn note_key(&mut self, signer: Signer, signal: Signal, ticket: Ticket, who: Reputation, id: u64) -> bool {
        let now = Instant::now();
        let known = self.key_or_new(signer);
        match signal {
            Signal::Success => {
                known.accepted = Some(SystemTime::now());
                known.delivered = Some(now);
                if let Some(gates) = &mut known.gates {
                    gates.well(ticket, now);
                    if gates.is_new() {
                        known.gates = None;
                    }
                }
                false
            }
            Signal::Unauthorized => {
                let gates = known.gates.get_or_insert_default();
                gates.was_delivered(known.delivered);
                gates.note(signal, ticket, who, id, now)
            }
            Signal::Answered => {
                known.gates.as_mut().is_some_and(|gates| gates.note(signal, ticket, who, id, now))
            }
            Signal::Throttled(_) | Signal::Unreachable | Signal::Silent | Signal::Nothing => {
                if let Some(gates) = &mut known.gates {
                    gates.lose(ticket);
                }
                false
            }
        }
    }

    /// Remaining time of a hold, its cause, and the subscriptions that it is for: of the service, or else the
    /// longest one of a key.
    fn held(&self, now: Instant) -> Option<(Duration, Cause, HeldFor)> {
        let of_keys = self.keys.iter().filter_map(|known| known.gates.as_ref()?.status(now));
        self.gates.status(now).or_else(|| of_keys.max_by_key(|(wait, ..)| *wait))
    }
}

impl Service {
    fn new(origin: Arc<Origin>) -> Self {
        Self {
            origin,
            claimed: Claimed::default(),
            addresses: ServiceAddresses::default(),
            known: Mutex::new(KnownKey {
                gates: Gates::default(),
                keys: Vec::new(),
                used: Instant::now(),
                opened: None,
            }),
            clock: Mutex::default(),
            answers: AtomicU64::new(0),
            dialed: Mutex::default(),
            lost: Mutex::default(),
        }
    }

    /// Asks the circuit breakers for a permit, which records the outcome of the message. The error is the wait and
    /// its cause.
    pub(crate) fn admit(&self, asking: Asking<'_>) -> Result<Permit<'_>, (Duration, Cause)> {
        let Asking { key, who, urgent } = asking;
        let now = Instant::now();
        let mut known = self.known.lock();
        known.used = now;
        let mut permit = Permit {
            service: self,
            signer: key.signer(),
            who,
            began: now,
            of_key: Ticket::Open,
            of_all: Ticket::Open,
        };
        if let Some(gates) = known.gates_of(permit.signer) {
            permit.of_key = gates.admit(who, urgent, now)?;
        }
        match known.gates.admit(who, urgent, now) {
            Ok(ticket) => permit.of_all = ticket,
            Err(wait) => {
                if let Some(gates) = known.gates_of(permit.signer) {
                    gates.lose(std::mem::take(&mut permit.of_key));
                }
                // The drop of the permit takes the lock.
                drop(known);
                return Err(wait);
            }
        }
        drop(known);
        Ok(permit)
    }

    /// Returns the wait and its cause when messages are held for longer than `patience`. It makes no sense then to
    /// wait for a permit.
    pub(crate) fn is_held(&self, asking: Asking<'_>, patience: Duration) -> Option<(Duration, Cause)> {
        let now = Instant::now();
        let mut known = self.known.lock();
        let of_key = known.gates_of(asking.key.signer());
        let of_key = of_key.and_then(|gates| gates.held(asking.who, asking.urgent, now));
        let held = of_key.or_else(|| known.gates.held(asking.who, asking.urgent, now));
        held.filter(|(wait, _)| *wait > patience)
    }

    /// Returns true when the service refuses a key, as far as is known: for many subscriptions, not for a single one.
    pub(crate) fn refuses(&self, signer: Signer) -> bool {
        self.known.lock().gates_of(signer).is_some_and(|gates| !gates.is_open())
    }

    /// Takes the acceptances that were not reported yet.
    fn take_accepted(&self) -> Vec<Acceptance> {
        let origin = || self.origin.name.clone();
        let keys = &mut self.known.lock().keys;
        let accepted = keys.iter_mut().filter_map(|known| {
            Some(Acceptance { origin: origin(), signer: known.signer, at: known.accepted.take()? })
        });
        accepted.collect()
    }

    /// Records a failed lookup of the name. Returns true when the name counts as nonexistent by [`LOST`], which a
    /// name of the policy never does.
    pub(crate) fn is_lost(&self) -> bool {
        let mut lost = self.lost.lock();
        let (since, times) = lost.get_or_insert_with(|| (Instant::now(), 0));
        *times = times.saturating_add(1);
        *times >= LOST.0 && since.elapsed() >= LOST.1 && !self.origin.is_named()
    }

    /// Records that the name has addresses.
    pub(crate) fn is_found(&self) {
        *self.lost.lock() = None;
    }

    /// Reserves the time at which another connection may be opened: no sooner than `pause` after the last one.
    pub(crate) fn next_dial(&self, pause: Duration) -> Instant {
        let (mut dialed, now) = (self.dialed.lock(), Instant::now());
        let at = dialed.map_or(now, |dialed| (dialed + pause).max(now));
        *dialed = Some(at);
        at
    }

    /// Closes all circuit breakers of the service and of its keys.
    fn open(&self) {
        let mut known = self.known.lock();
        known.opened = Some(Instant::now());
        known.gates.open();
        known.keys.iter_mut().for_each(|key| key.gates = None);
    }

    /// Warns when the service's clock and ours differ: the service would consider our claims too old, or too new.
    pub(crate) fn compare_clocks(&self, headers: &HeaderMap) {
        if !self.answers.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_AT_ONE_IN) {
            return;
        }
        let mut clock = self.clock.lock();
        if clock.looked.is_some_and(|looked| looked.elapsed() < LOOK_AT_CLOCK) {
            return;
        }
        let date =
            headers.get(header::DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        let Some(theirs) = date else { return };
        let ours = SystemTime::now();
        let apart = theirs.duration_since(ours).or_else(|_| ours.duration_since(theirs)).unwrap_or_default();
        let seconds = i64::try_from(apart.as_secs()).unwrap_or(i64::MAX);
        clock.ahead_seconds = if theirs > ours { seconds } else { -seconds };
        clock.looked = Some(Instant::now());
        if apart > SKEW {
            let ahead_seconds = clock.ahead_seconds;
            warn!(origin = self.origin.name, ahead_seconds, "the push service's clock and ours are apart");
        }
    }

    fn status(&self, now: Instant) -> ServiceStatus {
        let (held, has_delivered) = {
            let known = self.known.lock();
            (known.held(now), known.gates.delivered().is_some())
        };
        ServiceStatus {
            origin: self.origin.name.clone(),
            held,
            is_trusted: self.origin.is_named() || has_delivered,
            addresses: self.addresses.status(now),
            clock_ahead_seconds: self.clock.lock().ahead_seconds,
        }
    }
}

/// Permit for one message on its way. Its end records the outcome; when it is dropped without one, another message
/// may be the probe.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    service: &'a Service,
    signer: Signer,
    who: Reputation,
    began: Instant,
    /// Tickets of the circuit breakers of the key, and of those of the service.
    of_key: Ticket,
    of_all: Ticket,
}

impl Permit<'_> {
    /// Records the outcome for the subscription with this endpoint. Returns true when messages to the service are
    /// held from now on.
    pub(crate) fn end(mut self, signal: Signal, endpoint: &Endpoint) -> bool {
        let of_key = std::mem::take(&mut self.of_key);
        let of_all = std::mem::take(&mut self.of_all);
        // The query is left out, since any visitor can make one up; at WNS it contains the token.
        let mut id = DefaultHasher::new();
        if signal != Signal::Success {
            if is_windows(endpoint.host()) {
                endpoint.uri.path_and_query().hash(&mut id);
            } else {
                endpoint.uri.path().hash(&mut id);
            }
        }
        let (id, now) = (id.finish(), Instant::now());
        let mut known = self.service.known.lock();
        let is_stale = known.opened.is_some_and(|opened| self.began < opened);
        let signal = if is_stale && signal != Signal::Success { Signal::Nothing } else { signal };
        let closed = known.note_key(self.signer, signal, of_key, self.who, id);
        // A service that refuses a key can be reached, and does not choke.
        let signal = if signal == Signal::Unauthorized { Signal::Answered } else { signal };
        known.gates.note(signal, of_all, self.who, id, now) || closed
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.of_all == Ticket::Open && self.of_key == Ticket::Open {
            return;
        }
        let mut known = self.service.known.lock();
        known.gates.lose(self.of_all);
        if let Some(gates) = known.gates_of(self.signer) {
            gates.lose(self.of_key);
        }
    }
}

/// The push services that are known.
#[derive(Debug, Default)]
pub(crate) struct Services(Mutex<HashMap<String, Arc<Service>>>);

impl Services {
    /// Returns the endpoint with this URL. An endpoint at an origin that has been checked needs no second check.
    pub(crate) fn endpoint(&self, policy: &Policy, url: String) -> Result<Endpoint, TargetError> {
        let known = origin_of(&url).and_then(|origin| self.0.lock().get(origin).cloned());
        match known {
            Some(service) => Endpoint::at(&service.origin, &Bytes::from(url)),
            None => policy.check(&url),
        }
    }

    /// Returns the service at an origin, and adds it when it is new. When its pattern has no room left, another
    /// service of that pattern is removed.
    pub(crate) fn of(&self, origin: &Arc<Origin>) -> Option<Arc<Service>> {
        let mut known = self.0.lock();
        if let Some(service) = known.get(&origin.name) {
            return Some(Arc::clone(service));
        }
        let of_kind = |service: &Service| service.origin.pattern == origin.pattern;
        if known.values().filter(|service| of_kind(service)).count() >= budget(&origin.pattern) {
            // A held service is removed like any other; services that have delivered a message are removed last.
            let next = known.values().filter(|service| of_kind(service)).min_by_key(|service| {
                let known = service.known.lock();
                (known.gates.delivered().is_some(), known.used)
            })?;
            let next = next.origin.name.clone();
            known.remove(&next);
        }
        let service = Arc::new(Service::new(Arc::clone(origin)));
        known.insert(origin.name.clone(), Arc::clone(&service));
        Some(service)
    }

    /// Holds messages to an origin for at least `wait`. An origin that is not known here is added only while its
    /// pattern uses less than half of its room.
    pub(crate) fn hold(&self, policy: &Policy, origin: &str, wait: Duration, cause: Cause, whom: HeldFor) {
        let Ok(endpoint) = policy.check(&format!("{origin}/")) else { return };
        let origin = &endpoint.origin;
        {
            let known = self.0.lock();
            let of_kind = known.values().filter(|service| service.origin.pattern == origin.pattern).count();
            if !known.contains_key(&origin.name) && of_kind >= budget(&origin.pattern) / 2 {
                return;
            }
        }
        if let Some(service) = self.of(origin) {
            service.known.lock().gates.hold(whom, wait, cause, Instant::now());
        }
    }

    /// Returns true when an origin is known and has delivered a message.
    pub(crate) fn has_delivered(&self, origin: &str) -> bool {
        let service = self.0.lock().get(origin).cloned();
        service.is_some_and(|service| service.known.lock().gates.delivered().is_some())
    }

    /// Takes the acceptances that were not reported yet: the last one of each service and each key.
    pub(crate) fn take_accepted(&self) -> Vec<Acceptance> {
        let known: Vec<_> = self.0.lock().values().cloned().collect();
        known.iter().flat_map(|service| service.take_accepted()).collect()
    }

    /// Ends all holds of an origin. Returns false when the origin is not known.
    pub(crate) fn resume(&self, origin: &str) -> bool {
        let service = self.0.lock().get(origin).cloned();
        service.inspect(|service| service.open()).is_some()
    }

    pub(crate) fn status(&self) -> Vec<ServiceStatus> {
        let now = Instant::now();
        let known: Vec<_> = self.0.lock().values().cloned().collect();
        let mut all: Vec<_> = known.iter().map(|service| service.status(now)).collect();
        all.sort_by(|one, other| one.origin.cmp(&other.origin));
        all
    }
}

/// Maximum number of services that a pattern may bring.
fn budget(pattern: &HostPattern) -> usize {
    match pattern {
        HostPattern::Any => MAX_OF_ANY,
        HostPattern::Below(_) => MAX_OF_SUFFIX,
        HostPattern::Exact(_) => MAX_OF_NAME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_under_way_when_an_operator_ends_a_hold_begin_no_new_one() {
        let policy = Policy::default();
        let endpoint = |number: u32| policy.check(&format!("https://fcm.googleapis.com/{number}")).unwrap();
        let service = Service::new(Arc::clone(&endpoint(0).origin));
        let key = VapidKey::generate().unwrap();
        let asking = Asking { key: &key, who: Reputation::Proven, urgent: false };
        let throttled = Signal::Throttled(Some(Duration::from_secs(120)));
        let send = |count| (0..count).map(|_| service.admit(asking).unwrap()).collect::<Vec<_>>();
        let end = |permits: Vec<Permit<'_>>| {
            (0..).zip(permits).any(|(number, permit)| permit.end(throttled, &endpoint(number)))
        };
        let under_way = send(100);
        assert!(end(send(20)));
        assert!(service.admit(asking).is_err());
        service.open();
        assert!(!end(under_way));
        assert!(end(send(20)), "what is sent after that counts");
    }
}
