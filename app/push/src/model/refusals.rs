//! Decides in one pure function when a subscription that is refused repeatedly is given up.
//!
//! Most refusals have a cause that lies outside the subscription, concerns all subscriptions at once and passes: a
//! missing contact, another key, a proxy in between, a service that is out of order for a day. So a refusal counts only
//! where the same is shown to work for other subscriptions, and the refusals that count must go on for days.

use perennial_webpush::{Report, Verdict};

/// Number of refusals that must count (strikes) before a subscription is given up.
const STRIKES: i64 = 3;
/// Smallest time between two strikes, in milliseconds.
const STRIKE_MS: i64 = 12 * 3600 * 1000;
/// Smallest time between the first refusal and the last strike, in milliseconds.
const LONG_MS: i64 = 7 * DAY_MS;
/// The same time where the service accepts no other message: the cause may then lie between this server and the
/// service.
const LONGER_MS: i64 = 30 * DAY_MS;
const DAY_MS: i64 = 24 * 3600 * 1000;

/// The refusals of a subscription, as they are stored. Times are in milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RefusalRecord {
    /// Number of strikes in a row.
    pub(crate) strikes: i64,
    /// Time of the last strike.
    pub(crate) struck_at: Option<i64>,
    /// Time of the first refusal since the last delivery.
    pub(crate) refused_since: Option<i64>,
    /// Signer (VAPID key and contact) of the refused messages.
    pub(crate) refused_with: Option<i64>,
}

/// The subject of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalKind {
    /// The VAPID key, or the contact that is signed with it.
    Key,
    /// The host of the endpoint never existed and never will (RFC 2606, section 2).
    Nowhere,
    /// The host of the endpoint does not exist.
    Host,
    /// The endpoint takes no messages.
    Place,
}

impl RefusalKind {
    /// The kind of refusal that an answer, or a missing one, shows; `None` if it concerns the message or is no refusal.
    pub(crate) fn of(report: &Report, host: &str) -> Option<Self> {
        match (report.verdict, report.status) {
            (Verdict::Unresolvable, _) if host.ends_with(".invalid") => Some(Self::Nowhere),
            (Verdict::Unauthorized, Some(_)) => Some(Self::Key),
            (Verdict::Unresolvable, _) => Some(Self::Host),
            // An endpoint that answers with a redirect, 405 or 421 never takes a message.
            (Verdict::Rejected, Some(300..=399 | 405 | 421)) => Some(Self::Place),
            _ => None,
        }
    }
}

/// A refusal of one subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SubscriptionRefusal {
    pub(crate) kind: RefusalKind,
    /// Signer (VAPID key and contact) of the message.
    pub(crate) signer: i64,
    /// Whether the refusal may count; false while the key is refused for many subscriptions.
    pub(crate) counts: bool,
}

/// Times at which messages were last accepted, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RefusalEvidence {
    /// Last acceptance by the same service, with the same signer (VAPID key and contact).
    pub(crate) same: Option<i64>,
    /// Last acceptance by the same service, with any signer.
    pub(crate) service: Option<i64>,
    /// Last acceptance by any service.
    pub(crate) any: Option<i64>,
}

