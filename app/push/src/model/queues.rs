//! The queues of web push.

/// Queue of the jobs that cut audiences into batches.
pub(crate) const FAN_OUT_QUEUE: &str = "push-fan-out";
/// Queue of the batches of large notifications.
pub(crate) const BULK_QUEUE: &str = "push";
/// Queue of small notifications, which never wait behind a large one.
pub(crate) const SMALL_QUEUE: &str = "push-small";
/// Queue of retries, which take no slot of a first attempt.
pub(crate) const RETRY_QUEUE: &str = "push-retry";
/// Queue of batches for push services that bear little: they wait without taking a slot of a batch that could go at
/// once.
pub(crate) const SLOW_QUEUE: &str = "push-slow";
/// Queue of notifications with a rate, whose jobs mostly wait.
pub(crate) const PACED_QUEUE: &str = "push-paced";
/// Queue of the reports to webhooks.
pub(crate) const WEBHOOK_QUEUE: &str = "push-webhook";
