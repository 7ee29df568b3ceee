//! Settings: layers of `key = value` over a commented default that is also the schema.
//!
//! Reading has two steps, and both only read. [`Settings::load`] merges the layers and refuses keys that do not exist;
//! [`Reader`] turns values into types. Both go on after an error, so that all errors are reported at once.

mod mask;
mod reader;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::{Table, Value};

use crate::program;

pub(crate) use mask::words as masked_words;
pub use reader::parse_duration;
pub use reader::{Network, Reader, Setting, Size};

/// Commented default settings of the host, which are also their reference.
pub const DEFAULTS: &str = include_str!("../../../config/default.toml");

/// Open sections, whose parts the operator names: `[sites.shop]` has the keys and the defaults of `[sites.default]`.
const OPEN: [&str; 1] = [SITES];
/// The section with a part for each site.
pub(crate) const SITES: &str = "sites";
/// The part of an open section that always exists.
pub(crate) const FIRST: &str = "default";

/// Sources of settings besides the defaults.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Defaults that the program changes, as keys and values.
    pub program: Vec<(String, Value)>,
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// Variables of the environment, as names and values.
    pub environment: Vec<(String, String)>,
    /// Settings of the command line, as `section.key=value`.
    pub set: Vec<String>,
    /// A flag of `serve`, and the settings that it stands for. A list is appended to the current value.
    pub companion: Option<(&'static str, Vec<(String, Value)>)>,
}

impl Sources {
    /// Makes sources with only the environment of this process.
    pub fn from_environment() -> Self {
        // A variable that is not valid Unicode cannot be a setting.
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Self { environment, ..Self::default() }
    }
}

/// Source of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The commented defaults.
    Default,
    /// The file with this path.
    File(PathBuf),
    /// The environment variable with this name.
    Environment(String),
    /// The command line.
    Flag,
    /// A flag of `serve` that stands for several settings, such as `--dev`.
    Companion(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag => f.write_str("--set"),
            Self::Companion(flag) => f.write_str(flag),
        }
    }
}

/// One problem with the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingProblem {
    /// The key, or the text that was given for one.
    pub key: String,
    /// The value as it was written, if it may be shown.
    pub value: Option<String>,
    /// Source of the value.
    pub source: Source,
    /// Value that was wanted instead; without a value, the whole message.
    pub wanted: String,
}

impl fmt::Display for SettingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} = {value} (from {}): wanted {}", self.key, self.source, self.wanted),
            None => write!(f, "{} (from {}): {}", self.key, self.source, self.wanted),
        }
    }
}

/// All problems with the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<SettingProblem>);

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the settings cannot be used:")?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// One setting in effect.
#[derive(Clone, Debug)]
struct SettingEntry {
    value: Value,
    source: Source,
    default: Value,
}

/// The settings in effect, by their dotted keys.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    entries: BTreeMap<String, SettingEntry>,
    /// Problems of the layers. [`Reader::finish`] reports them together with the values that do not fit.
    problems: Vec<SettingProblem>,
    /// Notes about the layers, for operators.
    notes: BTreeSet<String>,
}

/// One setting, masked so that it may be shown.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// Key of the setting.
    pub key: String,
    /// Value of the setting, with secrets masked.
    pub value: Value,
    /// Source of the value.
    pub source: String,
    /// Whether the value differs from the default.
    pub changed: bool,
}

impl Settings {
    /// Merges the sources over the `defaults`, which are [`DEFAULTS`] and those of each module.
    ///
    /// # Errors
    /// All problems of the layers: unknown keys, a file that cannot be read, text that is not TOML.
    pub fn load(defaults: &[&str], sources: &Sources) -> Result<Self, Problems> {
        let settings = Self::merge(defaults, sources);
        if settings.problems.is_empty() { Ok(settings) } else { Err(Problems(settings.problems)) }
    }

    /// Merges like [`load`](Self::load), but leaves the problems of the layers to [`Reader::finish`], so that they do
    /// not hide values that do not fit.
    pub fn merge(defaults: &[&str], sources: &Sources) -> Self {
        let mut settings = Self::default();
        let mut problems = Vec::new();
        for text in defaults {
            settings.add_defaults(text, &mut problems);
        }
        for (key, value) in &sources.program {
            settings.change_default(key, value, &mut problems);
        }
        if let Some(file) = &sources.file {
            settings.add_file(file, &mut problems);
        }
        for (name, value) in &sources.environment {
            settings.add_variable(name, value, &mut problems);
        }
        for flag in &sources.set {
            settings.add_flag(flag, &mut problems);
        }
        if let Some((flag, needed)) = &sources.companion {
            for (key, value) in needed {
                settings.add_needed(key, value, Source::Companion(flag), &mut problems);
            }
        }
        settings.problems = problems;
        settings
    }

