//! The settings of web push, from `config/push.toml` to types.

use std::time::{Duration, SystemTime};

use perennial_webpush::{Contact, ContactError, HostPattern, Pin, Policy, Proxy, SenderKey};
use secrecy::ExposeSecret;

use crate::api::guests;
use perennial_host::capacity::{outgoing_connections, processors};
use perennial_host::settings::{Network, Reader, Size};

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// The longest time to live that every push service grants: 28 days.
pub(crate) const MAX_TTL: Duration = Duration::from_secs(28 * 24 * 3600);

/// The settings of the routes and jobs.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) page: bool,
    pub(crate) ttl: Duration,
    pub(crate) attempts: u32,
    pub(crate) batch: usize,
    pub(crate) window: usize,
    pub(crate) batches: usize,
    pub(crate) small_batches: usize,
    pub(crate) small_audience: u64,
    pub(crate) retry_batches: usize,
    pub(crate) paced_batches: usize,
    /// Messages per second to one push service.
    pub(crate) origin_rate: Option<f64>,
    pub(crate) threads: usize,
    /// Longest time of one send, together with its wait for a permit, which may take as long.
    pub(crate) send_timeout: Duration,
    /// Time for which notifications that have ended are kept.
    pub(crate) retention: Duration,
    /// Longest time of sends in flight when the process must stop. A send that is cut off is repeated.
    pub(crate) last_sends: Duration,
    pub(crate) checkpoint_every: Duration,
    pub(crate) checkpoint_sends: usize,
    /// Maximum number of requests of one API key that follow notifications at once.
    pub(crate) followers_per_key: usize,
    /// Maximum number of subscriptions of one user that pages may store.
    pub(crate) subscriptions_per_user: usize,
    /// Time until which user tokens without site and expiry are accepted.
    pub(crate) old_user_tokens_until: Option<SystemTime>,
}

impl Config {
    /// Returns true when an audience of this size goes before bigger ones.
    pub(crate) fn is_small(&self, audience: u64) -> bool {
        audience <= self.small_audience
    }
}

/// Reads the settings of the routes and jobs. `timeout` is that of one attempt to send.
pub(crate) fn config(settings: &mut Reader<'_>, timeout: Duration) -> Config {
    Config {
        page: settings.get("push.page"),
        ttl: settings.duration("push.ttl", Duration::ZERO..=MAX_TTL),
        attempts: settings.number("push.attempts", 1..=100),
        batch: settings.number("push.batch", 1..=100_000),
        window: settings.number("push.window", 1..=10_000),
        batches: settings.number("push.batches", 1..=1000),
        small_batches: settings.number("push.small_batches", 1..=1000),
        small_audience: settings.number("push.small_audience", 0..=10_000),
        retry_batches: settings.number("push.retry_batches", 1..=1000),
        paced_batches: settings.number("push.paced_batches", 1..=1000),
        origin_rate: origin_rate(settings),
        threads: threads(settings),
        send_timeout: timeout * 2,
        // Idempotency keys are valid for a day.
        retention: settings.duration("push.retention", HOUR * 24..=HOUR * 24 * 3660),
        // The rest of that phase is for recording their outcomes.
        last_sends: (settings.get::<Duration>("drain.hard") / 2).min(2 * SECOND),
        checkpoint_every: settings.duration("push.checkpoint.every", MILLISECOND..=HOUR),
        checkpoint_sends: settings.number("push.checkpoint.sends", 1..=100_000),
        followers_per_key: settings.number("push.followers_per_key", 1..=1_000_000),
        subscriptions_per_user: settings.number("push.subscriptions_per_user", 1..=1_000_000),
        old_user_tokens_until: settings.read_with(
            "push.old_user_tokens_until",
            "a date such as 2027-06-01, or nothing",
            date,
        ),
    }
}

/// Reads a date as the beginning of its day in UTC. An empty text is no date.
fn date(value: &toml::Value) -> Option<Option<SystemTime>> {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.is_empty() {
        return Some(None);
    }
    let date: jiff::civil::Date = text.parse().ok()?;
    Some(Some(date.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().into()))
}

/// Reads how many subscriptions of strangers are kept.
pub(crate) fn guests(settings: &mut Reader<'_>) -> guests::Config {
    let per_site: u64 = settings.number("push.guests_per_site", 0..=1_000_000_000);
    let per_address: usize = settings.number("push.guests_per_address", 0..=1_000_000_000);
    guests::Config {
        per_site: (per_site > 0).then_some(per_site),
        per_address: (per_address > 0).then_some(per_address),
    }
}

/// Number of threads that send: one for each processor, unless the settings have a number.
fn threads(settings: &mut Reader<'_>) -> usize {
    match settings.number("push.threads", 0..=1024) {
        0 => processors(settings).get(),
        threads => threads,
    }
}

/// Reads the rate limit for each push service; 0 means no limit.
fn origin_rate(settings: &mut Reader<'_>) -> Option<f64> {
    let rate: f64 =
        settings.read_with("push.origin_rate", "messages per second, or 0 for no limit", |value| {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let rate = value.as_float().or_else(|| value.as_integer().map(|rate| rate as f64))?;
            (rate == 0.0 || (0.001..=1e6).contains(&rate)).then_some(rate)
        });
    (rate > 0.0).then_some(rate)
}

