//! Cache invalidation between processes, through Redis.

use std::time::Duration;

use futures_util::StreamExt;
use redis::client::aio::PubSubStream;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::pool::redis::{self, Redis, client};

/// Interval at which a listener sends a message to itself, which shows whether the packets of its connection are lost.
const BEAT: Duration = Duration::from_secs(5);
/// Maximum time without any message.
const SILENCE: Duration = Duration::from_secs(16);

/// A channel of Redis on which processes publish cache invalidations.
#[derive(Clone, Debug)]
pub struct Bus {
    redis: Redis,
    channel: String,
}

/// Error of the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request to Redis failed.
    #[error(transparent)]
    Redis(#[from] redis::Error),
    /// The connection has ended, or no message has arrived in time.
    #[error("no message from Redis arrives")]
    Silent,
}

impl Bus {
    /// Creates the bus of all processes whose keys begin with `prefix`.
    pub fn new(redis: Redis, prefix: &str) -> Self {
        Self { redis, channel: format!("{prefix}:cache") }
    }

    /// Publishes an invalidation of `key`, or of all keys if it is `None`, in the cache `name`. When that fails, the
    /// entries of other processes stay until they expire.
    pub(super) async fn tell(&self, name: &str, key: Option<&str>) {
        let message = [Some(name), key].into_iter().flatten().collect::<Vec<_>>().join("\n");
        if let Err(error) = self.publish(&message).await {
            warn!(cache = name, %error, "a change cannot be published: other processes see it when entries expire");
        }
    }

    async fn publish(&self, message: &str) -> redis::Result<()> {
        self.redis.query(client::cmd("PUBLISH").arg(&self.channel).arg(message)).await
    }

    /// Subscribes to the channel.
    pub(super) async fn ear(&self) -> Result<Ear<'_>, Error> {
        let messages = self.redis.subscribe(&self.channel).await?.into_on_message();
        debug!(channel = self.channel, "listening for changes by other processes");
        let now = Instant::now();
        Ok(Ear { bus: self, messages, heard_at: now, beat_at: now })
    }
}

/// A connection that listens on the channel of a bus.
pub(super) struct Ear<'a> {
    bus: &'a Bus,
    messages: PubSubStream,
    heard_at: Instant,
    beat_at: Instant,
}

impl Ear<'_> {
    /// Waits for the next invalidation. Returns the name of the cache, and the key unless all keys are invalid.
    pub(super) async fn next(&mut self) -> Result<(String, Option<String>), Error> {
        loop {
            tokio::select! {
                message = self.messages.next() => {
                    let message = message.ok_or(Error::Silent)?;
                    self.heard_at = Instant::now();
                    match message.get_payload::<String>() {
                        Ok(text) if !text.is_empty() => return Ok(match text.split_once('\n') {
                            Some((name, key)) => (name.to_owned(), Some(key.to_owned())),
                            None => (text, None),
                        }),
                        // The message is a beat, or not from this program.
                        _ => {}
                    }
                }
                () = tokio::time::sleep_until(self.beat_at) => {
                    if self.heard_at.elapsed() > SILENCE {
                        return Err(Error::Silent);
                    }
                    self.bus.publish("").await?;
                    self.beat_at = Instant::now() + BEAT;
                }
            }
        }
    }
}
