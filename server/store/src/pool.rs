//! Stores in which every wait is bounded.

mod bounded;
mod causes;
mod holders;
mod migrations;
pub mod postgres;
pub mod redis;
pub mod sql;
pub mod sqlite;
pub(crate) mod status;
mod tls;
mod unreadable;
mod url;

pub use causes::with_causes;
pub use migrations::{Migrations, Newer};
pub use status::PoolStatus;
pub use unreadable::set_apart;
pub use url::Url;
