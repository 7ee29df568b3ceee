//! Time for tests: instead of a clock that jumps, everything that the store has written down is shifted into the past.

use jiff::SignedDuration;
use perennial_store::pool::sql::{Dialect, Result, Store, Tx};
use perennial_store::{transact, values};

/// Lets jobs, their retries, and schedules in a SQL store be as if `by` had passed; a negative time is a clock that is set
/// back. Leases on SQLite follow a clock that does not jump.
///
/// # Errors
/// When the store fails.
pub async fn shift(store: &Store, by: SignedDuration) -> Result<()> {
    let ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    transact!(store, tx => shift_in(tx, ms))
}

async fn shift_in<T: Tx>(tx: &T, ms: i64) -> Result<()> {
    let jobs = match tx.dialect() {
        Dialect::Sqlite => {
            "UPDATE jobs SET run_at = run_at - ?1, scheduled_at = scheduled_at - ?1,
                    created_at = created_at - ?1, recovered_at = recovered_at - ?1"
        }
        Dialect::Postgres => {
            "UPDATE jobs SET run_at = run_at - ?1 * interval '1 ms',
                    scheduled_at = scheduled_at - ?1 * interval '1 ms',
                    lease_until = lease_until - ?1 * interval '1 ms',
                    recovered_at = recovered_at - ?1 * interval '1 ms'"
        }
    };
    tx.execute(jobs, &values![ms]).await?;
    let schedules =
        "UPDATE schedules SET last_fire = last_fire - ?1, queued = queued - ?1, seen_at = seen_at - ?1";
    tx.execute(schedules, &values![ms]).await?;
    Ok(())
}
