//! Tests against a model that walks through time minute by minute and knows nothing of croner, and against the vectors
//! of croner's own tests.

use std::collections::BTreeSet;

use jiff::civil::{Weekday, date};
use jiff::tz::Offset;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;

fn parse(expression: &str, zone: &str) -> CronExpression {
    CronExpression::parse(expression, zone).unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// Returns the next times after a time, on the wall clock of the zone with its offset.
fn next(expression: &str, zone: &str, after: &str, most: usize) -> Vec<String> {
    let expression = parse(expression, zone);
    let times = std::iter::successors(expression.next_after(at(after)), |last| expression.next_after(*last));
    times
        .take(most)
        .map(|time| time.to_zoned(expression.zone().clone()).strftime("%F %T %:z").to_string())
        .collect()
}

#[test]
fn a_fixed_time_in_a_gap_is_due_at_its_end_and_only_once() {
    let night = next("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2);
    assert_eq!(night, ["2026-03-29 03:00:00 +02:00", "2026-03-30 02:30:00 +02:00"]);
    // Two times of a list become one.
    let list = next("0,30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2);
    assert_eq!(list, ["2026-03-29 03:00:00 +02:00", "2026-03-30 02:00:00 +02:00"]);
    // One time is in the gap, and one at its end.
    let end = next("0 2,3 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2);
    assert_eq!(end, ["2026-03-29 03:00:00 +02:00", "2026-03-30 02:00:00 +02:00"]);
    // The gap is a whole day.
    let day = next("0 12 * * *", "Pacific/Apia", "2011-12-30T00:00:00Z", 2);
    assert_eq!(day, ["2011-12-31 00:00:00 +14:00", "2011-12-31 12:00:00 +14:00"]);
    // The gap is at midnight.
    let midnight = next("@daily", "Africa/Cairo", "2025-04-24T12:00:00Z", 2);
    assert_eq!(midnight, ["2025-04-25 01:00:00 +03:00", "2025-04-26 00:00:00 +03:00"]);
}

#[test]
fn a_fixed_time_in_a_fold_is_due_the_first_time() {
    let night = next("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2);
    assert_eq!(night, ["2026-10-25 02:30:00 +02:00", "2026-10-26 02:30:00 +01:00"]);
    let list = next("0 2,14 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 3);
    assert_eq!(
        list,
        ["2026-10-25 02:00:00 +02:00", "2026-10-25 14:00:00 +01:00", "2026-10-26 02:00:00 +01:00"]
    );
    // The search begins within the second pass of the hour.
    let within = next("45 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", 1);
    assert_eq!(within, ["2026-10-26 02:45:00 +01:00"]);
}

#[test]
fn an_interval_keeps_the_time_between_two() {
    let fold = next("*/30 * * * *", "Europe/Berlin", "2026-10-24T23:45:00Z", 6);
    let expected = [
        "2026-10-25 02:00:00 +02:00",
        "2026-10-25 02:30:00 +02:00",
        "2026-10-25 02:00:00 +01:00",
        "2026-10-25 02:30:00 +01:00",
        "2026-10-25 03:00:00 +01:00",
        "2026-10-25 03:30:00 +01:00",
    ];
    assert_eq!(fold, expected);
    let gap = next("*/30 * * * *", "Europe/Berlin", "2026-03-29T00:15:00Z", 3);
    assert_eq!(
        gap,
        ["2026-03-29 01:30:00 +01:00", "2026-03-29 03:00:00 +02:00", "2026-03-29 03:30:00 +02:00"]
    );
    // The clock changes by half an hour only.
    let howe = next("*/15 * * * *", "Australia/Lord_Howe", "2026-04-04T14:20:00Z", 5);
    let times: Vec<&str> = howe.iter().map(|time| &time[11..]).collect();
    assert_eq!(
        times,
        ["01:30:00 +11:00", "01:45:00 +11:00", "01:30:00 +10:30", "01:45:00 +10:30", "02:00:00 +10:30"]
    );
    let every = next("@every 1h", "Europe/Berlin", "2026-10-25T00:10:00Z", 3);
    let expected = ["2026-10-25 02:10:00 +01:00", "2026-10-25 03:10:00 +01:00", "2026-10-25 04:10:00 +01:00"];
    assert_eq!(every, expected);
}

/// Vectors of croner's own tests (tests/ocps.rs, dst_gap_hour_before.rs, dst_overlap.rs, weekly_alias.rs and
/// the tests in lib.rs of version 4.0.3), with the times as the wall clock of the zone shows them.
#[test]
fn croners_own_vectors_hold() {
    let vectors = [
        ("0 0 * * *", "Europe/London", "2026-03-28T12:00:00Z", "2026-03-29 00:00:00"),
        ("0 0 * * *", "Europe/London", "2026-03-29T00:45:00Z", "2026-03-30 00:00:00"),
        ("0 0 1 * * *", "America/Los_Angeles", "2026-03-07T20:00:00Z", "2026-03-08 01:00:00"),
        ("0 0 1 * * *", "America/Los_Angeles", "2026-03-08T09:00:00Z", "2026-03-09 01:00:00"),
        ("0 0 15 * * *", "UTC", "2023-12-31T16:00:00Z", "2024-01-01 15:00:00"),
        ("* * * * *", "UTC", "2023-01-01T00:00:29Z", "2023-01-01 00:01:00"),
        ("* * * * * *", "UTC", "2023-01-01T00:00:29Z", "2023-01-01 00:00:30"),
        ("0 0 * * FRI", "Europe/Stockholm", "2024-01-03T11:00:00Z", "2024-01-05 00:00:00"),
        ("0 9 L 2 *", "UTC", "2023-02-01T00:00:00Z", "2023-02-28 09:00:00"),
        ("0 9 L 2 *", "UTC", "2024-02-01T00:00:00Z", "2024-02-29 09:00:00"),
        ("0 0 * * FRI#L", "UTC", "2023-12-01T00:00:00Z", "2023-12-29 00:00:00"),
        ("0 0 * * 5L", "UTC", "2023-12-01T00:00:00Z", "2023-12-29 00:00:00"),
        ("0 12 1 * MON", "UTC", "2025-07-01T12:00:00Z", "2025-07-07 12:00:00"),
        ("0 12 1 * +MON", "UTC", "2025-07-01T12:00:00Z", "2025-09-01 12:00:00"),
        ("0 0 LW * *", "UTC", "2025-08-01T00:00:00Z", "2025-08-29 00:00:00"),
        ("0 0 15W * *", "UTC", "2025-06-01T00:00:00Z", "2025-06-16 00:00:00"),
        ("0 0 * * MON#2", "UTC", "2025-07-01T00:00:00Z", "2025-07-14 00:00:00"),
        ("0 0 * * 7#L", "UTC", "2025-07-01T00:00:00Z", "2025-07-27 00:00:00"),
        ("@weekly", "UTC", "2025-07-01T00:00:00Z", "2025-07-06 00:00:00"),
        ("@hourly", "UTC", "2025-07-01T00:00:00Z", "2025-07-01 01:00:00"),
    ];
    for (expression, zone, after, expected) in vectors {
        let found = next(expression, zone, after, 1);
        assert_eq!(found[0][..19], *expected, "{expression} in {zone} after {after}");
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    for (expression, part) in [
        ("61 * * * *", "the minute 61 cannot be read"),
        ("0 24 * * *", "the hour 24 cannot be read"),
        ("99 * * * * *", "the second 99 cannot be read"),
        ("0 0 32 * *", "the day of month 32 cannot be read"),
        ("0 0 1 FOO *", "the month FOO cannot be read"),
        ("0 0 * * 8", "the day of week 8 cannot be read"),
        ("", "it has 0 fields"),
        ("* * * *", "it has 4"),
        ("0 0 0 1 1 * 2027", "it has 7"),
        ("@reboot", "there is no @reboot"),
        (", * * * *", "lists nothing"),
        ("0 1,,2 * * *", "lists nothing"),
        ("@every", "@every takes an interval"),
        ("@every 0s", "@every takes an interval"),
        ("@every 1.0001s", "@every takes an interval"),
        ("@every -1h", "@every takes an interval"),
    ] {
        let error = CronExpression::parse(expression, "UTC").unwrap_err().to_string();
        assert!(error.contains(part), "{expression}: {error}");
    }
    let zone = CronExpression::parse("@daily", "Mars/Olympus").unwrap_err();
    assert_eq!(zone, Unreadable::Zone("Mars/Olympus".to_owned()));
}

#[test]
fn one_that_never_comes_is_none() {
    assert_eq!(parse("0 0 30 2 *", "Europe/Berlin").next_after(at("2026-01-01T00:00:00Z")), None);
    assert_eq!(parse("* 0 31 4 *", "UTC").next_after(at("2026-01-01T00:00:00Z")), None);
}

#[test]
fn the_newest_are_found_without_going_through_all() {
    let (after, until) = (at("1990-01-01T00:00:00Z"), at("2026-07-01T00:00:00.5Z"));
    let seconds = parse("* * * * * *", "UTC").newest(after, until, 3);
    assert_eq!(seconds, ["2026-06-30T23:59:58Z", "2026-06-30T23:59:59Z", "2026-07-01T00:00:00Z"].map(at));
    let every = parse("@every 7s", "UTC").newest(after, at("1990-01-01T00:00:30Z"), 2);
    assert_eq!(every, ["1990-01-01T00:00:21Z", "1990-01-01T00:00:28Z"].map(at));
    assert_eq!(parse("@every 1h", "UTC").newest(after, after, 2), []);
    let years = parse("@yearly", "UTC").newest(after, until, 100);
    assert_eq!((years.len(), years[0]), (36, at("1991-01-01T00:00:00Z")));
    assert_eq!(parse("* * * * * *", "UTC").count(after, until, 1000), 1000);
    // A month of seconds lies long before `until`.
    let january =
        parse("* * * * 1 *", "UTC").newest(at("2026-01-10T00:00:00Z"), at("2026-03-01T00:00:00Z"), 2);
    assert_eq!(january, ["2026-01-31T23:59:58Z", "2026-01-31T23:59:59Z"].map(at));
}

/// One field: the values that it means, and its text.
#[derive(Clone, Debug)]
struct Field {
    values: BTreeSet<i8>,
    text: String,
    is_interval: bool,
}

fn field(low: i8, high: i8, intervals: bool) -> impl Strategy<Value = Field> {
    let list = prop::collection::btree_set(low..=high, 1..4).prop_map(|values| {
        let text = values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        Field { values, text, is_interval: false }
    });
    let range = (low..=high, low..=high).prop_map(|(a, b)| {
        let (from, to) = (a.min(b), a.max(b));
        Field { values: (from..=to).collect(), text: format!("{from}-{to}"), is_interval: false }
    });
    let step = (2..=15_usize).prop_map(move |step| Field {
        values: (low..=high).step_by(step).collect(),
        text: format!("*/{step}"),
        is_interval: true,
    });
    let all = Just(Field { values: (low..=high).collect(), text: "*".to_owned(), is_interval: true });
    if intervals { prop_oneof![4 => list, 1 => range, 2 => step, 1 => all].boxed() } else { list.boxed() }
}

/// An expression of five fields, as sets.
#[derive(Clone, Debug)]
struct Model {
    minutes: Field,
    hours: Field,
    days: Option<Field>,
    weekdays: Option<Field>,
}

impl Model {
    fn text(&self) -> String {
        let day = |field: &Option<Field>| field.as_ref().map_or("*".to_owned(), |field| field.text.clone());
        format!("{} {} {} * {}", self.minutes.text, self.hours.text, day(&self.days), day(&self.weekdays))
    }

    fn is_on(&self, time: DateTime) -> bool {
        let day = self.days.as_ref().map(|days| days.values.contains(&time.day()));
        let weekday = time.date().weekday().since(Weekday::Sunday);
        let weekday = self.weekdays.as_ref().map(|weekdays| weekdays.values.contains(&weekday));
        let on_day = match (day, weekday) {
            (Some(day), Some(weekday)) => day || weekday,
            (day, weekday) => day.unwrap_or(true) && weekday.unwrap_or(true),
        };
        on_day && self.minutes.values.contains(&time.minute()) && self.hours.values.contains(&time.hour())
    }

    /// Returns every due time for `days` days from `from` on, as a look at the wall clock each minute finds
    /// them.
    fn walk(&self, zone: &TimeZone, from: Timestamp, days: i64) -> Vec<Timestamp> {
        let is_interval = self.minutes.is_interval || self.hours.is_interval;
        let minute = SignedDuration::from_mins(1);
        let (mut found, mut last) = (Vec::new(), zone.to_datetime(from));
        // The latest time that the wall clock has shown.
        let mut latest = last;
        for number in 1..=days * 24 * 60 {
            let now = from + SignedDuration::from_mins(number);
            let time = zone.to_datetime(now);
            let is_due = if is_interval {
                self.is_on(time)
            } else {
                // Every time that the clock should have shown since the last look, and did not show before.
                let mut skipped = last + minute;
                let mut is_due = false;
                while skipped <= time {
                    is_due |= skipped > latest && self.is_on(skipped);
                    skipped += minute;
                }
                is_due
            };
            if is_due {
                found.push(now);
            }
            last = time;
            latest = latest.max(time);
        }
        found
    }
}

const ZONES: [&str; 20] = [
    "UTC",
    "America/New_York",
    "America/St_Johns",
    "America/Sao_Paulo",
    "America/Havana",
    "America/Santiago",
    "Europe/Berlin",
    "Europe/London",
    "Europe/Dublin",
    "Africa/Casablanca",
    "Africa/Cairo",
    "Asia/Tehran",
    "Asia/Gaza",
    "Asia/Kathmandu",
    "Asia/Amman",
    "Australia/Sydney",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Pacific/Apia",
    "Antarctica/Troll",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn it_agrees_with_whoever_looks_at_the_clock_each_minute(
        minutes in field(0, 59, true),
        hours in field(0, 23, true),
        days in prop::option::of(field(1, 31, false)),
        weekdays in prop::option::of(field(0, 6, false)),
        zone in select(&ZONES),
        year in 1985..2037_i16,
        which in 0..12_usize,
    ) {
        let model = Model { minutes, hours, days, weekdays };
        let zone = TimeZone::get(zone).unwrap();
        // The range is around a change of the clock, if there is one in that year.
        let begin = Offset::UTC.to_timestamp(date(year, 1, 1).at(0, 0, 0, 0)).unwrap();
        let changes: Vec<Timestamp> =
            zone.following(begin).take(2).map(|change| change.timestamp()).collect();
        let middle = changes.get(which % 2).copied().filter(|change| *change < begin + SignedDuration::from_hours(9000));
        let middle = middle.unwrap_or(begin + SignedDuration::from_hours(60 * 24 * 3));
        let from = middle - SignedDuration::from_hours(50);
        let expression = CronExpression { zone: zone.clone(), ..parse(&model.text(), "UTC") };
        let walked = model.walk(&zone, from, 5);
        let until = from + SignedDuration::from_hours(5 * 24);
        let found: Vec<Timestamp> = expression.between(from, until).collect();
        prop_assert_eq!(&found, &walked, "{} in {:?} from {}", model.text(), zone, from);
        // The next time is the same from any start.
        let start = from + SignedDuration::from_mins(which as i64 * 317);
        prop_assert_eq!(expression.next_after(start).filter(|next| *next <= until), walked.iter().copied().find(|next| *next > start));
        let most = which + 1;
        prop_assert_eq!(expression.newest(from, until, most), walked[walked.len().saturating_sub(most)..].to_vec());
    }
}
