//! Requests that follow notifications by server-sent events. One task reads the state of all followed notifications
//! from the store, many with one statement, so the number of followers of a notification costs the store nothing. The
//! number of followers of one API key is limited, so that one key cannot take all connections.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::Event;
use futures_util::stream::{self, Stream};
use http::StatusCode;
use parking_lot::{Mutex, MutexGuard};
use perennial_runtime::drain::Drain;
use perennial_server::http::problem::Problem;
use tokio::sync::{Notify, watch};
use tracing::warn;
use uuid::Uuid;

use super::ApiState;
use crate::model::notification::NotificationView;

/// Interval between two reads of the followed notifications. A follower gets an event only when something has changed.
const TELL: Duration = Duration::from_millis(500);
/// Number of notifications that are read with one statement.
const PAGE: usize = 200;
/// `Retry-After` of a request that is refused because its API key has too many followers.
const LATER: Duration = Duration::from_secs(10);

/// State of a notification at the last read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FollowerEvent {
    text: Arc<str>,
    /// Whether the notification has ended, so that nothing will change any more.
    is_over: bool,
}

impl FollowerEvent {
    fn new(view: &NotificationView) -> Self {
        Self { text: serde_json::to_string(view).unwrap_or_default().into(), is_over: view.is_over() }
    }

    fn event(&self) -> Event {
        Event::default().event(if self.is_over { "end" } else { "progress" }).data(&self.text)
    }
}

/// All followers in this process. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct Followers(Arc<FollowerTable>);

#[derive(Debug)]
struct FollowerTable {
    /// Largest number of followers of one API key.
    per_key: usize,
    known: Mutex<Followed>,
    /// Wakes the task when a follower has joined.
    came: Notify,
}

#[derive(Debug, Default)]
struct Followed {
    /// The last state of each followed notification. Its entry is removed with its last follower.
    notifications: HashMap<Uuid, watch::Sender<FollowerEvent>>,
    by_key: HashMap<String, usize>,
}

impl Followers {
    /// Creates an empty table that allows `per_key` followers for one API key.
    pub(crate) fn new(per_key: usize) -> Self {
        Self(Arc::new(FollowerTable { per_key, known: Mutex::default(), came: Notify::new() }))
    }

    fn known(&self) -> MutexGuard<'_, Followed> {
        self.0.known.lock()
    }

    /// Number of followers.
    pub(crate) fn len(&self) -> usize {
        self.known().by_key.values().sum()
    }

    /// Adds a follower of a notification for an API key; `view` is the current state of the notification.
    ///
    /// # Errors
    /// 429 when this API key has `per_key` followers already.
    pub(crate) fn follow(&self, key: &str, id: Uuid, view: &NotificationView) -> Result<Follower, Problem> {
        self.join(key, id, FollowerEvent::new(view))
    }

    fn join(&self, key: &str, id: Uuid, told: FollowerEvent) -> Result<Follower, Problem> {
        let mut known = self.known();
        let of_key = known.by_key.entry(key.to_owned()).or_default();
        if *of_key >= self.0.per_key {
            let detail = format!(
                "{} requests follow notifications with this API key, the limit (push.followers_per_key)",
                self.0.per_key
            );
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(LATER));
        }
        *of_key += 1;
        let sender = known.notifications.entry(id).or_insert_with(|| watch::Sender::new(told.clone()));
        let mut news = sender.subscribe();
        // The task may have read a newer state since this view was read.
        news.mark_changed();
        drop(known);
        self.0.came.notify_one();
        let seat = FollowerSeat { followers: self.clone(), key: key.to_owned(), id };
        Ok(Follower { news: Some(news), first: Some(told), last: None, _seat: seat })
    }

    /// Reads the state of the followed notifications until the soft phase of the drain.
    pub(crate) async fn run(self, api: ApiState, drain: Drain) -> anyhow::Result<()> {
        let look = async {
            loop {
                let came = self.0.came.notified();
                let ids: Vec<Uuid> = self.known().notifications.keys().copied().collect();
                if ids.is_empty() {
                    came.await;
                }
                for page in ids.chunks(PAGE) {
                    // A store outage passes, so the task goes on.
                    if let Err(error) = self.look(&api, page).await {
                        warn!(%error, "followed notifications cannot be read; followers wait for the next read");
                        break;
                    }
                }
                tokio::time::sleep(TELL).await;
            }
        };
        tokio::select! {
            never = look => never,
            () = drain.soft() => Ok(()),
        }
    }

    async fn look(&self, api: &ApiState, ids: &[Uuid]) -> perennial_store::pool::sql::Result<()> {
        let found = api.store.notifications_of(ids).await?;
        let mut found: HashMap<Uuid, FollowerEvent> = found
            .into_iter()
            .map(|found| (found.id, FollowerEvent::new(&api.progress.view(found))))
            .collect();
        let mut known = self.known();
        for id in ids {
            let Some(told) = found.remove(id) else {
                // The notification was deleted. Removing the sender closes the channels of its followers.
                known.notifications.remove(id);
                continue;
            };
            if let Some(sender) = known.notifications.get(id) {
                sender.send_if_modified(|last| {
                    let is_new = *last != told;
                    *last = told;
                    is_new
                });
            }
        }
        Ok(())
    }
}

