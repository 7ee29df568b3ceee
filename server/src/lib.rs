//! The host of a long-lived application: everything that an FPM pool, a process supervisor and a web server
//! used to do around the code that one actually wants to run.
//!
//! It knows no queue, no push and no domain. What it offers is one file a noun:
//!
//! | module | what it is |
//! |---|---|
//! | [`drain`] | the stop signal as a value: phases that every component receives as an argument |
//! | [`tasks`] | the only way to start a long-lived task: a name, an owner, a stated death |
//! | [`signal`] | SIGTERM, SIGINT, SIGHUP as a stream |
//! | [`health`] | readiness conditions, the heartbeat and what the probes answer |
//! | [`metrics`] | every metric of the host, and the Prometheus recorder |
//! | [`telemetry`] | logs |
//! | [`net`] | sockets: where to listen, who may connect, how many, and for how long |
//! | [`http`] | HTTP on them: the per-request scope, the stack around a router |
//! | [`tcp`] | protocols beside HTTP on them |
//! | [`cpu`] | work for the processor, off the threads that serve |
//! | [`cgroup`] | what a pod may have of processors and memory |
//! | [`pool`] | stores behind bounded waits |
//! | [`cache`] | what need not be asked of them again |
//! | [`backoff`] | how long to wait before trying again |
//! | [`breaker`] | not asking, for a while, a dependency that fails again and again |

pub mod backoff;
pub mod breaker;
pub mod cache;
pub mod cgroup;
pub mod cpu;
pub mod drain;
pub mod health;
pub mod http;
pub mod metrics;
pub mod net;
pub mod pool;
pub mod pulse;
pub mod signal;
pub mod tasks;
pub mod tcp;
pub mod telemetry;
