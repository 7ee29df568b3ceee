//! Targets and their settings.

use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use ipnet::IpNet;
use secrecy::SecretString;

use crate::config::MILLISECOND;
use crate::settings::{Network, Reader, Size};

/// Settings of a target with a URL, with their defaults; `NAME` and `URL` stand for its name and its URL.
const ONE: &str = include_str!("../../../../config/target.toml");
/// Settings of calls to URLs that others choose, with their defaults.
const ANY: &str = include_str!("../../../../config/targets.toml");

/// Defaults that differ where operators choose the URLs.
const INTERNAL: [(&str, &str); 5] = [
    ("allow_networks = []", "allow_networks = [\"0.0.0.0/0\", \"::/0\"]"),
    ("allow_insecure = false", "allow_insecure = true"),
    ("calls_per_host = 8", "calls_per_host = 64"),
    ("timeout = \"10s\"", "timeout = \"15s\""),
    ("retries = 2", "retries = 0"),
];

const HOUR: Duration = Duration::from_secs(3600);

/// A server that a module calls, named in [`Module::TARGETS`](crate::module::Module::TARGETS). The module gets its client
/// with [`Host::http_client`](crate::module::Host::http_client).
#[derive(Clone, Copy, Debug)]
pub struct Target {
    name: &'static str,
    /// Default of `targets.NAME.url`; `None` for URLs that others choose.
    url: Option<&'static str>,
    /// Whether operators choose the URLs.
    is_internal: bool,
}

impl Target {
    /// A server with a URL, which is the default of `targets.NAME.url`. The operator chooses it, so its addresses are not
    /// checked.
    pub const fn new(name: &'static str, url: &'static str) -> Self {
        Self { name, url: Some(url), is_internal: false }
    }

    /// Servers whose URLs others choose, such as the webhooks of users. Their addresses must be on the public internet:
    /// they are checked when a connection is made, after their name was looked up.
    pub const fn any(name: &'static str) -> Self {
        Self { name, url: None, is_internal: false }
    }

    /// Allows all networks and `http://` by default, because operators choose the URLs, and no strangers.
    #[must_use]
    pub const fn internal(self) -> Self {
        Self { is_internal: true, ..self }
    }

    /// The name.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Settings of the target with their defaults, as commented TOML.
    pub(crate) fn defaults(self) -> String {
        match self.url {
            Some(url) => ONE.replace("NAME", self.name).replace("\"URL\"", &format!("{url:?}")),
            None if self.is_internal => INTERNAL
                .into_iter()
                .fold(ANY.replace("NAME", self.name), |text, (default, other)| text.replace(default, other)),
            None => ANY.replace("NAME", self.name),
        }
    }

    pub(crate) fn read(self, settings: &mut Reader<'_>) -> TargetConfig {
        let key = |name: &str| format!("targets.{}.{name}", self.name);
        let base = self.url.and_then(|_| {
            let text: String = settings.get(&key("url"));
            let uri = text.trim_end_matches('/').parse().ok().filter(is_base);
            uri.or_else(|| settings.refuse(&key("url"), "a URL such as https://api.example.com/v1"))
        });
        let any = self.url.is_none().then(|| AnyHost {
            networks: settings
                .parse_list::<Network>(&key("allow_networks"), "networks such as 10.1.0.0/16")
                .into_iter()
                .map(|Network(network)| network)
                .collect(),
            is_insecure: settings.get(&key("allow_insecure")),
            is_internal: self.is_internal,
            calls: settings.number(&key("calls_per_host"), 1..=10_000),
        });
        let proxy: String = settings.get(&key("proxy"));
        let credentials = settings.secret_file(&key("proxy_credentials_file"));
        let proxy = (!proxy.is_empty()).then(|| {
            let uri = proxy.parse().ok().filter(is_proxy);
            uri.or_else(|| settings.refuse(&key("proxy"), "http://host:port, or nothing"))
        });
        TargetConfig {
            name: self.name,
            base,
            any,
            timeout: settings.duration(&key("timeout"), MILLISECOND..=HOUR),
            connect_timeout: settings.duration(&key("connect_timeout"), MILLISECOND..=HOUR),
            calls: settings.number(&key("calls"), 1..=10_000),
            retries: settings.number(&key("retries"), 0..=10),
            max_answer: settings.get::<Size>(&key("max_answer")).0,
            ca_file: settings.file(&key("ca_file")),
            proxy: proxy.flatten().map(|uri| Proxy { uri, credentials }),
        }
    }
}

/// Returns true for `http://host/path` and `https://host/path` without a query.
fn is_base(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        && uri.query().is_none()
}

fn is_proxy(uri: &Uri) -> bool {
    uri.scheme_str() == Some("http") && is_base(uri) && uri.port().is_some() && uri.path() == "/"
}

/// Settings of a target.
#[derive(Clone, Debug)]
pub(crate) struct TargetConfig {
    pub(super) name: &'static str,
    /// The URL, with the beginning of its paths; `None` where others choose URLs.
    pub(super) base: Option<Uri>,
    /// Rules for URLs that others choose; `None` where there is one URL.
    pub(super) any: Option<AnyHost>,
    /// Time limit of a call, with its retries and the body of its answer.
    pub(super) timeout: Duration,
    pub(super) connect_timeout: Duration,
    /// Maximum number of calls at once.
    pub(super) calls: usize,
    /// Maximum number of further attempts.
    pub(super) retries: u32,
    /// Maximum length of an answer that is read into memory, in bytes.
    pub(super) max_answer: usize,
    pub(super) ca_file: Option<PathBuf>,
    pub(super) proxy: Option<Proxy>,
}

/// Rules for URLs that others choose.
#[derive(Clone, Debug)]
pub(super) struct AnyHost {
    /// Networks that may be called although they are not public.
    pub(super) networks: Vec<IpNet>,
    /// Whether `http://` may be called.
    pub(super) is_insecure: bool,
    /// Whether operators choose the URLs.
    pub(super) is_internal: bool,
    /// Maximum number of calls to one host at once.
    pub(super) calls: usize,
}

/// A proxy, with `user:password`.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    pub(super) uri: Uri,
    pub(super) credentials: Option<SecretString>,
}
