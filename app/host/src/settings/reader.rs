//! Converts the values of settings into types, and notes every value that does not fit.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{AddrParseError, IpAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::SignedDuration;
use secrecy::SecretString;
use toml::Value;

use super::{Problems, SettingEntry, SettingProblem, Settings};

/// Reads settings. A value that does not fit is noted, and its default stands in for it until
/// [`Reader::finish`] refuses them all together.
#[derive(Debug)]
pub struct Reader<'a> {
    settings: &'a Settings,
    problems: Vec<SettingProblem>,
    notes: BTreeSet<String>,
}

/// A type that a setting can have.
pub trait Setting: Sized {
    /// Description of a valid value, in words.
    const WANTED: &'static str;

    /// Converts the value, if it fits.
    fn read(value: &Value) -> Option<Self>;
}

impl<'a> Reader<'a> {
    /// Makes a reader that has read nothing yet.
    pub fn new(settings: &'a Settings) -> Self {
        Self { settings, problems: settings.problems.clone(), notes: settings.notes.clone() }
    }

    /// Reads a setting of a type that implements [`Setting`].
    pub fn get<T: Setting>(&mut self, key: &str) -> T {
        self.read(key, T::WANTED, T::read)
    }

    /// Names of the parts of a section whose parts the operator names, `default` first.
    pub fn names(&self, section: &str) -> Vec<String> {
        self.settings.names(section)
    }

    /// Reads a whole number within bounds.
    pub fn number<T>(&mut self, key: &str, bounds: RangeInclusive<T>) -> T
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display + Copy,
    {
        let wanted = format!("a whole number from {} to {}", bounds.start(), bounds.end());
        self.read(key, &wanted, |value| {
            let number = T::try_from(value.as_integer()?).ok()?;
            bounds.contains(&number).then_some(number)
        })
    }

    /// Reads a duration within bounds.
    pub fn duration(&mut self, key: &str, bounds: RangeInclusive<Duration>) -> Duration {
        let wanted = format!("a duration from {:?} to {:?}", bounds.start(), bounds.end());
        self.read(key, &wanted, |value| Duration::read(value).filter(|duration| bounds.contains(duration)))
    }

    /// Reads and parses a text; `wanted` describes its form.
    pub fn parse<T: FromStr>(&mut self, key: &str, wanted: &str) -> T {
        self.read(key, wanted, |value| value.as_str()?.parse().ok())
    }

    /// Reads and parses a list of texts; `wanted` describes their form. A single text is a list of one.
    pub fn parse_list<T: FromStr>(&mut self, key: &str, wanted: &str) -> Vec<T> {
        let wanted = format!("a list of {wanted}");
        self.read(key, &wanted, |value| match value {
            Value::Array(items) => items.iter().map(|item| item.as_str()?.parse().ok()).collect(),
            value => Some(vec![value.as_str()?.parse().ok()?]),
        })
    }

