//! Push services that are held for a while: a hold of one process is known to all replicas within a second. A
//! refusal of a key is not exchanged: it says nothing about messages that are signed with other keys, and each
//! process finds out for itself.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
use perennial_runtime::telemetry::Seldom;
use perennial_webpush::{Cause, HeldFor, Sender};
use tracing::{error, info, warn};

use super::DeliveryContext;
use crate::model::endpoint::origin;
use crate::model::jobs::Deliver;
use crate::store::{HeldService, WaitingBatch};

/// Time between two exchanges.
pub(crate) const EXCHANGE: Duration = Duration::from_secs(1);
/// Two ends of a wait that are closer than this are the same one.
const SAME: Duration = Duration::from_millis(1500);
/// Time for which changes are read again, by the store's clock, in milliseconds: transactions commit out of order.
const AGAIN_MS: i64 = 5000;

/// One exchange in this number reads everything again.
const ALL_ONE_IN: u64 = 60;
/// An operator's end of a hold that is younger than this also ends a hold which the store does not know yet.
const RECENT: Duration = Duration::from_secs(5);
/// Maximum number of holds that are stored at once: those of services that visitors bring can wait.
const HOLDS: usize = 64;
/// Maximum number of log lines about holds in `TELL_AGAIN`.
const LINES: u32 = 20;
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// Maximum number of subscriptions at risk that are counted.
const MOST_AT_RISK: usize = 10_000;

/// State of the exchange so far.
#[derive(Debug, Default)]
struct ServiceExchange {
    /// End of each hold of a service, as the store knows it.
    known: HashMap<(String, HeldFor), Instant>,
    /// End of each refusal of a key, which is logged here only.
    refusing: HashMap<String, Instant>,
    /// Time of the newest change that was read.
    newest: i64,
    /// Services that were read, with the times of their changes.
    seen: HashMap<String, i64>,
    /// Number of exchanges.
    count: u64,
    /// Number of holds that were logged since this time.
    told: (u32, Option<Instant>),
    /// Number of holds that were not logged.
    untold: u64,
}

/// Limits the log lines of a store that is away and fails every exchange.
static NOT_EXCHANGED: Seldom = Seldom::each_minute();

/// Exchanges holds until the soft phase of the drain.
pub(crate) async fn run(delivery: Arc<DeliveryContext>, drain: Drain) -> anyhow::Result<()> {
    let mut exchange = ServiceExchange::default();
    loop {
        tokio::select! {
            () = pulse(EXCHANGE) => {}
            () = drain.soft() => return Ok(()),
        }
        if let Err(error) = exchange.once(&delivery).await
            && let Some(more) = NOT_EXCHANGED.tell()
        {
            warn!(
                error = format!("{error:#}"),
                more_since_last = more,
                "holds of push services cannot be exchanged with the store"
            );
        }
    }
}

impl ServiceExchange {
    async fn once(&mut self, delivery: &DeliveryContext) -> anyhow::Result<()> {
        let sender = delivery.senders.any();
        delivery.store.note_accepted(sender.take_accepted()).await?;
        if self.count.is_multiple_of(ALL_ONE_IN) && delivery.services.at_risk.is_due() {
            delivery.services.at_risk.look(delivery).await?;
        }
        self.tell_others(delivery).await?;
        self.count += 1;
        let is_all = self.count.is_multiple_of(ALL_ONE_IN);
        if is_all {
            // The store's clock may have been set back.
            self.newest = 0;
            let is_held = |origin: &String| {
                self.refusing.contains_key(origin) || self.known.keys().any(|(known, _)| known == origin)
            };
            self.seen.retain(|origin, _| is_held(origin));
        }
        // In a store that is not shared, only an operator changes holds from outside.
        let is_told = delivery.services.is_told.swap(false, Ordering::Relaxed);
        if !delivery.store.is_shared() && !is_all && !is_told && self.count > 1 {
            return Ok(());
        }
        let all_held = delivery.store.held_services(self.newest - AGAIN_MS).await;
        if all_held.is_err() {
            // The change by an operator is still to be read.
            delivery.services.is_told.fetch_or(is_told, Ordering::Relaxed);
        }
        for held in all_held? {
            self.newest = self.newest.max(held.changed_at);
            if self.seen.insert(held.origin.clone(), held.changed_at) == Some(held.changed_at) {
                continue;
            }
            if self.hear(sender, &held) {
                let woken = delivery.wake_resumed(&held.origin).await?;
                info!(woken, origin = held.origin, "an operator lets a push service be sent to again");
            }
        }
        let seen = &self.seen;
        self.known.retain(|(origin, _), until| seen.contains_key(origin) || *until > Instant::now());
        Ok(())
    }

