//! The log of deliveries.

use jiff::Timestamp;
use perennial_store::pool::sql::{Result, Row};

use super::timestamp;

/// A logged delivery to one subscription.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct DeliveryView {
    subscription: i64,
    outcome: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u32>,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    at: Timestamp,
}

impl DeliveryView {
    pub(super) fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            subscription: row.get("subscription")?,
            outcome: row.get("outcome")?,
            status: row.get("status")?,
            detail: row.get("detail")?,
            at: timestamp(row.get("at")?),
        })
    }
}
