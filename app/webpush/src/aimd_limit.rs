//! The number of requests at once that an origin can take. It grows by one with each round of answers as long as
//! the answers do not take much longer than the quickest one, and is halved when the origin chokes: it answers that
//! it is overloaded, or not at all.

use std::time::{Duration, Instant};

use crate::reputation::Reputation;

/// Limit at the beginning, and after a pause.
const FIRST: f64 = 16.0;
/// An origin that chokes again within this time keeps its threshold. Later, its capacity may have grown.
const FORGET: Duration = Duration::from_secs(60);

/// Number of choked requests in a row from which on one to an unproven subscription cuts the limit.
const STRANGERS: u32 = 32;
/// An answer that takes this much longer than the quickest one has waited behind other requests.
const PILE: Duration = Duration::from_millis(50);
/// With each answer, the time of the quickest one grows by one part in this number, and so is slowly forgotten.
const FADE: u32 = 10_000;

/// Additive increase, multiplicative decrease (Chiu and Jain, 1989), with the slow start of TCP (RFC 5681,
/// section 3.1). The caller passes the time.
#[derive(Clone, Debug)]
pub(crate) struct AimdLimit {
    limit: f64,
    most: f64,
    /// Up to this value the limit doubles with each round.
    threshold: f64,
    /// Time of the last cut. A failure of a request that was sent before it says nothing new.
    cut: Option<Instant>,
    /// Time that the quickest answers take.
    quickest: Duration,
    /// Number of choked requests in a row.
    in_a_row: u32,
}

impl AimdLimit {
    /// Makes a limit that may grow to `most`.
    pub(crate) fn new(most: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "some thousands")]
        let most = (most as f64).max(1.0);
        Self {
            limit: FIRST.min(most),
            most,
            threshold: most,
            cut: None,
            quickest: Duration::MAX,
            in_a_row: 0,
        }
    }

    /// The number of requests at once: at least one.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to some thousands")]
    pub(crate) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// Records an answer that came after `took` while `in_flight` requests were under way. The limit grows when at
    /// least half of it is used and requests do not pile up at the origin, where the next request would wait for
    /// all of them.
    pub(crate) fn answered(&mut self, in_flight: usize, took: Duration) {
        self.in_a_row = 0;
        self.quickest = self.quickest.saturating_add(self.quickest / FADE).min(took);
        let piles_up = took > (self.quickest * 3).max(self.quickest + PILE);
        if in_flight * 2 < self.limit() || piles_up {
            return;
        }
        let step = if self.limit < self.threshold { 1.0 } else { 1.0 / self.limit };
        self.limit = (self.limit + step).min(self.most);
    }

    /// Time that the quickest answers take: one second before the first answer.
    pub(crate) fn quickest(&self) -> Duration {
        if self.quickest == Duration::MAX { Duration::from_secs(1) } else { self.quickest }
    }

    /// Records that the origin choked on a request that was sent at `sent`. Failures of unproven subscriptions
    /// count only when there is nothing else, and leave room for other messages.
    pub(crate) fn choked(&mut self, sent: Instant, now: Instant, who: Reputation) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        let is_known = who == Reputation::Proven;
        if !is_known && (self.in_a_row < STRANGERS || self.limit <= FIRST / 2.0) {
            return;
        }
        if self.cut.is_some_and(|cut| sent <= cut) {
            return;
        }
        if self.cut.is_some_and(|cut| now.duration_since(cut) > FORGET) {
            self.threshold = self.most;
        }
        self.limit = (self.limit / 2.0).max(1.0);
        self.threshold = self.threshold.min(self.limit).max(FIRST.min(self.most) / 2.0);
        self.cut = Some(now);
    }

    /// Sets the highest limit to `most`.
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    pub(crate) fn bound(&mut self, most: usize) {
        self.most = (most as f64).max(1.0);
        self.limit = self.limit.min(self.most);
        self.threshold = if self.cut.is_none() { self.most } else { self.threshold.min(self.most) };
    }

    /// Restarts after a pause: the origin may take as much as before, but the limit grows to that step by step.
    pub(crate) fn restart(&mut self) {
        self.limit = self.limit.min(FIRST.min(self.most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const QUICK: Duration = Duration::from_millis(20);

    fn grown(to: usize) -> AimdLimit {
        let mut window = AimdLimit::new(1000);
        while window.limit() < to {
            window.answered(window.limit(), QUICK);
        }
        window
    }

    #[test]
    fn it_doubles_each_round_until_it_chokes_and_then_adds_one_a_round() {
        let now = Instant::now();
        let mut window = AimdLimit::new(1000);
        for expected in [16, 32, 64, 128] {
            assert_eq!(window.limit(), expected);
            (0..expected).for_each(|_| window.answered(expected, QUICK));
        }
        window.choked(now, now, Reputation::Proven);
        assert_eq!(window.limit(), 128);
        (0..140).for_each(|_| window.answered(128, QUICK));
        assert!((128..=130).contains(&window.limit()), "{}", window.limit());
    }

    #[test]
    fn what_was_sent_before_a_cut_cuts_no_more() {
        let start = Instant::now();
        let mut window = grown(400);
        for sent in 0..100 {
            window.choked(start, start + Duration::from_millis(sent), Reputation::Proven);
        }
        assert_eq!(window.limit(), 200);
        window.choked(start + SECOND, start + SECOND * 2, Reputation::Proven);
        assert_eq!(window.limit(), 100);
    }

    #[test]
    fn what_strangers_bring_about_cuts_only_where_there_is_nothing_else() {
        let start = Instant::now();
        let later = |ms: u64| start + Duration::from_millis(ms);
        let mut window = grown(400);
        for ms in 0..10_000 {
            window.choked(later(ms), later(ms), Reputation::Unproven);
            if ms % 20 == 0 {
                window.answered(1, QUICK);
            }
        }
        assert_eq!(window.limit(), 400, "one in twenty is delivered");
        for ms in 10_000..20_000 {
            window.choked(later(ms), later(ms), Reputation::Unproven);
        }
        assert!((4..=8).contains(&window.limit()), "{}", window.limit());
    }

    #[test]
    fn it_is_never_less_than_one_nor_more_than_allowed() {
        let start = Instant::now();
        let mut window = grown(100);
        for second in 1..100 {
            window.choked(start + SECOND * second, start + SECOND * second, Reputation::Proven);
        }
        assert_eq!(window.limit(), 1);
        (0..600_000).for_each(|_| window.answered(window.limit(), QUICK));
        assert_eq!(window.limit(), 1000);
    }

    #[test]
    fn a_window_that_is_not_used_does_not_grow() {
        let mut window = AimdLimit::new(1000);
        (0..1000).for_each(|_| window.answered(2, QUICK));
        assert_eq!(window.limit(), 16);
    }

    #[test]
    fn requests_that_pile_up_are_not_joined_by_more() {
        let mut window = grown(64);
        (0..1000).for_each(|_| window.answered(64, QUICK * 4));
        assert_eq!(window.limit(), 64);
        (0..64).for_each(|_| window.answered(64, QUICK * 2));
        assert_eq!(window.limit(), 128);
    }

    #[test]
    fn after_a_pause_it_is_asked_step_by_step() {
        let mut window = grown(500);
        window.restart();
        assert_eq!(window.limit(), 16);
        (0..16).for_each(|_| window.answered(16, QUICK));
        assert_eq!(window.limit(), 32);
    }
}
