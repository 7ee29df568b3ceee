//! The admin listener: probes, metrics, and answers to the first questions of an operator on call.
//!
//! | route | access | answer |
//! |---|---|---|
//! | `GET /livez` | open | whether the serving threads run tasks |
//! | `GET /readyz` | open | whether requests should be sent here, and why not |
//! | `GET /startupz` | open | whether boot has ended |
//! | `GET /metrics` | open | Prometheus |
//! | `GET /build` | token* | version, commit and features of this binary |
//! | `GET /process` | token* | processor time, memory, threads and open files of the process |
//! | `GET /settings` | token* | every setting in effect, masked, and its source |
//! | `GET /requests` | token* | running requests, their age, and what they wait for |
//! | `GET /connections` | token* | open connections, and what they do |
//! | `GET /workers` | token* | jobs that the workers run |
//! | `GET /pools` | token* | pools of connections: their size, free connections, waiting tasks |
//! | `GET /targets` | token* | servers that modules call: their running calls, and circuit breakers |
//! | `GET /cache` | token* | caches: their entries, and how often these were asked for |
//! | `GET /keys` | token* | the API keys in the store, see [`keys`] |
//! | `GET /modules` | token* | the status of each module |
//! | `GET /queues`, `/jobs` | token* | the jobs, see [`jobs`] |
//! | `GET /schedules` | token* | the schedules, see [`schedules`] |
//! | `GET ..` | token* | routes of modules, such as `/origins` and `/notifications` |
//! | `POST /backup` | token | copies the embedded store and the keys, see [`backup`](crate::backup) |
//! | `POST ..` | token | all routes that change something; pages of other origins are refused (`Origin`) |
//!
//! \* No token is needed when the listener is bound to loopback. The `Host` header is checked on these routes, so that
//! a web page cannot reach them by a name of its own (DNS rebinding).
//!
//! The listener runs on the control runtime, which also stops the process: it answers to the very end, also when the
//! serving runtime does not run any more.

pub(crate) mod jobs;
pub(crate) mod keys;
mod process;
pub(crate) mod schedules;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::uri::Authority;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use parking_lot::Mutex;
use perennial_runtime::health::Health;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::telemetry::Telemetry;
use perennial_server::http::problem::Problem;
use perennial_server::http::scope::{RequestScope, RequestView};
use perennial_server::net::{ConnectionView, Connections, Listen, Peer};
use perennial_workers::worker;
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use crate::access::{Access, bearer};
use crate::built::{self, BuildView};
use crate::http_client::HttpClient;
use crate::module::StatusFn;
use crate::pools::OpenPool;
use crate::settings::Settings;
use jobs::JobAdminState;
use keys::Keyring;
use process::ProcessView;

/// State of the admin listener. A cheap handle.
#[derive(Clone)]
pub(crate) struct Admin(Arc<AdminInner>);

struct AdminInner {
    health: Health,
    metrics: Metrics,
    telemetry: Arc<Telemetry>,
    /// Settings in effect; SIGHUP changes them.
    settings: Arc<Mutex<Settings>>,
    loopback: bool,
    connections: Connections,
    began: Instant,
    booted: OnceLock<Booted>,
}

impl AdminInner {
    /// The connections of all listeners, those of the public one first.
    fn listeners(&self) -> impl Iterator<Item = &Connections> {
        self.booted.get().into_iter().flat_map(|booted| &booted.connections).chain([&self.connections])
    }
}

/// State that is known after boot has ended.
pub(crate) struct Booted {
    pub(crate) access: Access,
    pub(crate) workers: worker::Status,
    pub(crate) status: Vec<(&'static str, StatusFn)>,
    pub(crate) pools: Vec<OpenPool>,
    pub(crate) clients: Vec<HttpClient>,
    /// The connections of the listeners of visitors.
    pub(crate) connections: Vec<Connections>,
    pub(crate) books: JobAdminState,
    pub(crate) keyring: Keyring,
    /// Routes of modules that show something.
    pub(crate) admin_read: Router,
    /// Routes of modules that change something.
    pub(crate) admin_write: Router,
}

impl Admin {
    pub(crate) fn new(
        health: Health,
        metrics: Metrics,
        telemetry: Arc<Telemetry>,
        settings: Arc<Mutex<Settings>>,
        listen: &[Listen],
        connections: Connections,
    ) -> Self {
        let loopback = listen.iter().all(Listen::is_loopback);
        let booted = OnceLock::new();
        let began = Instant::now();
        metrics.built(built::VERSION, built::COMMIT);
        Self(Arc::new(AdminInner {
            health,
            metrics,
            telemetry,
            settings,
            loopback,
            connections,
            began,
            booted,
        }))
    }

