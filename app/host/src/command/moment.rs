//! Times as people write them: `tomorrow 9:00`, `in 2h`, `2027-01-31 12:00`, besides the exact form of the interface.

use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

use crate::settings::parse_duration;

/// The forms of a time that are understood, in words.
pub const WANTED: &str = "a time such as 2027-01-31T12:00:00Z, \"2027-01-31 12:00\", \"tomorrow 9:00\", \"today 18:30\", 18:30 or \"in 2h\" (without a zone, that of this machine)";

/// Parses a time; `now` gives the current day and the time zone.
///
/// # Errors
/// The form that was wanted, or that the time is past.
pub fn parse(text: &str, now: &Zoned) -> Result<Timestamp, String> {
    let text = text.trim();
    let exact = text.parse::<Timestamp>().ok();
    let at = exact.or_else(|| relative(text, now)).or_else(|| on_a_day(text, now));
    let at = at.ok_or_else(|| format!("wanted {WANTED}"))?;
    if at < now.timestamp() {
        return Err(format!("{} is past; wanted a time to come", at.strftime("%F %TZ")));
    }
    Ok(at)
}

/// Parses `in 2h` and `now`.
fn relative(text: &str, now: &Zoned) -> Option<Timestamp> {
    if text.eq_ignore_ascii_case("now") {
        return Some(now.timestamp());
    }
    let wait = parse_duration(text.strip_prefix("in ")?.trim())?;
    now.timestamp().checked_add(wait).ok()
}

/// Parses a day and a time of day. Without a time it is midnight; without a day it is the day on which that time comes
/// next.
fn on_a_day(text: &str, now: &Zoned) -> Option<Timestamp> {
    // A `T` separates day and time only after a date.
    let words = text.split_once(' ').or_else(|| text.split_once('T').filter(|(first, _)| first.len() == 10));
    let (first, rest) = words.map_or((text, None), |(first, rest)| (first, Some(rest.trim())));
    let (day, time) = match day(first, now) {
        Some(day) => (day, rest.map_or(Some(Time::midnight()), time_of_day)?),
        None => {
            let time = time_of_day(text)?;
            let days = i64::from(time < now.time());
            (now.date().checked_add(days.days()).ok()?, time)
        }
    };
    let zone: TimeZone = now.time_zone().clone();
    day.to_datetime(time).to_zoned(zone).ok().map(|at| at.timestamp())
}

fn day(word: &str, now: &Zoned) -> Option<Date> {
    match word.to_ascii_lowercase().as_str() {
        "today" => Some(now.date()),
        "tomorrow" => now.date().checked_add(1.day()).ok(),
        word => word.parse().ok().filter(|_| word.len() == 10),
    }
}

/// Parses a time of day such as `9:00`, `09:00:30`, `9am` or `9:30 pm`.
fn time_of_day(text: &str) -> Option<Time> {
    let text = text.to_ascii_lowercase();
    let text = text.strip_prefix("at ").unwrap_or(&text).trim().to_owned();
    let (digits, half) = match (text.strip_suffix("am"), text.strip_suffix("pm")) {
        (Some(rest), _) => (rest.trim(), Some(0)),
        (_, Some(rest)) => (rest.trim(), Some(12)),
        (None, None) => (text.as_str(), None),
    };
    let mut parts = digits.split(':').map(str::parse::<i8>);
    let hour = parts.next()?.ok()?;
    let minute = match parts.next() {
        Some(minute) => minute.ok()?,
        // An hour without minutes needs `am` or `pm`.
        None if half.is_some() => 0,
        None => return None,
    };
    let second = parts.next().transpose().ok()?.unwrap_or(0);
    let hour = match half {
        Some(_) if !(1..=12).contains(&hour) => return None,
        Some(half) => hour % 12 + half,
        None => hour,
    };
    if parts.next().is_some() { None } else { Time::new(hour, minute, second, 0).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Result<String, String> {
        let now: Zoned = "2026-11-27T18:50:00+01:00[Europe/Berlin]".parse().unwrap();
        parse(text, &now).map(|at| at.to_string())
    }

    #[test]
    fn people_write_times_in_many_ways() {
        for (text, wanted) in [
            ("2027-01-31T12:00:00Z", "2027-01-31T12:00:00Z"),
            ("2027-01-31T12:00:00+01:00", "2027-01-31T11:00:00Z"),
            ("2027-01-31 12:00", "2027-01-31T11:00:00Z"),
            ("2027-01-31T12:00", "2027-01-31T11:00:00Z"),
            ("2027-07-31 12:00:30", "2027-07-31T10:00:30Z"),
            ("2027-01-31", "2027-01-30T23:00:00Z"),
            ("tomorrow 9:00", "2026-11-28T08:00:00Z"),
            ("Tomorrow 09:00", "2026-11-28T08:00:00Z"),
            ("tomorrow at 9am", "2026-11-28T08:00:00Z"),
            ("today 11:30 pm", "2026-11-27T22:30:00Z"),
            ("tomorrow 12am", "2026-11-27T23:00:00Z"),
            ("23:30", "2026-11-27T22:30:00Z"),
            ("9:00", "2026-11-28T08:00:00Z"),
            ("in 2h", "2026-11-27T19:50:00Z"),
            ("in 1h30m", "2026-11-27T19:20:00Z"),
            ("now", "2026-11-27T17:50:00Z"),
        ] {
            assert_eq!(at(text).as_deref(), Ok(wanted), "{text}");
        }
        for bad in
            ["", "soon", "tomorrow 25:00", "tomorrow 9", "13pm", "2027-13-01", "next week", "9:00:00:00"]
        {
            assert!(at(bad).unwrap_err().starts_with("wanted a time such as"), "{bad}");
        }
        for past in ["2020-01-01T00:00:00Z", "today 9:00", "2026-11-26", "today"] {
            assert!(at(past).unwrap_err().ends_with("is past; wanted a time to come"), "{past}");
        }
    }
}
