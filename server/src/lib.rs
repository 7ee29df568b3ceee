//! Listeners and the protocols on them: everything that a web server does around the handlers of an application. This
//! crate knows no store, no queue, no push notifications and no domain.
//!
//! | module | content |
//! |---|---|
//! | [`net`] | sockets: addresses, access, connection limits and deadlines |
//! | [`http`] | HTTP on these sockets: the per-request scope, the stack around a router |
//! | [`tcp`] | other protocols on these sockets |
//! | [`udp`] | datagrams |
//! | [`metrics`] | all metrics of this crate |

pub mod http;
pub mod metrics;
pub mod net;
pub mod tcp;
pub mod udp;