    /// Stores the holds of this process for other replicas, and logs them.
    async fn tell_others(&mut self, delivery: &DeliveryContext) -> anyhow::Result<()> {
        let now = Instant::now();
        let services = delivery.senders.any().services().into_iter();
        let mut held: Vec<_> = services
            .filter_map(|service| Some((service.held?, service.is_trusted, service.origin)))
            .collect();
        delivery.meters.held(held.len());
        // Services that only visitors have brought come last.
        held.sort_by_key(|(_, is_trusted, _)| !is_trusted);
        let mut written = 0;
        for ((wait, cause, whom), _, origin) in held {
            let until = now + wait;
            let is_refusal = cause == Cause::Unauthorized;
            let known =
                if is_refusal { self.refusing.get(&origin) } else { self.known.get(&(origin.clone(), whom)) };
            if known.is_some_and(|known| *known + SAME > until) {
                continue;
            }
            let (seconds, why) = (wait.as_secs(), cause.as_str());
            let is_told = self.may_tell(now);
            if is_refusal {
                if is_told {
                    error!(origin, seconds, "{}", refusal(whom));
                }
                self.refusing.insert(origin, until);
                continue;
            }
            if written >= HOLDS {
                continue;
            }
            written += 1;
            if is_told {
                warn!(
                    origin,
                    seconds,
                    cause = why,
                    whom = whom.as_str(),
                    "nothing is sent to a push service"
                );
            }
            // What an operator has just ended is written by the next exchange, if it is still held then.
            if delivery.store.hold_service(&origin, wait, &word(cause, whom)).await? {
                self.known.insert((origin, whom), until);
            }
        }
        self.refusing.retain(|_, until| *until > now);
        Ok(())
    }

    /// Returns true when one more line may be logged. From time to time it logs the number of lines that were left
    /// out.
    fn may_tell(&mut self, now: Instant) -> bool {
        let (count, since) = &mut self.told;
        if since.is_none_or(|since| now.duration_since(since) > TELL_AGAIN) {
            if self.untold > 0 {
                warn!(services = self.untold, "more push services were held than are logged here");
                self.untold = 0;
            }
            (*count, *since) = (0, Some(now));
        }
        *count += 1;
        if *count > LINES {
            self.untold += 1;
        }
        *count <= LINES
    }

    /// Applies a change by another replica or an operator. Returns true when it ended a hold.
    fn hear(&mut self, sender: &Sender, held: &HeldService) -> bool {
        let of = |whom| (held.origin.clone(), whom);
        match (held.wait, parse_word(&held.cause)) {
            // Earlier versions also stored the refusal of a key, like a hold of all messages.
            (Some(_), Some((Cause::Unauthorized, _))) => {}
            (Some(wait), Some((cause, whom))) if !wait.is_zero() => {
                self.known.insert(of(whom), Instant::now() + wait);
                sender.hold(&held.origin, wait, cause, whom);
            }
            (None, _) => {
                let was_held = [HeldFor::All, HeldFor::Unproven].map(|whom| self.known.remove(&of(whom)));
                let was_refusing = self.refusing.remove(&held.origin);
                let was_held = was_held.into_iter().chain([was_refusing]).any(|until| until.is_some());
                return (was_held || held.age < RECENT) && sender.resume(&held.origin);
            }
            _ => {}
        }
        false
    }
}

