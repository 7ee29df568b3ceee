//! Claiming, which stays fast when an index has many dead entries.
//!
//! A row that was claimed leaves a dead entry in the index of ready jobs, at its head, where the next claim begins
//! to look. Usually these entries are cleared away in passing. But while another session holds an old snapshot (a
//! long report, a backup) they have to stay, and every claim would walk over all of them. So when looking from the
//! head has become slow, most claims begin where the last one ended (a *cursor* for each priority). The head is
//! looked at again from time to time, seldom enough to take a small part of the time: for jobs that were enqueued
//! with an older due time, and for priorities that have no cursor yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use perennial_store::pool::postgres::{Parameter, Postgres, PostgresConnection, Session};
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use uuid::Uuid;

use super::{CLAIMED, WHEN_STARTED, claimed, give_back, key_of, seconds};
use crate::queue::{Claim, Claimed, Claims, Lapsed, Result};

/// Time from which on a look from the head is slow.
const SLOW: Duration = Duration::from_millis(10);
/// Factor for the pause after a slow look from the head: this many times as long as the look took.
const SELDOM: u32 = 20;
/// Longest pause between two looks from the head.
const AT_LEAST: Duration = Duration::from_secs(5);
/// How often to look for jobs that have become due, while no due time is known.
const PROMOTE: Duration = Duration::from_millis(250);
/// Highest number of jobs that one query makes ready.
const PROMOTED: i64 = 1000;

/// Where the last claims of each queue ended. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursors(Arc<Mutex<HashMap<Arc<str>, Cursor>>>);

#[derive(Clone, Debug)]
struct Cursor {
    /// The last job that was claimed, of each priority.
    last: BTreeMap<i16, (Timestamp, Uuid)>,
    /// When to look from the head again.
    head_at: Instant,
    /// When to look again for jobs that have become due.
    promote_at: Instant,
}

impl Cursors {
    fn get(&self, queue: &Arc<str>) -> Cursor {
        let mut cursors = self.0.lock();
        let now = Instant::now();
        let new = || Cursor { last: BTreeMap::new(), head_at: now, promote_at: now };
        cursors.entry(Arc::clone(queue)).or_insert_with(new).clone()
    }

    /// Notes that a job becomes due after this wait, so that the next look is not too late for it.
    pub(super) fn due_in(&self, queue: &str, wait: Duration) {
        let mut cursors = self.0.lock();
        if let (Some(cursor), Some(at)) = (cursors.get_mut(queue), Instant::now().checked_add(wait)) {
            cursor.promote_at = cursor.promote_at.min(at);
        }
    }

    fn change(&self, queue: &Arc<str>, change: impl FnOnce(&mut Cursor)) {
        if let Some(cursor) = self.0.lock().get_mut(queue) {
            change(cursor);
        }
    }
}

pub(super) async fn claim(postgres: &Postgres, cursors: &Cursors, claim: Claim) -> Result<Claims> {
    let connection = postgres.get().await?;
    let cursor = cursors.get(&claim.queue);
    let next_in = if cursor.promote_at <= Instant::now() {
        let next_in = promote(&connection, &claim.queue).await?;
        let again = Instant::now() + next_in.unwrap_or(PROMOTE).min(PROMOTE);
        cursors.change(&claim.queue, |cursor| cursor.promote_at = again);
        next_in
    } else {
        Some(cursor.promote_at - Instant::now())
    };
    let is_from_head = cursor.head_at <= Instant::now() || cursor.last.is_empty();
    let rows = if is_from_head {
        let began = Instant::now();
        // If this query takes so long that it is cancelled, the next claims begin at the cursor.
        if !cursor.last.is_empty() {
            cursors.change(&claim.queue, |cursor| cursor.head_at = began + AT_LEAST);
        }
        let rows = from_head(&connection, &claim).await?;
        let took = began.elapsed();
        // A claim of many rows takes a while because of the rows.
        let slow = took > SLOW + Duration::from_micros(50) * u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let pause = if slow { (took * SELDOM).min(AT_LEAST) } else { Duration::ZERO };
        cursors.change(&claim.queue, |cursor| cursor.head_at = Instant::now() + pause);
        rows
    } else {
        from_cursor(&connection, &claim, &cursor.last).await?
    };
    cursors.change(&claim.queue, |cursor| {
        for row in &rows {
            let (priority, at): (i16, (Timestamp, Uuid)) =
                (row.get("priority"), (row.get("run_at"), row.get("id")));
            let last = cursor.last.entry(priority).or_insert(at);
            *last = at.max(*last);
        }
    });
    let mut jobs: Vec<Claimed> = rows.iter().map(|row| claimed(row, Some(&claim.queue))).collect();
    jobs.sort_by_key(|job| (job.priority, std::cmp::Reverse(job.waited)));
    give_back(&connection, jobs.iter().filter_map(key_of), WHEN_STARTED).await?;
    Ok(Claims { jobs, next_in })
}

const IS_NOT_PAUSED: &str = "NOT EXISTS (SELECT FROM paused_queues WHERE queue = $1)";

async fn from_head(connection: &PostgresConnection, claim: &Claim) -> Result<Vec<Row>> {
    let found = format!(
        "SELECT id FROM jobs WHERE state = 'ready' AND queue = $1 AND {IS_NOT_PAUSED}
         ORDER BY priority, run_at, id LIMIT $2 FOR UPDATE SKIP LOCKED"
    );
    take(connection, claim, &found, &[]).await
}

