//! Building blocks of a long-lived process, independent of what it serves.
//!
//! | module | contents |
//! |---|---|
//! | [`drain`] | the stop signal as a value: phases that every component receives as an argument |
//! | [`tasks`] | the only way to start a long-lived task, which has a name, an owner and a stated meaning of its end |
//! | [`signal`] | SIGTERM, SIGQUIT, SIGINT, SIGHUP and SIGUSR2 as a stream |
//! | [`health`] | readiness conditions, the heartbeat and the answers of the probes |
//! | [`metrics`] | the recorder that Prometheus reads, and the metrics of the process |
//! | [`telemetry`] | logs |
//! | [`cpu`] | CPU-bound work, on threads of its own |
//! | [`cgroup`] | the CPU and memory limits of a pod, and the memory pressure |
//! | [`pulse`] | periodic background waits that end together |
//! | [`running`] | counts of running work by key |
//! | [`backoff`] | the wait before the next attempt |
//! | [`breaker`] | a circuit breaker: no calls for a while to a dependency that keeps failing |

pub mod backoff;
pub mod breaker;
pub mod cgroup;
pub mod cpu;
pub mod drain;
pub mod health;
pub mod metrics;
pub mod panics;
pub mod pulse;
pub mod running;
pub mod signal;
pub mod tasks;
pub mod telemetry;