    /// Adds a setting that a companion needs to the settings of the operator.
    fn add_needed(&mut self, key: &str, value: &Value, source: Source, problems: &mut Vec<SettingProblem>) {
        let before = self.entries.get(key).map(|entry| entry.value.clone());
        let value = match (value, before) {
            (Value::Array(more), Some(Value::Array(list))) => Value::Array([list, more.clone()].concat()),
            (Value::Array(more), Some(one)) => Value::Array([vec![one], more.clone()].concat()),
            (value, _) => value.clone(),
        };
        self.put(key.to_owned(), value, source, problems);
    }

    /// Adds the defaults of the host or of a module. Mistakes are reported, since modules may come from any author.
    fn add_defaults(&mut self, text: &str, problems: &mut Vec<SettingProblem>) {
        let wrong = |key: &str, wanted| SettingProblem {
            key: key.to_owned(),
            value: None,
            source: Source::Default,
            wanted,
        };
        let table: Table = match text.parse() {
            Ok(table) => table,
            Err(error) => return problems.push(wrong("defaults", format!("they are no TOML: {error}"))),
        };
        flatten(&table, "", &mut |key, value| {
            let entry =
                SettingEntry { value: value.clone(), source: Source::Default, default: value.clone() };
            if self.entries.insert(key.clone(), entry).is_some() {
                problems
                    .push(wrong(&key, "it has a default already: a module's keys are its own".to_owned()));
            }
        });
    }

    /// Changes the default of a setting, by order of the program.
    fn change_default(&mut self, key: &str, value: &Value, problems: &mut Vec<SettingProblem>) {
        self.put(key.to_owned(), value.clone(), Source::Default, problems);
        if let Some(entry) = self.entries.get_mut(key) {
            entry.default = entry.value.clone();
        }
    }

