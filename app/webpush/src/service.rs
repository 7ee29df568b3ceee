//! A push service, as everybody who sends to it knows it.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, header};
use tracing::warn;

use crate::addresses::{AddressStatus, Addresses};
use crate::gate::{Admission, Cause, Gate, News};
use crate::lock;
use crate::target::{Endpoint, Origin, Policy, TargetError, origin_of};
use crate::vapid::Claimed;
use crate::verdict::is_windows;

/// How many push services are known at once, and how many of them may be such that the settings do not name: any
/// visitor can bring one where every host is allowed.
const MAX_SERVICES: usize = 1024;
const MAX_UNLISTED: usize = 512;
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
    clock: Mutex<Clock>,
    answers: AtomicU64,
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
            clock: Mutex::default(),
            answers: AtomicU64::new(0),
        }
    }

    /// Asks whether a message may go, and notes what comes of it.
    pub(crate) fn admit(&self) -> Result<Errand<'_>, (Duration, Cause)> {
        let mut gate = lock(&self.gate);
        if gate.is_open() {
            return Ok(Errand { service: self, probe: false });
        }
        match gate.admit(Instant::now()) {
            Admission::Open => Ok(Errand { service: self, probe: false }),
            Admission::Probe => Ok(Errand { service: self, probe: true }),
            Admission::Held(wait, cause) => Err((wait, cause)),
        }
    }

    /// Whether it makes no sense to wait for a turn: for how long nothing is sent, and why.
    pub(crate) fn is_held(&self, patience: Duration) -> Option<(Duration, Cause)> {
        let gate = lock(&self.gate);
        if gate.is_open() { None } else { gate.held(Instant::now()).filter(|(wait, _)| *wait > patience) }
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

    fn status(&self, now: Instant) -> ServiceStatus {
        ServiceStatus {
            origin: self.origin.name.clone(),
            held: lock(&self.gate).held(now),
            addresses: self.addresses.status(now),
            clock_ahead_seconds: lock(&self.clock).ahead_seconds,
        }
    }
}

/// One message on its way: what comes of it is noted, and a probe that comes to nothing is not the last.
#[derive(Debug)]
pub(crate) struct Errand<'a> {
    service: &'a Service,
    probe: bool,
}

impl Errand<'_> {
    /// Notes what came of it, for the subscription with this endpoint. True when the service is not sent to
    /// from now on.
    pub(crate) fn end(mut self, news: News, endpoint: &Endpoint) -> bool {
        let probe = std::mem::take(&mut self.probe);
        let mut gate = lock(&self.service.gate);
        if news == News::Well && !probe {
            gate.well();
            return false;
        }
        // Without what follows a question mark, which anybody can make up; except where the token stands there.
        let mut who = DefaultHasher::new();
        if is_windows(endpoint.host()) {
            endpoint.uri.path_and_query().hash(&mut who);
        } else {
            endpoint.uri.path().hash(&mut who);
        }
        gate.note(news, probe, who.finish(), Instant::now())
    }
}

impl Drop for Errand<'_> {
    fn drop(&mut self) {
        if self.probe {
            lock(&self.service.gate).lose_probe(true);
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
                Arc::strong_count(service) > 1 || lock(&service.gate).held(Instant::now()).is_some()
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
        service.inspect(|service| lock(&service.gate).open()).is_some()
    }

    pub(crate) fn status(&self) -> Vec<ServiceStatus> {
        let now = Instant::now();
        let known: Vec<_> = lock(&self.0).values().cloned().collect();
        let mut all: Vec<_> = known.iter().map(|service| service.status(now)).collect();
        all.sort_by(|one, other| one.origin.cmp(&other.origin));
        all
    }
}
