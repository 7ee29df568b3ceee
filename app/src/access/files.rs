//! API keys in files: Secrets of Kubernetes, for one. A file has one key a line, so that the old and the new one can both
//! be good for a while; files are read again when they change.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use perennial_server::drain::Drain;
use tracing::{error, info};

use super::keys::{self, Grant, Hash};
use super::{Caller, Scope};
use crate::settings::Reader;
use crate::sites::{self, Sites};

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// The setting that names them.
const KEY: &str = "access.keys";
/// The shortest key: anything less can be guessed.
const MIN_KEY: usize = 24;

/// A file of keys, from the settings.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    name: String,
    file: PathBuf,
    site: String,
    scopes: BTreeSet<Scope>,
    per_minute: Option<u32>,
}

impl Config {
    /// Reads which files there are.
    pub(crate) fn read(settings: &mut Reader<'_>) -> Vec<Self> {
        let sites = settings.names(sites::SECTION);
        let wanted = "a list of { name, file, site = \"default\", scopes = [..], per_minute = 600 }";
        let found = settings
            .read_with(KEY, wanted, |value| value.as_array()?.iter().map(entry).collect::<Option<Vec<_>>>());
        for (index, config) in found.iter().enumerate() {
            if !sites.contains(&config.site) {
                settings.refuse_part(
                    KEY,
                    &format!("[{index}].site"),
                    None,
                    "the name of a site in the settings",
                );
            }
            if !keys::is_name(&config.name) {
                let wanted = "a name of a-z, 0-9, dots, dashes and underscores";
                settings.refuse_part(KEY, &format!("[{index}].name"), None, wanted);
            }
            let twice = |other: &Self| other.name == config.name && other.site == config.site;
            if found[..index].iter().any(twice) {
                let wanted = "a name that no other key of its site has; a file may hold several keys";
                settings.refuse_part(KEY, &format!("[{index}].name"), None, wanted);
            }
            if let Err(reason) = read(&config.file) {
                settings.refuse_part(KEY, &format!("[{index}].file"), None, &reason);
            }
        }
        found
    }
}

fn entry(value: &toml::Value) -> Option<Config> {
    let table = value.as_table()?;
    let known = ["name", "file", "site", "scopes", "per_minute"];
    table.keys().all(|key| known.contains(&key.as_str())).then_some(())?;
    let text = |key: &str| table.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let scopes = table.get("scopes")?.as_array()?;
    let per_minute = match table.get("per_minute") {
        None => None,
        Some(number) => Some(u32::try_from(number.as_integer()?).ok().filter(|number| *number > 0)?),
    };
    Some(Config {
        name: text("name")?,
        file: text("file")?.into(),
        site: if table.contains_key("site") { text("site")? } else { sites::DEFAULT.to_owned() },
        scopes: scopes.iter().map(|scope| scope.as_str()?.parse().ok()).collect::<Option<_>>()?,
        per_minute,
    })
}

/// The keys of a file.
fn read(file: &Path) -> Result<Vec<Hash>, String> {
    let text = fs::read_to_string(file).map_err(|error| format!("a file that can be read: {error}"))?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return Err("a file with a key a line; this one is empty".to_owned());
    }
    if lines.iter().any(|line| line.len() < MIN_KEY) {
        return Err(format!("keys of at least {MIN_KEY} characters, which nobody can guess"));
    }
    Ok(lines.into_iter().map(keys::hash).collect())
}

/// The keys in files as of the last look. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct Files(Arc<Known>);

#[derive(Debug)]
struct Known {
    files: Vec<(Config, Caller)>,
    keys: RwLock<HashMap<Hash, Caller>>,
}

impl Files {
    /// Reads them for the first time. The settings have said that they can be read.
    pub(super) fn open(configs: Vec<Config>, sites: &Sites) -> Self {
        let caller = |config: Config| {
            let site = sites.named(&config.site)?.id;
            let grant = Grant {
                site,
                name: config.name.clone(),
                scopes: config.scopes.clone(),
                per_minute: config.per_minute,
                ends_at: None,
            };
            Some((config, grant))
        };
        let files = configs.into_iter().filter_map(caller);
        let files: Vec<_> = files
            .map(|(config, grant)| {
                let key = format!("file:{}:{}", config.site, config.name);
                (config, Caller::new(key, grant))
            })
            .collect();
        let known = Known { files, keys: RwLock::default() };
        for (config, caller) in &known.files {
            known.replace(config, caller);
        }
        Self(Arc::new(known))
    }

    pub(super) fn find(&self, hash: &Hash) -> Option<Caller> {
        self.0.keys.read().unwrap_or_else(PoisonError::into_inner).get(hash).cloned()
    }

    /// Reads files again when they have changed, until nothing new is taken.
    pub(super) async fn follow(&self, drain: Drain) {
        let mut seen: Vec<_> = self.0.files.iter().map(|(config, _)| stamp(&config.file)).collect();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = drain.soft() => return,
            }
            for ((config, caller), seen) in self.0.files.iter().zip(&mut seen) {
                let now = stamp(&config.file);
                if now.is_some() && now != *seen {
                    *seen = now;
                    self.0.replace(config, caller);
                }
            }
        }
    }
}

impl Known {
    /// What a file says now. One that cannot be used changes nothing.
    fn replace(&self, config: &Config, caller: &Caller) {
        match read(&config.file) {
            Ok(hashes) => {
                let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
                keys.retain(|_, other| other.key != caller.key);
                info!(key = config.name, keys = hashes.len(), file = %config.file.display(), "read API keys");
                keys.extend(hashes.into_iter().map(|hash| (hash, caller.clone())));
            }
            Err(wanted) => {
                error!(key = config.name, file = %config.file.display(), "the keys stay as they were: wanted {wanted}");
            }
        }
    }
}

/// When a file was changed, and how long it is.
fn stamp(file: &Path) -> Option<(SystemTime, u64)> {
    let metadata: io::Result<_> = fs::metadata(file);
    let metadata = metadata.ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}
