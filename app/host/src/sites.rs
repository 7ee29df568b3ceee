//! Sites: the tenants that one process serves side by side, each with its own keys, subscriptions and pages.
//!
//! An API key belongs to one site. Without a key, the `Origin` of the calling page decides the site, else the `Host` of
//! the request, else it is the default site.

mod origins;

use std::collections::HashMap;
use std::sync::Arc;

use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, header};
use perennial_server::http::problem::FieldError;
use perennial_store::pool::sql::{self, Store};
use perennial_store::values;
use tracing::warn;

use crate::settings::{self, Reader, Setting};
use origins::Pattern;

/// Section of the settings with a part for each site.
pub const SECTION: &str = settings::SITES;
/// Name of the site that needs no settings.
pub const DEFAULT: &str = settings::FIRST;

/// Id of a site in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SiteId(pub i64);

impl SiteId {
    /// Id of the site that needs no settings.
    pub const DEFAULT: Self = Self(1);

    /// Number of the default site, for stored values that have no site.
    pub fn default_number() -> i64 {
        Self::DEFAULT.0
    }
}

/// A site.
#[derive(Clone, Debug)]
pub struct Site {
    /// Id in the store.
    pub id: SiteId,
    /// Name in the settings.
    pub name: String,
    /// Origins of the pages of the site.
    origins: Vec<Pattern>,
    /// Host names with which requests ask for the site.
    pub hosts: Vec<String>,
}

/// All sites. A cheap handle.
#[derive(Clone, Debug)]
pub struct Sites(Arc<SiteTable>);

#[derive(Debug)]
struct SiteTable {
    all: Vec<Site>,
    by_id: HashMap<SiteId, usize>,
    /// Patterns of origins, the most exact first.
    by_origin: Vec<(Pattern, usize)>,
    by_host: HashMap<String, usize>,
}

/// Settings of the sites, before the store has given them their ids.
#[derive(Clone, Debug)]
pub(crate) struct Config(Vec<Site>);

impl Config {
    /// Reads the sites. An origin or a host that two sites claim is refused.
    pub(crate) fn read(settings: &mut Reader<'_>) -> Self {
        let mut sites = Vec::<Site>::new();
        for name in settings.names(SECTION) {
            let origins_key = format!("{SECTION}.{name}.origins");
            let listed: Vec<String> = settings.get(&origins_key);
            let (mut origins, mut wrong) = (Vec::new(), Vec::new());
            for text in &listed {
                match Pattern::read(text) {
                    Ok(origin) => origins.push(origin),
                    Err(wanted) => wrong.push(format!("for {text:?} {wanted}")),
                }
            }
            if !wrong.is_empty() {
                let wanted = format!("a list of origins as browsers write them: {}", wrong.join("; "));
                settings.refuse::<()>(&origins_key, &wanted);
            }
            let hosts_key = format!("{SECTION}.{name}.hosts");
            let hosts = settings.read_with(
                &hosts_key,
                "a list of host names, with a port if it is in URLs",
                |value| {
                    let hosts = <Vec<String> as Setting>::read(value)?;
                    hosts
                        .iter()
                        .all(|host| host.parse::<Authority>().is_ok_and(|it| it.as_str() == *host))
                        .then_some(hosts)
                },
            );
            let hosts: Vec<String> = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
            for other in &sites {
                let twice =
                    |text: &&String| Pattern::read(text).is_ok_and(|origin| other.origins.contains(&origin));
                if let Some(origin) = listed.iter().find(twice) {
                    let wanted =
                        format!("{origin} in one site only; it is in sites.{}.origins, too", other.name);
                    settings.refuse::<()>(&origins_key, &wanted);
                }
                if let Some(host) = hosts.iter().find(|host| other.hosts.contains(host)) {
                    let wanted = format!("{host} in one site only; it is in sites.{}.hosts, too", other.name);
                    settings.refuse::<()>(&hosts_key, &wanted);
                }
            }
            let id = SiteId::DEFAULT;
            sites.push(Site { id, name, origins, hosts });
        }
        Self(sites)
    }

