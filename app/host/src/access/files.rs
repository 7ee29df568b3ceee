//! API keys in files, such as Secrets of Kubernetes. A file has one key per line, so that an old and a new key can both
//! be valid for a while. Files are read again when they change.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use perennial_runtime::drain::Drain;
use tracing::{error, info};

use super::keys::{self, Grant, Hash, MAX_PER_MINUTE};
use super::{Caller, Scope, Scopes};
use crate::settings::Reader;
use crate::sites::{self, Sites};

/// Interval at which files are read again.
const LOOK: Duration = Duration::from_secs(2);
/// Setting that names the files.
const KEY: &str = "access.keys";
/// Minimum length of a key, in bytes; a shorter key could be guessed.
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
    /// Reads the list of files, and checks that each has keys.
    pub(crate) fn read(settings: &mut Reader<'_>, scopes: &Scopes) -> Vec<Self> {
        let sites = settings.names(sites::SECTION);
        let wanted = "a list of { name, file, site = \"default\", scopes = [..], per_minute = 600 }";
        let entries = settings.read_with(KEY, wanted, |value| Some(value.as_array()?.clone()));
        let mut found = Vec::new();
        for (index, value) in entries.iter().enumerate() {
            match entry(value, scopes) {
                Ok(config) => found.push(config),
                Err((part, wanted)) => {
                    let at = if part.is_empty() { format!("[{index}]") } else { format!("[{index}].{part}") };
                    settings.refuse_part(KEY, &at, None, &wanted);
                }
            }
        }
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
            let reason = match read(&config.file) {
                Ok(keys) if keys.is_empty() => {
                    "a file with one key per line; this one is empty or missing".to_owned()
                }
                Ok(_) => continue,
                Err(reason) => reason,
            };
            settings.refuse_part(KEY, &format!("[{index}].file"), None, &reason);
        }
        found
    }
}

/// Reads an entry. The error has the field that does not fit, and the value that was wanted.
fn entry(value: &toml::Value, known_scopes: &Scopes) -> Result<Config, (String, String)> {
    let refused = |part: &str, wanted: &str| (part.to_owned(), wanted.to_owned());
    let table = value.as_table().ok_or_else(|| refused("", "a table { name, file, scopes }"))?;
    let known = ["name", "file", "site", "scopes", "per_minute"];
    if let Some(unknown) = table.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(refused(unknown, "no such field: there are name, file, site, scopes and per_minute"));
    }
    let text = |key: &str| table.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let scopes = table.get("scopes").and_then(toml::Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let scopes: Option<BTreeSet<Scope>> =
        scopes.iter().map(|scope| known_scopes.named(scope.as_str()?)).collect();
    let scopes = scopes.filter(|scopes| !scopes.is_empty());
    let per_minute = match table.get("per_minute") {
        None => None,
        Some(number) => {
            let number = number.as_integer().and_then(|number| u32::try_from(number).ok());
            let within = number.filter(|number| (1..=MAX_PER_MINUTE).contains(number));
            let wanted = format!("a whole number from 1 to {MAX_PER_MINUTE}");
            Some(within.ok_or_else(|| refused("per_minute", &wanted))?)
        }
    };
    Ok(Config {
        name: text("name").ok_or_else(|| refused("name", "what the key is called"))?,
        file: text("file").ok_or_else(|| refused("file", "a file with one key per line"))?.into(),
        site: if table.contains_key("site") {
            text("site").unwrap_or_default()
        } else {
            sites::DEFAULT.to_owned()
        },
        scopes: scopes
            .ok_or_else(|| refused("scopes", &format!("at least one of {}", known_scopes.words())))?,
        per_minute,
    })
}

/// Reads the hashes of the keys of a file. A missing or empty file has none.
fn read(file: &Path) -> Result<Vec<Hash>, String> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("a file that can be read: {error}")),
    };
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.iter().any(|line| line.len() < MIN_KEY) {
        return Err(format!("keys of at least {MIN_KEY} characters, which nobody can guess"));
    }
    Ok(lines.into_iter().map(keys::hash).collect())
}

/// The keys in files, as of the last reading. A cheap handle.
#[derive(Clone, Debug)]
pub(super) struct KeyFiles(Arc<WatchedFiles>);

#[derive(Debug)]
struct WatchedFiles {
    /// Each file, the caller of its keys, and the hashes of its keys when it could last be read.
    files: Mutex<Vec<(Config, Caller, Vec<Hash>)>>,
    keys: RwLock<HashMap<Hash, Caller>>,
}

impl KeyFiles {
    /// Reads the files for the first time. The settings have checked that they can be read.
    pub(super) fn open(configs: Vec<Config>, sites: &Sites) -> Self {
        let caller = |config: Config| {
            let grant = Grant {
                site: sites.named(&config.site)?.id,
                name: config.name.clone(),
                scopes: config.scopes.clone(),
                per_minute: config.per_minute,
                ends_at: None,
            };
            let key = format!("file:{}:{}", config.site, config.name);
            Some((config, Caller::new(key, grant), Vec::new()))
        };
        let files = configs.into_iter().filter_map(caller).collect();
        let files = Self(Arc::new(WatchedFiles { files: Mutex::new(files), keys: RwLock::default() }));
        files.look();
        files
    }

    pub(super) fn find(&self, hash: &Hash) -> Option<Caller> {
        self.0.keys.read().get(hash).cloned()
    }

    /// Reads the files again and again, until the drain is soft.
    pub(super) async fn follow(&self, drain: Drain) {
        if self.0.files.lock().is_empty() {
            return drain.soft().await;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => self.look(),
                () = drain.soft() => return,
            }
        }
    }

    /// Reads the files. A file that cannot be used changes nothing.
    fn look(&self) {
        let mut files = self.0.files.lock();
        let mut changed = false;
        for (config, _, known) in files.iter_mut() {
            let (key, file) = (&config.name, config.file.display());
            match read(&config.file) {
                Ok(hashes) if hashes == *known => {}
                Ok(hashes) => {
                    match hashes.len() {
                        0 => error!(key, %file, "the file is empty or missing: its keys are no longer valid"),
                        keys => info!(key, keys, %file, "read API keys"),
                    }
                    (*known, changed) = (hashes, true);
                }
                Err(wanted) => error!(key, %file, "the keys stay as they were: wanted {wanted}"),
            }
        }
        if !changed {
            return;
        }
        let mut keys = HashMap::new();
        for (config, caller, hashes) in files.iter() {
            for hash in hashes {
                if keys.insert(*hash, caller.clone()).is_some() {
                    error!(
                        key = config.name,
                        "this key is that of another entry of access.keys, too: only one of them counts"
                    );
                }
            }
        }
        *self.0.keys.write() = keys;
    }
}
