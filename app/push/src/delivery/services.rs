//! Push services that are not sent to for a while: what this process learns, all replicas know within a second. That one
//! refuses a key each finds out for itself: it says nothing about what is signed with other keys.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
use perennial_runtime::telemetry::Seldom;
use perennial_webpush::{Cause, HeldFor, Sender};
use tracing::{error, info, warn};

use super::DeliveryContext;
use crate::model::endpoint::origin;
use crate::store::HeldService;

/// How often what is known is exchanged.
pub(crate) const EXCHANGE: Duration = Duration::from_secs(1);
/// Two ends of a wait that are closer than this are the same one.
const SAME: Duration = Duration::from_millis(1500);
/// Changes are read again for so long, by the store's clock, in milliseconds: transactions commit out of order.
const AGAIN_MS: i64 = 5000;

/// Everything is read again once in so many exchanges.
const ALL_ONE_IN: u64 = 60;
/// How many holds are written down at once: those of services that visitors bring can wait.
const HOLDS: usize = 64;
/// So many lines about holds are written in so long.
const LINES: u32 = 20;
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// How many subscriptions at risk are counted.
const MOST_AT_RISK: usize = 10_000;

/// What was exchanged so far.
#[derive(Debug, Default)]
struct ServiceExchange {
    /// Until when which service is held, as the store knows it,
    known: HashMap<(String, HeldFor), Instant>,
    /// and until when one refuses a key, which was told here.
    refusing: HashMap<String, Instant>,
    /// The newest change that was read.
    newest: i64,
    /// Those that were read, with when they changed.
    seen: HashMap<String, i64>,
    /// How often.
    count: u64,
    /// How many holds were told in the log since when, and how many were not.
    told: (u32, Option<Instant>),
    untold: u64,
}

/// A store that is away fails every exchange.
static NOT_EXCHANGED: Seldom = Seldom::each_minute();

/// Exchanges, until nothing is sent any more.
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
                "which push services are held is not known"
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
            // A store's clock may have been set back.
            self.newest = 0;
            self.seen.retain(|origin, _| self.known.keys().any(|(known, _)| known == origin));
        }
        // In a store of our own, only an operator's word comes from elsewhere.
        let is_told = delivery.services.is_told.swap(false, Ordering::Relaxed);
        if !delivery.store.is_shared() && !is_all && !is_told && self.count > 1 {
            return Ok(());
        }
        let all_held = delivery.store.held_services(self.newest - AGAIN_MS).await;
        if all_held.is_err() {
            // What was said is still to be heard.
            delivery.services.is_told.fetch_or(is_told, Ordering::Relaxed);
        }
        for held in all_held? {
            self.newest = self.newest.max(held.changed_at);
            if self.seen.insert(held.origin.clone(), held.changed_at) == Some(held.changed_at) {
                continue;
            }
            self.hear(sender, &held);
        }
        let seen = &self.seen;
        self.known.retain(|(origin, _), until| seen.contains_key(origin) || *until > Instant::now());
        Ok(())
    }

    /// Tells other replicas what is held here, and the log.
    async fn tell_others(&mut self, delivery: &DeliveryContext) -> anyhow::Result<()> {
        let now = Instant::now();
        let services = delivery.senders.any().services().into_iter();
        let mut held: Vec<_> = services
            .filter_map(|service| Some((service.held?, service.is_trusted, service.origin)))
            .collect();
        delivery.meters.held(held.len());
        // Services that only visitors know come last.
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
            delivery.store.hold_service(&origin, wait, &word(cause, whom)).await?;
            self.known.insert((origin, whom), until);
        }
        self.refusing.retain(|_, until| *until > now);
        Ok(())
    }

    /// Whether one more line may be written; from time to time one says how many were not.
    fn may_tell(&mut self, now: Instant) -> bool {
        let (count, since) = &mut self.told;
        if since.is_none_or(|since| now.duration_since(since) > TELL_AGAIN) {
            if self.untold > 0 {
                warn!(services = self.untold, "nothing was sent to more push services than are listed here");
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

    /// Another replica has told something, or an operator.
    fn hear(&mut self, sender: &Sender, held: &HeldService) {
        let of = |whom| (held.origin.clone(), whom);
        match (held.wait, parse_word(&held.cause)) {
            // Earlier versions wrote down refused keys too, as if they were all.
            (Some(_), Some((Cause::Unauthorized, _))) => {}
            (Some(wait), Some((cause, whom))) if !wait.is_zero() => {
                self.known.insert(of(whom), Instant::now() + wait);
                sender.hold(&held.origin, wait, cause, whom);
            }
            (None, _) => {
                let was_held = [HeldFor::All, HeldFor::Unproven].map(|whom| self.known.remove(&of(whom)));
                let was_refusing = self.refusing.remove(&held.origin);
                let was_held = was_held.into_iter().chain([was_refusing]).flatten().next();
                if was_held.is_some() && sender.resume(&held.origin) {
                    info!(origin = held.origin, "an operator lets a push service be sent to again");
                }
            }
            _ => {}
        }
    }
}

/// What the log says about a key that is refused. Of those that nothing was delivered to yet, not all were tried.
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

/// How the store says why a service is held, and for whom.
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

/// What this process knows of push services besides what its senders do.
#[derive(Debug, Default)]
pub(crate) struct HeldServices {
    pub(crate) at_risk: AtRisk,
    /// Whether an operator has said something about one here.
    pub(crate) is_told: AtomicBool,
}

/// How many subscriptions are at risk of being given up, of each push service: refused, and nothing was delivered since.
#[derive(Debug, Default)]
pub(crate) struct AtRisk {
    by_origin: Mutex<BTreeMap<String, u64>>,
    /// Whether one was refused here since the last look.
    is_new: AtomicBool,
}

impl AtRisk {
    /// One was refused.
    pub(crate) fn refused(&self) {
        self.is_new.store(true, Ordering::Relaxed);
    }

    /// Whether a look may find others than the last.
    fn is_due(&self) -> bool {
        self.is_new.swap(false, Ordering::Relaxed) || !self.by_origin.lock().is_empty()
    }

    /// Counts them.
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
