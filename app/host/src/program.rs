//! The identity of this program: its name, version and prefix of environment variables. It is the same for the whole
//! process, and set once at its start.

use std::borrow::Cow;
use std::sync::OnceLock;

use crate::built;

/// Name of the program when an application sets none.
const PERENNIAL: &str = "perennial";

/// The identity of a program.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) name: Cow<'static, str>,
    pub(crate) version: Cow<'static, str>,
    /// What the program is, for its usage and `/openapi.json`; empty for that of Perennial.
    pub(crate) about: Cow<'static, str>,
    /// Prefix of environment variables that are settings, with its underscore.
    pub(crate) env_prefix: Cow<'static, str>,
}

impl Default for Identity {
    fn default() -> Self {
        Self {
            name: PERENNIAL.into(),
            version: built::VERSION.into(),
            about: "".into(),
            env_prefix: "PERENNIAL_".into(),
        }
    }
}

static IDENTITY: OnceLock<Identity> = OnceLock::new();

/// Sets the identity. Only the first call counts.
pub(crate) fn identify(identity: &Identity) {
    IDENTITY.get_or_init(|| identity.clone());
}

/// The identity of this process.
pub(crate) fn identity() -> &'static Identity {
    IDENTITY.get_or_init(Identity::default)
}

/// Name of the program, as a person calls it on the command line.
pub fn name() -> &'static str {
    &identity().name
}

/// A text with examples of commands, in the name of this program.
pub(crate) fn in_its_name(text: &str) -> Cow<'_, str> {
    if name() == PERENNIAL { text.into() } else { text.replace("perennial ", &format!("{} ", name())).into() }
}
