//! Settings of the host, as the types that its components want.

pub(crate) mod stores;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use perennial_runtime::cgroup::{Cgroup, Pressure};
use perennial_runtime::cpu;
use perennial_runtime::health::{self, ReadinessPolicy};
use perennial_runtime::telemetry;
use perennial_server::http;
use perennial_server::net::{self, Listen, Timeouts, UnixAccess, tls};
use perennial_store::pool::postgres;
use perennial_workers::admission::Bounds;
use perennial_workers::limits::Limits;
use perennial_workers::{upkeep, worker};

use crate::access::{KeyFile, Scopes};
use crate::capacity::{cgroup_of, fit, means, processors};
use crate::cron;
use crate::data_dir;
use crate::http_client::TargetConfig;
use crate::listeners::ListenerConfig;
use crate::pools::PoolConfig;
use crate::settings::{Network, Reader, Size};
use crate::sites;
pub(crate) use stores::{RedisQueueConfig, StoreConfig};

pub(crate) const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);
/// Interval at which expired leases are looked for.
const RESCUE_EVERY: Duration = Duration::from_secs(3);

/// All settings that boot needs, without the settings of modules.
#[derive(Debug)]
pub(crate) struct Config {
    /// Notes about the settings, for operators.
    pub(crate) notes: BTreeSet<String>,
    /// Whether jobs and schedules are paused until an operator resumes them. Only the command line sets this.
    pub(crate) paused: bool,
    pub(crate) data_dir: PathBuf,
    pub(crate) threads: usize,
    pub(crate) server: http::Config,
    pub(crate) admin: http::Config,
    pub(crate) cpu: cpu::Config,
    pub(crate) sites: sites::Config,
    /// API keys besides those in the store.
    pub(crate) key_files: Vec<KeyFile>,
    pub(crate) scopes: Scopes,
    pub(crate) health: health::Config,
    pub(crate) store: StoreConfig,
    /// A replica of the store that only reads.
    pub(crate) replica: Option<postgres::Config>,
    pub(crate) queue: Option<RedisQueueConfig>,
    /// Effect on readiness when the store is away.
    pub(crate) store_policy: ReadinessPolicy,
    /// Effect on readiness when the store of jobs is away.
    pub(crate) queue_policy: ReadinessPolicy,
    /// Pools that modules name.
    pub(crate) pools: Vec<PoolConfig>,
    /// Listeners that modules name.
    pub(crate) listeners: Vec<ListenerConfig>,
    /// Targets that modules call.
    pub(crate) targets: Vec<TargetConfig>,
    pub(crate) worker: worker::Config,
    pub(crate) upkeep: upkeep::Config,
    pub(crate) cron: cron::Config,
    /// How long jobs that have ended are kept.
    pub(crate) retention: Duration,
    /// Limits of the jobs that wait in one queue.
    pub(crate) bounds: Bounds,
    /// Limits after which the process is recycled.
    pub(crate) limits: Limits,
    /// Number of jobs of the default queue that run at once.
    pub(crate) slots: usize,
    pub(crate) phases: Phases,
    pub(crate) telemetry: telemetry::Config,
    /// The cgroup that limits the process.
    pub(crate) cgroup: Cgroup,
    /// Share of the memory limit from which requests are shed, in percent.
    pub(crate) shed_at: u64,
}

/// Time limits of the phases of the drain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Phases {
    /// Notice: requests are served as before, while load balancers learn that this process stops.
    pub(crate) notice: Duration,
    /// Soft: running requests and jobs may finish.
    pub(crate) soft: Duration,
    /// Soft, while a successor waits.
    pub(crate) succession: Duration,
    /// Hard: cancelled tasks may hand back their work.
    pub(crate) hard: Duration,
    /// Time for which a connection may be idle, in the notice or after it, before it is closed.
    pub(crate) idle: Duration,
}

