//! Cron expressions in a time zone: when a schedule is due.
//!
//! The syntax is that of croner (OCPS 1.4: Vixie's, with seconds, `L`, `W` and `#`). This module decides what happens
//! when clocks change, as a person would expect it:
//!
//! * A **fixed time** has no wildcard and no step in its seconds, minutes or hours (`30 2 * * *`, `0 6,18 * * MON`). It
//!   is due once for each such time on the wall clock. A time that a clock change skips is due at the first instant
//!   after the gap; of a time that comes twice, the first one counts.
//! * An **interval** has a wildcard or a step there (`*/10 * * * *`). It is due whenever the wall clock shows it:
//!   nothing is made up for in a gap, and a repeated hour has all its times twice. So the time between two of them
//!   stays the same.
//! * **`@every 90s`** does not look at the wall clock at all.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The shortest interval.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest interval: an interval of more than ten years is a mistake.
const LONGEST: Duration = Duration::from_secs(3650 * 24 * 3600);
/// The names that stand for expressions.
const NICKNAMES: [(&str, &str); 7] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];
/// The fields of an expression with seconds.
const FIELDS: [&str; 6] = ["second", "minute", "hour", "day of month", "month", "day of week"];

/// An expression and its time zone.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct CronExpression {
    written: Written,
    zone: TimeZone,
    form: Form,
}

/// The expression and the zone, as they are written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    expression: String,
    zone: String,
}

#[derive(Clone)]
enum Form {
    Fixed(Cron),
    Interval(Cron),
    Every(SignedDuration),
}

/// Error for an expression or a zone that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// The text is no expression.
    #[error("{0}")]
    Expression(String),
    /// There is no such zone.
    #[error("there is no time zone {0}; an IANA name is such as Europe/Berlin")]
    Zone(String),
}

impl CronExpression {
    /// Reads an expression of 5 or 6 fields, `@hourly` and the like, or `@every 30s`, for the wall clock of `zone`, an
    /// IANA name.
    ///
    /// # Errors
    /// [`Unreadable`] names the field of the expression, or the zone.
    pub fn parse(expression: &str, zone: &str) -> Result<Self, Unreadable> {
        let written = Written { expression: expression.trim().to_owned(), zone: zone.to_owned() };
        let zone = TimeZone::get(zone).map_err(|_| Unreadable::Zone(zone.to_owned()))?;
        let form = match written.expression.strip_prefix("@every") {
            Some(interval) => Form::Every(every(interval)?),
            None => wall_clock(&written.expression)?,
        };
        Ok(Self { written, zone, form })
    }

    /// Returns the expression as it was written, without the zone.
    pub fn as_str(&self) -> &str {
        &self.written.expression
    }

    /// Returns the name of the zone.
    pub fn zone_name(&self) -> &str {
        &self.written.zone
    }

    /// Returns the zone.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// Returns true if the expression is about elapsed time, and not about the wall clock.
    pub fn is_elapsed(&self) -> bool {
        matches!(self.form, Form::Every(_))
    }

    /// Returns the first time after `after`; `None` when there will never be one. For `@every`, `after` is
    /// the last time that was due.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        match &self.form {
            Form::Every(interval) => after.checked_add(*interval).ok(),
            Form::Interval(cron) => {
                let next = cron.find_next_occurrence(&after.to_zoned(self.zone.clone()), false).ok()?;
                Some(next.timestamp())
            }
            Form::Fixed(cron) => {
                let mut time = self.zone.to_datetime(after);
                // In an hour that comes again, the times of its first pass are over.
                loop {
                    time = cron.find_next_occurrence(&time, false).ok()?;
                    let instant = self.instant(time)?;
                    if instant > after {
                        return Some(instant);
                    }
                }
            }
        }
    }

    /// Returns the newest times after `after` and not after `until`, at most `most` of them, the oldest
    /// first.
    pub fn newest(&self, after: Timestamp, until: Timestamp, most: usize) -> Vec<Timestamp> {
        if let Form::Every(interval) = self.form {
            return newest_of_interval(interval, after, until, most);
        }
        // The search is for the latest beginning with enough times, so that years of seconds are not gone
        // through.
        let has_all = |begin| self.between(begin, until).take(most).count() == most;
        let (mut begin, mut end) = (after, until);
        while has_all(begin) && end.duration_since(begin) > SignedDuration::from_secs(1) {
            let middle = begin + (end.duration_since(begin) / 2);
            if has_all(middle) { begin = middle } else { end = middle }
        }
        let mut found: Vec<Timestamp> = self.between(begin, until).collect();
        found.drain(..found.len().saturating_sub(most));
        found
    }

    /// Returns how many times there are after `after` and not after `until`, counted up to `most`.
    pub fn count(&self, after: Timestamp, until: Timestamp, most: usize) -> usize {
        self.between(after, until).take(most).count()
    }

    fn between(&self, after: Timestamp, until: Timestamp) -> impl Iterator<Item = Timestamp> {
        let times = std::iter::successors(self.next_after(after), |last| self.next_after(*last));
        times.take_while(move |time| *time <= until)
    }

    /// Returns when the wall clock first shows this time; if it never does, the first instant after the gap.
    fn instant(&self, time: DateTime) -> Option<Timestamp> {
        match self.zone.to_ambiguous_timestamp(time).offset() {
            AmbiguousOffset::Unambiguous { offset } | AmbiguousOffset::Fold { before: offset, .. } => {
                offset.to_timestamp(time).ok()
            }
            AmbiguousOffset::Gap { before, .. } => {
                // This is the instant if the clock had not changed; the change is the last one before it.
                let unchanged = before.to_timestamp(time).ok()?;
                let second = SignedDuration::from_secs(1);
                Some(self.zone.preceding(unchanged.checked_add(second).ok()?).next()?.timestamp())
            }
        }
    }
}

