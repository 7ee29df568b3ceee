//! What API keys may be used for in the routes of web push.

use perennial_host::access::{Required, Scope};

/// Write subscriptions.
pub(crate) const SUBSCRIBE: Scope = Scope::new("subscribe");
/// Send notifications.
pub(crate) const NOTIFY: Scope = Scope::new("notify");

/// See [`SUBSCRIBE`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct SubscribeScope;

impl Required for SubscribeScope {
    const SCOPE: Scope = SUBSCRIBE;
}

/// See [`NOTIFY`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotifyScope;

impl Required for NotifyScope {
    const SCOPE: Scope = NOTIFY;
}
