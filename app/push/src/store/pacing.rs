//! The status of notifications, and reservations of slices of their schedules.

use std::time::Duration;

use perennial_store::pool::set_apart;
use perennial_store::pool::sql::{self, Result, Row, Tx};
use perennial_store::{transact, values};
use uuid::Uuid;

use super::PushStore;
use crate::model::notification::NotificationStatus;
use crate::model::schedule::{CATCH_UP, RateSchedule, SLICE};

/// How far ahead slices are reserved, in microseconds: the length of two slices.
const AHEAD_US: i64 = 500_000;
/// Time from the first reservation to the first send, in microseconds.
const LEAD_US: i64 = 20_000;
const CATCH_UP_US: i64 = 250_000;
const _: () = assert!(CATCH_UP.as_micros() == 250_000);

/// The result of asking for a slice.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reserved {
    /// A slice is reserved for this process.
    Slice {
        schedule: RateSchedule,
        /// Time of the store's clock, in microseconds since 1970.
        now: i64,
        /// Time at which the schedule began, in microseconds since 1970.
        began: i64,
        /// See [`crate::pacing::pace::Slice`].
        next: f64,
        end: f64,
    },
    /// Other processes have the next slices; the next one can be reserved after this time.
    Later(Duration),
    /// There is nothing to reserve: the notification is not paced, or not sent.
    Nothing,
}

impl PushStore {
    /// Returns the status of notifications; `None` for a notification that cannot be read.
    pub(crate) async fn standings(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, Option<NotificationStatus>)>> {
        let among = self.sql.dialect().is_among("id", "?");
        let sql = format!("SELECT id, {} FROM notifications WHERE {among}", NotificationStatus::COLUMNS);
        let rows = self.sql.query(sql, values![sql::hex_list(ids)]).await?;
        let read = |row: &Row| {
            let standing = NotificationStatus::read(row);
            let standing =
                standing.inspect_err(|error| set_apart("notifications", &row.name("id"), error)).ok();
            Ok((row.get("id")?, standing))
        };
        Ok(sql::each(&rows, "notifications", "id", read))
    }

    /// Reserves the next slice of a notification's schedule.
    pub(crate) async fn reserve(&self, id: Uuid) -> Result<Reserved> {
        transact!(&self.sql, tx => reserve(tx, id))
    }

    /// Reserves the next slice of an origin's schedule.
    pub(crate) async fn reserve_origin(&self, origin: &str, schedule: RateSchedule) -> Result<Reserved> {
        let origin = origin.to_owned();
        transact!(&self.sql, tx => reserve_origin(tx, &origin, schedule))
    }
}

async fn reserve<T: Tx>(tx: &T, id: Uuid) -> Result<Reserved> {
    let now = tx.dialect().now_us();
    let sql = format!(
        "SELECT {now} AS now, rate_milli, ramp_ms, pace_from, pace_next FROM notifications
         WHERE id = ? AND rate_milli IS NOT NULL AND state IN ('queued', 'sending')"
    );
    let Some(row) = sql::first(tx, &sql, &values![id]).await? else { return Ok(Reserved::Nothing) };
    let (rate_milli, ramp_ms): (i64, i64) = (row.get("rate_milli")?, row.get("ramp_ms")?);
    #[expect(clippy::cast_precision_loss, reason = "rates and ramps are far below 2^52")]
    let schedule = RateSchedule { rate: rate_milli as f64 / 1e3, ramp: ramp_ms as f64 / 1e3 };
    let next: Option<i64> = row.get("pace_next")?;
    let from: Option<i64> = row.get("pace_from")?;
    let (reserved, from, end) = slice(schedule, row.get("now")?, from, next);
    let Reserved::Slice { .. } = reserved else { return Ok(reserved) };
    let sql = "UPDATE notifications SET pace_from = ?, pace_next = ?
               WHERE id = ? AND (pace_next IS NOT DISTINCT FROM ?) AND rate_milli = ? AND ramp_ms = ?
                 AND state IN ('queued', 'sending')";
    let changed = tx.execute(sql, &values![from, end, id, next, rate_milli, ramp_ms]).await?;
    Ok(if changed == 1 { reserved } else { Reserved::Later(Duration::ZERO) })
}

