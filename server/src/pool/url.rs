//! Where a server is: said once, or in a file that somebody changes when the password does.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

/// The URL of a server. It may hold a password.
#[derive(Clone, Debug)]
pub struct Url {
    /// The URL, or what the file said when it was read for the first time.
    pub text: SecretString,
    /// A file with it.
    pub file: Option<PathBuf>,
}

impl From<&str> for Url {
    fn from(text: &str) -> Self {
        Self { text: text.into(), file: None }
    }
}

impl Url {
    /// What it is now, if that is another than this.
    pub(super) fn changed(&self) -> Option<Self> {
        let text = std::fs::read_to_string(self.file.as_ref()?).ok()?;
        let text = text.trim_end_matches(['\r', '\n']);
        let is_new = !text.trim().is_empty() && text != self.text.expose_secret();
        is_new.then(|| Self { text: text.into(), file: self.file.clone() })
    }
}
