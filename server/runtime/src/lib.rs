//! What a long-lived process is made of, whatever it serves: one file a noun.
//!
//! | module | what it is |
//! |---|---|
//! | [`drain`] | the stop signal as a value: phases that every component receives as an argument |
//! | [`tasks`] | the only way to start a long-lived task: a name, an owner, a stated death |
//! | [`signal`] | SIGTERM, SIGINT, SIGHUP as a stream |
//! | [`health`] | readiness conditions, the heartbeat and what the probes answer |
//! | [`metrics`] | the recorder that Prometheus reads, and the metrics of the process |
//! | [`telemetry`] | logs |
//! | [`cpu`] | work for the processor, off the threads that serve |
//! | [`cgroup`] | what a pod may have of processors and memory |
//! | [`pulse`] | background waits that end together |
//! | [`backoff`] | how long to wait before trying again |
//! | [`breaker`] | not asking, for a while, a dependency that fails again and again |

pub mod backoff;
pub mod breaker;
pub mod cgroup;
pub mod cpu;
pub mod drain;
pub mod health;
pub mod metrics;
pub mod panics;
pub mod pulse;
pub mod signal;
pub mod tasks;
pub mod telemetry;
