//! Logs: one line an event, to standard error, without ever making a request wait for the log's reader.

mod access;
mod writer;

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing::error;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

pub(crate) use access::Access;
pub use access::AccessLog;
use writer::{Lines, Writer};

use crate::metrics;

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The thread that writes cannot be started.
    #[error("the log's thread cannot be started")]
    Thread(#[from] io::Error),
    /// A log is already installed.
    #[error(transparent)]
    Installed(#[from] TryInitError),
}

/// What is logged and how it looks.
#[derive(Clone, Debug)]
pub struct Config {
    /// A filter such as `info` or `info,perennial_workers=debug`.
    pub filter: Filter,
    /// How a line looks.
    pub format: Format,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines: one object a line.
    Json,
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(()),
        }
    }
}

/// A valid log filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(String);

impl FromStr for Filter {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        EnvFilter::try_new(text).map(|_| Self(text.to_owned()))
    }
}

impl Filter {
    fn directives(&self) -> EnvFilter {
        // Its level info is about its own making.
        EnvFilter::new(format!("tokio_cron_scheduler=warn,{}", self.0))
    }
}

/// The installed log. What was logged is written out when it drops.
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    lines: Lines,
    access: Option<AccessLog>,
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
        let events = tracing_subscriber::fmt::layer().with_writer(lines.clone()).with_ansi(terminal);
        let json = config.format == Format::Json || (config.format == Format::Auto && !terminal);
        let events = if json {
            events.json().flatten_event(true).with_span_list(false).boxed()
        } else {
            events.with_target(false).boxed()
        };
        tracing_subscriber::registry().with(filter).with(events).try_init()?;
        std::panic::set_hook(Box::new(log_panic));
        let access = json.then(|| AccessLog(lines.clone()));
        Ok(Self { filter: handle, lines, access, _writer: writer })
    }

    /// Where a server's access log goes directly, if its lines are JSON.
    pub fn access_log(&self) -> Option<AccessLog> {
        self.access.clone()
    }

    /// Replaces the filter while running.
    pub fn set_filter(&self, filter: &Filter) {
        if let Err(error) = self.filter.reload(filter.directives()) {
            error!(%error, "the log filter could not be replaced");
        }
    }

    /// Publishes how many lines were dropped so far.
    pub fn publish(&self) {
        metrics::log_lines_dropped(self.lines.dropped());
    }
}

fn log_panic(info: &std::panic::PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = std::backtrace::Backtrace::capture();
    let message = crate::tasks::panic_message(info.payload());
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        error!(message, place, %backtrace, "panic");
    } else {
        error!(message, place, "panic");
    }
}