    /// Reads a value with a function of the caller.
    pub fn read_with<T>(&mut self, key: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> T {
        self.read(key, wanted, read)
    }

    /// Reads the path of a file that must be readable; `None` when no file is named.
    pub fn file(&mut self, key: &str) -> Option<PathBuf> {
        let file: PathBuf = self.get::<Option<PathBuf>>(key)?;
        match std::fs::File::open(&file) {
            Ok(_) => Some(file),
            Err(error) => self.refuse(key, &format!("a file that can be read: {error}")),
        }
    }

    /// Reads the secret in the file that a setting names, without the line break at its end; `None` when no file is
    /// named.
    pub fn secret_file(&mut self, key: &str) -> Option<SecretString> {
        let file: PathBuf = self.get::<Option<PathBuf>>(key)?;
        match std::fs::read_to_string(&file) {
            Ok(text) if !text.trim().is_empty() => Some(text.trim_end_matches(['\r', '\n']).into()),
            Ok(_) => self.refuse(key, "a file with a secret in it; this one is empty"),
            Err(error) => self.refuse(key, &format!("a file that can be read: {error}")),
        }
    }

    /// Notes that the value of `key` does not fit for a reason that its type does not show. Returns `None`.
    pub fn refuse<T>(&mut self, key: &str, wanted: &str) -> Option<T> {
        let entry = self.entry(key);
        let (value, source) = (super::mask::value(key, &entry.value).to_string(), entry.source.clone());
        let problem =
            SettingProblem { key: key.to_owned(), value: Some(value), source, wanted: wanted.to_owned() };
        self.problems.push(problem);
        None
    }

    /// Notes that a part of the value of `key` does not fit; `part` is its place in the value, such as `[0].name`.
    pub fn refuse_part(&mut self, key: &str, part: &str, value: Option<&Value>, wanted: &str) {
        let problem = SettingProblem {
            key: format!("{key}{part}"),
            value: value.map(|value| super::mask::part(key, part, value).to_string()),
            source: self.entry(key).source.clone(),
            wanted: if value.is_some() { wanted.to_owned() } else { format!("wanted {wanted}") },
        };
        self.problems.push(problem);
    }

    /// Adds a note for operators about a value that can be used.
    pub fn note(&mut self, note: String) {
        self.notes.insert(note);
    }

    /// Takes the notes that were added so far.
    pub fn take_notes(&mut self) -> BTreeSet<String> {
        std::mem::take(&mut self.notes)
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// All values that did not fit.
    pub fn finish(self) -> Result<(), Problems> {
        if self.problems.is_empty() { Ok(()) } else { Err(Problems(self.problems)) }
    }

    fn entry(&self, key: &str) -> &'a SettingEntry {
        #[expect(clippy::panic, reason = "a mistake in the program, which any start of it shows")]
        self.settings
            .entries
            .get(key)
            .unwrap_or_else(|| panic!("the setting {key} is read, but has no default"))
    }

    fn read<T>(&mut self, key: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> T {
        let entry = self.entry(key);
        if let Some(value) = read(&entry.value) {
            return value;
        }
        self.refuse::<T>(key, wanted);
        #[expect(clippy::panic, reason = "a mistake in the program, which a test finds")]
        read(&entry.default).unwrap_or_else(|| panic!("the default of {key} is not {wanted}"))
    }
}

impl Setting for bool {
    const WANTED: &'static str = "true or false";

    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Setting for String {
    const WANTED: &'static str = "text";

    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl Setting for Vec<String> {
    const WANTED: &'static str = "a list of texts";

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Array(items) => items.iter().map(String::read).collect(),
            value => Some(vec![String::read(value)?]),
        }
    }
}

impl Setting for PathBuf {
    const WANTED: &'static str = "a path";

    fn read(value: &Value) -> Option<Self> {
        value.as_str().filter(|path| !path.is_empty()).map(Self::from)
    }
}

impl Setting for Option<PathBuf> {
    const WANTED: &'static str = "a path, or nothing";

    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(|path| if path.is_empty() { None } else { Some(path.into()) })
    }
}

/// Parses a duration such as `30s`, as settings and requests write it.
pub fn parse_duration(text: &str) -> Option<Duration> {
    // The library also reads ISO 8601 and clock times, which would be a surprise here.
    let friendly = text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains(':');
    Duration::try_from(text.parse::<SignedDuration>().ok().filter(|_| friendly)?).ok()
}

impl Setting for Duration {
    const WANTED: &'static str = "a duration such as 30s, 200ms or 1h";

    fn read(value: &Value) -> Option<Self> {
        parse_duration(value.as_str()?)
    }
}

/// A network, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(pub IpNet);

impl FromStr for Network {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<Self, AddrParseError> {
        text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map(Self)
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub usize);

impl Setting for Size {
    const WANTED: &'static str = "a size such as 512B, 64KiB or 1MiB";

    fn read(value: &Value) -> Option<Self> {
        let text = value.as_str()?;
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let unit: usize = match text[digits..].trim() {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return None,
        };
        text[..digits].parse::<usize>().ok()?.checked_mul(unit).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sources;
    use super::*;

    fn text(text: &str) -> Value {
        Value::String(text.to_owned())
    }

    #[test]
    fn durations() {
        for (written, ms) in
            [("30s", 30_000), ("200ms", 200), ("1h", 3_600_000), ("1h30m", 5_400_000), ("0s", 0)]
        {
            assert_eq!(Duration::read(&text(written)), Some(Duration::from_millis(ms)), "{written}");
        }
        for bad in ["", "30", "s", "-1s", "soon", "PT30S", "00:30:00"] {
            assert_eq!(Duration::read(&text(bad)), None, "{bad}");
        }
    }

    #[test]
    fn sizes() {
        for (written, bytes) in [("512B", 512), ("64KiB", 65536), ("1 MiB", 1 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(Size::read(&text(written)), Some(Size(bytes)), "{written}");
        }
        for bad in ["", "64", "KiB", "64KB", "-1B", "99999999999GiB"] {
            assert_eq!(Size::read(&text(bad)), None, "{bad}");
        }
    }

    #[test]
    fn every_value_that_does_not_fit_is_reported_at_once() {
        let schema = "a = '1s'\nb = 5\nc = ['x']\nd = true";
        let set = ["a=soon", "b=500", "c=", "d=maybe"].map(str::to_owned).to_vec();
        let settings = Settings::load(&[schema], &Sources { set, ..Sources::default() }).unwrap();
        let mut reader = Reader::new(&settings);
        assert_eq!(reader.get::<Duration>("a"), Duration::from_secs(1), "the default stands in");
        assert_eq!(reader.number("b", 1..=100_u16), 5);
        assert_eq!(reader.get::<Vec<String>>("c"), Vec::<String>::new());
        assert!(reader.get::<bool>("d"));
        let problems = reader.finish().unwrap_err().to_string();
        for part in [
            r#"a = "soon" (from --set): wanted a duration such as 30s, 200ms or 1h"#,
            "b = 500 (from --set): wanted a whole number from 1 to 100",
            r#"d = "maybe" (from --set): wanted true or false"#,
        ] {
            assert!(problems.contains(part), "{problems}");
        }
    }
}
