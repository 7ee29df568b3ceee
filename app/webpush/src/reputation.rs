//! The reputation of subscriptions: which messages are held because of which failures.
//!
//! Any visitor can hand in a subscription that is refused, throttled or never answered. So the failures of proven
//! subscriptions, which were delivered to before, count for all messages, and those of unproven ones only for
//! unproven ones. Before unproven subscriptions are held, a trickle of messages finds out whether any of them is
//! delivered to:
//!
//! ```text
//!            failures of many unproven ones, none delivered between       too many probes fail
//!   free ────────────────────────────────────────────────────► doubted ─────────────────────────────► held
//!    ▲                                                            │                                     │
//!    └────────────────────── any message is delivered ────────────┴─────────────────────────────────────┘
//! ```

use std::time::{Duration, Instant};

use crate::circuit_breaker::{Cause, CircuitBreaker, HeldFor, Passage, Signal};

/// Reputation of a subscription before a message is sent to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reputation {
    /// A message was delivered to it before, or the caller vouches for it.
    #[default]
    Proven,
    /// Nothing was delivered to it yet: a visitor has handed it in.
    Unproven,
}

/// Maximum number of probes under way while unproven subscriptions are doubted; urgent messages have a higher one.
const PROBES: usize = 4;
const URGENT_PROBES: usize = 16;
/// Number of failed probes before unproven subscriptions are held: probes with an answer, and probes without one.
const DOUBTS: (usize, usize) = (16, 8);
/// The number for probes with an answer when a message was delivered recently. A push service that asks this many
/// subscriptions to wait, one by one, is not out of order.
const DOUBTS_WHERE_DELIVERED: usize = 4096;
/// A delivery is recent for this long.
const RECENTLY: Duration = Duration::from_secs(600);
/// Time that a message waits for a probe under way to end: a probe with an answer, or one without.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Time after the end of a hold for all subscriptions in which only a proven one may be the probe.
const FOR_A_PROVEN_ONE: Duration = Duration::from_secs(30);
/// Shortest time between two urgent messages that pass a hold of unproven subscriptions.
const INSIST: Duration = Duration::from_millis(100);
/// Such messages pass when the push service has delivered a message within this time, or refuses our key.
const LATELY: Duration = Duration::from_secs(3600);

/// The circuit breakers of a push service, or of one key at it: see the module. The caller passes the time.
#[derive(Debug)]
pub(crate) struct Gates {
    /// Fed by proven subscriptions; it holds all messages.
    all: CircuitBreaker,
    /// Fed by unproven subscriptions; it holds only messages to them.
    unproven: CircuitBreaker,
    doubt: Option<Doubt>,
    delivered: Option<Instant>,
    insisted: Option<Instant>,
}

/// State while only a trickle of messages to unproven subscriptions is sent.
#[derive(Debug)]
struct Doubt {
    cause: Cause,
    under_way: usize,
    failed: usize,
}

/// The kind of admission of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Ticket {
    /// A message like any other.
    #[default]
    Open,
    /// The probe that decides about all subscriptions.
    ProbeForAll,
    /// The probe that decides about unproven subscriptions.
    Probe,
    /// A message of the trickle to unproven subscriptions.
    Doubted,
}

impl Default for Gates {
    fn default() -> Self {
        let (all, unproven) = (CircuitBreaker::default(), CircuitBreaker::of_unproven());
        Self { all, unproven, doubt: None, delivered: None, insisted: None }
    }
}

