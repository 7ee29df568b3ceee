//! Logs: one line an event, to standard error, without ever making a request wait for the log's reader.

use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing::error;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::metrics;

/// How many lines may wait for the reader of standard error before lines are dropped (and counted).
const LINES_IN_FLIGHT: usize = 64 * 1024;

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
        EnvFilter::new(&self.0)
    }
}

/// The installed log. What was logged is written out when it drops.
pub struct Telemetry {
    filter: reload::Handle<EnvFilter, Registry>,
    dropped: ErrorCounter,
    _writer: WorkerGuard,
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
    /// When a log is already installed.
    pub fn install(config: &Config) -> Result<Self, TryInitError> {
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(LINES_IN_FLIGHT)
            .thread_name("log-writer")
            .finish(io::stderr());
        let dropped = writer.error_counter();
        let (filter, handle) = reload::Layer::new(config.filter.directives());
        let terminal = io::stderr().is_terminal();
        let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(terminal);
        let json = config.format == Format::Json || (config.format == Format::Auto && !terminal);
        let lines = if json {
            lines.json().flatten_event(true).with_span_list(false).boxed()
        } else {
            lines.with_target(false).boxed()
        };
        tracing_subscriber::registry().with(filter).with(lines).try_init()?;
        std::panic::set_hook(Box::new(log_panic));
        Ok(Self { filter: handle, dropped, _writer: guard })
    }

    /// Replaces the filter while running.
    pub fn set_filter(&self, filter: &Filter) {
        if let Err(error) = self.filter.reload(filter.directives()) {
            error!(%error, "the log filter could not be replaced");
        }
    }

    /// Publishes how many lines were dropped so far.
    pub fn publish(&self) {
        metrics::log_lines_dropped(self.dropped.dropped_lines() as u64);
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
