//! Rate limits of keys: a bucket that holds the requests of a minute, and fills evenly.
//!
//! With Redis, all replicas share the bucket. When Redis does not answer, each replica counts for itself: an outage
//! must not refuse requests that are allowed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::Mutex;
use perennial_runtime::backoff::Backoff;
use perennial_runtime::breaker::{self, Breaker};
use perennial_server::http::problem::Problem;
use perennial_server::net::network;
use perennial_store::pool::redis::{Redis, client};

use super::Caller;
use super::keys::MAX_PER_MINUTE;

/// The window of every limit, in seconds.
const WINDOW: u32 = 60;
/// Time limit for an answer of Redis.
const PATIENCE: Duration = Duration::from_millis(250);
/// Maximum number of wrong keys per second from all addresses together. After more, the store is not asked about each
/// key for a while.
const WRONG_PER_SECOND: NonZeroU32 = NonZeroU32::new(200).unwrap();
/// Number of keys that are then looked up per second, if there are too many keys to list.
const LOOKUPS: NonZeroU32 = NonZeroU32::new(20).unwrap();
/// Maximum number of wrong keys per minute from one address. After more, the store is not asked about each key for a
/// while.
const WRONG_PER_MINUTE: NonZeroU32 = NonZeroU32::new(600).unwrap();
/// How long the store is not asked about each key.
const GUESSING: Duration = Duration::from_secs(5);
/// Maximum number of addresses with wrong keys that are remembered.
const ADDRESSES: usize = 100_000;

/// The generic cell rate algorithm (ITU-T I.371, annex A) by the clock of the Redis server. ARGV: the microseconds from
/// one request to the next, and the number of requests at once. Returns the number of requests left, the microseconds
/// until the next request is allowed (0 if it is allowed now), and the microseconds until all are.
const SCRIPT: &str = "
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
    local full = math.max(tonumber(redis.call('GET', KEYS[1])) or 0, now)
    local wait = full + interval - now - interval * burst
    if wait > 0 then
        return { 0, math.ceil(wait), math.ceil(full - now) }
    end
    full = full + interval
    redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
    return { math.floor((now + interval * burst - full) / interval), 0, math.ceil(full - now) }
";

type Local = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// Limits of keys, and of wrong keys.
pub(super) struct KeyLimits {
    shared: Option<SharedLimits>,
    /// Limits that this process counts, by key, with the requests per minute of each; one for each key with a limit.
    local: Mutex<HashMap<String, (u32, Arc<Local>)>>,
    /// Limits that are used up, by key, with the time of their state. Redis need not be asked about them.
    used_up: Mutex<HashMap<String, (Instant, RateLimitState)>>,
    wrong: DefaultKeyedRateLimiter<IpAddr>,
    wrong_in_all: DefaultDirectRateLimiter,
    lookups: DefaultDirectRateLimiter,
    /// End of the time in which the store is not asked about each key, by address, and for all addresses.
    guessing: Mutex<(HashMap<IpAddr, Instant>, Option<Instant>)>,
    clock: DefaultClock,
}

struct SharedLimits {
    redis: Redis,
    prefix: String,
    script: client::Script,
    breaker: Breaker,
}

impl std::fmt::Debug for KeyLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Limits")
    }
}

/// State of the limit of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RateLimitState {
    per_minute: u32,
    remaining: u32,
    /// Time until the next request is allowed; zero if it is allowed now.
    wait: Duration,
    /// Time until the whole limit is available again.
    full_in: Duration,
}

impl RateLimitState {
    /// Makes the headers `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10).
    pub(super) fn headers(self) -> HeaderMap {
        let Self { per_minute, remaining, full_in, .. } = self;
        let seconds = full_in.as_secs_f64().ceil();
        let policy = format!("\"key\";q={per_minute};w={WINDOW}");
        let limit = format!("\"key\";r={remaining};t={seconds}");
        let header =
            |name, value: String| Some((HeaderName::from_static(name), HeaderValue::from_str(&value).ok()?));
        [header("ratelimit-policy", policy), header("ratelimit", limit)].into_iter().flatten().collect()
    }

    pub(super) fn verdict(self) -> Result<(), Problem> {
        if self.wait.is_zero() {
            return Ok(());
        }
        let detail = format!("this key may be used {} times a minute", self.per_minute);
        Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(self.wait))
    }
}

