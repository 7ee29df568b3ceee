//! Limits of one route, as layers: the length of the request body, the time until there is an answer, and the number of
//! requests from one client.
//!
//! ```
//! # use std::time::Duration;
//! # use axum::{Router, routing::{get, post}};
//! # use perennial_host::limits;
//! # let (report, upload, login) = (|| async {}, || async {}, || async {});
//! Router::<()>::new()
//!     .route("/reports", get(report).layer(limits::time(Duration::from_secs(120))))
//!     .route("/pictures", post(upload).layer(limits::body(20 << 20)))
//!     .route("/login", post(login).layer(limits::rate(10, Duration::from_secs(60))));
//! ```

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::StatusCode;
use perennial_server::http::around::{Answering, Around, Surrounded};
use perennial_server::http::problem::Problem;
use perennial_server::http::scope::RequestScope;
use perennial_server::net::network;
use perennial_store::table::Table;
use tower::Layer;

pub use perennial_server::http::limits::{RouteLimit, body, time};

/// Maximum number of clients that are remembered for one route. A new one takes the place of the client that has sent no
/// request for the longest time.
const CLIENTS: u64 = 100_000;
/// Number of periods after which the count of a client begins anew.
const PERIODS: u32 = 100;

/// Sets the maximum number of requests of a route from one client in a time. They may come all at once, and then one by
/// one, evenly. A request beyond that is answered with 429 and `Retry-After`.
///
/// A client is an address, or the /64 network of an IPv6 address. Each process counts for itself. The number of clients that
/// are remembered is bounded: requests from very many addresses make the process forget silent clients, and refuse no other
/// client.
///
/// # Panics
/// When the time is zero.
pub fn rate(requests: u32, within: Duration) -> RateLimit {
    let requests = NonZeroU32::new(requests).unwrap_or(NonZeroU32::MIN);
    #[expect(clippy::expect_used, reason = "a mistake in the program, which any start of it shows")]
    let quota = Quota::with_period(within / requests.get()).expect("a time above zero").allow_burst(requests);
    RateLimit(Arc::new(Clients { requests, within, quota, by_address: Table::new(CLIENTS) }))
}

/// Layer that limits the rate of requests from one client.
#[derive(Clone)]
pub struct RateLimit(Arc<Clients>);

struct Clients {
    requests: NonZeroU32,
    within: Duration,
    quota: Quota,
    by_address: Table<DefaultDirectRateLimiter>,
}

impl fmt::Debug for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimit")
            .field("requests", &self.0.requests)
            .field("within", &self.0.within)
            .finish_non_exhaustive()
    }
}

impl Clients {
    /// Counts a request of a client, and returns the answer if it is beyond the limit.
    fn count(&self, client: Option<IpAddr>) -> Option<Problem> {
        // All clients of a Unix socket would share one limit.
        let client = network(client?).to_string();
        let kept = self.within.saturating_mul(PERIODS);
        let limiter = self.by_address.get_or_make(&client, kept, || RateLimiter::direct(self.quota));
        let wait = limiter.check().err()?.wait_time_from(DefaultClock::default().now());
        let detail = format!("a client may do this {} times in {:?}", self.requests, self.within);
        Some(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(wait))
    }
}

impl<S> Layer<S> for RateLimit {
    type Service = Surrounded<Self, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Surrounded::new(self.clone(), inner)
    }
}

impl Around for RateLimit {
    fn around<F>(&self, scope: Option<RequestScope>, handle: impl FnOnce() -> F) -> Answering
    where
        F: Future<Output = Result<Response, Infallible>> + Send + 'static,
    {
        match self.0.count(scope.as_ref().and_then(RequestScope::client)) {
            Some(problem) => Box::pin(std::future::ready(Ok(problem.into_response()))),
            None => Box::pin(handle()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_a_limit_of_its_own_and_an_ipv6_network_is_one_client() {
        let limit = rate(3, Duration::from_secs(60));
        let refused = |client: &str| limit.0.count(Some(client.parse().unwrap())).is_some();
        assert_eq!([(); 4].map(|()| refused("192.0.2.1")), [false, false, false, true]);
        assert_eq!(
            [1, 2, 3, 4].map(|host| refused(&format!("2001:db8::{host}"))),
            [false, false, false, true]
        );
        assert!(!refused("192.0.2.2") && !refused("2001:db8:0:1::1"));
        assert!(limit.0.count(None).is_none());
    }

    #[test]
    fn strangers_from_many_addresses_lock_nobody_out_and_free_no_one_who_goes_on() {
        let limit = rate(2, Duration::from_secs(3600));
        let refused = |client: u32| limit.0.count(Some(IpAddr::from(client.to_be_bytes()))).is_some();
        assert!(!refused(0) && !refused(0) && refused(0));
        for client in 1..=u32::try_from(CLIENTS).unwrap() * 2 {
            assert!(!refused(client), "a new client");
            if client % 1000 == 0 {
                assert!(refused(0), "one who goes on is remembered");
            }
        }
        assert!(limit.0.by_address.len() <= CLIENTS + 1000);
    }
}
