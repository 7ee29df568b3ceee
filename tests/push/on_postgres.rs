//! The same promises on the other store: `Setup::start` gives each test of this module a Postgres database of its own.

#[path = "audience.rs"]
mod audience;
#[path = "counts.rs"]
mod counts;
#[path = "delivery.rs"]
mod delivery;
#[path = "keys.rs"]
mod keys;
#[path = "notify.rs"]
mod notify;
#[path = "subscriptions.rs"]
mod subscriptions;