impl Gates {
    /// Admits one message. The error is the time that it has to wait, and the cause.
    pub(crate) fn admit(
        &mut self,
        who: Reputation,
        urgent: bool,
        now: Instant,
    ) -> Result<Ticket, (Duration, Cause)> {
        if let Some(wait) = self.waits_for_a_proven_one(who, now) {
            return Err(wait);
        }
        if !self.all.is_closed() {
            match self.all.admit(now) {
                Passage::Free => {}
                Passage::Probe => return Ok(Ticket::ProbeForAll),
                Passage::Held(wait, cause) => return Err((wait, cause)),
            }
        }
        if who == Reputation::Proven {
            return Ok(Ticket::Open);
        }
        if let Some(doubt) = &mut self.doubt {
            let most = if urgent { URGENT_PROBES } else { PROBES };
            if doubt.under_way >= most {
                let pause = if doubt.cause == Cause::Unreachable { PAUSE.1 } else { PAUSE.0 };
                return Err((pause, doubt.cause));
            }
            doubt.under_way += 1;
            return Ok(Ticket::Doubted);
        }
        match self.unproven.admit(now) {
            Passage::Free => Ok(Ticket::Open),
            Passage::Probe => Ok(Ticket::Probe),
            Passage::Held(_, cause) if urgent && self.may_insist(cause, now) => {
                self.insisted = Some(now);
                Ok(Ticket::Open)
            }
            Passage::Held(wait, cause) => Err((wait, cause)),
        }
    }

    /// Time that such a message would have to wait, and the cause, without admitting it.
    pub(crate) fn held(&self, who: Reputation, urgent: bool, now: Instant) -> Option<(Duration, Cause)> {
        if self.all.is_closed() && (who == Reputation::Proven || self.unproven.is_closed()) {
            return None;
        }
        if let Some(wait) = self.waits_for_a_proven_one(who, now) {
            return Some(wait);
        }
        let unproven = || {
            let (wait, cause) = self.unproven.held(now)?;
            (who == Reputation::Unproven && !(urgent && self.may_insist(cause, now))).then_some((wait, cause))
        };
        self.all.held(now).or_else(unproven)
    }

    /// Records the outcome of a message to the subscription `id`. Returns true when it opened the circuit breaker
    /// for all subscriptions.
    pub(crate) fn note(
        &mut self,
        signal: Signal,
        ticket: Ticket,
        who: Reputation,
        id: u64,
        now: Instant,
    ) -> bool {
        self.release(ticket);
        if signal == Signal::Success {
            self.well(ticket, now);
            return false;
        }
        // A single subscription cannot cause a missing connection, so this counts for all.
        if ticket == Ticket::ProbeForAll || who == Reputation::Proven || signal == Signal::Unreachable {
            self.unproven.lose_probe(ticket == Ticket::Probe);
            return self.all.record(signal, ticket == Ticket::ProbeForAll, id, now);
        }
        if signal == Signal::Answered {
            self.all.is_there();
        }
        match signal.cause() {
            Some(cause) if ticket != Ticket::Probe => self.doubt_or_hold(cause, signal, id, now),
            _ => _ = self.unproven.record(signal, ticket == Ticket::Probe, id, now),
        }
        false
    }

    /// Records a delivered message.
    pub(crate) fn well(&mut self, ticket: Ticket, now: Instant) {
        self.delivered = Some(now);
        self.doubt = None;
        self.unproven.reset();
        if ticket == Ticket::ProbeForAll { self.all.reset() } else { self.all.succeeded() }
    }

    /// Returns true when no message is held or doubted.
    pub(crate) fn is_open(&self) -> bool {
        self.all.is_closed() && self.unproven.is_closed() && self.doubt.is_none()
    }

    /// Returns true when there is nothing for a delivery to clear.
    pub(crate) fn is_new(&self) -> bool {
        self.is_open() && self.all.is_new() && self.unproven.is_new()
    }

    /// Holds messages to all subscriptions, or to unproven ones, for at least `wait`.
    pub(crate) fn hold(&mut self, whom: HeldFor, wait: Duration, cause: Cause, now: Instant) {
        match whom {
            HeldFor::All => self.all.hold(wait, cause, now),
            HeldFor::Unproven => self.unproven.hold(wait, cause, now),
        }
    }

    /// Closes both circuit breakers and ends the doubt.
    pub(crate) fn open(&mut self) {
        self.all.reset();
        self.unproven.reset();
        self.doubt = None;
    }

    /// Records that a message ended without a result.
    pub(crate) fn lose(&mut self, ticket: Ticket) {
        self.release(ticket);
        self.all.lose_probe(ticket == Ticket::ProbeForAll);
        self.unproven.lose_probe(ticket == Ticket::Probe);
    }

