//! The routes of web push: for pages, for backends, for operators.

mod audiences;
mod followers;
pub(crate) mod guests;
pub(crate) mod import;
mod lifecycle;
pub(crate) mod limits;
mod notifications;
pub(crate) mod notify;
mod page;
mod services;
mod subscriptions;
mod user_token;
mod users;
pub(crate) mod vapid;

use std::ops::Deref;
use std::sync::Arc;

use axum::extract::FromRef;
use axum::middleware::map_response;
use axum::response::Response;
use http::HeaderValue;
use http::header::LOCATION;
use perennial_host::access::Access;
use perennial_host::module::Host;
use perennial_runtime::drain::Drain;
use perennial_runtime::pulse::pulse;
use perennial_server::http::detach::Detach;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::config::Config;
use crate::delivery::DeliveryContext;
use crate::delivery::progress::ProgressRates;
use crate::delivery::senders::Senders;
use crate::delivery::services::HeldServices;
use crate::delivery::webhook::Webhooks;
use crate::model::profile::Profiles;
use crate::pacing::active::Flows;
use crate::store::PushStore;
use crate::vapid::VapidKeys;
use audiences::Audiences;
use followers::Followers;
use guests::Guests;
use limits::AddressLimits;

/// The state of the routes; a cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct ApiState(Arc<ApiParts>);

/// The parts of [`ApiState`].
#[derive(Debug)]
pub(crate) struct ApiParts {
    config: Arc<Config>,
    store: PushStore,
    access: Access,
    profiles: Profiles,
    vapid: Arc<VapidKeys>,
    senders: Senders,
    flows: Flows,
    services: Arc<HeldServices>,
    webhooks: Webhooks,
    progress: ProgressRates,
    audiences: Audiences,
    limits: AddressLimits,
    guests: Guests,
    followers: Followers,
    in_flight: notify::AcceptingKeys,
}

impl Deref for ApiState {
    type Target = ApiParts;

    fn deref(&self) -> &ApiParts {
        &self.0
    }
}

impl FromRef<ApiState> for Access {
    fn from_ref(api: &ApiState) -> Self {
        api.access.clone()
    }
}

impl ApiState {
    /// Makes the state from parts of the delivery context and from parts of its own.
    pub(crate) fn new(
        host: &Host,
        delivery: &DeliveryContext,
        limits: limits::Config,
        guests: guests::Config,
    ) -> Self {
        let (config, store) = (Arc::clone(&delivery.config), delivery.store.clone());
        Self(Arc::new(ApiParts {
            access: host.access.clone(),
            profiles: delivery.profiles.clone(),
            vapid: Arc::clone(&delivery.vapid),
            senders: delivery.senders.clone(),
            flows: delivery.flows.clone(),
            services: Arc::clone(&delivery.services),
            webhooks: delivery.webhooks.clone(),
            progress: delivery.progress.clone(),
            audiences: Audiences::new(&host.caches, store.clone(), config.small_audience),
            limits: AddressLimits::new(limits),
            guests: Guests::new(guests),
            followers: Followers::new(config.followers_per_key),
            in_flight: notify::AcceptingKeys::default(),
            config,
            store,
        }))
    }

    /// Number of addresses without a key that are limited now, and number of requests that follow notifications.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.limits.len(), self.followers.len())
    }

    /// Removes addresses that have kept within their limits, from time to time, until the soft phase of the drain.
    async fn forget_limits(self, drain: Drain) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                () = pulse(limits::FORGET_EVERY) => self.limits.forget(),
                () = drain.soft() => return Ok(()),
            }
        }
    }
}

/// Registers the routes and the tasks.
pub(crate) fn mount(host: &mut Host, api: &ApiState) {
    // The files of the page are at the root: a service worker serves only pages that are not above it.
    let has_page = api.config.page && host.prefix.is_empty();
    match host.prefix {
        "" => host.routes(routes(api, has_page)),
        prefix => {
            host.routes(routes(api, has_page).layer(map_response(move |response| below(prefix, response))));
        }
    }
    host.admin_read(services::admin_read(api.clone()));
    host.admin_write(services::admin_write(api.clone()));
    host.admin_write(vapid::admin_write(Arc::clone(&api.vapid)));
    host.task("push limits", {
        let (api, drain) = (api.clone(), host.drain.clone());
        move || api.clone().forget_limits(drain.clone())
    });
    host.task("push followers", {
        let (api, drain) = (api.clone(), host.drain.clone());
        move || api.followers.clone().run(api.clone(), drain.clone())
    });
}

/// Puts the prefix of the module before the path that an answer names.
async fn below(prefix: &'static str, mut response: Response) -> Response {
    let location = response.headers().get(LOCATION).and_then(|path| path.to_str().ok());
    let location = location.and_then(|path| HeaderValue::try_from(format!("{prefix}{path}")).ok());
    if let Some(location) = location {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn routes(api: &ApiState, has_page: bool) -> OpenApiRouter {
    let from_pages = OpenApiRouter::new()
        .routes(routes!(subscriptions::key))
        .routes(routes!(subscriptions::subscribe, subscriptions::unsubscribe, subscriptions::list))
        .layer(subscriptions::cors(api.access.sites()));
    let mut routes = OpenApiRouter::new()
        .merge(from_pages)
        .routes(routes!(subscriptions::one, subscriptions::delete))
        // The notification of a client that leaves early is sent all the same; the client may ask again with the
        // same Idempotency-Key.
        .merge(OpenApiRouter::new().routes(routes!(notify::notify)).layer(Detach))
        .routes(routes!(notifications::list))
        .routes(routes!(notifications::one, lifecycle::set_rate))
        .routes(routes!(lifecycle::pause))
        .routes(routes!(lifecycle::resume))
        .routes(routes!(lifecycle::cancel))
        .routes(routes!(lifecycle::events))
        .routes(routes!(lifecycle::deliveries))
        .routes(routes!(users::one, users::delete));
    routes = routes.merge(page::script().into());
    if has_page {
        routes = routes.merge(page::routes().into());
    }
    routes.with_state(api.clone())
}
