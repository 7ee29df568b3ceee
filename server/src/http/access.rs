//! The line of the access log as JSON.
//!
//! Each request has one line. Its fields are the same for every request, except that `client` may be missing, and its
//! form is that of the other log lines.

use std::fmt::{Debug, Display};
use std::net::IpAddr;

use http::Version;
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::net::Peer;
use perennial_runtime::telemetry::JsonLines;

/// One request that has ended.
#[derive(Debug, Serialize)]
pub(super) struct AccessLog<'a> {
    pub(super) request_id: &'a str,
    pub(super) trace_id: &'a str,
    pub(super) method: &'static str,
    pub(super) path: &'a str,
    pub(super) route: &'a str,
    pub(super) status: u16,
    pub(super) bytes: u64,
    pub(super) complete: bool,
    pub(super) took_ms: f64,
    #[serde(serialize_with = "debugged")]
    pub(super) version: Version,
    #[serde(serialize_with = "displayed")]
    pub(super) peer: Peer,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client: Option<IpAddr>,
}

/// A whole line: the fields of every log line around those of the request.
#[derive(Serialize)]
struct AccessLine<'a> {
    #[serde(serialize_with = "to_the_microsecond")]
    timestamp: Timestamp,
    level: &'static str,
    message: &'static str,
    #[serde(flatten)]
    access: &'a AccessLog<'a>,
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

/// Writes the line of one request.
pub(super) fn write(log: &JsonLines, access: &AccessLog<'_>) {
    let timestamp = Timestamp::now();
    log.write(&AccessLine { timestamp, level: "INFO", message: "request", access, target: "access" });
}
