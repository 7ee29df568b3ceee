//! Perennial as its users meet it: a process on a port, among real peers. A file per promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]
#![allow(clippy::duplicate_mod, reason = "some promises are kept on two stores, by the same tests")]

mod adopt;
mod api;
mod audience;
mod boot;
mod chaos;
mod cli;
mod counts;
mod crash;
mod cron;
mod deadlines;
mod delivery;
mod drain;
mod drills;
mod host;
mod http2;
mod jobs;
mod keys;
mod kubernetes;
mod lanes;
mod module;
mod moving;
mod notify;
mod on_postgres;
mod openapi;
mod operators;
mod pacing;
mod page;
mod pools;
mod readme;
mod refused;
mod rollout;
mod schedules;
mod scope;
mod settings;
mod sites;
mod sockets;
mod stores;
mod storm;
mod strangers;
mod subscriptions;
mod succession;
mod supervised;
mod tcp;
mod trial;
