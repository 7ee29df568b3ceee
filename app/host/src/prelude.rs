//! The names that most modules use: `use perennial::prelude::*`.

pub use axum::Router;
pub use axum::extract::State;
pub use axum::routing::{delete, get, patch, post, put};
pub use perennial_runtime::drain::Drain;
pub use perennial_store::pool::sql::{FromRow, Row, Store, StoreTransaction, Tx};
pub use perennial_store::values;
pub use perennial_workers::{Context, Job, JobOutcome, Jobs, NewJob, Options, Schedule};

pub use crate::Perennial;
pub use crate::api::{Form, Json, Path, Query, Result};
pub use crate::module::{Host, Module, Need, Provides};
pub use crate::settings::Reader;
