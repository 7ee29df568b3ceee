//! The input of boot.

use std::io;

use perennial_server::http::Server;
use perennial_server::net::{BindError, Connections, Sockets};
use perennial_store::pool::sql::Tables;

use super::open;
use crate::config::Config;
use crate::data_dir::SecretFile;
use crate::handover::Inheritance;
use crate::listeners::OpenListener;
use crate::module::{self, Blueprint};
use crate::settings::Settings;

/// The input of boot: everything that was read before anything is changed.
pub(crate) struct BootPlan {
    pub(crate) config: Config,
    pub(crate) tables: Vec<Tables>,
    /// The secret files of the modules.
    pub(crate) files: Vec<SecretFile>,
    /// The directories of the modules, within the data directory.
    pub(crate) directories: Vec<&'static str>,
    pub(crate) inheritance: Inheritance,
    /// Addresses of the admin listener.
    pub(crate) admin_addresses: Vec<String>,
}

impl BootPlan {
    /// Makes the plan from everything that was read, and the addresses of the admin listener.
    pub(crate) fn new(
        config: Config,
        modules: &[Blueprint],
        settings: &Settings,
        inheritance: Inheritance,
        admin_addresses: Vec<String>,
    ) -> Self {
        Self {
            config,
            tables: open::tables(modules.iter().map(|module| module.tables)),
            files: modules.iter().flat_map(|module| (module.files)(settings)).collect(),
            directories: module::directories(modules),
            inheritance,
            admin_addresses,
        }
    }

    /// Opens the public listener, and the listeners of modules.
    pub(super) async fn listen(&self) -> anyhow::Result<OpenServers> {
        let opened = self.open_listeners().await;
        if opened.is_err() {
            // An inherited socket that is not taken over may be the cause.
            self.inheritance.warn_of_the_rest();
        }
        opened
    }

    async fn open_listeners(&self) -> anyhow::Result<OpenServers> {
        let inherited = &self.inheritance.sockets;
        let public = Server::bind(self.config.server.clone(), inherited).await;
        let public = public.map_err(|error| not_opened(error, "server.listen"))?;
        let mut named = Vec::new();
        for listener in &self.config.listeners {
            named.push(listener.open(inherited).await?);
        }
        Ok(OpenServers { public, named })
    }
}

/// The listeners of visitors, whose sockets are open.
pub(super) struct OpenServers {
    pub(super) public: Server,
    /// The listeners of modules.
    pub(super) named: Vec<OpenListener>,
}

impl OpenServers {
    /// The sockets of all of them, to hand them over.
    pub(super) fn sockets(&self) -> Vec<Sockets> {
        [self.public.sockets()].into_iter().chain(self.named.iter().map(OpenListener::sockets)).collect()
    }

    /// The connections of all of them, those of the public listener first.
    pub(super) fn connections(&self) -> Vec<Connections> {
        let named = self.named.iter().filter_map(OpenListener::connections);
        [self.public.connections()].into_iter().chain(named).collect()
    }
}

/// Makes the error for a listener that could not be opened, with the setting that has its address.
pub(crate) fn not_opened(error: BindError, setting: &str) -> anyhow::Error {
    let is_taken =
        matches!(&error, BindError::Address { source, .. } if source.kind() == io::ErrorKind::AddrInUse);
    let remedy = match is_taken {
        true => format!(
            "{setting}: another program listens there (or a socket that was inherited for another address, which a warning names); stop it, or choose another address (--set {setting}=127.0.0.1:PORT)"
        ),
        false => format!("{setting}: the listener cannot be opened"),
    };
    anyhow::Error::from(error).context(remedy)
}
