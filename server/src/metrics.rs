//! All metrics of listeners and their requests; each name is defined once.
//!
//! Labels are bounded: a route is the pattern that matched (or `unmatched`), never a path.

use std::collections::HashMap;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use parking_lot::RwLock;
use perennial_runtime::metrics::Counted;

use crate::net::refusal::ConnectionRefusal;

/// Counter by `listener`, `route`, `method`, `status`: requests that have ended. Status 499 means that the client left
/// before the answer.
pub const HTTP_REQUESTS: &str = "perennial_http_requests_total";
/// Histogram by `listener`, `route`, in seconds: time from the request head to the last byte of the response.
pub const HTTP_DURATION: &str = "perennial_http_request_duration_seconds";
/// Gauge by `listener`: requests between their head and the last byte of the response, without shed requests.
pub const HTTP_IN_FLIGHT: &str = "perennial_http_requests_in_flight";
/// Gauge by `listener`: open connections.
pub const HTTP_CONNECTIONS: &str = "perennial_http_connections";
/// Gauge by `listener`: 1 while the connection limit is reached and idle connections make room for new ones.
pub const HTTP_AT_LIMIT: &str = "perennial_http_connections_at_limit";
/// Counter by `reason`: connections that the host ended or refused.
pub const HTTP_CONNECTIONS_CUT: &str = "perennial_http_connections_cut_total";
/// Counter by `listener`: requests that were refused because too many were running, or memory was nearly used up.
pub const HTTP_SHED: &str = "perennial_http_requests_shed_total";
/// Counter by `route`: polls of a handler that kept their thread for longer than `server.slow_poll`.
pub const HTTP_SLOW_POLLS: &str = "perennial_http_slow_polls_total";
/// Counter: handlers that panicked.
pub const HTTP_PANICS: &str = "perennial_http_panics_total";
/// Counter by `listener`, `reason`: connections whose first bytes, or requests whose head, could not be served. The
/// reasons are those of [`ConnectionRefusal`].
pub const HTTP_REFUSED: &str = "perennial_http_refused_total";

/// Counter by `listener`, `result` (handled, failed, too slow, address limit): datagrams. The kernel drops others before
/// they are counted.
pub const DATAGRAMS: &str = "perennial_datagrams_total";
/// Gauge by `listener`: datagrams that are being handled.
pub const DATAGRAMS_IN_FLIGHT: &str = "perennial_datagrams_in_flight";

/// Reasons for which the host ends or refuses connections.
const CUTS: [&str; 13] = [
    "address limit",
    "body idle",
    "body timeout",
    "drain",
    "flood",
    "handshake timeout",
    "head timeout",
    "idle timeout",
    "limit",
    "made room",
    "memory",
    "resets",
    "write timeout",
];

/// Describes all metrics to the recorder, and starts the counters whose labels are known at 0.
pub fn describe() {
    describe_counter!(HTTP_REQUESTS, Unit::Count, "requests answered, by route, method and status");
    describe_histogram!(HTTP_DURATION, Unit::Seconds, "request head to last byte of the response, by route");
    describe_gauge!(HTTP_IN_FLIGHT, Unit::Count, "requests between head and last byte");
    describe_gauge!(HTTP_AT_LIMIT, Unit::Count, "1 while the connection limit is reached");
    describe_gauge!(HTTP_CONNECTIONS, Unit::Count, "open connections");
    describe_counter!(
        HTTP_CONNECTIONS_CUT,
        Unit::Count,
        "connections ended or refused by the host, by reason"
    );
    describe_counter!(HTTP_SHED, Unit::Count, "requests refused because too many were running");
    describe_counter!(HTTP_SLOW_POLLS, Unit::Count, "polls of a handler that kept their thread for too long");
    describe_counter!(HTTP_PANICS, Unit::Count, "handlers that panicked");
    describe_counter!(
        HTTP_REFUSED,
        Unit::Count,
        "connections that could not be served, by listener and reason"
    );
    describe_counter!(DATAGRAMS, Unit::Count, "datagrams received, by listener and result");
    describe_gauge!(DATAGRAMS_IN_FLIGHT, Unit::Count, "datagrams that are being handled");
    counter!(HTTP_PANICS).increment(0);
    for reason in CUTS {
        counter!(HTTP_CONNECTIONS_CUT, "reason" => reason).increment(0);
    }
}

/// The metrics of a listener's requests. The recorder is asked for each set of labels only once.
pub(crate) struct Requests {
    listener: &'static str,
    in_flight: Gauge,
    routes: RwLock<HashMap<Box<str>, Route>>,
}

