//! Addresses of the running server: `addresses.json` in the data directory, for scripts and for commands of this
//! program.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::data_dir::{self, ADDRESSES};

/// The addresses of all listeners, as they are written in settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Addresses {
    pub(crate) server: Vec<String>,
    pub(crate) admin: Vec<String>,
    /// Addresses of the listeners of modules, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) listeners: BTreeMap<String, Vec<String>>,
}

impl Addresses {
    /// Reads the addresses of the server that runs on this data directory.
    pub(crate) fn of_running(path: &Path) -> anyhow::Result<Self> {
        let file = path.join(ADDRESSES);
        data_dir::check_access(path)?;
        // A killed server leaves its file behind, and another program may listen at its addresses by now.
        if !data_dir::is_locked(path) {
            bail!("no server runs on {}", path.display());
        }
        let opened = File::open(&file)
            .with_context(|| format!("the server on {} has not opened its listeners yet", path.display()))?;
        serde_json::from_reader(opened).with_context(|| format!("{} is no JSON", file.display()))
    }

    /// URL with which commands of this program reach the admin listener.
    pub(crate) fn admin_url(&self) -> anyhow::Result<String> {
        url(&self.admin)
            .context("this command cannot use a Unix socket, and the server has no other admin address")
    }
}

/// The URL of the first of these addresses that a client on this machine can open; `None` if all are Unix sockets.
pub(crate) fn url(addresses: &[String]) -> Option<String> {
    let address = addresses.iter().find(|address| !address.starts_with("unix:"))?;
    let url = if address.contains("://") { address.clone() } else { format!("http://{address}") };
    // A client cannot connect to the unspecified address; on this machine, the loopback address reaches the listener.
    Some(url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_one_that_can_be_opened_here() {
        let of = |addresses: &[&str]| {
            url(&addresses.iter().map(|address| (*address).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["unix:/run/p.sock", "0.0.0.0:8080"]).unwrap(), "http://127.0.0.1:8080");
        assert_eq!(of(&["https://[::]:443"]).unwrap(), "https://[::1]:443");
        assert_eq!(of(&["10.0.0.1:80", "127.0.0.1:81"]).unwrap(), "http://10.0.0.1:80");
        assert_eq!(of(&["unix:/run/p.sock"]), None);
    }
}
