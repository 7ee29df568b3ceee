//! Those who follow notifications by server-sent events. One task asks the store how all notifications stand that somebody
//! follows, with one statement for many of them; how many follow one costs the store nothing. An API key may have so many
//! connections that follow, so that one cannot take all there are.

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

/// How often those who follow a notification are told, while something changes.
const TELL: Duration = Duration::from_millis(500);
/// How many notifications are read with one statement.
const PAGE: usize = 200;
/// When somebody who may not follow now may ask again.
const LATER: Duration = Duration::from_secs(10);

/// A notification as it stood at the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FollowerEvent {
    text: Arc<str>,
    /// Nothing will change any more.
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

/// All of them. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Followers(Arc<FollowerTable>);

#[derive(Debug)]
struct FollowerTable {
    /// How many one API key may have.
    per_key: usize,
    known: Mutex<Followed>,
    /// The first has come.
    came: Notify,
}

#[derive(Debug, Default)]
struct Followed {
    /// What is told of each notification that somebody follows; the last who leaves takes it along.
    notifications: HashMap<Uuid, watch::Sender<FollowerEvent>>,
    by_key: HashMap<String, usize>,
}

impl Followers {
    /// Nobody, and so many may follow with one API key.
    pub(crate) fn new(per_key: usize) -> Self {
        Self(Arc::new(FollowerTable { per_key, known: Mutex::default(), came: Notify::new() }))
    }

    fn known(&self) -> MutexGuard<'_, Followed> {
        self.0.known.lock()
    }

    /// How many follow.
    pub(crate) fn len(&self) -> usize {
        self.known().by_key.values().sum()
    }

    /// Follows a notification, which stands like this now, with an API key.
    ///
    /// # Errors
    /// 429 when as many as may follow with this key.
    pub(crate) fn follow(&self, key: &str, id: Uuid, view: &NotificationView) -> Result<Follower, Problem> {
        self.join(key, id, FollowerEvent::new(view))
    }

    fn join(&self, key: &str, id: Uuid, told: FollowerEvent) -> Result<Follower, Problem> {
        let mut known = self.known();
        let of_key = known.by_key.entry(key.to_owned()).or_default();
        if *of_key >= self.0.per_key {
            let detail = format!(
                "{} requests follow notifications with this API key, and no more may (push.followers_per_key)",
                self.0.per_key
            );
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, detail).retry_after(LATER));
        }
        *of_key += 1;
        let sender = known.notifications.entry(id).or_insert_with(|| watch::Sender::new(told.clone()));
        let mut news = sender.subscribe();
        // It may have been looked at since this view was read.
        news.mark_changed();
        drop(known);
        self.0.came.notify_one();
        let seat = FollowerSeat { followers: self.clone(), key: key.to_owned(), id };
        Ok(Follower { news: Some(news), first: Some(told), last: None, _seat: seat })
    }

    /// Looks how notifications stand, until nothing new is taken.
    pub(crate) async fn run(self, api: ApiState, drain: Drain) -> anyhow::Result<()> {
        let look = async {
            loop {
                let came = self.0.came.notified();
                let ids: Vec<Uuid> = self.known().notifications.keys().copied().collect();
                if ids.is_empty() {
                    came.await;
                }
                for page in ids.chunks(PAGE) {
                    // A store that is away comes back.
                    if let Err(error) = self.look(&api, page).await {
                        warn!(%error, "how notifications stand cannot be told to those who follow them");
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
                // It was deleted. Whoever follows finds its channel closed.
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

/// The right to follow. It is given back when this drops.
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

/// Somebody who follows a notification.
#[derive(Debug)]
pub(crate) struct Follower {
    /// None when nothing more will be told. It goes before the seat, which looks whether others are left.
    news: Option<watch::Receiver<FollowerEvent>>,
    /// What is told at once.
    first: Option<FollowerEvent>,
    last: Option<FollowerEvent>,
    _seat: FollowerSeat,
}

impl Follower {
    /// What is told, until it is over or nothing new is taken.
    pub(crate) fn events(
        self,
        drain: Drain,
    ) -> impl Stream<Item = std::result::Result<Event, Infallible>> + Send {
        stream::unfold((self, drain), async |(mut follower, drain)| {
            let told = tokio::select! {
                told = follower.next() => told?,
                // Whoever comes again finds another replica, or the next process.
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