impl Config {
    pub(crate) fn read(settings: &mut Reader<'_>, scopes: Scopes) -> Self {
        let server = server(settings);
        let pressure = server.net.pressure.clone();
        let data_dir: PathBuf = settings.get("data_dir");
        let store = stores::store(settings);
        note_exposed(settings, &data_dir, &store);
        Self {
            paused: false,
            notes: BTreeSet::new(),
            data_dir,
            threads: threads(settings),
            admin: admin(settings, &server),
            server,
            cpu: cpu(settings),
            sites: sites::Config::read(settings),
            key_files: KeyFile::read(settings, &scopes),
            scopes,
            health: health::Config {
                stall_after: settings.duration("admin.stall_after", MILLISECOND..=DAY),
                unready_after: settings.duration("admin.unready_after", MILLISECOND..=DAY),
            },
            replica: stores::replica(settings, &store),
            store,
            queue: stores::queue(settings),
            store_policy: stores::readiness(settings, "store"),
            queue_policy: stores::readiness(settings, "queue"),
            pools: Vec::new(),
            listeners: Vec::new(),
            targets: Vec::new(),
            worker: worker(settings, pressure),
            upkeep: upkeep::Config { rescue_every: RESCUE_EVERY, lease: settings.get("queue.lease") },
            cron: cron::config(settings),
            retention: settings.duration("queue.retention", SECOND..=400 * DAY),
            bounds: Bounds {
                jobs: settings.number("queue.max_jobs", 1..=u64::MAX),
                bytes: settings.get::<Size>("queue.max_bytes").0 as u64,
            },
            limits: limits(settings),
            slots: settings.number("queue.slots", 1..=10_000),
            phases: Phases {
                notice: settings.get("drain.notice"),
                soft: settings.get("drain.soft"),
                succession: settings.get("drain.succession"),
                hard: settings.get("drain.hard"),
                idle: settings.get("drain.idle"),
            },
            telemetry: telemetry(settings),
            cgroup: cgroup_of(settings),
            shed_at: settings.number("process.shed_at", 10..=100),
        }
    }
}

pub(crate) fn telemetry(settings: &mut Reader<'_>) -> telemetry::Config {
    let filter: telemetry::Filter =
        settings.parse("telemetry.log", "a level such as info, or info,perennial_workers=debug");
    if !filter.has_level_for_the_rest() {
        settings.note(
            "telemetry.log: targets that it does not name log only errors; put info in front, so that they log as usual".to_owned(),
        );
    }
    telemetry::Config { filter, format: settings.parse("telemetry.format", "auto, text or json") }
}

/// Notes when other users can read the data directory or the store: keys are secrets, and so are endpoints.
fn note_exposed(settings: &mut Reader<'_>, data_dir: &Path, store: &StoreConfig) {
    if let Some(mode) = data_dir::exposed(data_dir) {
        settings.note(format!(
            "data_dir: others can read {} (its mode is {mode:o}): chmod 700",
            data_dir.display()
        ));
    }
    if let StoreConfig::Sqlite { file, .. } = store {
        let file = data_dir.join(file);
        if let Some(mode) = data_dir::exposed(&file).filter(|_| file.parent() != Some(data_dir)) {
            settings.note(format!(
                "store.url: others can read {} (its mode is {mode:o}): chmod 600",
                file.display()
            ));
        }
    }
}

fn threads(settings: &mut Reader<'_>) -> usize {
    match settings.number("server.threads", 0..=1024) {
        // With one thread, a handler that blocks it would stop everything.
        0_usize => processors(settings).get().max(2),
        threads => threads,
    }
}

