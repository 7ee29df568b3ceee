//! Jobs that run beside requests, in the same process, and survive it.
//!
//! | module | what it is |
//! |---|---|
//! | [`job`] | a job is a type: its kind, its options, its `run`, and the fates it may meet |
//! | [`registry`] | the kinds that a process can run, and how many of each queue at once |
//! | [`jobs`] | the handle of applications and operators |
//! | [`state`] | a job's life as one pure function |
//! | [`queue`] | what a store of jobs can do for those who enqueue and those who work |
//! | [`ledger`] | what it can do for operators: look, retry, discard, cancel, pause |
//! | [`store`] | the stores |
//! | [`cron`] | schedules: jobs that are enqueued by the clock; [`schedules`] what a store can do for them |
//! | [`outbox`] | jobs of a transaction in one store that are kept in another |
//! | [`worker`] | claim, run, renew, settle |
//! | [`upkeep`] | take jobs from workers that died, count, forget |
//! | [`admission`] | how much may wait |
//! | [`limits`] | when a process has done enough |
//! | [`lease`] | the right to work on a job, by a clock that does not stop when the process does |
//! | [`wake`] | who tells a worker that there is something to do |
//! | [`metrics`] | every metric of the engine |
//!
//! What is promised: a job that was enqueued runs **at least once**, until it is done, cancelled, or given up
//! for dead. Every claim raises the job's *epoch*; renewing and settling carry it, and so do the rows that a job
//! writes elsewhere. A worker whose lease has lapsed settles nothing.

pub mod admission;
pub mod cron;
pub mod job;
pub mod jobs;
pub mod lease;
pub mod ledger;
pub mod limits;
pub mod metrics;
pub mod outbox;
pub mod queue;
pub mod registry;
pub mod schedules;
pub mod state;
pub mod store;
pub mod upkeep;
pub mod wake;
pub mod worker;

pub use cron::{Crontab, Schedule};
pub use job::{Context, Job, JobOutcome, Options};
pub use jobs::Jobs;
pub use ledger::JobAdmin;
pub use queue::{NewJob, Queue};
pub use registry::Registry;
pub use schedules::Schedules;
pub use worker::Worker;