    /// Remaining time of a hold, its cause, and its subscriptions: of two holds the one for all.
    pub(crate) fn status(&self, now: Instant) -> Option<(Duration, Cause, HeldFor)> {
        let of = |breaker: &CircuitBreaker, whom| breaker.held(now).map(|(wait, cause)| (wait, cause, whom));
        of(&self.all, HeldFor::All).or_else(|| of(&self.unproven, HeldFor::Unproven))
    }

    /// Records a delivery from before these circuit breakers existed.
    pub(crate) fn was_delivered(&mut self, at: Option<Instant>) {
        self.delivered = self.delivered.max(at);
    }

    /// Time of the last delivered message.
    pub(crate) fn delivered(&self) -> Option<Instant> {
        self.delivered
    }

    fn doubt_or_hold(&mut self, cause: Cause, signal: Signal, id: u64, now: Instant) {
        let has_delivered = self.delivered.is_some_and(|at| now.duration_since(at) < RECENTLY);
        // The service accepts messages of others with this key, so the key is not the reason of the refusal.
        if has_delivered && cause == Cause::Unauthorized {
            return;
        }
        if let Some(doubt) = &mut self.doubt {
            doubt.failed += 1;
            let most = match cause {
                Cause::Unreachable => DOUBTS.1,
                _ if has_delivered => DOUBTS_WHERE_DELIVERED,
                _ => DOUBTS.0,
            };
            if doubt.failed >= most {
                self.doubt = None;
                self.unproven.trip(signal, now);
            }
        } else if self.unproven.is_closed() && self.unproven.is_reached(signal, id) {
            self.doubt = Some(Doubt { cause, under_way: 0, failed: 0 });
        }
    }

    /// Returns the wait of an unproven subscription after a hold for all: for a while, the next proven one is the
    /// probe.
    fn waits_for_a_proven_one(&self, who: Reputation, now: Instant) -> Option<(Duration, Cause)> {
        let (ended, cause) = self.all.ended(now)?;
        (who == Reputation::Unproven && self.all.is_by_many() && ended < FOR_A_PROVEN_ONE)
            .then_some((Duration::from_secs(1), cause))
    }

    fn may_insist(&self, cause: Cause, now: Instant) -> bool {
        let has_delivered = self.delivered.is_some_and(|at| now.duration_since(at) < LATELY);
        let is_due = self.insisted.is_none_or(|at| now.duration_since(at) >= INSIST);
        is_due && (has_delivered || cause == Cause::Unauthorized)
    }

