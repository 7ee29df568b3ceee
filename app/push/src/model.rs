//! The model of web push: values and decisions, without routes, tasks and SQL statements.

pub(crate) mod audience;
pub(crate) mod endpoint;
pub(crate) mod jobs;
pub(crate) mod notification;
pub(crate) mod outcome;
pub(crate) mod profile;
pub(crate) mod queues;
pub(crate) mod refusals;
pub(crate) mod schedule;
pub(crate) mod tags;
pub(crate) mod template;