    /// Sets the state that is known after boot.
    pub(crate) fn booted(&self, booted: Booted) {
        let _ = self.0.booted.set(booted);
    }

    pub(crate) fn router(&self) -> Router {
        let guarded = Router::new()
            .route("/build", get(build))
            .route("/process", get(process))
            .route("/settings", get(settings))
            .route("/requests", get(requests))
            .route("/connections", get(connections))
            .route("/workers", get(workers))
            .route("/pools", get(pools))
            .route("/targets", get(targets))
            .route("/cache", get(cache))
            .route("/modules", get(modules))
            .merge(
                jobs::admin_read()
                    .merge(schedules::admin_read())
                    .merge(keys::admin_read())
                    .layer(from_fn_with_state(self.clone(), open_books)),
            )
            .layer(from_fn_with_state(self.clone(), guard));
        let admin_write = jobs::admin_write()
            .merge(schedules::admin_write())
            .merge(keys::admin_write())
            .layer(from_fn_with_state(self.clone(), open_books))
            .layer(from_fn_with_state(self.clone(), guard_change));
        Router::new()
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/startupz", get(startupz))
            .route("/metrics", get(metrics))
            .merge(guarded)
            .merge(admin_write)
            .fallback(of_modules)
            .with_state(self.clone())
    }
}

async fn livez(State(Admin(known)): State<Admin>) -> Response {
    probe(known.health.live().map(|()| Vec::new()).map_err(|reason| vec![reason]))
}

async fn readyz(State(Admin(known)): State<Admin>) -> Response {
    probe(known.health.ready())
}

async fn startupz(State(Admin(known)): State<Admin>) -> Response {
    let started = known.health.has_started();
    probe(if started { Ok(Vec::new()) } else { Err(vec!["starting".to_owned()]) })
}

/// Makes the answer of a probe. Dependencies that are away while the process is healthy are named in it.
fn probe(result: Result<Vec<String>, Vec<String>>) -> Response {
    match result {
        Ok(away) if away.is_empty() => {
            (StatusCode::OK, axum::Json(json!({ "status": "ok" }))).into_response()
        }
        Ok(away) => {
            let body = json!({ "status": "degraded", "reasons": away });
            (StatusCode::OK, axum::Json(body)).into_response()
        }
        Err(reasons) => {
            let body = json!({ "status": "unavailable", "reasons": reasons });
            (StatusCode::SERVICE_UNAVAILABLE, axum::Json(body)).into_response()
        }
    }
}

async fn metrics(State(Admin(known)): State<Admin>) -> Response {
    known.telemetry.publish();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], known.metrics.render())
        .into_response()
}

async fn build(State(Admin(known)): State<Admin>) -> axum::Json<BuildView> {
    axum::Json(BuildView::of(known.began))
}

async fn process(State(Admin(known)): State<Admin>) -> axum::Json<ProcessView> {
    process::view(known.began)
}

async fn settings(State(Admin(known)): State<Admin>) -> Response {
    let shown = known.settings.lock().show();
    axum::Json(shown).into_response()
}

async fn requests(State(Admin(known)): State<Admin>) -> axum::Json<Vec<RequestView>> {
    axum::Json(known.listeners().flat_map(Connections::requests).collect())
}

async fn connections(State(Admin(known)): State<Admin>) -> axum::Json<Vec<ConnectionView>> {
    axum::Json(known.listeners().flat_map(Connections::view).collect())
}

async fn workers(State(Admin(known)): State<Admin>) -> Response {
    axum::Json(known.booted.get().map(|booted| booted.workers.busy()).unwrap_or_default()).into_response()
}

async fn pools(State(Admin(known)): State<Admin>) -> Response {
    let pools = known.booted.get().map(|booted| booted.pools.as_slice()).unwrap_or_default();
    let pools = pools.iter().map(OpenPool::status).collect::<BTreeMap<_, _>>();
    axum::Json(pools).into_response()
}

async fn targets(State(Admin(known)): State<Admin>) -> Response {
    let clients = known.booted.get().map(|booted| booted.clients.as_slice()).unwrap_or_default();
    axum::Json(clients.iter().map(HttpClient::status).collect::<BTreeMap<_, _>>()).into_response()
}