    fn release(&mut self, ticket: Ticket) {
        if let (Ticket::Doubted, Some(doubt)) = (ticket, &mut self.doubt) {
            doubt.under_way = doubt.under_way.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Reputation::{Proven, Unproven};
    use Signal::{Silent, Success, Unauthorized};

    const SECOND: Duration = Duration::from_secs(1);

    fn asks() -> Signal {
        Signal::Throttled(Some(3600 * SECOND))
    }

    /// Lets up to `most` unproven subscriptions fail. Returns the number that was let through.
    fn attack(gates: &mut Gates, signal: Signal, most: u64, now: Instant) -> u64 {
        for id in 0..most {
            let Ok(ticket) = gates.admit(Unproven, false, now) else { return id };
            gates.note(signal, ticket, Unproven, id, now);
        }
        most
    }

    #[test]
    fn unproven_ones_hold_nobody_who_was_delivered_to_before() {
        let now = Instant::now();
        for signal in [Unauthorized, asks(), Silent] {
            let mut gates = Gates::default();
            let asked = attack(&mut gates, signal, 10_000, now);
            assert!(asked < 60, "{asked} of them are asked before they are held");
            assert_eq!(gates.admit(Proven, false, now), Ok(Ticket::Open), "{signal:?}");
            assert!(gates.admit(Unproven, false, now).is_err());
            assert!(matches!(gates.status(now), Some((_, _, HeldFor::Unproven))));
        }
    }

    #[test]
    fn one_delivery_ends_the_doubt_and_the_hold() {
        let now = Instant::now();
        for (most, signal) in [(25, Unauthorized), (10_000, Unauthorized), (25, asks()), (10_000, asks())] {
            let mut gates = Gates::default();
            attack(&mut gates, signal, most, now);
            gates.note(Success, Ticket::Open, Proven, 77, now);
            assert!(gates.is_open(), "after {most}");
            assert_eq!(gates.admit(Unproven, false, now), Ok(Ticket::Open));
        }
    }

    #[test]
    fn an_urgent_message_to_a_new_subscriber_goes_past_a_hold_that_strangers_caused() {
        let now = Instant::now();
        let mut gates = Gates::default();
        gates.note(Success, Ticket::Open, Proven, 77, now);
        let asked = attack(&mut gates, asks(), 10_000, now);
        assert!(asked < 5000, "{asked} are asked where others are delivered to");
        assert!(gates.admit(Unproven, false, now).is_err());
        assert_eq!(gates.admit(Unproven, true, now), Ok(Ticket::Open));
        assert!(gates.admit(Unproven, true, now).is_err(), "one in a while");
        assert_eq!(gates.admit(Unproven, true, now + INSIST), Ok(Ticket::Open));
    }

    #[test]
    fn a_key_that_others_were_delivered_with_is_not_refused() {
        let now = Instant::now();
        let mut gates = Gates::default();
        gates.note(Success, Ticket::Open, Unproven, 77, now);
        assert_eq!(attack(&mut gates, Unauthorized, 10_000, now), 10_000, "each for itself");
        assert!(gates.is_open());
        assert!(attack(&mut gates, Unauthorized, 10_000, now + RECENTLY) < 60, "that was long ago");
    }

    #[test]
    fn a_service_that_has_never_delivered_and_asks_to_wait_is_waited_for() {
        let now = Instant::now();
        let mut gates = Gates::default();
        attack(&mut gates, Signal::Throttled(Some(4 * SECOND)), 10_000, now);
        assert_eq!(gates.admit(Unproven, true, now), Err((4 * SECOND, Cause::Throttled)));
        assert_eq!(gates.held(Unproven, true, now), Some((4 * SECOND, Cause::Throttled)));
    }

    #[test]
    fn proven_ones_hold_everybody_and_the_probe_is_one_of_them() {
        let now = Instant::now();
        let mut gates = Gates::default();
        let closed = (0..20).map(|id| gates.note(Unauthorized, Ticket::Open, Proven, id, now));
        assert_eq!(closed.filter(|closed| *closed).count(), 1);
        assert!(gates.admit(Proven, true, now).is_err() && gates.admit(Unproven, true, now).is_err());
        let later = now + 31 * SECOND;
        assert!(gates.admit(Unproven, false, later).is_err(), "a stranger's word would decide for all");
        assert_eq!(gates.admit(Proven, false, later), Ok(Ticket::ProbeForAll));
        gates.note(Success, Ticket::ProbeForAll, Proven, 5, later);
        assert!(gates.is_open());
    }

    #[test]
    fn a_probe_that_no_proven_one_comes_for_is_an_unproven_one() {
        let now = Instant::now();
        let mut gates = Gates::default();
        (0..20).for_each(|id| _ = gates.note(Unauthorized, Ticket::Open, Proven, id, now));
        let later = now + 30 * SECOND + FOR_A_PROVEN_ONE;
        assert_eq!(gates.admit(Unproven, false, later), Ok(Ticket::ProbeForAll));
    }

    #[test]
    fn messages_that_end_without_a_word_make_room_for_others() {
        let now = Instant::now();
        let mut gates = Gates::default();
        attack(&mut gates, Unauthorized, 20, now);
        let tickets: Vec<_> = (0..PROBES).map(|_| gates.admit(Unproven, false, now)).collect();
        assert!(tickets.iter().all(|ticket| *ticket == Ok(Ticket::Doubted)));
        assert_eq!(gates.admit(Unproven, false, now), Err((PAUSE.0, Cause::Unauthorized)));
        gates.lose(Ticket::Doubted);
        assert_eq!(gates.admit(Unproven, false, now), Ok(Ticket::Doubted));
    }
}
