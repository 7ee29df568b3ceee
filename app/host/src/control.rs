//! The parts of the process that run from before boot until after the stop: the admin listener, and the tasks that watch
//! the process.

use std::sync::Arc;

use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_runtime::health::Health;
use perennial_runtime::metrics::Metrics;
use perennial_runtime::tasks::Tasks;
use perennial_runtime::telemetry::Telemetry;
use perennial_server::http::Server;
use perennial_server::net::Sockets;
use tokio::runtime::Handle;

use crate::admin::Admin;
use crate::boot;
use crate::config::Config;
use crate::handover::Inheritance;
use crate::settings::Settings;
use crate::supervisor;

/// The parts of the control runtime, which run from before boot until after the stop.
pub(crate) struct Control {
    pub(crate) background: Tasks,
    /// Drain that is hard when everything else has ended.
    pub(crate) drain: Drain,
    pub(crate) health: Health,
    pub(crate) metrics: Metrics,
    pub(crate) telemetry: Arc<Telemetry>,
    /// The settings in effect.
    pub(crate) running: Arc<Mutex<Settings>>,
}

/// The open admin listener.
pub(crate) struct OpenAdmin {
    pub(crate) known: Admin,
    pub(crate) sockets: Sockets,
    pub(crate) addresses: Vec<String>,
}

impl Control {
    /// Opens the admin listener, and starts the tasks that watch the process.
    pub(crate) async fn open_admin(
        &self,
        config: &Config,
        inheritance: &Inheritance,
        serving: &Handle,
    ) -> anyhow::Result<OpenAdmin> {
        let Self { background, drain, health, metrics, telemetry, running } = self;
        let admin = Server::bind(config.admin.clone(), &inheritance.sockets).await.map_err(|error| {
            inheritance.warn_of_the_rest();
            boot::not_opened(error, "admin.listen")
        })?;
        let known = Admin::new(
            health.clone(),
            metrics.clone(),
            Arc::clone(telemetry),
            Arc::clone(running),
            &config.admin.net.listen,
            admin.connections(),
        );
        let open = OpenAdmin { known: known.clone(), sockets: admin.sockets(), addresses: admin.addresses() };
        background.critical("admin", admin.run(known.router(), None, drain.clone()));
        background.contained("metrics upkeep", {
            let (metrics, drain) = (metrics.clone(), drain.clone());
            move || metrics.clone().upkeep(drain.clone())
        });
        {
            let _on_serving = serving.enter();
            let (health, drain) = (health.clone(), drain.clone());
            background.contained("heartbeat", move || health.clone().heartbeat(drain.clone()));
        }
        background.critical("watchdog", supervisor::watchdog(health.clone(), drain.clone()));
        Ok(open)
    }
}
