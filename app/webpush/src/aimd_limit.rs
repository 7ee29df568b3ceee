//! How many requests at once an origin bears: one more for each round of answers as long as these do not take much
//! longer than they could, half as many when it chokes.

use std::time::{Duration, Instant};

use crate::reputation::Reputation;

/// How many at once at the beginning, and after a pause.
const FIRST: f64 = 16.0;
/// An origin that chokes again within this time has its limit for good; later, it may have grown.
const FORGET: Duration = Duration::from_secs(60);

/// On so many messages to unproven subscriptions in a row an origin chokes before it is asked for less.
const STRANGERS: u32 = 32;
/// So much longer than the quickest, an answer has waited for others.
const PILE: Duration = Duration::from_millis(50);
/// What the quickest answer took is forgotten by one part in so many with each other answer.
const FADE: u32 = 10_000;

/// Additive increase, multiplicative decrease (Chiu and Jain, 1989), with the slow start of TCP (RFC 5681,
/// section 3.1). Time is an argument.
#[derive(Clone, Debug)]
pub(crate) struct AimdLimit {
    limit: f64,
    most: f64,
    /// Up to here it doubles with each round.
    threshold: f64,
    /// When it was cut last: what was sent before says nothing new.
    cut: Option<Instant>,
    /// How long the quickest answers take.
    quickest: Duration,
    /// On how many in a row the origin choked.
    in_a_row: u32,
}

impl AimdLimit {
    /// A window that may grow to `most`.
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

    /// How many at once: at least one.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to some thousands")]
    pub(crate) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// An answer came after `took` while `in_flight` were under way. The window grows if it was of any use, and if requests
    /// do not pile up at the origin: whoever comes next would wait for all of them.
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

    /// How long the quickest answers take: a second while there was none.
    pub(crate) fn quickest(&self) -> Duration {
        if self.quickest == Duration::MAX { Duration::from_secs(1) } else { self.quickest }
    }

    /// The origin choked on a request that was sent at `sent`. What unproven subscriptions bring about counts when there is
    /// nothing else, and leaves room for others.
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

    /// No more than `most` from now on.
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    pub(crate) fn bound(&mut self, most: usize) {
        self.most = (most as f64).max(1.0);
        self.limit = self.limit.min(self.most);
        self.threshold = if self.cut.is_none() { self.most } else { self.threshold.min(self.most) };
    }

    /// After a pause: it may bear as much as before, and is asked step by step.
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
