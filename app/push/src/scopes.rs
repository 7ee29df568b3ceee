//! The scopes of API keys for the routes of web push.

use perennial_host::access::{Required, Scope};

/// Allows to write subscriptions.
pub(crate) const SUBSCRIBE: Scope = Scope::new("subscribe");
/// Allows to send notifications.
pub(crate) const NOTIFY: Scope = Scope::new("notify");

/// The scope [`SUBSCRIBE`] as a type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SubscribeScope;

impl Required for SubscribeScope {
    const SCOPE: Scope = SUBSCRIBE;
}

/// The scope [`NOTIFY`] as a type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotifyScope;

impl Required for NotifyScope {
    const SCOPE: Scope = NOTIFY;
}
