//! Decides when the next message of a notification may be sent, and whether any may be.

pub(crate) mod active;
pub(crate) mod pace;
