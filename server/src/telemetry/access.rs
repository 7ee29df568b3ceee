//! The access log's line as JSON.
//!
//! There is one for each request, and it always has the same fields: written directly it costs a tenth of what an
//! event costs that could be anything. It looks like the lines of the others.

use std::fmt::{Debug, Display};
use std::net::IpAddr;

use http::Version;
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::writer::Lines;
use crate::net::Peer;

/// Where the lines go. A cheap handle.
#[derive(Clone, Debug)]
pub struct AccessLog(pub(super) Lines);

/// One request that has ended.
#[derive(Debug, Serialize)]
pub(crate) struct Access<'a> {
    pub(crate) request_id: &'a str,
    pub(crate) trace_id: &'a str,
    pub(crate) method: &'static str,
    pub(crate) path: &'a str,
    pub(crate) route: &'a str,
    pub(crate) status: u16,
    pub(crate) bytes: u64,
    pub(crate) complete: bool,
    pub(crate) took_ms: f64,
    #[serde(serialize_with = "debugged")]
    pub(crate) version: Version,
    #[serde(serialize_with = "displayed")]
    pub(crate) peer: Peer,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client: Option<IpAddr>,
}

/// What stands around it in every line.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(serialize_with = "to_the_microsecond")]
    timestamp: Timestamp,
    level: &'static str,
    message: &'static str,
    #[serde(flatten)]
    access: &'a Access<'a>,
    target: &'static str,
}

fn displayed<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn debugged<S: Serializer>(value: &impl Debug, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:?}"))
}

fn to_the_microsecond<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.6}"))
}

impl AccessLog {
    pub(crate) fn write(&self, access: &Access<'_>) {
        let timestamp = Timestamp::now();
        let line = Line { timestamp, level: "INFO", message: "request", access, target: "access" };
        self.0.append(|waiting| {
            let begin = waiting.len();
            match serde_json::to_writer(&mut *waiting, &line) {
                Ok(()) => waiting.push(b'\n'),
                Err(_) => waiting.truncate(begin),
            }
        });
    }
}
