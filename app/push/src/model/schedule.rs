//! The times at which the sends of a paced notification are due: pure arithmetic, in seconds since the schedule began.

use std::time::Duration;
/// Lateness from which on sends are not made up for, so that a stall is not followed by a flood.
pub(crate) const CATCH_UP: Duration = Duration::from_millis(250);
/// Length of a slice.
pub(crate) const SLICE: Duration = Duration::from_millis(250);

/// A rate that is reached linearly from 0.
///
/// With a ramp of R seconds to r sends per second, r·t²/2R sends are due after t seconds; after the ramp, r more are
/// due each second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RateSchedule {
    /// Sends per second, more than 0.
    pub(crate) rate: f64,
    /// Time in which the rate is reached, in seconds.
    pub(crate) ramp: f64,
}

impl RateSchedule {
    /// Number of sends that are due by `time`.
    pub(crate) fn due(&self, time: f64) -> f64 {
        let time = time.max(0.0);
        if time < self.ramp {
            self.rate * time * time / (2.0 * self.ramp)
        } else {
            self.rate * (time - self.ramp / 2.0)
        }
    }

    /// Time at which the send after `count` others is due.
    pub(crate) fn at(&self, count: f64) -> f64 {
        let of_ramp = self.rate * self.ramp / 2.0;
        if count < of_ramp {
            (2.0 * count * self.ramp / self.rate).sqrt()
        } else {
            (count - of_ramp) / self.rate + self.ramp
        }
    }

    /// Number of sends in a slice of `length` seconds that begins with the send due at `next`. It is at least one,
    /// however long that send takes.
    pub(crate) fn slice(&self, next: f64, length: f64) -> f64 {
        (self.due(next + length) - self.due(next)).round().max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-6 * one.abs().max(1.0)
    }

    #[test]
    fn a_rate_is_even_and_may_be_less_than_one() {
        let slow = RateSchedule { rate: 0.5, ramp: 0.0 };
        assert_eq!([0.0, 1.0, 2.0].map(|count| slow.at(count)), [0.0, 2.0, 4.0]);
        assert!(close(slow.slice(2.0, 0.25), 1.0), "one every two seconds");
        let fast = RateSchedule { rate: 5000.0, ramp: 0.0 };
        assert!(close(fast.slice(7.0, 0.25), 1250.0));
        assert!(close(fast.at(5000.0), 1.0));
    }

    #[test]
    fn a_ramp_rises_in_a_straight_line_from_nothing() {
        let ramped = RateSchedule { rate: 100.0, ramp: 10.0 };
        for second in 0..10 {
            let sent = ramped.due(f64::from(second) + 1.0) - ramped.due(f64::from(second));
            assert!(close(sent, 10.0 * f64::from(second) + 5.0), "{second}: {sent}");
        }
        assert!(close(ramped.due(11.0) - ramped.due(10.0), 100.0));
    }

    proptest::proptest! {
        #[test]
        fn counts_and_times_are_the_same_thing(rate in 0.01..100_000.0, ramp in 0.0..3600.0, count in 0.0..1e7) {
            let schedule = RateSchedule { rate, ramp };
            proptest::prop_assert!(close(schedule.due(schedule.at(count)), count));
            proptest::prop_assert!(schedule.at(count + 1.0) > schedule.at(count));
        }

        #[test]
        fn slices_one_after_the_other_lose_nothing(rate in 0.01..20_000.0, ramp in 0.0..60.0) {
            let schedule = RateSchedule { rate, ramp };
            let (mut next, mut reserved) = (0.0, 0.0);
            for _ in 0..200 {
                let count = schedule.slice(next, 0.25);
                next = schedule.at(schedule.due(next) + count);
                reserved += count;
            }
            proptest::prop_assert!((schedule.due(next) - reserved).abs() < 1e-3 * reserved.max(1.0));
        }
    }
}