fn server(settings: &mut Reader<'_>) -> http::Config {
    let listen = listen(settings, "server.listen");
    let cert_file = settings.file("server.tls.cert_file");
    let key_file = settings.file("server.tls.key_file");
    let tls = match (cert_file, key_file) {
        (Some(cert_file), Some(key_file)) => Some(tls::Config { cert_file, key_file }),
        (None, None) => {
            if listen.iter().any(|listen| matches!(listen, Listen::Https(_))) {
                settings.refuse::<()>(
                    "server.tls.cert_file",
                    "a certificate, since server.listen has an https address",
                );
            }
            None
        }
        (Some(_), None) => settings.refuse("server.tls.key_file", "the key of the certificate"),
        (None, Some(_)) => settings.refuse("server.tls.cert_file", "the certificate of the key"),
    };
    note_certificate(settings, tls.as_ref());
    check_certificate(settings, tls.as_ref());
    let timeout = |settings: &mut Reader<'_>, key| settings.duration(key, MILLISECOND..=DAY);
    let head_limit = head_limit(settings);
    let wanted = settings.number("server.max_connections", 1..=1_000_000);
    let max_connections = fit(settings, "server.max_connections", wanted, |means| means.visitors(head_limit));
    let proxy_protocol = settings.get("server.proxy_protocol");
    let trusted_proxies =
        settings.parse_list::<Network>("server.trusted_proxies", "networks such as 10.1.0.0/16");
    if proxy_protocol && trusted_proxies.is_empty() {
        settings.note(
            "server.proxy_protocol: no proxy is trusted, so that no connection begins with its header; list the proxies in server.trusted_proxies".to_owned(),
        );
    }
    http::Config {
        net: net::Config {
            name: "public",
            listen,
            unix: unix_access(settings),
            tls,
            reuse_port: settings.get("server.reuse_port"),
            max_connections,
            max_per_address: settings.number("server.max_per_address", 0..=1_000_000),
            at_limit: settings.parse("server.at_limit", "queue or reject"),
            proxy_protocol,
            trusted_proxies: trusted_proxies.into_iter().map(|network| network.0).collect(),
            forwarded_header: settings.parse("server.forwarded_header", "x-forwarded-for or forwarded"),
            timeouts: Timeouts {
                handshake: timeout(settings, "server.handshake_timeout"),
                head: timeout(settings, "server.head_timeout"),
                idle: timeout(settings, "server.idle_timeout"),
                write: timeout(settings, "server.write_timeout"),
                age: settings.duration("server.max_age", Duration::ZERO..=30 * DAY),
            },
            pressure: Pressure::default(),
        },
        quiet: false,
        access_log: None,
        max_requests: settings.number("server.max_requests", 1..=10_000_000),
        head_limit,
        request_timeout: timeout(settings, "server.request_timeout"),
        body_idle_timeout: timeout(settings, "server.body_idle_timeout"),
        body_timeout: timeout(settings, "server.body_timeout"),
        body_limit: settings.get::<Size>("server.body_limit").0,
        trust_request_id: settings.get("server.trust_request_id"),
        slow_after: timeout(settings, "server.slow_after"),
        slow_poll: timeout(settings, "server.slow_poll"),
        http2: http::Http2Config {
            streams: settings.number("server.http2.streams", 1..=10_000),
            header_list: u32::try_from(settings.get::<Size>("server.http2.header_list").0)
                .unwrap_or(u32::MAX),
            send_buffer: settings.get::<Size>("server.http2.send_buffer").0,
            ping_every: timeout(settings, "server.http2.ping_every"),
            ping_timeout: timeout(settings, "server.http2.ping_timeout"),
        },
    }
}

/// Reads the mode and the group of Unix sockets, which say who may connect.
fn unix_access(settings: &mut Reader<'_>) -> UnixAccess {
    let mode =
        settings.read_with("server.socket_mode", "a mode in octal such as 0660, or nothing", |value| {
            match value.as_str()? {
                "" => Some(None),
                text => u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).map(Some),
            }
        });
    let wanted = "a group of this machine, by its name or number, or nothing";
    let group = settings.read_with("server.socket_group", wanted, |value| match value.as_str()? {
        "" => Some(None),
        text => text.parse().ok().or_else(|| group(text)).map(Some),
    });
    UnixAccess { mode, group }
}