/// The log message about a refused key. Of the subscriptions that nothing was delivered to yet, not all were tried.
fn refusal(whom: HeldFor) -> &'static str {
    match whom {
        HeldFor::All => {
            "a push service refuses a key of ours for every subscription: nothing that is signed with it is sent there"
        }
        HeldFor::Unproven => {
            "a push service refuses a key of ours: subscriptions that nothing was delivered to yet wait until it takes a message"
        }
    }
}

/// The stored form of a hold's cause and subscriptions.
fn word(cause: Cause, whom: HeldFor) -> String {
    match whom {
        HeldFor::All => cause.as_str().to_owned(),
        HeldFor::Unproven => format!("{}/{}", cause.as_str(), whom.as_str()),
    }
}

fn parse_word(word: &str) -> Option<(Cause, HeldFor)> {
    match word.split_once('/') {
        None => Some((Cause::parse(word)?, HeldFor::All)),
        Some((cause, whom)) if whom == HeldFor::Unproven.as_str() => {
            Some((Cause::parse(cause)?, HeldFor::Unproven))
        }
        Some(_) => None,
    }
}

/// State of push services in this process besides that of its senders.
#[derive(Debug, Default)]
pub(crate) struct HeldServices {
    pub(crate) at_risk: AtRisk,
    /// True when an operator has changed a push service through this process.
    pub(crate) is_told: AtomicBool,
    /// Number of holds that operators have ended, here or at another replica.
    resumed: AtomicU64,
}

impl HeldServices {
    /// Records that an operator has ended a hold: batches that are being put off because of it are woken.
    pub(crate) fn note_resumed(&self) {
        self.resumed.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of holds that operators have ended.
    pub(crate) fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed)
    }
}

impl DeliveryContext {
    /// Sends at once to the batches that wait for a push service whose hold was ended at another replica. Returns
    /// their number.
    async fn wake_resumed(&self, origin: &str) -> anyhow::Result<usize> {
        self.services.note_resumed();
        self.wake(origin).await
    }

    /// Sends at once to the batches that wait for a push service. Returns their number.
    pub(crate) async fn wake(&self, origin: &str) -> anyhow::Result<usize> {
        let new_job = |waiting: &WaitingBatch| Deliver::woken(&self.config, waiting);
        Ok(self.store.wake_batches(origin, new_job).await?)
    }
}

/// Number of subscriptions of each push service that are at risk of being given up: they were refused, and nothing
/// was delivered to them since.
#[derive(Debug, Default)]
pub(crate) struct AtRisk {
    by_origin: Mutex<BTreeMap<String, u64>>,
    /// True when a subscription was refused here since the last count.
    is_new: AtomicBool,
}

impl AtRisk {
    /// Records that a subscription was refused.
    pub(crate) fn refused(&self) {
        self.is_new.store(true, Ordering::Relaxed);
    }

    /// Returns true when a count may differ from the last one.
    fn is_due(&self) -> bool {
        self.is_new.swap(false, Ordering::Relaxed) || !self.by_origin.lock().is_empty()
    }

    /// Counts the subscriptions at risk.
    pub(crate) async fn look(&self, delivery: &DeliveryContext) -> anyhow::Result<()> {
        let mut by_origin = BTreeMap::<String, u64>::new();
        for endpoint in delivery.store.at_risk(MOST_AT_RISK).await? {
            *by_origin.entry(origin(&endpoint).to_owned()).or_default() += 1;
        }
        delivery.meters.at_risk(by_origin.values().sum());
        *self.by_origin.lock() = by_origin;
        Ok(())
    }

    pub(crate) fn of(&self, origin: &str) -> u64 {
        self.by_origin.lock().get(origin).copied().unwrap_or_default()
    }
}
