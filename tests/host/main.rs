//! The host as its users see it: connections, requests, boot and stop. There is a file for each promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]

mod api;
mod boot;
mod deadlines;
mod drain;
mod host;
mod http2;
mod http_client;
mod kit;
mod limits;
mod listeners;
mod locks;
mod module;
mod pools;
mod refused;
mod scope;
mod sessions;
mod sockets;
mod sql;
mod succession;
mod supervised;
mod tcp;