/// Reads the proxy for connections to push services.
fn proxy(settings: &mut Reader<'_>) -> Option<Proxy> {
    let resolves: bool = settings.get("push.proxy_resolves");
    let credentials = settings.secret_file("push.proxy_credentials_file");
    let proxy: Option<Proxy> = settings.read_with(
        "push.proxy",
        "a proxy such as http://proxy.example.net:3128",
        |value| match value.as_str()? {
            "" => Some(None),
            text => text.parse().ok().map(Some),
        },
    );
    let proxy = proxy?.resolving(resolves);
    Some(match credentials {
        Some(credentials) => proxy.with_credentials(credentials.expose_secret()),
        None => proxy,
    })
}

/// Reads the way in which sender keys are made.
fn sender_key(settings: &mut Reader<'_>) -> SenderKey {
    let life = settings.duration("push.sender_key_life", SECOND..=HOUR * 24 * 30);
    let Size(cache) = settings.get("push.sender_key_cache");
    let rotates =
        settings.read_with("push.sender_key", "fresh or rotating", |value| match value.as_str()? {
            "fresh" => Some(false),
            "rotating" => Some(true),
            _ => None,
        });
    if rotates { SenderKey::Rotating { life, cache: cache as u64 } } else { SenderKey::Fresh }
}

/// Reads the settings of the sender.
pub(crate) fn sender(settings: &mut Reader<'_>) -> perennial_webpush::Config {
    let wanted = settings.number("push.max_connections", 2..=100_000);
    let max_connections = outgoing_connections(settings, "push.max_connections", wanted);
    perennial_webpush::Config {
        policy: Policy {
            hosts: settings.parse_list::<HostPattern>("push.allow_hosts", "host names, *.suffix or *"),
            networks: settings
                .parse_list::<Network>("push.allow_networks", "networks such as 10.1.0.0/16")
                .into_iter()
                .map(|Network(network)| network)
                .collect(),
            ports: settings.read_with("push.allow_ports", "a list of ports such as [443, 8443]", ports),
            insecure: settings.get("push.allow_insecure"),
        },
        http: settings
            .read_with("push.http", "auto, 1 or 2", |value| value.to_string().trim_matches('"').parse().ok()),
        extra_ca_file: settings.file("push.extra_ca_file"),
        resolve: settings.read_with(
            "push.resolve",
            "a list of { host = \"name\", addresses = [\"192.0.2.7\"] }",
            pins,
        ),
        proxy: proxy(settings),
        sender_key: sender_key(settings),
        connections: settings.number("push.connections", 1..=1000),
        streams: settings.number("push.streams", 1..=10_000),
        http1_connections: settings.number("push.http1_connections", 1..=10_000),
        max_connections,
        connect_every: settings.duration("push.connect_every", Duration::ZERO..=HOUR),
        connect_timeout: settings.duration("push.connect_timeout", MILLISECOND..=HOUR),
        timeout: settings.duration("push.timeout", SECOND..=HOUR),
    }
}

/// Reads the contact for push services. The error is the reason why Apple would refuse to deliver.
pub(crate) fn contact(settings: &mut Reader<'_>) -> Result<Contact, String> {
    let text: String = settings.get("push.contact");
    if text.is_empty() {
        if settings.get("push.contact_required") {
            settings.refuse::<()>("push.contact", &ContactError::Form.to_string());
        }
        return Err("push.contact is not set".to_owned());
    }
    text.parse().map_err(|error: ContactError| {
        settings.refuse::<()>("push.contact", &error.to_string());
        error.to_string()
    })
}

/// Reads a list of ports, as numbers or, from the environment, as texts.
fn ports(value: &toml::Value) -> Option<Vec<u16>> {
    let port = |port: &toml::Value| {
        let number = port.as_integer().or_else(|| port.as_str()?.parse().ok())?;
        u16::try_from(number).ok().filter(|port| *port > 0)
    };
    match value.as_array() {
        Some(list) => list.iter().map(port).collect(),
        None => Some(vec![port(value)?]),
    }
}

fn pins(value: &toml::Value) -> Option<Vec<Pin>> {
    let pin = |pin: &toml::Value| {
        let host = pin.get("host")?.as_str()?.to_owned();
        let addresses = pin.get("addresses")?.as_array()?;
        let addresses =
            addresses.iter().map(|address| address.as_str()?.parse().ok()).collect::<Option<Vec<_>>>()?;
        (!addresses.is_empty()).then_some(Pin { host, addresses })
    };
    value.as_array()?.iter().map(pin).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Push;
    use perennial_host::module::Module;

    #[test]
    fn the_hosts_in_the_settings_are_those_of_the_library() {
        let defaults: toml::Table = Push::DEFAULTS.parse().unwrap();
        let listed = defaults["push"]["allow_hosts"].as_array().unwrap();
        assert!(listed.iter().filter_map(|host| host.as_str()).eq(perennial_webpush::DEFAULT_HOSTS));
    }
}
