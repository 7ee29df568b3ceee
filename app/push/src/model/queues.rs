//! The queues of web push.

/// Cuts audiences into batches.
pub(crate) const FAN_OUT_QUEUE: &str = "push-fan-out";
/// Sends the batches of big notifications.
pub(crate) const BULK_QUEUE: &str = "push";
/// Sends small notifications: never behind a big one.
pub(crate) const SMALL_QUEUE: &str = "push-small";
/// Sends what is tried again, and takes no place of what is tried first.
pub(crate) const RETRY_QUEUE: &str = "push-retry";
/// Sends what waits for push services that bear little, and takes no place of what could go at once.
pub(crate) const SLOW_QUEUE: &str = "push-slow";
/// Sends what has a rate: such a job mostly waits.
pub(crate) const PACED_QUEUE: &str = "push-paced";
/// Tells the backend.
pub(crate) const WEBHOOK_QUEUE: &str = "push-webhook";
