//! What API keys may be used for in the routes of web push.

use perennial_host::access::{Required, Scope};

/// Write subscriptions.
pub(crate) const SUBSCRIBE: Scope = Scope::new("subscribe");
/// Send notifications.
pub(crate) const NOTIFY: Scope = Scope::new("notify");

/// See [`SUBSCRIBE`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subscribe;

impl Required for Subscribe {
    const SCOPE: Scope = SUBSCRIBE;
}

/// See [`NOTIFY`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notify;

impl Required for Notify {
    const SCOPE: Scope = NOTIFY;
}
