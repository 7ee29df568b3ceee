//! The jobs of web push, as they are stored. Each job runs in the file of `delivery/` that has its name.

use perennial_host::sites::SiteId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Cuts a big audience into batches.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FanOut {
    pub(crate) notification: Uuid,
    /// Priority of its batches.
    pub(crate) priority: i16,
}

/// Sends to the members of one batch. The batch has the id of its job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Deliver {
    pub(crate) notification: Uuid,
}

/// Ends the batches of a notification that still wait.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Close {
    pub(crate) notification: Uuid,
    /// Time since which no new send begins, in milliseconds since 1970.
    pub(crate) since: i64,
}

/// Reports one event to one webhook.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Webhook {
    /// Id of the site. Jobs that were stored before there were several sites do not name it.
    #[serde(default = "SiteId::default_number")]
    pub(crate) site: i64,
    pub(crate) webhook: String,
    pub(crate) event: WebhookEvent,
}

/// An event that is reported to a webhook.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WebhookEvent {
    /// A notification has ended; the report has its outcomes.
    Ended { notification: Uuid },
    /// Subscriptions had ended and were deleted.
    Pruned { notification: Uuid, subscriptions: Vec<Pruned> },
}

/// A subscription that was deleted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pruned {
    pub(crate) id: i64,
}