impl PartialEq for CronExpression {
    fn eq(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

impl fmt::Debug for CronExpression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expression").field(&self.as_str()).field(&self.zone_name()).finish()
    }
}

/// Formats the expression with its zone.
impl fmt::Display for CronExpression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.written.expression, self.written.zone)
    }
}

/// Reads an expression in UTC.
impl FromStr for CronExpression {
    type Err = Unreadable;

    fn from_str(expression: &str) -> Result<Self, Unreadable> {
        Self::parse(expression, "UTC")
    }
}

impl TryFrom<Written> for CronExpression {
    type Error = Unreadable;

    fn try_from(Written { expression, zone }: Written) -> Result<Self, Unreadable> {
        Self::parse(&expression, &zone)
    }
}

impl From<CronExpression> for Written {
    fn from(expression: CronExpression) -> Self {
        expression.written
    }
}

/// Returns the newest times of an interval, whose times are all equally far apart.
fn newest_of_interval(
    interval: SignedDuration,
    after: Timestamp,
    until: Timestamp,
    most: usize,
) -> Vec<Timestamp> {
    let (step, span) = (interval.as_millis(), until.duration_since(after).as_millis());
    let last = if step > 0 { span / step } else { 0 };
    let first = last.saturating_sub(i128::try_from(most).unwrap_or(i128::MAX)).max(0) + 1;
    let time = |number: i128| {
        let since = i64::try_from(number * step).ok()?;
        after.checked_add(SignedDuration::from_millis(since)).ok()
    };
    (first..=last).filter_map(time).collect()
}

fn every(interval: &str) -> Result<SignedDuration, Unreadable> {
    let wanted =
        || Unreadable::Expression("@every takes an interval of 1s to 3650d, such as 30s or 1h".to_owned());
    let interval: SignedDuration = interval.trim().parse().map_err(|_| wanted())?;
    let unsigned = Duration::try_from(interval).map_err(|_| wanted())?;
    // Times are stored in milliseconds.
    if !(SHORTEST..=LONGEST).contains(&unsigned) || unsigned.subsec_nanos() % 1_000_000 != 0 {
        return Err(wanted());
    }
    Ok(interval)
}

fn wall_clock(expression: &str) -> Result<Form, Unreadable> {
    let refuse = |reason: String| Err(Unreadable::Expression(reason));
    let nickname = NICKNAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(expression));
    let fields = nickname.map_or(expression, |(_, fields)| fields);
    if fields.starts_with('@') {
        let known = NICKNAMES.map(|(name, _)| name).join(", ");
        return refuse(format!("there is no {fields}; there are @every and {known}"));
    }
    let split: Vec<&str> = fields.split_whitespace().collect();
    if !matches!(split.len(), 5 | 6) {
        return refuse(format!("it has {} fields, and not 5, or 6 with seconds", split.len()));
    }
    // croner accepts an empty text as a value, which is never due.
    if let Some(field) = split.iter().find(|field| field.split(',').any(str::is_empty)) {
        return refuse(format!("{field} lists nothing between two commas or at its end"));
    }
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    let Ok(cron) = parser.parse(fields) else { return refuse(wrong_field(&parser, &split)) };
    // The fields of the time of day are the first two of 5, and the first three of 6.
    let of_day = &split[..split.len() - 3];
    let is_interval = of_day.iter().any(|field| field.contains(['*', '?', '/']));
    Ok(if is_interval { Form::Interval(cron) } else { Form::Fixed(cron) })
}

/// Returns which field cannot be read: the one that cannot even among wildcards.
fn wrong_field(parser: &CronParser, fields: &[&str]) -> String {
    let names = &FIELDS[FIELDS.len() - fields.len()..];
    for (index, (name, field)) in names.iter().zip(fields).enumerate() {
        let mut alone = vec!["*"; fields.len()];
        alone[index] = field;
        if let Err(error) = parser.parse(&alone.join(" ")) {
            let error = error.to_string();
            let reason = error.rsplit_once("rror: ").map_or(&*error, |(_, reason)| reason);
            return format!("the {name} {field} cannot be read: {}", reason.trim_end_matches('.'));
        }
    }
    format!("{} cannot be read", fields.join(" "))
}

#[cfg(test)]
mod tests;
