//! The access log's line as JSON.
//!
//! There is one for each request, and it always has the same fields: written directly it costs a tenth of what an
//! event costs that could be anything. It looks like the lines of the others.

use std::io::Write;
use std::time::Duration;

use http::Version;
use jiff::Timestamp;
use serde::Serialize;

use super::writer::Lines;

/// Where the lines go. A cheap handle.
#[derive(Clone, Debug)]
pub struct AccessLog(pub(super) Lines);

/// One request that has ended.
#[derive(Debug)]
pub(crate) struct Access<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) method: &'static str,
    pub(crate) path: &'a str,
    pub(crate) route: &'a str,
    pub(crate) status: u16,
    pub(crate) bytes: u64,
    pub(crate) complete: bool,
    pub(crate) took: Duration,
    pub(crate) version: Version,
    pub(crate) peer: String,
    pub(crate) client: Option<String>,
}

#[derive(Serialize)]
struct Line<'a> {
    level: &'static str,
    message: &'static str,
    request_id: &'a str,
    method: &'static str,
    path: &'a str,
    route: &'a str,
    status: u16,
    bytes: u64,
    complete: bool,
    took_ms: f64,
    version: &'static str,
    peer: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<&'a str>,
    target: &'static str,
}

impl AccessLog {
    pub(crate) fn write(&self, access: &Access<'_>) {
        let line = Line {
            level: "INFO",
            message: "request",
            request_id: access.request_id,
            method: access.method,
            path: access.path,
            route: access.route,
            status: access.status,
            bytes: access.bytes,
            complete: access.complete,
            took_ms: (access.took.as_secs_f64() * 1e6).round() / 1e3,
            version: match access.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2.0",
                _ => "HTTP/1.1",
            },
            peer: &access.peer,
            client: access.client.as_deref(),
            target: "access",
        };
        let now = Timestamp::now();
        self.0.append(|waiting| {
            let begin = waiting.len();
            let _ = write!(waiting, "{{\"timestamp\":\"{now:.6}\",");
            // The other object's brace gives way to ours.
            let brace = waiting.len();
            if serde_json::to_writer(&mut *waiting, &line).is_ok() {
                waiting.remove(brace);
                waiting.push(b'\n');
            } else {
                waiting.truncate(begin);
            }
        });
    }
}
