//! The commands of web push.

mod dumps;
mod keys;
mod notify;
mod sink;
mod subscriptions;
mod trial;

use perennial_host::command::Commands;

/// All commands.
pub(super) fn all() -> Commands {
    Commands::default()
        .with::<notify::NotifyArgs>()
        .with::<subscriptions::SubscriptionsArgs>()
        .with::<sink::SinkArgs>()
        .with_in::<keys::ImportKeyArgs>("keys")
        .with_in::<keys::RotateArgs>("keys")
        .with_companion::<trial::Dev>()
}