async fn reserve_origin<T: Tx>(tx: &T, origin: &str, schedule: RateSchedule) -> Result<Reserved> {
    let now = tx.dialect().now_us();
    let sql = format!("SELECT {now} AS now, pace_next FROM push_services WHERE origin = ?");
    let Some(row) = sql::first(tx, &sql, &values![origin]).await? else {
        let sql = "INSERT INTO push_services (origin, changed_at) VALUES (?, 0) ON CONFLICT DO NOTHING";
        tx.execute(sql, &values![origin]).await?;
        return Ok(Reserved::Later(Duration::ZERO));
    };
    let next: Option<i64> = row.get("pace_next")?;
    // Without a ramp, any time can serve as the beginning.
    let (reserved, _, end) = slice(schedule, row.get("now")?, next, next);
    let Reserved::Slice { .. } = reserved else { return Ok(reserved) };
    let sql =
        "UPDATE push_services SET pace_next = ? WHERE origin = ? AND (pace_next IS NOT DISTINCT FROM ?)";
    let changed = tx.execute(sql, &values![end, origin, next]).await?;
    Ok(if changed == 1 { reserved } else { Reserved::Later(Duration::ZERO) })
}

/// Returns the next slice of a schedule that began at `from` and whose first unreserved send is due at `next`; the
/// beginning of the schedule, which moves when time was lost; and the time at which the first send after the slice is
/// due. All times are in microseconds.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "microseconds of some years"
)]
fn slice(schedule: RateSchedule, now: i64, from: Option<i64>, next: Option<i64>) -> (Reserved, i64, i64) {
    let mut from = from.unwrap_or(now + LEAD_US);
    let mut next = next.unwrap_or(from);
    let longest = SLICE.as_secs_f64() + (1.0 / schedule.rate).max(schedule.at(1.0));
    if next - now > AHEAD_US + (longest * 1e6) as i64 {
        // No process reserves so far ahead: the store's clock was set back.
        from += now - next;
        next = now;
    }
    if next - now > AHEAD_US {
        let wait = Duration::from_micros((next - now - AHEAD_US).unsigned_abs());
        return (Reserved::Later(wait), from, next);
    }
    let late = now - next;
    if late > CATCH_UP_US {
        from += late;
        next = now;
    }
    let seconds = |us: i64| us as f64 / 1e6;
    let count = schedule.due(seconds(next - from));
    let end = count + schedule.slice(seconds(next - from), SLICE.as_secs_f64());
    let after = from + (schedule.at(end) * 1e6).round() as i64;
    (Reserved::Slice { schedule, now, began: from, next: count, end }, from, after)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEADY: RateSchedule = RateSchedule { rate: 5000.0, ramp: 0.0 };

    #[test]
    fn replicas_take_turns_and_none_is_far_ahead() {
        let now = 1_000_000_000_000_000;
        let (first, from, next) = slice(STEADY, now, None, None);
        let Reserved::Slice { next: 0.0, end, .. } = first else { panic!("{first:?}") };
        assert!((end - 1250.0).abs() < 1e-6);
        assert_eq!((from, next), (now + LEAD_US, now + LEAD_US + 250_000));
        let (second, _, next) = slice(STEADY, now + 1000, Some(from), Some(next));
        assert!(matches!(second, Reserved::Slice { .. }));
        let (third, ..) = slice(STEADY, now + 2000, Some(from), Some(next));
        let Reserved::Later(wait) = third else { panic!("{third:?}") };
        assert_eq!(wait, Duration::from_micros(18_000));
    }

    #[test]
    fn a_clock_that_is_set_back_stops_nobody() {
        let now = 1_000_000_000_000_000;
        let (reserved, ..) = slice(STEADY, now, Some(now), Some(now + 3_600_000_000));
        assert!(matches!(reserved, Reserved::Slice { .. }));
        let slow = RateSchedule { rate: 0.001, ramp: 0.0 };
        let (reserved, ..) = slice(slow, now, Some(now), Some(now + 999_000_000));
        assert!(matches!(reserved, Reserved::Later(_)), "that is how slow it is");
    }

    #[test]
    fn time_that_was_lost_moves_the_schedule_and_not_its_ramp() {
        let ramped = RateSchedule { rate: 100.0, ramp: 10.0 };
        let now = 1_000_000_000_000_000;
        let (_, from, next) = slice(ramped, now, Some(now - 5_000_000), Some(now));
        assert_eq!(from, now - 5_000_000);
        let away = next + 60_000_000;
        let (reserved, moved, _) = slice(ramped, away, Some(from), Some(next));
        let Reserved::Slice { next: count, .. } = reserved else { panic!("{reserved:?}") };
        assert_eq!(moved - from, 60_000_000);
        assert!((count - 137.8).abs() < 2.0, "it goes on where it was: {count}");
    }
}
