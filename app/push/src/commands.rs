//! What web push brings to the command line.

mod dumps;
mod keys;
mod notify;
mod sink;
mod subscriptions;
mod trial;

use perennial_host::command::Commands;

/// All of it.
pub(super) fn all() -> Commands {
    Commands::default()
        .with::<notify::Notify>()
        .with::<subscriptions::Subscriptions>()
        .with::<sink::Sink>()
        .with_in::<keys::Import>("keys")
        .with_in::<keys::Rotate>("keys")
        .with_companion::<trial::Dev>()
}
