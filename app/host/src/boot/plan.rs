//! The input of boot.

use std::io;

use perennial_server::http::Server;
use perennial_server::net::BindError;
use perennial_store::pool::sql::Tables;

use crate::config::Config;
use crate::data_dir::SecretFile;
use crate::handover::Inheritance;

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
    /// Opens the public listener.
    pub(super) async fn listen(&self) -> anyhow::Result<Server> {
        Server::bind(self.config.server.clone(), &self.inheritance.sockets).await.map_err(|error| {
            // An inherited socket that is not taken over may be the cause.
            self.inheritance.warn_of_the_rest();
            not_opened(error, "server.listen")
        })
    }
}

/// Makes the error for a listener that could not be opened, with the setting that has its address.
pub(crate) fn not_opened(error: BindError, setting: &'static str) -> anyhow::Error {
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
