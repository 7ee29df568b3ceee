//! Listeners, and what is spoken on them: everything that a web server used to do around the code that one actually wants to
//! run. It knows no store, no queue, no push and no domain.
//!
//! | module | what it is |
//! |---|---|
//! | [`net`] | sockets: where to listen, who may connect, how many, and for how long |
//! | [`http`] | HTTP on them: the per-request scope, the stack around a router |
//! | [`tcp`] | protocols beside HTTP on them |
//! | [`metrics`] | every metric of these |

pub mod http;
pub mod metrics;
pub mod net;
pub mod tcp;