    fn add_file(&mut self, file: &Path, problems: &mut Vec<SettingProblem>) {
        let source = Source::File(file.to_owned());
        let unreadable = |wanted| SettingProblem {
            key: "--config".to_owned(),
            value: None,
            source: source.clone(),
            wanted,
        };
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) => return problems.push(unreadable(format!("the file cannot be read: {error}"))),
        };
        let table: Table = match text.parse() {
            Ok(table) => table,
            Err(error) => {
                return problems
                    .push(unreadable(format!("the file is no TOML: {}", place_of(&error, &text))));
            }
        };
        flatten(&table, "", &mut |key, value| self.put(key, value.clone(), source.clone(), problems));
    }

    fn add_variable(&mut self, name: &str, value: &str, problems: &mut Vec<SettingProblem>) {
        let prefix = &*program::identity().env_prefix;
        let Some(key) = name.strip_prefix(prefix) else { return };
        let key = key.to_lowercase().replace("__", ".");
        // Kubernetes describes a service named "perennial" by PERENNIAL_SERVICE_HOST, PERENNIAL_PORT and so on. So a
        // variable that has no section and is no key is not a setting.
        if !key.contains('.') && !self.entries.contains_key(&key) {
            if let Some(meant) = self.entries.keys().find(|known| known.replace('.', "_") == key) {
                let right = meant.to_uppercase().replace('.', "__");
                self.notes.insert(format!(
                    "{name} is no setting: a section and its key are separated by two underscores, {prefix}{right}"
                ));
            }
            return;
        }
        self.put_text(key, value, Source::Environment(name.to_owned()), problems);
    }

    fn add_flag(&mut self, flag: &str, problems: &mut Vec<SettingProblem>) {
        match flag.split_once('=') {
            Some((key, value)) => self.put_text(key.trim().to_owned(), value, Source::Flag, problems),
            None => problems.push(SettingProblem {
                key: mask::key(flag.to_owned()),
                value: None,
                source: Source::Flag,
                wanted: "wanted section.key=value".to_owned(),
            }),
        }
    }

    /// Sets a value that is given as text. It gets the type of its default.
    fn put_text(&mut self, key: String, text: &str, source: Source, problems: &mut Vec<SettingProblem>) {
        self.open_part(&key);
        let trimmed = text.trim();
        let value = match self.entries.get(&key).map(|entry| &entry.default) {
            Some(Value::Boolean(_)) => trimmed.parse().map(Value::Boolean).ok(),
            Some(Value::Integer(_)) => trimmed.parse().map(Value::Integer).ok(),
            Some(Value::Float(_)) => trimmed.parse().map(Value::Float).ok(),
            Some(Value::Array(_)) => list(trimmed),
            _ => None,
        };
        self.put(key, value.unwrap_or_else(|| Value::String(text.to_owned())), source, problems);
    }

    fn put(&mut self, key: String, value: Value, source: Source, problems: &mut Vec<SettingProblem>) {
        let is_part = self.open_part(&key);
        if is_part && value.as_table().is_some_and(Table::is_empty) {
            return;
        }
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.value = value;
            entry.source = source;
            return;
        }
        let near = self.entries.keys().map(|known| (strsim::jaro_winkler(known, &key), known));
        let near = near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness > 0.85);
        let wanted = match near {
            Some((_, known)) => format!("there is no such setting; did you mean {known}?"),
            None => "there is no such setting".to_owned(),
        };
        problems.push(SettingProblem { key: mask::key(key), value: None, source, wanted });
    }

    /// Makes the part of an open section that a key is in, with all its defaults, unless it exists. Returns true when
    /// the key is in a part with a valid name.
    fn open_part(&mut self, key: &str) -> bool {
        let Some((section, rest)) = key.split_once('.').filter(|(section, _)| OPEN.contains(section)) else {
            return false;
        };
        let name = rest.split_once('.').map_or(rest, |(name, _)| name);
        let first = format!("{section}.{FIRST}.");
        let defaults = self.entries.iter().filter_map(|(key, entry)| {
            let key = format!("{section}.{name}.{}", key.strip_prefix(&first)?);
            let (value, source) = (entry.default.clone(), Source::Default);
            Some((key, SettingEntry { value, source, default: entry.default.clone() }))
        });
        if is_name(name) && !self.entries.keys().any(|key| key.starts_with(&format!("{section}.{name}."))) {
            self.entries.extend(defaults.collect::<Vec<_>>());
        }
        is_name(name)
    }

    /// Names of the parts of an open section, [`FIRST`] first.
    fn names(&self, section: &str) -> Vec<String> {
        let parts = self
            .entries
            .keys()
            .filter_map(|key| key.strip_prefix(section)?.strip_prefix('.')?.split_once('.'));
        let names: BTreeSet<&str> = parts.map(|(name, _)| name).filter(|name| *name != FIRST).collect();
        [FIRST].into_iter().chain(names).map(str::to_owned).collect()
    }

    /// Returns every setting in effect, masked so that it may be shown.
    pub fn show(&self) -> Vec<Shown> {
        let shown = self.entries.iter().map(|(key, entry)| Shown {
            key: key.clone(),
            value: mask::value(key, &entry.value),
            source: entry.source.to_string(),
            changed: entry.value != entry.default,
        });
        shown.collect()
    }

    /// Returns the notes about the layers, for operators.
    pub(crate) fn notes(&self) -> impl Iterator<Item = &String> {
        self.notes.iter()
    }

    /// Takes over the value of one key, and its source, from settings that were read later.
    pub(crate) fn take_over(&mut self, key: &str, later: &Self) {
        if let Some(entry) = later.entries.get(key) {
            self.entries.insert(key.to_owned(), entry.clone());
        }
    }

    /// The keys whose values differ from those of `other`.
    pub fn changed_from(&self, other: &Self) -> Vec<&str> {
        let differs = |key: &String, entry: &SettingEntry| {
            other.entries.get(key).is_none_or(|old| old.value != entry.value)
        };
        self.entries.iter().filter(|(key, entry)| differs(key, entry)).map(|(key, _)| key.as_str()).collect()
    }
}

/// Describes an error and its place. The line itself is not repeated, since it may contain a password.
fn place_of(error: &toml::de::Error, text: &str) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{} at line {line}, column {column}", error.message())
}

/// Returns true when a part of an open section may have this name, which becomes part of file names and of variables.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=32).contains(&text.len()) && text.bytes().all(allowed)
}

/// Visits every value that is not itself a section, and every empty part of a section, by its dotted key.
fn flatten(table: &Table, prefix: &str, visit: &mut impl FnMut(String, &Value)) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Table(section) if !section.is_empty() => flatten(section, &key, visit),
            Value::Table(_) if !key.contains('.') => {}
            value => visit(key, value),
        }
    }
}

