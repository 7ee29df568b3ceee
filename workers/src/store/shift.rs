//! Time for tests: instead of a clock that jumps, everything that the store has written down is shifted into the past.

use jiff::SignedDuration;
use perennial_store::pool::redis::{self, Redis, client::Script};
use perennial_store::pool::sql::{Dialect, Result, Store, Tx};
use perennial_store::{transact, values};

/// Shifts the scores of the sorted sets in `KEYS` by `ARGV[1]` milliseconds.
const SCORES: &str = "
    for _, key in ipairs(KEYS) do
        for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do
            redis.call('ZINCRBY', key, -ARGV[1], id)
        end
    end";

/// Shifts the times of the schedules below the prefix `KEYS[1]` by `ARGV[1]` milliseconds.
const SCHEDULES: &str = "
    for _, name in ipairs(redis.call('SMEMBERS', KEYS[1] .. ':schedules')) do
        local schedule = KEYS[1] .. ':schedule:' .. name
        for _, field in ipairs({ 'last_fire', 'queued', 'seen_at' }) do
            if redis.call('HEXISTS', schedule, field) == 1 then
                redis.call('HINCRBY', schedule, field, -ARGV[1])
            end
        end
    end";

/// Sorted sets of a queue whose scores are times.
const TIMES: [&str; 3] = ["leases", "scheduled", "waits"];

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

/// Lets jobs of these queues, their leases, and schedules in Redis be as if `by` had passed: see [`shift`].
///
/// # Errors
/// When Redis fails.
pub async fn shift_redis(
    redis: &Redis,
    prefix: &str,
    queues: impl IntoIterator<Item = &str>,
    by: SignedDuration,
) -> redis::Result<()> {
    let ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
    for queue in queues {
        shift_scores(redis, prefix, queue, &TIMES, ms).await?;
    }
    let script = Script::new(SCHEDULES);
    let mut invocation = script.prepare_invoke();
    redis.invoke(invocation.key(prefix).arg(ms)).await
}

/// Shifts the scores of these sorted sets of a queue into the past, by a number of milliseconds.
///
/// # Errors
/// When Redis fails.
pub async fn shift_scores(
    redis: &Redis,
    prefix: &str,
    queue: &str,
    parts: &[&str],
    ms: i64,
) -> redis::Result<()> {
    let script = Script::new(SCORES);
    let mut invocation = script.prepare_invoke();
    for part in parts {
        invocation.key(format!("{prefix}:{{{queue}}}:{part}"));
    }
    redis.invoke(invocation.arg(ms)).await
}