/// Claims jobs after the cursor of each priority.
async fn from_cursor(
    connection: &PostgresConnection,
    claim: &Claim,
    last: &BTreeMap<i16, (Timestamp, Uuid)>,
) -> Result<Vec<Row>> {
    let priorities: Vec<i16> = last.keys().copied().collect();
    let (times, ids): (Vec<Timestamp>, Vec<Uuid>) = last.values().copied().unzip();
    // The rows of a priority are locked as they are found, so that no more of them are locked than can be
    // claimed.
    let found = format!(
        "SELECT found.id FROM unnest($5::int2[], $6::timestamptz[], $7::uuid[]) AS last (priority, at, id)
         CROSS JOIN LATERAL (
             SELECT id FROM jobs WHERE state = 'ready' AND queue = $1 AND priority = last.priority
                AND (run_at, jobs.id) > (last.at, last.id)
             ORDER BY run_at, jobs.id LIMIT $2 FOR UPDATE SKIP LOCKED) AS found
         WHERE {IS_NOT_PAUSED} LIMIT $2"
    );
    let last: [Parameter<'_>; 3] =
        [(&priorities, Type::INT2_ARRAY), (&times, Type::TIMESTAMPTZ_ARRAY), (&ids, Type::UUID_ARRAY)];
    take(connection, claim, &found, &last).await
}

/// Claims the jobs that `found` selects. It may use the queue as `$1`, the limit as `$2`, and `more` from
/// `$5` on.
async fn take(
    connection: &PostgresConnection,
    claim: &Claim,
    found: &str,
    more: &[Parameter<'_>],
) -> Result<Vec<Row>> {
    let sql = format!(
        "UPDATE jobs SET state = 'running', epoch = epoch + 1, worker = $3,
                         lease_until = clock_timestamp() + make_interval(secs => $4)
         WHERE id = ANY (ARRAY({found})) RETURNING {CLAIMED}"
    );
    let (limit, lease) = (i64::try_from(claim.limit).unwrap_or(i64::MAX), seconds(claim.lease));
    let queue = &*claim.queue;
    let mut parameters: Vec<Parameter<'_>> =
        vec![(&queue, Type::TEXT), (&limit, Type::INT8), (&claim.worker, Type::TEXT), (&lease, Type::FLOAT8)];
    parameters.extend_from_slice(more);
    Ok(connection.query(&sql, &parameters).await?)
}

/// Makes jobs ready that have become due, and returns the time until the next one is due.
async fn promote(connection: &PostgresConnection, queue: &Arc<str>) -> Result<Option<Duration>> {
    let sql = "
        WITH due AS (
            UPDATE jobs SET state = 'ready' WHERE id = ANY (ARRAY(
                SELECT id FROM jobs WHERE state = 'scheduled' AND queue = $1 AND run_at <= now()
                ORDER BY run_at LIMIT $2 FOR UPDATE SKIP LOCKED))
            RETURNING id
        )
        SELECT (extract(epoch FROM min(run_at) - now()) * 1000000)::int8, (SELECT count(*) FROM due)
        FROM jobs WHERE state = 'scheduled' AND queue = $1 AND run_at > now()";
    let rows = connection.query(sql, &[(&&**queue, Type::TEXT), (&PROMOTED, Type::INT8)]).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    if row.get::<_, i64>(1) == PROMOTED {
        return Ok(Some(Duration::ZERO));
    }
    let wait: Option<i64> = row.get(0);
    // The wait is rounded up to a time that the store can tell apart.
    Ok(wait.map(|wait| Duration::from_micros(wait.max(0).unsigned_abs() + 1000)))
}

/// Claims jobs whose leases have expired, or last for longer than any lease can.
pub(super) async fn lapsed(
    postgres: &Postgres,
    limit: usize,
    worker: String,
    lease: Duration,
) -> Result<Lapsed> {
    let connection = postgres.get().await?;
    let mend = "UPDATE jobs SET run_at = run_at - (scheduled_at - now()), scheduled_at = now()
                WHERE id = ANY (ARRAY(
                    SELECT id FROM jobs WHERE state = 'scheduled' AND scheduled_at > now() + interval '1 second'
                    LIMIT $1 FOR UPDATE SKIP LOCKED))";
    connection.execute(mend, &[(&PROMOTED, Type::INT8)]).await?;
    let sql = format!(
        "UPDATE jobs SET epoch = epoch + 1, worker = $2, lease_until = now() + make_interval(secs => $3)
         WHERE id = ANY (ARRAY(
             SELECT id FROM jobs WHERE state = 'running'
                AND (lease_until < now() OR lease_until > now() + 3 * make_interval(secs => $3))
             LIMIT $1 FOR UPDATE SKIP LOCKED))
         RETURNING {CLAIMED}, now()"
    );
    let (limit, lease) = (i64::try_from(limit).unwrap_or(i64::MAX), seconds(lease));
    let parameters: [Parameter<'_>; 3] =
        [(&limit, Type::INT8), (&worker, Type::TEXT), (&lease, Type::FLOAT8)];
    let rows = connection.query(&sql, &parameters).await?;
    let now = rows.first().map_or_else(Timestamp::now, |row| row.get("now"));
    Ok(Lapsed { jobs: rows.iter().map(|row| claimed(row, None)).collect(), now })
}