#[derive(Default)]
struct Route(HashMap<(&'static str, u16), (Counter, Histogram)>);

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requests").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Requests {
    pub(crate) fn new(listener: &'static str) -> Self {
        let in_flight = gauge!(HTTP_IN_FLIGHT, "listener" => listener);
        counter!(HTTP_SHED, "listener" => listener).increment(0);
        for refusal in <ConnectionRefusal as strum::VariantArray>::VARIANTS {
            counter!(HTTP_REFUSED, "listener" => listener, "reason" => refusal.as_str()).increment(0);
        }
        Self { listener, in_flight, routes: RwLock::default() }
    }

    /// Counts a request as running until the returned guard drops.
    pub(crate) fn count(&self) -> Counted {
        Counted::new(self.in_flight.clone())
    }

    /// Records a request that has ended.
    pub(crate) fn ended(&self, route: &str, method: &'static str, status: u16, took: Duration) {
        let record = |(requests, duration): &(Counter, Histogram)| {
            requests.increment(1);
            duration.record(took);
        };
        let routes = self.routes.read();
        if let Some(known) = routes.get(route).and_then(|route| route.0.get(&(method, status))) {
            return record(known);
        }
        drop(routes);
        let labels = [
            ("listener", self.listener.to_owned()),
            ("route", route.to_owned()),
            ("method", method.to_owned()),
            ("status", status.to_string()),
        ];
        let duration = histogram!(HTTP_DURATION, "listener" => self.listener, "route" => route.to_owned());
        counter!(HTTP_SLOW_POLLS, "route" => route.to_owned()).increment(0);
        let new = (counter!(HTTP_REQUESTS, &labels), duration);
        record(&new);
        let mut routes = self.routes.write();
        routes.entry(route.into()).or_default().0.insert((method, status), new);
    }

    /// Records a request that was refused at once.
    pub(crate) fn shed(&self, method: &'static str) {
        self.ended("shed", method, 503, Duration::ZERO);
        counter!(HTTP_SHED, "listener" => self.listener).increment(1);
    }
}

/// Records a connection or a request head that could not be served.
pub(crate) fn refused(listener: &'static str, refusal: ConnectionRefusal) {
    counter!(HTTP_REFUSED, "listener" => listener, "reason" => refusal.as_str()).increment(1);
}

/// Records a poll of a handler that took too long.
pub(crate) fn slow_poll(route: &str) {
    counter!(HTTP_SLOW_POLLS, "route" => route.to_owned()).increment(1);
}

/// Returns the gauge of a listener's connections.
pub(crate) fn connections(listener: &'static str) -> Gauge {
    gauge!(HTTP_CONNECTIONS, "listener" => listener)
}

/// Records a handler that panicked.
pub(crate) fn handler_panicked() {
    counter!(HTTP_PANICS).increment(1);
}

/// Records a connection that the host ended or refused.
pub(crate) fn connection_cut(reason: &'static str) {
    counter!(HTTP_CONNECTIONS_CUT, "reason" => reason).increment(1);
}

/// Records whether the connection limit of a listener is reached.
pub(crate) fn at_limit(listener: &'static str, reached: bool) {
    gauge!(HTTP_AT_LIMIT, "listener" => listener).set(f64::from(u8::from(reached)));
}

/// How the handling of a datagram ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub(crate) enum DatagramResult {
    Handled,
    Failed,
    #[strum(serialize = "too slow")]
    TooSlow,
    #[strum(serialize = "address limit")]
    AddressLimit,
}

/// The metrics of a listener's datagrams.
pub(crate) struct Datagrams {
    listener: &'static str,
    in_flight: Gauge,
}

impl Datagrams {
    pub(crate) fn new(listener: &'static str) -> Self {
        for result in <DatagramResult as strum::VariantArray>::VARIANTS {
            let result: &'static str = result.into();
            counter!(DATAGRAMS, "listener" => listener, "result" => result).increment(0);
        }
        Self { listener, in_flight: gauge!(DATAGRAMS_IN_FLIGHT, "listener" => listener) }
    }

    /// Counts a datagram as being handled until the returned guard drops.
    pub(crate) fn count(&self) -> Counted {
        Counted::new(self.in_flight.clone())
    }

    /// Records a datagram that has been handled, or dropped.
    pub(crate) fn ended(&self, result: DatagramResult) {
        let result: &'static str = result.into();
        counter!(DATAGRAMS, "listener" => self.listener, "result" => result).increment(1);
    }
}