/// Returns the number of a group.
fn group(name: &str) -> Option<u32> {
    nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

/// Refuses a key that does not fit the certificate. A file that cannot be used is only noted, since files may be
/// missing while settings are only checked.
fn check_certificate(settings: &mut Reader<'_>, tls: Option<&tls::Config>) {
    match tls.map(tls::check) {
        None | Some(Ok(())) => {}
        Some(Err(error @ tls::Error::Pem { .. })) => settings.note(format!("server.tls: {error}")),
        Some(Err(tls::Error::Identity(_))) => {
            settings
                .refuse::<()>("server.tls.key_file", "the key of the certificate in server.tls.cert_file");
        }
    }
}

/// Notes when the certificate has expired, or expires within seven days.
fn note_certificate(settings: &mut Reader<'_>, tls: Option<&tls::Config>) {
    let Some(end) = tls.and_then(|tls| tls::ends_at(&tls.cert_file)) else { return };
    let at = Timestamp::try_from(end).map_or_else(|_| String::new(), |at| format!(" ({at:.0})"));
    match end.duration_since(SystemTime::now()) {
        Err(_) => settings.note(format!("server.tls.cert_file: the certificate has expired{at}")),
        Ok(left) if left < 7 * DAY => {
            settings.note(format!(
                "server.tls.cert_file: the certificate expires in {} days{at}",
                left.as_secs() / 86400
            ));
        }
        Ok(_) => {}
    }
}

/// Reads the maximum length of a request head. The HTTP library takes no less than 8 KiB.
fn head_limit(settings: &mut Reader<'_>) -> usize {
    let limit = settings.get::<Size>("server.head_limit").0;
    if !(8 << 10..=1 << 20).contains(&limit) {
        settings.refuse::<()>("server.head_limit", "a size from 8KiB to 1MiB");
    }
    limit.max(8 << 10)
}

/// Makes the settings of the admin listener. It gets few requests, so it needs few settings of its own.
fn admin(settings: &mut Reader<'_>, server: &http::Config) -> http::Config {
    let listen = listen(settings, "admin.listen");
    if listen.iter().any(|listen| matches!(listen, Listen::Https(_))) {
        settings.refuse::<()>("admin.listen", "addresses without https://");
    }
    if listen.iter().any(|listen| server.net.listen.iter().any(|public| collide(listen, public))) {
        settings.refuse::<()>("admin.listen", "addresses that server.listen does not have");
    }
    let net = net::Config {
        name: "admin",
        listen,
        tls: None,
        max_connections: means(settings).operators().try_into().unwrap_or(256),
        max_per_address: 0,
        proxy_protocol: false,
        // Probes are never shed.
        pressure: Pressure::default(),
        ..server.net.clone()
    };
    // A copy of the store may take long.
    let request_timeout = Duration::from_secs(3600);
    http::Config { net, quiet: true, max_requests: usize::MAX, request_timeout, ..server.clone() }
}

/// Returns true when two listeners could not be open at once.
fn collide(one: &Listen, other: &Listen) -> bool {
    let address = |listen: &Listen| match listen {
        Listen::Http(address) | Listen::Https(address) => address.parse::<SocketAddr>().ok(),
        Listen::Unix(_) => None,
    };
    match (address(one), address(other)) {
        (Some(one), Some(other)) => {
            let is_any = one.ip().is_unspecified() || other.ip().is_unspecified();
            one.port() != 0 && one.port() == other.port() && (one.ip() == other.ip() || is_any)
        }
        _ => one == other,
    }
}

fn cpu(settings: &mut Reader<'_>) -> cpu::Config {
    let threads: usize = settings.number("server.cpu.threads", 0..=1024);
    let all = processors(settings);
    cpu::Config {
        threads: NonZeroUsize::new(threads).unwrap_or(all),
        queue: settings.number("server.cpu.queue", 1..=1_000_000),
    }
}

fn listen(settings: &mut Reader<'_>, key: &str) -> Vec<Listen> {
    let listen = settings.parse_list(key, "host:port, https://host:port or unix:/path");
    if listen.is_empty() {
        settings.refuse::<()>(key, "at least one address");
    }
    listen
}

/// Reads the limits after which the process is recycled. A setting of zero is no limit.
fn limits(settings: &mut Reader<'_>) -> Limits {
    let age = settings.duration("process.max_age", Duration::ZERO..=400 * DAY);
    let memory = settings.get::<Size>("process.max_memory").0 as u64;
    let jobs = settings.number("process.max_jobs", 0..=u64::MAX);
    Limits {
        jobs: (jobs > 0).then_some(jobs),
        age: (!age.is_zero()).then_some(age),
        memory: (memory > 0).then_some(memory),
    }
}

fn worker(settings: &mut Reader<'_>, pressure: Pressure) -> worker::Config {
    let config = worker::Config {
        name: format!("{}@{}", std::process::id(), rustix::system::uname().nodename().to_string_lossy()),
        lease: settings.duration("queue.lease", MILLISECOND..=DAY),
        renew_every: settings.duration("queue.renew_every", MILLISECOND..=DAY),
        poll: settings.duration("queue.poll", MILLISECOND..=DAY),
        payload_bytes: settings.get::<Size>("queue.payload_bytes").0,
        pressure,
    };
    if config.renew_every * 3 > config.lease {
        settings.refuse::<()>("queue.lease", "at least three times queue.renew_every");
    }
    config
}