async fn cache(State(Admin(known)): State<Admin>) -> Response {
    let caches = known.booted.get().map(|booted| booted.keyring.caches.status()).unwrap_or_default();
    axum::Json(caches.into_iter().collect::<BTreeMap<_, _>>()).into_response()
}

async fn modules(State(Admin(known)): State<Admin>) -> Response {
    let status = known.booted.get().map(|booted| booted.status.as_slice()).unwrap_or_default();
    let status: Map<String, Value> =
        status.iter().map(|(name, status)| ((*name).to_owned(), status())).collect();
    axum::Json(status).into_response()
}

/// Gives a request the state of the jobs and of the keys. Until boot has ended, the answer is 503.
async fn open_books(State(Admin(known)): State<Admin>, mut request: Request, next: Next) -> Response {
    let Some(booted) = known.booted.get() else {
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "starting").into_response();
    };
    request.extensions_mut().insert(booted.books.clone());
    request.extensions_mut().insert(booted.keyring.clone());
    next.run(request).await
}

/// Lets only requests through that may read, see [`may_look`].
async fn guard(
    State(Admin(known)): State<Admin>,
    scope: RequestScope,
    request: Request,
    next: Next,
) -> Response {
    match may_look(&known, &scope, &request) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// Calls the routes that modules have handed in.
async fn of_modules(State(Admin(known)): State<Admin>, scope: RequestScope, request: Request) -> Response {
    let looks = request.method() == Method::GET;
    let allowed =
        if looks { may_look(&known, &scope, &request) } else { may_change(&known, &scope, &request) };
    match (allowed, known.booted.get()) {
        (Err(problem), _) => problem.into_response(),
        (Ok(()), None) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "starting").into_response(),
        (Ok(()), Some(booted)) => {
            let router = if looks { &booted.admin_read } else { &booted.admin_write };
            router.clone().oneshot(request).await.into_response()
        }
    }
}

/// Checks that a request may read: its `Host` names this machine, and it has the admin token, unless the listener is
/// bound to loopback.
fn may_look(known: &AdminInner, scope: &RequestScope, request: &Request) -> Result<(), Problem> {
    if !is_own_name(request.headers(), request.uri(), scope.connection().socket_peer) {
        let detail = "wanted a Host header that names this machine: an address, or localhost";
        return Err(Problem::new(StatusCode::MISDIRECTED_REQUEST, detail));
    }
    if known.loopback { Ok(()) } else { has_token(known, request) }
}

/// Checks that a request may change something: it has the admin token, its `Host` names this machine, and it does not
/// come from a page of another origin.
fn may_change(known: &AdminInner, scope: &RequestScope, request: &Request) -> Result<(), Problem> {
    let own = is_own_name(request.headers(), request.uri(), scope.connection().socket_peer);
    if !own || !is_own_origin(request.headers()) {
        let detail = "wanted a Host header that names this machine, and no Origin but this one";
        return Err(Problem::new(StatusCode::MISDIRECTED_REQUEST, detail));
    }
    has_token(known, request)
}

/// Lets only requests through that may change something, see [`may_change`].
async fn guard_change(
    State(Admin(known)): State<Admin>,
    scope: RequestScope,
    request: Request,
    next: Next,
) -> Response {
    match may_change(&known, &scope, &request) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// Returns true when no page sends the request, or a page of the same host.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    origin.is_some() && origin == headers.get(header::HOST).and_then(|host| host.to_str().ok())
}

fn has_token(known: &AdminInner, request: &Request) -> Result<(), Problem> {
    let Some(booted) = known.booted.get() else {
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "starting"));
    };
    match bearer(request.headers()) {
        Some(token) if booted.access.is_admin(token) => Ok(()),
        _ => Err(Problem::new(StatusCode::UNAUTHORIZED, "wanted Authorization: Bearer <admin token>")),
    }
}

/// Returns true when a request came by an address, by `localhost`, or by a Unix socket. A page of another origin can
/// make its own name point to this machine, but it cannot make the browser send another `Host` than that name.
fn is_own_name(headers: &HeaderMap, uri: &Uri, peer: Peer) -> bool {
    if peer == Peer::Unix {
        return true;
    }
    let header = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let Some(host) = header.or_else(|| uri.authority().map(Authority::as_str)) else {
        return false;
    };
    let name =
        host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
    name == "localhost" || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}
