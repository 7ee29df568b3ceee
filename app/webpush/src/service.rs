//! A push service, as everybody who sends to it knows it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, header};
use tracing::warn;

use crate::addresses::{AddressStatus, Addresses};
use crate::gate::{Cause, Gate, News};
use crate::lock;
use crate::target::{Endpoint, Origin, Policy, TargetError, origin_of};
use crate::vapid::{Claimed, KeyId, VapidKey};
use crate::verdict::is_windows;

/// How many push services are known at once, and how many of them may be such that the settings do not name: any
/// visitor can bring one where every host is allowed.
const MAX_SERVICES: usize = 1024;
const MAX_UNLISTED: usize = 512;
/// How many keys are known that a service refuses.
const MAX_REFUSED: usize = 64;
/// How far the clocks may be apart before somebody should look: claims are good for a while only.
const SKEW: Duration = Duration::from_secs(30);
/// How often a service's clock is looked at: with one answer in so many, and not so soon again.
const LOOK_AT_ONE_IN: u64 = 256;
const LOOK_AT_CLOCK: Duration = Duration::from_secs(300);

/// What is known about one push service.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) origin: Arc<Origin>,
    pub(crate) claimed: Claimed,
    pub(crate) addresses: Addresses,
    gate: Mutex<Gate>,
    /// The keys that it has refused since it last took one, each with a gate of its own: what is wrong with one of them
    /// is nothing to the others.
    refused: Mutex<Vec<(KeyId, Gate)>>,
    /// Whether there are any.
    refuses: AtomicBool,
    clock: Mutex<Clock>,
    answers: AtomicU64,
    /// When the last connection was opened, or will be: whoever sends, they are opened one after the other.
    dialed: Mutex<Option<Instant>>,
}

/// How far a service's clock is from ours.
#[derive(Debug, Default)]
struct Clock {
    looked: Option<Instant>,
    ahead_seconds: i64,
}

/// One push service, for those who look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Its origin: `https://fcm.googleapis.com`.
    pub origin: String,
    /// For how long nothing is sent to it, and why.
    pub held: Option<(Duration, Cause)>,
    /// Its addresses.
    pub addresses: Vec<AddressStatus>,
    /// How far its clock is ahead of ours, in seconds.
    pub clock_ahead_seconds: i64,
}

impl Service {
    fn new(origin: Arc<Origin>) -> Self {
        Self {
            origin,
            claimed: Claimed::default(),
            addresses: Addresses::default(),
            gate: Mutex::default(),
            refused: Mutex::default(),
            refuses: AtomicBool::new(false),
            clock: Mutex::default(),
            answers: AtomicU64::new(0),
            dialed: Mutex::default(),
        }
    }

    /// Asks whether a message signed with `key` may go, and notes what comes of it.
    pub(crate) fn admit(&self, key: &VapidKey) -> Result<Errand<'_>, (Duration, Cause)> {
        let mut errand = Errand { service: self, key: None, key_probe: false, probe: false };
        let now = Instant::now();
        if let Some(admission) = self.of_key(key, |gate| gate.admit(now)) {
            errand.key = Some(key.id());
            errand.key_probe = admission.is_probe()?;
        }
        let mut gate = lock(&self.gate);
        if !gate.is_open() {
            let admission = gate.admit(now);
            drop(gate);
            errand.probe = admission.is_probe()?;
        }
        Ok(errand)
    }

    /// Whether it makes no sense to wait for a turn: for how long nothing is sent, and why.
    pub(crate) fn is_held(&self, key: &VapidKey, patience: Duration) -> Option<(Duration, Cause)> {
        let now = Instant::now();
        let of_key = self.of_key(key, |gate| gate.held(now)).flatten();
        let held = of_key.or_else(|| {
            let gate = lock(&self.gate);
            if gate.is_open() { None } else { gate.held(now) }
        });
        held.filter(|(wait, _)| *wait > patience)
    }

    /// The gate of a key, if it was refused.
    fn of_key<T>(&self, key: &VapidKey, look: impl FnOnce(&mut Gate) -> T) -> Option<T> {
        if !self.refuses.load(Ordering::Relaxed) {
            return None;
        }
        let (id, mut refused) = (key.id(), lock(&self.refused));
        refused.iter_mut().find(|(known, _)| *known == id).map(|(_, gate)| look(gate))
    }

    /// What came of a message, as far as it is about its key. True when this closed the gate of that key.
    fn note_key(&self, id: KeyId, news: News, probe: bool, who: u64, now: Instant) -> bool {
        let mut refused = lock(&self.refused);
        let known = refused.iter().position(|(known, _)| *known == id);
        let closed = match (known, news) {
            (Some(at), News::Well) => {
                refused.remove(at);
                false
            }
            (Some(at), News::Refuses | News::Answers) => refused[at].1.note(news, probe, who, now),
            (Some(at), _) => {
                refused[at].1.lose_probe(probe);
                false
            }
            (None, News::Refuses) => {
                if refused.len() >= MAX_REFUSED {
                    refused.remove(0);
                }
                let mut gate = Gate::default();
                let closed = gate.note(news, false, who, now);
                refused.push((id, gate));
                closed
            }
            (None, _) => false,
        };
        self.refuses.store(!refused.is_empty(), Ordering::Relaxed);
        closed
    }

    /// When another connection may be opened: no sooner than `pause` after the last one.
    pub(crate) fn next_dial(&self, pause: Duration) -> Instant {
        let (mut dialed, now) = (lock(&self.dialed), Instant::now());
        let at = dialed.map_or(now, |dialed| (dialed + pause).max(now));
        *dialed = Some(at);
        at
    }

    /// Forgets everything that speaks against sending to it.
    fn open(&self) {
        lock(&self.gate).open();
        lock(&self.refused).clear();
        self.refuses.store(false, Ordering::Relaxed);
    }

    /// Warns when the service's clock and ours are apart: it would take our claims for too old, or too new.
    pub(crate) fn compare_clocks(&self, headers: &HeaderMap) {
        if !self.answers.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_AT_ONE_IN) {
            return;
        }
        let mut clock = lock(&self.clock);
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

    /// For how long something is held back, and why: everything, or what is signed with one key.
    fn held(&self, now: Instant) -> Option<(Duration, Cause)> {
        let of_keys =
            lock(&self.refused).iter().filter_map(|(_, gate)| gate.held(now)).max_by_key(|(wait, _)| *wait);
        lock(&self.gate).held(now).or(of_keys)
    }

    fn status(&self, now: Instant) -> ServiceStatus {
        ServiceStatus {
            origin: self.origin.name.clone(),
            held: self.held(now),
            addresses: self.addresses.status(now),
            clock_ahead_seconds: lock(&self.clock).ahead_seconds,
        }
    }
}

