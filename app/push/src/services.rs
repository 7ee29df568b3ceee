//! Push services that are not sent to for a while: what this process learns, all replicas know within a second. That one
//! refuses a key each finds out for itself: it says nothing about what is signed with other keys.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json as Answer, Router};
use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
use perennial_runtime::telemetry::Seldom;
use perennial_server::http::problem::FieldError;
use perennial_webpush::{Cause, HeldFor, Sender, ServiceStatus};
use perennial_workers::queue::Due;
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Tools;
use super::deliver::Deliver;
use super::progress::NotificationView;
use super::send::origin;
use super::store::{Held, Waiting};
use perennial_host::api::{Json, Query, Result, not_found};
use perennial_host::sites::SiteId;

/// How often what is known is exchanged.
const EXCHANGE: Duration = Duration::from_secs(1);
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
/// How many notifications operators are shown.
const NOTIFICATIONS: usize = 100;

/// What was exchanged so far.
#[derive(Debug, Default)]
struct Exchange {
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
pub(super) async fn run(tools: Tools, drain: Drain) -> anyhow::Result<()> {
    let mut exchange = Exchange::default();
    loop {
        tokio::select! {
            () = pulse(EXCHANGE) => {}
            () = drain.soft() => return Ok(()),
        }
        if let Err(error) = exchange.once(&tools).await
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

impl Exchange {
    async fn once(&mut self, tools: &Tools) -> anyhow::Result<()> {
        let sender = tools.senders.any();
        tools.store.note_accepted(sender.take_accepted()).await?;
        if self.count.is_multiple_of(ALL_ONE_IN) && tools.at_risk.is_due() {
            tools.at_risk.look(tools).await?;
        }
        self.tell_others(tools).await?;
        self.count += 1;
        let is_all = self.count.is_multiple_of(ALL_ONE_IN);
        if is_all {
            // A store's clock may have been set back.
            self.newest = 0;
            self.seen.retain(|origin, _| self.known.keys().any(|(known, _)| known == origin));
        }
        // In a store of our own, only an operator's word comes from elsewhere.
        let is_told = tools.services_changed.swap(false, Ordering::Relaxed);
        if !tools.store.is_shared() && !is_all && !is_told && self.count > 1 {
            return Ok(());
        }
        let all_held = tools.store.held_services(self.newest - AGAIN_MS).await;
        if all_held.is_err() {
            // What was said is still to be heard.
            tools.services_changed.fetch_or(is_told, Ordering::Relaxed);
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
    async fn tell_others(&mut self, tools: &Tools) -> anyhow::Result<()> {
        let now = Instant::now();
        let services = tools.senders.any().services().into_iter();
        let mut held: Vec<_> = services
            .filter_map(|service| Some((service.held?, service.is_trusted, service.origin)))
            .collect();
        tools.meters.held(held.len());
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
            tools.store.hold_service(&origin, wait, &word(cause, whom)).await?;
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
    fn hear(&mut self, sender: &Sender, held: &Held) {
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

/// How many subscriptions are at risk of being given up, of each push service: refused, and nothing was delivered since.
#[derive(Debug, Default)]
pub(super) struct AtRisk {
    by_origin: Mutex<BTreeMap<String, u64>>,
    /// Whether one was refused here since the last look.
    is_new: AtomicBool,
}

impl AtRisk {
    /// One was refused.
    pub(super) fn refused(&self) {
        self.is_new.store(true, Ordering::Relaxed);
    }

    /// Whether a look may find others than the last.
    fn is_due(&self) -> bool {
        self.is_new.swap(false, Ordering::Relaxed) || !self.by_origin.lock().is_empty()
    }

    /// Counts them.
    pub(super) async fn look(&self, tools: &Tools) -> anyhow::Result<()> {
        let mut by_origin = BTreeMap::<String, u64>::new();
        for endpoint in tools.store.at_risk(MOST_AT_RISK).await? {
            *by_origin.entry(origin(&endpoint).to_owned()).or_default() += 1;
        }
        tools.meters.at_risk(by_origin.values().sum());
        *self.by_origin.lock() = by_origin;
        Ok(())
    }

    fn of(&self, origin: &str) -> u64 {
        self.by_origin.lock().get(origin).copied().unwrap_or_default()
    }
}

/// A push service, as operators see it.
#[derive(Debug, Serialize)]
struct OriginView {
    origin: String,
    /// throttled, unreachable or unauthorized, while nothing is sent to it
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<&'static str>,
    /// Whether that is so for all, or for subscriptions that nothing was delivered to yet (unproven)
    #[serde(skip_serializing_if = "Option::is_none")]
    held_for: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_seconds: Option<f64>,
    connections: usize,
    /// How many requests at once it bears, as far as is known
    window: usize,
    in_flight: usize,
    clock_ahead_seconds: i64,
    /// How many subscriptions it refuses that may be given up for that; looked up once a minute, and counted to 10,000
    at_risk: u64,
    addresses: Vec<AddressView>,
}

#[derive(Debug, Serialize)]
struct AddressView {
    address: String,
    connections: usize,
    aside: bool,
}

/// What operators may look at.
pub(super) fn admin_read(tools: Tools) -> Router {
    Router::new()
        .route("/origins", get(origins))
        .route("/notifications", get(notifications))
        .with_state(tools)
}

/// What operators may change.
pub(super) fn admin_write(tools: Tools) -> Router {
    Router::new().route("/origins/resume", post(resume)).with_state(tools)
}

async fn origins(State(tools): State<Tools>) -> Answer<Vec<OriginView>> {
    let lanes: Vec<_> = tools.senders.all().flat_map(perennial_webpush::Sender::lanes).collect();
    let view = |service: ServiceStatus| {
        let of = || lanes.iter().filter(|lane| lane.origin == service.origin);
        let addresses = service.addresses.iter().map(|address| AddressView {
            address: address.address.to_string(),
            connections: address.connections,
            aside: address.aside,
        });
        OriginView {
            held: service.held.map(|(_, cause, _)| cause.as_str()),
            held_for: service.held.map(|(_, _, whom)| whom.as_str()),
            held_seconds: service.held.map(|(wait, ..)| wait.as_secs_f64()),
            connections: of().map(|lane| lane.connections).sum(),
            window: of().map(|lane| lane.window).sum(),
            in_flight: of().map(|lane| lane.in_flight).sum(),
            clock_ahead_seconds: service.clock_ahead_seconds,
            at_risk: tools.at_risk.of(&service.origin),
            addresses: addresses.collect(),
            origin: service.origin.clone(),
        }
    };
    Answer(tools.senders.any().services().into_iter().map(view).collect())
}

/// Of which site; the default one without a name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Of {
    site: Option<String>,
}

/// The newest notifications, as `GET /notifications` shows them.
async fn notifications(
    State(tools): State<Tools>,
    Query(of): Query<Of>,
) -> Result<Json<Vec<NotificationView>>> {
    let site = match &of.site {
        None => SiteId::DEFAULT,
        Some(name) => tools.access.sites().named(name).ok_or_else(|| not_found("site"))?.id,
    };
    let found = tools.store.notifications(site.0, Uuid::max(), NOTIFICATIONS).await?;
    Ok(Json(found.into_iter().map(|found| NotificationView::of(found, &tools.progress)).collect()))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resume {
    origin: String,
}

async fn resume(State(tools): State<Tools>, Json(request): Json<Resume>) -> Result<http::StatusCode> {
    let known = tools.senders.any().resume(&request.origin);
    if !known {
        return Err(FieldError::new("origin", "an origin of GET /origins").into());
    }
    tools.store.resume_service(&request.origin).await?;
    tools.services_changed.store(true, Ordering::Relaxed);
    // Where others work on the same store, not before they have heard of it.
    let due = match tools.store.is_shared() {
        true => Due::In(2 * EXCHANGE),
        false => Due::Now,
    };
    let new_job = |waiting: &Waiting| Ok(Deliver::woken(&tools, waiting)?.due(due));
    let woken = tools.store.wake_batches(&request.origin, new_job).await?;
    info!(woken, origin = request.origin, "an operator lets a push service be sent to again");
    Ok(http::StatusCode::NO_CONTENT)
}
