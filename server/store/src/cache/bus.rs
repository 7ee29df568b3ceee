//! Telling other processes through Redis what they must forget.

use std::time::Duration;

use futures_util::StreamExt;
use redis::client::aio::PubSubStream;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::pool::redis::{self, Redis, client};

/// How often a listener tells itself that it is there. A connection whose packets are swallowed says nothing.
const BEAT: Duration = Duration::from_secs(5);
/// How long nothing may be heard.
const SILENCE: Duration = Duration::from_secs(16);

/// A channel of Redis on which processes tell each other what has changed.
#[derive(Clone, Debug)]
pub struct Bus {
    redis: Redis,
    channel: String,
}

/// Why nothing is heard any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Redis did not do what it should.
    #[error(transparent)]
    Redis(#[from] redis::Error),
    /// The connection has ended, or is as good as ended.
    #[error("nothing is heard from Redis")]
    Silent,
}

impl Bus {
    /// The bus of all processes whose keys begin with `prefix`.
    pub fn new(redis: Redis, prefix: &str) -> Self {
        Self { redis, channel: format!("{prefix}:cache") }
    }

    /// Publishes that something has changed. When that fails, others find out by themselves when their entries end.
    pub(super) async fn tell(&self, name: &str, key: Option<&str>) {
        let message = [Some(name), key].into_iter().flatten().collect::<Vec<_>>().join("\n");
        if let Err(error) = self.publish(&message).await {
            warn!(cache = name, %error, "other processes are not told what has changed, and notice when their entries end");
        }
    }

    async fn publish(&self, message: &str) -> redis::Result<()> {
        self.redis.query(client::cmd("PUBLISH").arg(&self.channel).arg(message)).await
    }

    /// Begins to listen.
    pub(super) async fn ear(&self) -> Result<Ear<'_>, Error> {
        let messages = self.redis.subscribe(&self.channel).await?.into_on_message();
        debug!(channel = self.channel, "listening to what other processes change");
        let now = Instant::now();
        Ok(Ear { bus: self, messages, heard_at: now, beat_at: now })
    }
}

/// A connection that listens.
pub(super) struct Ear<'a> {
    bus: &'a Bus,
    messages: PubSubStream,
    heard_at: Instant,
    beat_at: Instant,
}

impl Ear<'_> {
    /// The name of a cache in which something has changed, and the key of it if it is one thing.
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
                        // A beat, or nothing of ours.
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