/// One follower's share of the limit of its API key. It is released on drop.
#[derive(Debug)]
struct FollowerSeat {
    followers: Followers,
    key: String,
    id: Uuid,
}

impl Drop for FollowerSeat {
    fn drop(&mut self) {
        let mut known = self.followers.known();
        if let Some(of_key) = known.by_key.get_mut(&self.key) {
            *of_key -= 1;
            if *of_key == 0 {
                known.by_key.remove(&self.key);
            }
        }
        if known.notifications.get(&self.id).is_some_and(|sender| sender.receiver_count() == 0) {
            known.notifications.remove(&self.id);
        }
    }
}

/// A request that follows a notification.
#[derive(Debug)]
pub(crate) struct Follower {
    /// `None` after the last event. It is dropped before `_seat`, which checks on drop whether other receivers are
    /// left.
    news: Option<watch::Receiver<FollowerEvent>>,
    /// The event that is sent at once.
    first: Option<FollowerEvent>,
    last: Option<FollowerEvent>,
    _seat: FollowerSeat,
}

impl Follower {
    /// Returns the events until the notification ends or the drain reaches its soft phase.
    pub(crate) fn events(
        self,
        drain: Drain,
    ) -> impl Stream<Item = std::result::Result<Event, Infallible>> + Send {
        stream::unfold((self, drain), async |(mut follower, drain)| {
            let told = tokio::select! {
                told = follower.next() => told?,
                // The client reconnects to another replica or to the next process.
                () = drain.soft() => return None,
            };
            Some((Ok(told.event()), (follower, drain)))
        })
    }

    async fn next(&mut self) -> Option<FollowerEvent> {
        let told = loop {
            let told = match self.first.take() {
                Some(first) => first,
                None => {
                    let news = self.news.as_mut()?;
                    news.changed().await.ok()?;
                    news.borrow_and_update().clone()
                }
            };
            if self.last.as_ref() != Some(&told) {
                break told;
            }
        };
        if told.is_over {
            self.news = None;
        }
        self.last = Some(told.clone());
        Some(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_has_so_many_followers_and_one_who_leaves_makes_room() {
        let (followers, id) = (Followers::new(2), Uuid::now_v7());
        let follow = |key| followers.join(key, id, FollowerEvent { text: "{}".into(), is_over: false });
        let one = follow("mine").unwrap();
        let two = follow("mine").unwrap();
        assert_eq!(follow("mine").unwrap_err().status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(follow("another").is_ok());
        drop(one);
        assert_eq!(followers.known().notifications.len(), 1, "somebody follows it");
        drop(follow("mine").unwrap());
        drop(two);
        assert_eq!((followers.len(), followers.known().notifications.len()), (0, 0), "nothing is left");
    }
}
