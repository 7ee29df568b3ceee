//! Jobs that run beside requests in the same process, and survive it.
//!
//! | module | content |
//! |---|---|
//! | [`job`] | a job is a type: its kind, its options, its `run`, and the outcomes of a run |
//! | [`registry`] | the kinds that a process can run, and the slots of each queue |
//! | [`jobs`] | the handle of applications and operators |
//! | [`state`] | the states of a job, as one pure function |
//! | [`queue`] | the operations of a job store for enqueueing and for workers |
//! | [`job_admin`] | the job admin: list, retry, discard, cancel, pause |
//! | [`store`] | the stores |
//! | [`cron`] | schedules: jobs that are enqueued by the clock |
//! | [`schedules`] | the operations of a job store for schedules |
//! | [`outbox`] | jobs of a transaction in one store, published to another store |
//! | [`worker`] | claim, run, renew, settle |
//! | [`upkeep`] | maintenance: claim jobs with an expired lease, count jobs |
//! | [`admission`] | bounds on how many jobs and bytes may wait |
//! | [`limits`] | limits after which a process is recycled |
//! | [`lease`] | the right to work on a job, by a clock that goes on while the process is stopped |
//! | [`wake`] | wakes workers of queues that may have a job to claim |
//! | [`metrics`] | every metric of the engine |
//!
//! A job that was enqueued runs **at least once**, until it is done, cancelled or dead. Every claim raises the
//! *epoch* of the job, which is a fencing token: renewing and settling carry it, and so do the rows that a job
//! writes elsewhere. A worker whose lease has expired settles nothing.

pub mod admission;
pub mod cron;
mod encoding;
pub mod job;
pub mod job_admin;
pub mod jobs;
pub mod lease;
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
pub use job_admin::JobAdmin;
pub use jobs::Jobs;
pub use queue::{NewJob, Queue};
pub use registry::Registry;
pub use schedules::Schedules;
pub use worker::Worker;