/// Parses a list in one line of text: TOML if it begins with a bracket, else values separated by commas.
fn list(text: &str) -> Option<Value> {
    if text.starts_with('[') {
        return format!("list = {text}").parse::<Table>().ok()?.remove("list");
    }
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    Some(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = "data_dir = 'd'\n[server]\nlisten = ['a']\nthreads = 0\n[store]\nurl = ''";

    fn load(sources: &Sources) -> Result<Settings, Problems> {
        Settings::load(&[SCHEMA], sources)
    }

    fn shown(settings: &Settings, key: &str) -> (String, String) {
        let shown = settings.show().into_iter().find(|shown| shown.key == key).unwrap();
        (shown.value.to_string(), shown.source)
    }

    fn set(flags: &[&str]) -> Sources {
        Sources { set: flags.iter().map(|flag| (*flag).to_owned()).collect(), ..Sources::default() }
    }

    #[test]
    fn the_last_layer_wins_and_says_so() {
        let directory = std::env::temp_dir().join(format!("perennial-settings-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("p.toml");
        std::fs::write(&file, "data_dir = 'file'\n[server]\nlisten = 'one'\nthreads = 3").unwrap();
        let environment = [("PERENNIAL_SERVER__THREADS", "4"), ("PERENNIAL_DATA_DIR", "env"), ("HOME", "/")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let set = vec!["data_dir=flag".to_owned()];
        let settings =
            load(&Sources { file: Some(file.clone()), environment, set, ..Sources::default() }).unwrap();
        let at = |key| shown(&settings, key);
        assert_eq!(at("data_dir"), ("\"flag\"".into(), "--set".into()));
        assert_eq!(at("server.threads"), ("4".into(), "PERENNIAL_SERVER__THREADS".into()));
        assert_eq!(at("server.listen"), ("\"one\"".into(), file.display().to_string()));
        assert_eq!(at("store.url"), ("\"\"".into(), "default".into()));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn every_unknown_key_is_reported_at_once_with_a_guess() {
        let environment = vec![("PERENNIAL_SERVER__TREADS".to_owned(), "4".to_owned())];
        let sources = Sources { environment, ..set(&["sever.listen=x", "nothing", "zzz=1"]) };
        let text = load(&sources).unwrap_err().to_string();
        for part in [
            "server.treads (from PERENNIAL_SERVER__TREADS): there is no such setting; did you mean server.threads?",
            "sever.listen (from --set): there is no such setting; did you mean server.listen?",
            "nothing (from --set): wanted section.key=value",
            "zzz (from --set): there is no such setting",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn the_variables_of_a_kubernetes_service_are_not_ours() {
        let environment = ["PERENNIAL_SERVICE_HOST", "PERENNIAL_PORT", "PERENNIAL_PORT_8080_TCP_ADDR"];
        let environment = environment.map(|name| (name.to_owned(), "10.0.0.1".to_owned())).to_vec();
        assert!(load(&Sources { environment, ..Sources::default() }).is_ok());
    }

    #[test]
    fn sites_are_named_by_whoever_has_them() {
        const SITES: &str = "[sites.default]\norigins = []\ncontact = ''";
        let read = |sources: &Sources| Settings::load(&[SITES], sources);
        let environment =
            vec![("PERENNIAL_SITES__NEWS__ORIGINS".to_owned(), "https://a, https://b".to_owned())];
        let settings =
            read(&Sources { environment, ..set(&["sites.shop.contact=mailto:a@b.example"]) }).unwrap();
        assert_eq!(settings.names("sites"), ["default", "news", "shop"]);
        assert_eq!(shown(&settings, "sites.news.origins").0, r#"["https://a", "https://b"]"#);
        assert_eq!(shown(&settings, "sites.shop.origins"), ("[]".into(), "default".into()));
        for bad in ["sites.shop.contract=x", "sites.Shop.contact=x", "sites.a.b.contact=x", "sites.shop=x"] {
            let text = read(&set(&[bad])).unwrap_err().to_string();
            assert!(text.contains("there is no such setting"), "{bad}: {text}");
        }
        let file = std::env::temp_dir().join(format!("perennial-sites-{}.toml", std::process::id()));
        std::fs::write(&file, "[sites.bare]\n").unwrap();
        let settings = read(&Sources { file: Some(file.clone()), ..Sources::default() }).unwrap();
        assert_eq!(settings.names("sites"), ["default", "bare"]);
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn a_variable_with_one_underscore_is_said_to_be_none() {
        let environment = vec![("PERENNIAL_SERVER_LISTEN".to_owned(), "b".to_owned())];
        let settings = load(&Sources { environment, ..Sources::default() }).unwrap();
        let note = settings.notes.first().unwrap();
        assert!(note.starts_with("PERENNIAL_SERVER_LISTEN is no setting"), "{note}");
        assert!(note.ends_with("PERENNIAL_SERVER__LISTEN"), "{note}");
    }

    #[test]
    fn unknown_keys_do_not_hide_values_that_do_not_fit() {
        let settings = Settings::merge(&[SCHEMA], &set(&["sever.listen=x", "server.threads=many"]));
        let mut reader = Reader::new(&settings);
        reader.number("server.threads", 0..=4_u16);
        let text = reader.finish().unwrap_err().to_string();
        assert!(
            text.contains("did you mean server.listen?") && text.contains("server.threads = \"many\""),
            "{text}"
        );
    }

    #[test]
    fn lists_are_one_value_commas_or_toml() {
        for (text, list) in
            [("a", r#"["a"]"#), ("a, b,", r#"["a", "b"]"#), ("[{ host = 'x' }]", r#"[{ host = "x" }]"#)]
        {
            let settings = load(&set(&[&format!("server.listen={text}")])).unwrap();
            assert_eq!(shown(&settings, "server.listen").0, list);
        }
    }
}