    /// Registers all sites in the store.
    ///
    /// # Errors
    /// When the store refuses.
    pub(crate) async fn open(self, store: &Store) -> sql::Result<Sites> {
        let mut all = self.0;
        for site in &mut all {
            site.id = register(store, &site.name).await?;
        }
        let rows = store.query("SELECT id, name FROM sites", values![]).await?;
        for name in sql::each(&rows, "sites", "id", |row| row.get::<String>("name")) {
            if all.iter().all(|site| site.name != name) {
                warn!(
                    site = name,
                    "this site is in the store and not in the settings: nothing of it is served or sent"
                );
            }
        }
        let (mut by_id, mut by_origin, mut by_host) = (HashMap::new(), Vec::new(), HashMap::new());
        for (index, site) in all.iter().enumerate() {
            by_id.insert(site.id, index);
            by_origin.extend(site.origins.iter().map(|origin| (origin.clone(), index)));
            by_host.extend(site.hosts.iter().map(|host| (host.clone(), index)));
        }
        by_origin.sort_by_key(|(origin, _): &(Pattern, usize)| std::cmp::Reverse(origin.rank()));
        Ok(Sites(Arc::new(SiteTable { all, by_id, by_origin, by_host })))
    }
}

/// Returns the id of a site. A site that the store does not know gets a new id.
async fn register(store: &Store, name: &str) -> sql::Result<SiteId> {
    loop {
        let found: Option<i64> =
            store.value("SELECT max(id) FROM sites WHERE name = ?", values![name]).await?;
        if let Some(id) = found {
            return Ok(SiteId(id));
        }
        // When two processes do this at once, one inserts nothing, and finds the row of the other.
        let insert =
            "INSERT INTO sites (id, name) SELECT max(id) + 1, ? FROM sites WHERE true ON CONFLICT DO NOTHING";
        store.execute(insert, values![name]).await?;
    }
}

impl Sites {
    /// Iterates over all sites.
    pub fn all(&self) -> impl Iterator<Item = &Site> {
        self.0.all.iter()
    }

    /// Returns the site with this id, if it is served here.
    pub fn get(&self, id: SiteId) -> Option<&Site> {
        self.0.by_id.get(&id).map(|index| &self.0.all[*index])
    }

    /// Returns the site with this name.
    pub fn named(&self, name: &str) -> Option<&Site> {
        self.all().find(|site| site.name == name)
    }

    /// Returns the site that a request names; the default site without a name.
    ///
    /// # Errors
    /// 422 for an unknown name.
    pub fn wanted(&self, name: Option<&str>) -> Result<&Site, FieldError> {
        let wanted = || FieldError::new("site", "the name of a site in the settings");
        self.named(name.unwrap_or(DEFAULT)).ok_or_else(wanted)
    }

    /// Returns the site that a page belongs to: the site that lists its origin, or the site of the `Host` if the page
    /// is from that host or the request has no `Origin`. `None` for pages of any other origin.
    pub fn of_page(&self, parts: &Parts) -> Option<&Site> {
        let own = host(parts);
        let Some(origin) = parts.headers.get(header::ORIGIN) else { return self.of_host(own) };
        let origin = origin.to_str().ok()?;
        if let Some(site) = self.of_origin(origin) {
            return Some(site);
        }
        let (_, host) = origin.split_once("://")?;
        if own == Some(host) { self.of_host(own) } else { None }
    }

    /// Returns true when a page of another site than `id` sends these headers.
    pub fn is_elsewhere(&self, headers: &HeaderMap, id: SiteId) -> bool {
        let origin = headers.get(header::ORIGIN).and_then(|origin| origin.to_str().ok());
        let owner = origin.and_then(|origin| self.of_origin(origin));
        owner.is_some_and(|owner| owner.id != id)
    }

    /// Returns the site that lists this origin.
    pub fn of_origin(&self, origin: &str) -> Option<&Site> {
        let found = self.0.by_origin.iter().find(|(pattern, _)| pattern.matches(origin));
        found.map(|(_, index)| &self.0.all[*index])
    }

    /// Returns the site with this host name; the default site if no site has it.
    fn of_host(&self, host: Option<&str>) -> Option<&Site> {
        let host = host.map(str::to_ascii_lowercase).unwrap_or_default();
        let without_port = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
        let found = self.0.by_host.get(&host).or_else(|| self.0.by_host.get(without_port));
        found.map(|index| &self.0.all[*index]).or_else(|| self.get(SiteId::DEFAULT))
    }
}

/// Host name of a request, with its port if it has one.
fn host(parts: &Parts) -> Option<&str> {
    let header = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    header.or_else(|| parts.uri.authority().map(Authority::as_str))
}
