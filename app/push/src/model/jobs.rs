//! The jobs of web push, as they are stored. What each does is in the file of `delivery/` that is named like it.

use perennial_host::sites::SiteId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Cuts a big audience into batches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FanOut {
    pub(crate) notification: Uuid,
    /// Of its batches.
    pub(crate) priority: i16,
}

/// Sends to one batch. The batch has the id of its job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Deliver {
    pub(crate) notification: Uuid,
}

/// Ends what still waits of a notification.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Close {
    pub(crate) notification: Uuid,
    /// Since when nothing more is begun, in milliseconds since 1970.
    pub(crate) since: i64,
}

/// Tells one backend about one event.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Webhook {
    /// Jobs from before there were several sites do not name theirs.
    #[serde(default = "SiteId::default_number")]
    pub(crate) site: i64,
    pub(crate) webhook: String,
    pub(crate) event: WebhookEvent,
}

/// What has happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WebhookEvent {
    /// A notification has ended: what is told is how it went.
    Ended { notification: Uuid },
    /// Subscriptions had ended, and were deleted.
    Pruned { notification: Uuid, subscriptions: Vec<Pruned> },
}

/// A subscription that was deleted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pruned {
    pub(crate) id: i64,
}