/// Returns the record of a subscription after one more refusal at `now`, and whether the subscription is given up.
pub(crate) fn refuse(
    before: RefusalRecord,
    refusal: &SubscriptionRefusal,
    evidence: RefusalEvidence,
    now: i64,
) -> (RefusalRecord, bool) {
    // A refusal with another key or contact begins a new record.
    let mut record = match before.refused_with {
        Some(signer) if signer == refusal.signer && before.refused_since.is_some() => before,
        _ => RefusalRecord {
            refused_since: Some(now),
            refused_with: Some(refusal.signer),
            ..RefusalRecord::default()
        },
    };
    let since = record.refused_since.unwrap_or(now);
    let later = |accepted: Option<i64>| accepted.is_some_and(|at| at > since);
    let long = match refusal.kind {
        // Browsers return such endpoints after unsubscribing, so nothing on the side of this server can be the cause.
        RefusalKind::Nowhere => 0,
        RefusalKind::Key if later(evidence.same) => LONG_MS,
        RefusalKind::Host if later(evidence.any) => LONG_MS,
        RefusalKind::Place if later(evidence.service) => LONG_MS,
        RefusalKind::Place if later(evidence.any) => LONGER_MS,
        _ => return (record, false),
    };
    let is_soon = record.struck_at.is_some_and(|struck| now < struck + STRIKE_MS);
    if !refusal.counts || is_soon {
        return (record, false);
    }
    record.strikes += 1;
    record.struck_at = Some(now);
    (record, record.strikes >= STRIKES && now - since >= long)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600 * 1000;

    fn refusal(kind: RefusalKind) -> SubscriptionRefusal {
        SubscriptionRefusal { kind, signer: 7, counts: true }
    }

    /// Refuses every `every` hours for `hours`, while another message was last accepted as `accepted` says. Returns the
    /// hour at which the subscription is given up.
    fn given_up_after(
        refusal: &SubscriptionRefusal,
        every: i64,
        hours: i64,
        accepted: fn(i64) -> RefusalEvidence,
    ) -> Option<i64> {
        let mut record = RefusalRecord::default();
        (0..=hours).step_by(usize::try_from(every).unwrap()).find(|hour| {
            let (after, is_over) = refuse(record, refusal, accepted(hour * HOUR), hour * HOUR);
            record = after;
            is_over
        })
    }

    fn all(now: i64) -> RefusalEvidence {
        RefusalEvidence { same: Some(now), service: Some(now), any: Some(now) }
    }

    #[test]
    fn a_refused_key_is_the_subscriptions_fault_only_where_others_are_accepted_with_it() {
        let key = refusal(RefusalKind::Key);
        assert_eq!(given_up_after(&key, 12, 24 * 60, all), Some(7 * 24));
        for nothing in [
            (|_| RefusalEvidence::default()) as fn(i64) -> RefusalEvidence,
            // The acceptances were before the first refusal, or not with this key.
            |_| RefusalEvidence { same: Some(0), service: Some(0), any: Some(0) },
            |now| RefusalEvidence { same: None, service: Some(now), any: Some(now) },
        ] {
            assert_eq!(given_up_after(&key, 12, 24 * 365, nothing), None);
        }
    }

    #[test]
    fn what_is_refused_while_the_key_is_refused_for_many_does_not_count() {
        let held = SubscriptionRefusal { counts: false, ..refusal(RefusalKind::Key) };
        assert_eq!(given_up_after(&held, 12, 24 * 365, all), None);
    }

    #[test]
    fn a_day_or_two_of_refusals_and_many_at_once_are_not_the_end() {
        let key = refusal(RefusalKind::Key);
        assert_eq!(given_up_after(&key, 1, 24 * 7 - 1, all), None);
        assert_eq!(given_up_after(&key, 24 * 7, 24 * 60, all), Some(24 * 7 * 3), "three have to count");
    }

    #[test]
    fn another_contact_begins_anew() {
        let mut record = RefusalRecord::default();
        for day in 0..10 {
            record = refuse(record, &refusal(RefusalKind::Key), RefusalEvidence::default(), day * DAY_MS).0;
        }
        let with_contact = SubscriptionRefusal { signer: 8, ..refusal(RefusalKind::Key) };
        let (after, is_over) = refuse(record, &with_contact, all(11 * DAY_MS), 11 * DAY_MS);
        assert!(!is_over);
        assert_eq!((after.strikes, after.refused_since), (0, Some(11 * DAY_MS)));
    }

    #[test]
    fn a_host_that_never_was_needs_no_evidence() {
        assert_eq!(
            given_up_after(&refusal(RefusalKind::Nowhere), 12, 48, |_| RefusalEvidence::default()),
            Some(24)
        );
    }

    #[test]
    fn a_place_that_takes_no_messages_ends_sooner_where_its_service_takes_others() {
        let elsewhere: fn(i64) -> RefusalEvidence =
            |now| RefusalEvidence { same: None, service: None, any: Some(now) };
        assert_eq!(given_up_after(&refusal(RefusalKind::Place), 12, 24 * 60, all), Some(24 * 7));
        assert_eq!(given_up_after(&refusal(RefusalKind::Place), 12, 24 * 60, elsewhere), Some(24 * 30));
        assert_eq!(given_up_after(&refusal(RefusalKind::Host), 12, 24 * 60, elsewhere), Some(24 * 7));
        assert_eq!(
            given_up_after(&refusal(RefusalKind::Host), 12, 24 * 365, |_| RefusalEvidence::default()),
            None
        );
    }
}