impl KeyLimits {
    /// Makes limits without any requests. `redis` comes with the prefix of its keys.
    pub(super) fn new(redis: Option<(Redis, String)>) -> Self {
        let shared = redis.map(|(redis, prefix)| {
            let pause = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
            let breaker = Breaker::new("rate limits", breaker::Config { failures: 3, pause });
            SharedLimits { redis, prefix, script: client::Script::new(SCRIPT), breaker }
        });
        Self {
            shared,
            local: Mutex::default(),
            used_up: Mutex::default(),
            wrong: RateLimiter::keyed(Quota::per_minute(WRONG_PER_MINUTE)),
            wrong_in_all: RateLimiter::direct(Quota::per_second(WRONG_PER_SECOND)),
            lookups: RateLimiter::direct(Quota::per_second(LOOKUPS)),
            guessing: Mutex::default(),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one request, and returns the state of the limit, if the key has one.
    pub(super) async fn count(&self, caller: &Caller) -> Option<RateLimitState> {
        let per_minute = NonZeroU32::new(caller.per_minute?.min(MAX_PER_MINUTE))?;
        if let Some(standing) = self.still_used_up(&caller.key, per_minute) {
            return Some(standing);
        }
        let shared = match &self.shared {
            Some(shared) => shared.count(&caller.key, per_minute).await,
            None => None,
        };
        let standing = shared.unwrap_or_else(|| self.count_here(&caller.key, per_minute));
        if !standing.wait.is_zero() {
            let mut used_up = self.used_up.lock();
            used_up.insert(caller.key.clone(), (Instant::now(), standing));
        }
        Some(standing)
    }

    fn still_used_up(&self, key: &str, per_minute: NonZeroU32) -> Option<RateLimitState> {
        let mut used_up = self.used_up.lock();
        let (since, standing) = *used_up.get(key)?;
        let ago = since.elapsed();
        if ago >= standing.wait || standing.per_minute != per_minute.get() {
            used_up.remove(key);
            return None;
        }
        Some(RateLimitState {
            wait: standing.wait - ago,
            full_in: standing.full_in.saturating_sub(ago),
            ..standing
        })
    }

    fn count_here(&self, key: &str, per_minute: NonZeroU32) -> RateLimitState {
        let limiter = {
            let mut local = self.local.lock();
            let known = local.entry(key.to_owned()).or_insert_with(|| (0, limiter(per_minute)));
            if known.0 != per_minute.get() {
                *known = (per_minute.get(), limiter(per_minute));
            }
            Arc::clone(&known.1)
        };
        let interval = Duration::from_secs(u64::from(WINDOW)) / per_minute.get();
        let (remaining, wait) = match limiter.check() {
            Ok(state) => (state.remaining_burst_capacity(), Duration::ZERO),
            Err(until) => (0, until.wait_time_from(self.clock.now())),
        };
        let full_in = interval * (per_minute.get() - remaining);
        RateLimitState { per_minute: per_minute.get(), remaining, wait, full_in }
    }

    /// Returns the answer to a wrong key if too many wrong keys have come from this address, or from all addresses.
    pub(super) fn is_guessing(&self, address: Option<IpAddr>) -> Option<Problem> {
        let now = Instant::now();
        let guessing = self.guessing.lock();
        let (by_address, all) = &*guessing;
        let of_address = address.map(network).and_then(|address| by_address.get(&address).copied());
        let until = of_address.max(*all).filter(|until| *until > now)?;
        let detail = "too many wrong keys from this address";
        Some(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(until - now))
    }

    /// Counts a wrong key.
    pub(super) fn guessed(&self, address: Option<IpAddr>) {
        let until = Instant::now() + GUESSING;
        // The limit of all addresses also counts wrong keys from addresses beyond the table, and from many addresses at
        // once.
        if self.wrong_in_all.check().is_err() {
            self.guessing.lock().1 = Some(until);
        }
        let Some(address) = address.map(network) else { return };
        if self.wrong.len() < ADDRESSES && self.wrong.check_key(&address).is_err() {
            self.guessing.lock().0.insert(address, until);
        }
    }

    /// Returns true when the store may be asked about one more key while wrong keys come in.
    pub(super) fn may_look(&self) -> bool {
        self.lookups.check().is_ok()
    }

    /// Drops addresses without recent wrong keys, and limits that are no longer used up.
    pub(super) fn forget(&self) {
        self.wrong.retain_recent();
        self.wrong.shrink_to_fit();
        let now = Instant::now();
        self.guessing.lock().0.retain(|_, until| *until > now);
        let mut used_up = self.used_up.lock();
        used_up.retain(|_, (since, standing)| since.elapsed() < standing.wait);
    }
}

fn limiter(per_minute: NonZeroU32) -> Arc<Local> {
    Arc::new(RateLimiter::direct(Quota::per_minute(per_minute)).with_middleware())
}

impl SharedLimits {
    /// Counts one request in Redis; `None` when Redis does not answer.
    async fn count(&self, key: &str, per_minute: NonZeroU32) -> Option<RateLimitState> {
        let interval = WINDOW * 1_000_000 / per_minute;
        let mut script = self.script.key(format!("{}:limit:{key}", self.prefix));
        script.arg(interval).arg(per_minute.get());
        let asked = async {
            match tokio::time::timeout(PATIENCE, self.redis.invoke_beside::<(u32, u64, u64)>(&script)).await {
                Ok(Ok(answer)) => Ok(answer),
                _ => Err(()),
            }
        };
        let (remaining, wait, full_in) = self.breaker.call(asked).await.ok()?;
        let (wait, full_in) = (Duration::from_micros(wait), Duration::from_micros(full_in));
        Some(RateLimitState { per_minute: per_minute.get(), remaining, wait, full_in })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_as_many_as_it_may_and_is_told_how_many_are_left() {
        let limits = KeyLimits::new(None);
        let three = NonZeroU32::new(3).unwrap();
        let standings = [(); 4].map(|()| limits.count_here("a", three));
        assert_eq!(standings.map(|standing| standing.remaining), [2, 1, 0, 0]);
        assert!(standings[2].verdict().is_ok() && standings[3].verdict().is_err());
        assert!(standings[3].wait > Duration::from_secs(15) && standings[3].wait <= Duration::from_secs(20));
        assert!(limits.count_here("b", three).verdict().is_ok());
        let headers = standings[0].headers();
        assert_eq!(headers["ratelimit-policy"], "\"key\";q=3;w=60");
        assert_eq!(headers["ratelimit"], "\"key\";r=2;t=20");
        // Another limit counts anew.
        assert!(limits.count_here("a", NonZeroU32::new(5).unwrap()).verdict().is_ok());
    }
}