/// One message on its way: what comes of it is noted, and a probe that comes to nothing is not the last.
#[derive(Debug)]
pub(crate) struct Errand<'a> {
    service: &'a Service,
    /// Its key, if that was refused before, and whether this is to find out whether it still is.
    key: Option<KeyId>,
    key_probe: bool,
    probe: bool,
}

impl Errand<'_> {
    /// Notes what came of it, for the subscription with this endpoint. True when the service is not sent to
    /// from now on.
    pub(crate) fn end(mut self, news: News, endpoint: &Endpoint, key: &VapidKey) -> bool {
        let probe = std::mem::take(&mut self.probe);
        let key_probe = std::mem::take(&mut self.key_probe);
        let is_about_key = news == News::Refuses || self.service.refuses.load(Ordering::Relaxed);
        if news == News::Well && !probe && !is_about_key {
            lock(&self.service.gate).well();
            return false;
        }
        // Without what follows a question mark, which anybody can make up; except where the token stands there.
        let mut who = DefaultHasher::new();
        if is_windows(endpoint.host()) {
            endpoint.uri.path_and_query().hash(&mut who);
        } else {
            endpoint.uri.path().hash(&mut who);
        }
        let (who, now) = (who.finish(), Instant::now());
        let closed = is_about_key && self.service.note_key(key.id(), news, key_probe, who, now);
        // Who refuses a key is there, and does not choke.
        let news = if news == News::Refuses { News::Answers } else { news };
        lock(&self.service.gate).note(news, probe, who, now) || closed
    }
}

impl Drop for Errand<'_> {
    fn drop(&mut self) {
        if self.probe {
            lock(&self.service.gate).lose_probe(true);
        }
        if let Some(id) = self.key.filter(|_| self.key_probe) {
            let mut refused = lock(&self.service.refused);
            refused.iter_mut().filter(|(known, _)| *known == id).for_each(|(_, gate)| gate.lose_probe(true));
        }
    }
}

/// The push services that are known.
#[derive(Debug, Default)]
pub(crate) struct Services(Mutex<HashMap<String, Arc<Service>>>);

impl Services {
    /// The endpoint with this URL. What is at an origin that has been checked needs no second look.
    pub(crate) fn endpoint(&self, policy: &Policy, url: String) -> Result<Endpoint, TargetError> {
        let known = origin_of(&url).and_then(|origin| lock(&self.0).get(origin).cloned());
        match known {
            Some(service) => Endpoint::at(&service.origin, &Bytes::from(url)),
            None => policy.check(&url),
        }
    }

    /// The service at an origin; none when there are too many.
    pub(crate) fn of(&self, origin: &Arc<Origin>) -> Option<Arc<Service>> {
        let mut known = lock(&self.0);
        if let Some(service) = known.get(&origin.name) {
            return Some(Arc::clone(service));
        }
        let is_full = |known: &HashMap<String, Arc<Service>>| {
            let unlisted = known.values().filter(|service| !service.origin.is_listed).count();
            known.len() >= MAX_SERVICES || (!origin.is_listed && unlisted >= MAX_UNLISTED)
        };
        if is_full(&known) {
            // One that nobody sends to can be made again, unless there is something to remember.
            known.retain(|_, service| {
                Arc::strong_count(service) > 1 || service.held(Instant::now()).is_some()
            });
            if is_full(&known) {
                return None;
            }
        }
        let service = Arc::new(Service::new(Arc::clone(origin)));
        known.insert(origin.name.clone(), Arc::clone(&service));
        Some(service)
    }

    /// Stops sending to an origin for at least this long.
    pub(crate) fn hold(&self, policy: &Policy, origin: &str, wait: Duration, cause: Cause) {
        let Ok(endpoint) = policy.check(&format!("{origin}/")) else { return };
        if let Some(service) = self.of(&endpoint.origin) {
            lock(&service.gate).hold(wait, cause, Instant::now());
        }
    }

    /// Sends to an origin again. False when it is not known.
    pub(crate) fn resume(&self, origin: &str) -> bool {
        let service = lock(&self.0).get(origin).cloned();
        service.inspect(|service| service.open()).is_some()
    }

    pub(crate) fn status(&self) -> Vec<ServiceStatus> {
        let now = Instant::now();
        let known: Vec<_> = lock(&self.0).values().cloned().collect();
        let mut all: Vec<_> = known.iter().map(|service| service.status(now)).collect();
        all.sort_by(|one, other| one.origin.cmp(&other.origin));
        all
    }
}
