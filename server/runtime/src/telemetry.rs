//! Logs: one line per event, on standard error. A request never waits for the reader of the log.

mod joined;
mod seldom;
mod writer;

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing::error;
use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use joined::Joined;
pub use seldom::Seldom;
pub use writer::JsonLines;
use writer::{Lines, Writer};

use crate::metrics;

/// Error of [`Telemetry::install`].
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The thread that writes the log cannot be started.
    #[error("the log's thread cannot be started")]
    Thread(#[from] io::Error),
    /// A log is already installed.
    #[error(transparent)]
    Installed(#[from] TryInitError),
}

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct Config {
    /// A filter such as `info` or `info,perennial_workers=debug`.
    pub filter: Filter,
    /// The format of a line.
    pub format: Format,
}

/// The format of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString)]
#[strum(serialize_all = "kebab-case")]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// Text for people.
    Text,
    /// JSON for machines, one object per line.
    Json,
}

/// A valid log filter: a level, or a level for each part of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

/// Error of parsing a [`Filter`].
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A word is not a level. `EnvFilter` would take it for the name of a part of the program, and log nothing else.
    #[error("{0:?} is no level: wanted off, error, warn, info, debug or trace")]
    NoLevel(String),
    /// A level stands in the place of the name of a part of the program.
    #[error("{0:?} is a level, and no part of the program has that name: wanted a level, or name=level")]
    LevelAsName(String),
    /// `EnvFilter` cannot parse a directive.
    #[error(transparent)]
    Directive(#[from] ParseError),
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
        if parts.is_empty() {
            return Err(FilterError::NoLevel(text.to_owned()));
        }
        for part in &parts {
            let level = match part.rsplit_once('=') {
                Some((_, level)) => level,
                None => part,
            };
            // A span filter ends with `]` and may have no level.
            let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
            if !is_level(level) && !part.ends_with(']') {
                return Err(FilterError::NoLevel(level.to_owned()));
            }
            let name = part.split(['=', '[']).next().unwrap_or_default();
            if name.len() < part.len() && is_level(name) {
                return Err(FilterError::LevelAsName(name.to_owned()));
            }
        }
        let text = parts.join(",");
        EnvFilter::try_new(&text)?;
        Ok(Self(text))
    }
}

impl Filter {
    fn directives(&self) -> EnvFilter {
        // Without a default level, a filter that only has names, perhaps a misspelt one, would hide even errors. At
        // level info, tokio_cron_scheduler logs its own internals.
        EnvFilter::new(format!("error,tokio_cron_scheduler=warn,{}", self.0))
    }

    /// Returns true when the filter has a level for the parts that it does not name. Without one, only their errors are
    /// logged.
    pub fn has_level_for_the_rest(&self) -> bool {
        self.0.split(',').any(|part| part.parse::<LevelFilter>().is_ok())
    }
}

/// The installed log. Dropping it writes out the pending lines.
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: Lines,
    json: Option<JsonLines>,
    _writer: Writer,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Telemetry")
    }
}

impl Telemetry {
    /// Installs the log, once per process, and sends panics to it.
    ///
    /// # Errors
    /// When a log is already installed, or the system has no more threads.
    pub fn install(config: &Config) -> Result<Self, InstallError> {
        let (lines, writer) = Lines::start(io::stderr())?;
        let (filter, handle) = reload::Layer::new(config.filter.directives());
        let terminal = io::stderr().is_terminal();
        let events =
            tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(terminal && has_colours());
        let json = config.format == Format::Json || (config.format == Format::Auto && !terminal);
        let events = if json {
            events.json().flatten_event(true).with_span_list(false).map_event_format(Joined).boxed()
        } else {
            events.with_target(false).boxed()
        };
        tracing_subscriber::registry().with(filter).with(events).try_init()?;
        std::panic::set_hook(Box::new(log_panic));
        let json = json.then(|| JsonLines::new(lines.clone()));
        Ok(Self { filter: handle, lines, json, _writer: writer })
    }

    /// Makes a log that is not installed and shows nothing, for a program within another one, which has its own log.
    ///
    /// # Errors
    /// When the system has no more threads.
    pub fn detached() -> Result<Self, InstallError> {
        let (lines, writer) = Lines::start(io::sink())?;
        let (_, handle) = reload::Layer::new(EnvFilter::default());
        Ok(Self { filter: handle, lines, json: None, _writer: writer })
    }

    /// A direct writer of JSON lines; `None` when the log is text.
    pub fn json_lines(&self) -> Option<JsonLines> {
        self.json.clone()
    }

    /// Replaces the filter of the running log.
    pub fn set_filter(&self, filter: &Filter) {
        if let Err(error) = self.filter.reload(filter.directives()) {
            error!(%error, "the log filter could not be replaced");
        }
    }

    /// Publishes the number of lines dropped so far as a metric.
    pub fn publish(&self) {
        metrics::log_lines_dropped(self.lines.dropped());
    }
}

/// Returns true when the environment allows colours: `NO_COLOR` is unset or empty (<https://no-color.org>), and `TERM`
/// is not `dumb`.
pub fn has_colours() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn log_panic(info: &std::panic::PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = std::backtrace::Backtrace::capture();
    let message = crate::panics::panic_message(info.payload());
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        error!(message, place, %backtrace, "panic");
    } else {
        error!(message, place, "panic");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_level_is_refused_and_spaces_are_trimmed() {
        for (text, filter) in [
            ("info", "info"),
            (" info", "info"),
            ("info\n", "info"),
            ("INFO", "INFO"),
            ("off", "off"),
            (" info , perennial_workers=debug,", "info,perennial_workers=debug"),
            ("warn,perennial_server::net=trace", "warn,perennial_server::net=trace"),
        ] {
            assert_eq!(text.parse::<Filter>().unwrap(), Filter(filter.to_owned()), "{text:?}");
        }
        for bad in [
            "debg",
            "warning",
            "",
            " ",
            ",",
            "info,perennial_workers",
            "perennial_workers=debg",
            "inf o",
            "6",
            "info=",
            "info=debug",
            "debug[{a=b}]",
        ] {
            assert!(bad.parse::<Filter>().is_err(), "{bad:?}");
        }
    }
}
