//! The URL of a server: fixed, or read from a file that changes when the password does.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use secrecy::{ExposeSecret, SecretString};
use tracing::{info, warn};

use super::causes::with_causes;

/// The URL of a server. It may hold a password.
#[derive(Clone, Debug)]
pub struct Url {
    /// The URL, or the content of the file when it was read for the first time.
    pub text: SecretString,
    /// The file that has the URL, if there is one.
    pub file: Option<PathBuf>,
    /// A different URL that the file had at the last check, and whether it was tried since. It may have been incomplete
    /// then.
    seen: Arc<Mutex<Option<(SecretString, bool)>>>,
}

/// The connections to the server with the current URL. The URL may change with its file while the process runs.
pub(super) struct Reloadable<T>(RwLock<Arc<T>>);

impl<T> Reloadable<T> {
    pub(super) fn new(connections: T) -> Self {
        Self(RwLock::new(Arc::new(connections)))
    }

    /// The current connections. Those of a previous URL end when the last caller that uses them, or waits for one, is done.
    pub(super) fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read())
    }

    /// Changes to the URL in the file, if it is a different one and `open` can use it. Logs the change, or the failure once;
    /// returns true when it has changed.
    pub(super) async fn follow<E: Error>(
        &self,
        server: &str,
        url: impl Fn(&T) -> &Url,
        open: impl AsyncFnOnce(Url) -> Result<T, E>,
    ) -> bool {
        let Some(Candidate { url, was_tried }) = url(&self.get()).changed() else { return false };
        match open(url).await {
            Ok(connections) => {
                info!("the URL of {server} has changed: connecting anew");
                *self.0.write() = Arc::new(connections);
                true
            }
            Err(_) if was_tried => false,
            Err(error) => {
                warn!(
                    error = with_causes(&error),
                    "the URL of {server} has changed, and cannot be used: the previous one stays in use"
                );
                false
            }
        }
    }
}

/// A URL that may replace the current one.
struct Candidate {
    url: Url,
    /// Whether this URL was tried before, so that the reason of its failure is logged already.
    was_tried: bool,
}

impl From<&str> for Url {
    fn from(text: &str) -> Self {
        Self::new(text.into(), None)
    }
}

impl Url {
    /// Creates a URL that may change with the content of `file`.
    pub fn new(text: SecretString, file: Option<PathBuf>) -> Self {
        Self { text, file, seen: Arc::default() }
    }

    /// The place of the server without secrets: its hosts and ports, or the directory of its socket.
    pub fn place(&self) -> String {
        let text = self.text.expose_secret();
        let rest = text.split_once("://").map_or("", |(_, rest)| rest);
        let rest = rest.rsplit_once('@').map_or(rest, |(_, place)| place);
        let (hosts, more) = rest.find(['/', '?']).map_or((rest, ""), |at| rest.split_at(at));
        if !hosts.is_empty() {
            let hosts: Vec<&str> = hosts.split(',').map(without_odd_port).collect();
            return hosts.join(",");
        }
        let options = more.split_once('?').map_or("", |(_, options)| options).split('&');
        let host = options.into_iter().find_map(|option| option.strip_prefix("host="));
        host.unwrap_or_else(|| more.split('?').next().unwrap_or_default()).to_owned()
    }

    /// Returns the URL in the file, if it differs from this one and was the same at two checks in a row.
    fn changed(&self) -> Option<Candidate> {
        let text = std::fs::read_to_string(self.file.as_ref()?).ok()?;
        let text = text.trim_end_matches(['\r', '\n']);
        let mut seen = self.seen.lock();
        if text.trim().is_empty() || text == self.text.expose_secret() {
            *seen = None;
            return None;
        }
        let before = seen.replace((text.into(), false));
        let (_, was_tried) = before.filter(|(before, _)| before.expose_secret() == text)?;
        *seen = Some((text.into(), true));
        Some(Candidate { url: Self::new(text.into(), self.file.clone()), was_tried })
    }
}

/// A host with its port, if the port is a number. Any other text in its place may be a misplaced password and is cut
/// off.
fn without_odd_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') && port.parse::<u16>().is_err() => name,
        _ => host,
    }
}
