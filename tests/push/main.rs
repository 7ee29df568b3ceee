//! Web push with real browsers, push services and stores. There is a file for each promise.

#![allow(clippy::unwrap_used, reason = "the panic of a test is its verdict")]
#![allow(clippy::duplicate_mod, reason = "some promises are kept on two stores, by the same tests")]

mod audience;
mod clients;
mod counts;
mod crash;
mod delivery;
mod keys;
mod lanes;
mod notify;
mod on_postgres;
mod pacing;
mod page;
mod sites;
mod storm;
mod strangers;
mod subscriptions;
mod trial;
