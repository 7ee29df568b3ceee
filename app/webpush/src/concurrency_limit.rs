//! Permits to send to an origin: as many at once as its AIMD limit allows, of which bulk messages never take all.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::aimd_limit::AimdLimit;
use crate::reputation::Reputation;

/// The permits of one origin. Bulk messages may have three quarters of them, so that other messages never wait for
/// all of these.
#[derive(Debug)]
pub(crate) struct ConcurrencyLimit {
    window: Mutex<AimdLimit>,
    all: Rights,
    bulk: Rights,
}

/// The permit to send one message. For a bulk message it contains a right of both kinds.
#[derive(Debug)]
pub(crate) struct ConcurrencyPermit<'a> {
    turns: &'a ConcurrencyLimit,
    sent: Instant,
    rights: Option<(Right<'a>, Option<Right<'a>>)>,
}

impl ConcurrencyLimit {
    pub(crate) fn new(most: usize) -> Self {
        let window = AimdLimit::new(most);
        let limit = window.limit();
        Self { window: Mutex::new(window), all: Rights::new(limit), bulk: Rights::new(share_of_bulk(limit)) }
    }

    /// Returns a permit for one message when one is free now.
    pub(crate) fn take_at_once(&self, bulk: bool) -> Option<ConcurrencyPermit<'_>> {
        let bulk = if bulk { Some(self.bulk.take_at_once()?) } else { None };
        let all = self.all.take_at_once()?;
        Some(ConcurrencyPermit { turns: self, sent: Instant::now(), rights: Some((all, bulk)) })
    }

    /// Waits for a permit for one message.
    pub(crate) async fn take(&self, bulk: bool) -> ConcurrencyPermit<'_> {
        let bulk = if bulk { Some(self.bulk.take().await) } else { None };
        let all = self.all.take().await;
        ConcurrencyPermit { turns: self, sent: Instant::now(), rights: Some((all, bulk)) }
    }

    /// Approximate time of an answer that does not wait behind other requests.
    pub(crate) fn usual(&self) -> Duration {
        self.window.lock().quickest()
    }

    /// The limit of requests under way at once, and their number now.
    pub(crate) fn status(&self) -> (usize, usize) {
        let limit = self.window.lock().limit();
        (limit, limit.saturating_sub(self.all.free()))
    }

    /// Sets the highest limit, which is known once the origin's HTTP version is.
    pub(crate) fn bound(&self, most: usize) {
        self.change(|window| window.bound(most));
    }

    /// Restarts at a low limit, which grows step by step.
    pub(crate) fn restart(&self) {
        self.change(AimdLimit::restart);
    }

    fn change(&self, change: impl FnOnce(&mut AimdLimit)) {
        let mut window = self.window.lock();
        let before = window.limit();
        change(&mut window);
        let limit = window.limit();
        if limit != before {
            self.all.set(limit);
            self.bulk.set(share_of_bulk(limit));
        }
    }
}

fn share_of_bulk(limit: usize) -> usize {
    (limit * 3 / 4).max(1)
}

impl ConcurrencyPermit<'_> {
    /// Records an answer to the message.
    pub(crate) fn answered(&self) {
        let in_flight = self.turns.status().1;
        let took = self.sent.elapsed();
        self.turns.change(|window| window.answered(in_flight, took));
    }

    /// Records that the origin choked on the message. A single subscription can cause that when it is unproven.
    pub(crate) fn choked(&self, who: Reputation) {
        self.turns.change(|window| window.choked(self.sent, Instant::now(), who));
    }

    /// Gives the permit back while its message is still under way.
    pub(crate) fn give_back(&mut self) {
        self.rights = None;
    }
}

/// A number of rights that changes while they are in use.
#[derive(Debug)]
struct Rights {
    free: Semaphore,
    /// The wanted number of rights, and how many more than that exist because they are in use.
    count: Mutex<(usize, usize)>,
}

#[derive(Debug)]
struct Right<'a> {
    rights: &'a Rights,
    permit: Option<SemaphorePermit<'a>>,
}

impl Rights {
    fn new(count: usize) -> Self {
        Self { free: Semaphore::new(count), count: Mutex::new((count, 0)) }
    }

    async fn take(&self) -> Right<'_> {
        // The semaphore is never closed, so there is always a permit to wait for.
        Right { rights: self, permit: self.free.acquire().await.ok() }
    }

    fn take_at_once(&self) -> Option<Right<'_>> {
        Some(Right { rights: self, permit: Some(self.free.try_acquire().ok()?) })
    }

    fn free(&self) -> usize {
        self.free.available_permits()
    }

    fn set(&self, wanted: usize) {
        let mut count = self.count.lock();
        let (before, excess) = *count;
        let there = before + excess;
        if wanted >= there {
            self.free.add_permits(wanted - there);
            *count = (wanted, 0);
        } else {
            let forgotten = if wanted >= before { 0 } else { self.free.forget_permits(before - wanted) };
            // Rights in use are removed when they are given back.
            *count = (wanted, there - forgotten - wanted);
        }
    }
}

impl Drop for Right<'_> {
    fn drop(&mut self) {
        let mut count = self.rights.count.lock();
        if count.1 > 0 {
            count.1 -= 1;
            if let Some(permit) = self.permit.take() {
                permit.forget();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn rights_that_are_in_use_are_given_up_when_they_come_back() {
        let rights = Rights::new(4);
        let mut used = Vec::new();
        for _ in 0..3 {
            used.push(rights.take().await);
        }
        rights.set(2);
        assert_eq!(rights.free(), 0);
        used.pop();
        assert_eq!(rights.free(), 0, "two are still in use");
        used.pop();
        assert_eq!(rights.free(), 1);
        rights.set(3);
        rights.set(1);
        rights.set(5);
        assert_eq!(rights.free(), 4);
        used.clear();
        assert_eq!(rights.free(), 5);
    }

    #[tokio::test]
    async fn bulk_leaves_a_quarter_to_others() {
        let turns = ConcurrencyLimit::new(16);
        let mut bulk = Vec::new();
        for _ in 0..12 {
            bulk.push(turns.take(true).await);
        }
        let thirteenth = tokio::time::timeout(std::time::Duration::from_millis(20), turns.take(true)).await;
        assert!(thirteenth.is_err());
        let other = tokio::time::timeout(std::time::Duration::from_secs(5), turns.take(false)).await;
        assert!(other.is_ok());
    }

    #[tokio::test]
    async fn an_origin_that_chokes_gets_half_as_many() {
        let turns = ConcurrencyLimit::new(1000);
        let mut turn = Vec::new();
        for _ in 0..12 {
            turn.push(turns.take(true).await);
        }
        turn.iter().for_each(ConcurrencyPermit::answered);
        assert_eq!(turns.status().0, 25, "it grows while it is used");
        turn[0].choked(Reputation::Proven);
        turn[1].choked(Reputation::Proven);
        assert_eq!(turns.status().0, 12);
    }
}
