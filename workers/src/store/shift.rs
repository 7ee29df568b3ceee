//! Time for tests: instead of a clock that jumps, everything that the store has written down is shifted into the past.

use std::time::Duration;

use perennial_store::pool::sql::{Dialect, Result, Store};
use perennial_store::values;

/// Lets jobs, their retries, and schedules in a SQL store be as if `by` had passed. Leases on SQLite follow a clock that
/// does not jump.
///
/// # Errors
/// When the store fails.
pub async fn shift(store: &Store, by: Duration) -> Result<()> {
    let ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    match store.dialect() {
        Dialect::Sqlite => {
            let sql = "UPDATE jobs SET run_at = run_at - ?1, scheduled_at = scheduled_at - ?1,
                              created_at = created_at - ?1, recovered_at = recovered_at - ?1";
            store.execute(sql, values![ms]).await?;
        }
        Dialect::Postgres => {
            let sql = "UPDATE jobs SET run_at = run_at - $1 * interval '1 ms',
                              scheduled_at = scheduled_at - $1 * interval '1 ms',
                              lease_until = lease_until - $1 * interval '1 ms',
                              recovered_at = recovered_at - $1 * interval '1 ms'";
            store.execute(sql, values![ms as f64]).await?;
        }
    }
    let sql = "UPDATE schedules SET last_fire = last_fire - $1, queued = queued - $1, seen_at = seen_at - $1";
    store.execute(sql, values![ms]).await?;
    Ok(())
}
