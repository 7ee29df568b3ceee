//! Jobs that run beside requests, in the same process, and survive it.
//!
//! | module | what it is |
//! |---|---|
//! | [`job`] | a job is a type: its kind, its options, its `run`, and the fates it may meet |
//! | [`state`] | a job's life as one pure function |
//! | [`queue`] | what a store of jobs can do |
//! | [`worker`] | claim, run, renew, settle |
//! | [`rescue`] | what happens to the jobs of a worker that died |
//! | [`lease`] | the right to work on a job, by a clock that does not stop when the process does |
//! | [`store`] | the stores: SQLite |
//! | [`metrics`] | every metric of the engine |
//!
//! What is promised: a job that was enqueued runs **at least once**, until it is done or given up for dead.
//! Every claim raises the job's *epoch*; renewing and settling carry it, and so do the rows that a job writes
//! elsewhere. A worker whose lease has lapsed settles nothing.

pub mod job;
pub mod lease;
pub mod metrics;
pub mod queue;
pub mod rescue;
pub mod state;
pub mod store;
pub mod worker;

pub use job::{Context, Fate, Job, Options, Registry};
pub use queue::{NewJob, Queue};
pub use worker::Worker;
