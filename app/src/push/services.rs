//! Push services that are not sent to for a while: what this process learns, all replicas know within a second. That one
//! refuses a key each finds out for itself: it says nothing about what is signed with other keys.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json as Answer, Router};
use perennial_server::drain::Drain;
use perennial_server::http::problem::FieldError;
use perennial_webpush::{Cause, ServiceStatus};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::Tools;
use super::progress::NotificationView;
use crate::api::{Json, Query, Result, not_found};
use crate::sites::SiteId;

/// How often what is known is exchanged.
const EXCHANGE: Duration = Duration::from_secs(1);
/// Two ends of a wait that are closer than this are the same one.
const SAME: Duration = Duration::from_millis(1500);
/// Changes are read again for so long, by the store's clock, in milliseconds: transactions commit out of order.
const AGAIN_MS: i64 = 5000;

/// Everything is read again once in so many exchanges.
const ALL_ONE_IN: u64 = 60;
/// How many notifications operators are shown.
const NOTIFICATIONS: usize = 100;

/// What was exchanged so far.
#[derive(Debug, Default)]
struct Exchange {
    /// Until when which service is held, as the store knows it,
    known: HashMap<String, Instant>,
    /// and until when one refuses a key, which was told here.
    refusing: HashMap<String, Instant>,
    /// The newest change that was read.
    newest: i64,
    /// Those that were read, with when they changed.
    seen: HashMap<String, i64>,
    /// How often.
    count: u64,
}

/// Exchanges, until nothing is sent any more.
pub(super) async fn run(tools: Tools, drain: Drain) -> anyhow::Result<()> {
    let mut exchange = Exchange::default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EXCHANGE) => {}
            () = drain.soft() => return Ok(()),
        }
        if let Err(error) = exchange.once(&tools).await {
            warn!(error = format!("{error:#}"), "which push services are held is not known");
        }
    }
}

impl Exchange {
    async fn once(&mut self, tools: &Tools) -> anyhow::Result<()> {
        let sender = tools.senders.any();
        let now = Instant::now();
        let held: Vec<(String, Duration, Cause)> = sender
            .services()
            .into_iter()
            .filter_map(|service| service.held.map(|(wait, cause)| (service.origin, wait, cause)))
            .collect();
        tools.meters.held(held.len());
        for (origin, wait, cause) in held {
            let until = now + wait;
            let is_refusal = cause == Cause::Unauthorized;
            let known = if is_refusal { &self.refusing } else { &self.known };
            if known.get(&origin).is_some_and(|known| *known + SAME > until) {
                continue;
            }
            let (seconds, why) = (wait.as_secs(), cause.as_str());
            if is_refusal {
                error!(
                    origin,
                    seconds,
                    "a push service refuses a key of ours for every subscription: nothing that is signed with it is sent there"
                );
                self.refusing.insert(origin, until);
            } else {
                warn!(origin, seconds, cause = why, "nothing is sent to a push service");
                tools.store.hold_service(&origin, wait, why).await?;
                self.known.insert(origin, until);
            }
        }
        self.refusing.retain(|_, until| *until > now);
        self.count += 1;
        if self.count.is_multiple_of(ALL_ONE_IN) {
            // A store's clock may have been set back.
            self.newest = 0;
            self.seen.retain(|origin, _| self.known.contains_key(origin));
        }
        for held in tools.store.held_services(self.newest - AGAIN_MS).await? {
            self.newest = self.newest.max(held.changed_at);
            if self.seen.insert(held.origin.clone(), held.changed_at) == Some(held.changed_at) {
                continue;
            }
            match (held.wait, Cause::parse(&held.cause)) {
                // Earlier versions wrote down refused keys too, as if they were all.
                (Some(_), Some(Cause::Unauthorized)) => {}
                (Some(wait), Some(cause)) if !wait.is_zero() => {
                    self.known.insert(held.origin.clone(), Instant::now() + wait);
                    sender.hold(&held.origin, wait, cause);
                }
                (None, _) => {
                    let held_it = self.known.remove(&held.origin).or(self.refusing.remove(&held.origin));
                    if held_it.is_some() && sender.resume(&held.origin) {
                        info!(origin = held.origin, "an operator lets a push service be sent to again");
                    }
                }
                _ => {}
            }
        }
        let seen = &self.seen;
        self.known.retain(|origin, until| seen.contains_key(origin) || *until > now);
        Ok(())
    }
}

/// A push service, as operators see it.
#[derive(Debug, Serialize)]
struct OriginView {
    origin: String,
    /// throttled, unreachable or unauthorized, while nothing is sent to it
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_seconds: Option<f64>,
    connections: usize,
    /// How many requests at once it bears, as far as is known
    window: usize,
    in_flight: usize,
    clock_ahead_seconds: i64,
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
            held: service.held.map(|(_, cause)| cause.as_str()),
            held_seconds: service.held.map(|(wait, _)| wait.as_secs_f64()),
            connections: of().map(|lane| lane.connections).sum(),
            window: of().map(|lane| lane.window).sum(),
            in_flight: of().map(|lane| lane.in_flight).sum(),
            clock_ahead_seconds: service.clock_ahead_seconds,
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
    info!(origin = request.origin, "an operator lets a push service be sent to again");
    Ok(http::StatusCode::NO_CONTENT)
}
