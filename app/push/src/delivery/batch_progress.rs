//! How far a batch has come: a pure account of its members. Time is an argument.
//!
//! ```text
//!           low mark                   the newest that was begun
//!  ───────────┼──────────────────────────────┼───────────────────►  members, by id
//!   recorded  │ begun: in flight, or ended   │  not begun
//!             │ (the ended ones: `above`)    │
//! ```
//!
//! Sends run side by side and end in any order. A checkpoint records the outcomes of the members that have ended since the
//! last one, with the low mark, up to which every member has ended, and the ended members above it. No more than `limit`
//! members are begun and not recorded, so that a crash repeats at most that many sends; a recorded member is never sent to
//! again.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct BatchProgress {
    /// Most members that are begun and not recorded.
    limit: usize,
    /// Longest time between two checkpoints while members end.
    every: Duration,
    /// Highest id that was begun.
    newest: i64,
    in_flight: BTreeSet<i64>,
    /// Ended members above the low mark.
    above: BTreeSet<i64>,
    /// Members that are begun and in no committed checkpoint.
    unrecorded: usize,
    /// Members that have ended and are in no checkpoint.
    ended: usize,
    /// When the next checkpoint is due.
    due: Instant,
}

/// What a checkpoint says of the members of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Every member up to this id has ended.
    pub(super) low_id: i64,
    /// Ended members above it, in ascending order.
    pub(super) above: Vec<i64>,
    /// Number of members whose outcome the checkpoint records.
    pub(super) ended: usize,
}

impl BatchProgress {
    /// The progress of a batch whose last checkpoint has this low mark, and these ended members above it.
    pub(super) fn new(limit: usize, every: Duration, low_id: i64, above: &[i64], now: Instant) -> Self {
        Self {
            limit,
            every,
            newest: low_id,
            in_flight: BTreeSet::new(),
            above: above.iter().copied().collect(),
            unrecorded: 0,
            ended: 0,
            due: now + every,
        }
    }

    /// Returns true while one more member may be begun.
    pub(super) fn may_begin(&self) -> bool {
        self.unrecorded < self.limit
    }

    /// A send to this member begins. Members begin in ascending order of their ids.
    pub(super) fn begin(&mut self, id: i64) {
        self.newest = id;
        self.in_flight.insert(id);
        self.unrecorded += 1;
    }

    /// A send has ended.
    pub(super) fn end(&mut self, id: i64) {
        self.in_flight.remove(&id);
        self.above.insert(id);
        self.ended += 1;
    }

    /// A member ends that was never begun, since its row is gone or cannot be read.
    pub(super) fn end_unsent(&mut self, id: i64) {
        self.above.insert(id);
        self.ended += 1;
        self.unrecorded += 1;
    }

    /// A send was taken back before it left. Its member stays in flight as far as checkpoints are concerned: a later run
    /// sends to it.
    pub(super) fn take_back(&mut self) {
        self.unrecorded -= 1;
    }

    /// Returns true when a checkpoint should be made: three quarters of the limit have ended, nothing else can go on, or
    /// the time has come. That is early enough for sends to go on during the commit.
    pub(super) fn should_record(&self, is_idle: bool, now: Instant) -> bool {
        self.ended > 0 && (self.ended * 4 >= self.limit * 3 || is_idle || now >= self.due)
    }

    /// When the next checkpoint is due, if there is anything to record.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.ended > 0).then_some(self.due)
    }

    /// Makes a checkpoint of what has ended.
    pub(super) fn mark(&mut self, now: Instant) -> Mark {
        let low_id = self.in_flight.first().map_or(self.newest, |first| first - 1);
        self.above.retain(|id| *id > low_id);
        self.due = now + self.every;
        let ended = std::mem::take(&mut self.ended);
        Mark { low_id, above: self.above.iter().copied().collect(), ended }
    }

    /// A checkpoint with this many outcomes is committed.
    pub(super) fn recorded(&mut self, ended: usize) {
        self.unrecorded -= ended;
    }

    /// Ids that are in flight, or were taken back.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Gives up the members in flight: the caller decides what becomes of them.
    pub(super) fn give_up(&mut self) -> BTreeSet<i64> {
        std::mem::take(&mut self.in_flight)
    }

    /// The highest id that was begun.
    pub(super) fn newest(&self) -> i64 {
        self.newest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 8;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Begin,
        End(usize),
        TakeBack(usize),
        Mark,
        Commit,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => Just(Step::Begin),
            4 => (0..LIMIT).prop_map(Step::End),
            1 => (0..LIMIT).prop_map(Step::TakeBack),
            1 => Just(Step::Mark),
            1 => Just(Step::Commit),
        ];
        prop::collection::vec(step, 0..200)
    }

    /// A batch with the members 1, 2, 3 and so on, and what a store and a push service would know of it.
    struct Model {
        progress: BatchProgress,
        next: i64,
        /// Sends under way.
        running: Vec<i64>,
        ended: BTreeSet<i64>,
        /// A checkpoint that is being committed.
        saving: Option<Mark>,
        /// The last one that was.
        stored: Mark,
    }

    impl Model {
        fn new(now: Instant) -> Self {
            let progress = BatchProgress::new(LIMIT, Duration::from_secs(1), 0, &[], now);
            let stored = Mark { low_id: 0, above: Vec::new(), ended: 0 };
            let (running, ended) = (Vec::new(), BTreeSet::new());
            Self { progress, next: 1, running, ended, saving: None, stored }
        }

        fn take(&mut self, step: Step, now: Instant) {
            match step {
                Step::Begin if self.progress.may_begin() => {
                    self.progress.begin(self.next);
                    self.running.push(self.next);
                    self.next += 1;
                }
                Step::End(nth) if !self.running.is_empty() => {
                    let id = self.running.remove(nth % self.running.len());
                    self.progress.end(id);
                    self.ended.insert(id);
                }
                Step::TakeBack(nth) if !self.running.is_empty() => {
                    self.running.remove(nth % self.running.len());
                    self.progress.take_back();
                }
                Step::Mark if self.saving.is_none() => self.saving = Some(self.progress.mark(now)),
                Step::Commit => {
                    if let Some(mark) = self.saving.take() {
                        self.progress.recorded(mark.ended);
                        self.stored = mark;
                    }
                }
                Step::Begin | Step::End(_) | Step::TakeBack(_) | Step::Mark => {}
            }
        }

        fn is_stored(&self, id: i64) -> bool {
            id <= self.stored.low_id || self.stored.above.contains(&id)
        }
    }

    proptest! {
        #[test]
        fn a_checkpoint_has_the_members_that_have_ended_and_no_other(steps in steps()) {
            let now = Instant::now();
            let mut model = Model::new(now);
            let mut recorded = 0;
            for step in steps {
                model.take(step, now);
                if let Some(mark) = &model.saving {
                    let of_mark = (1..model.next).filter(|id| *id <= mark.low_id || mark.above.contains(id));
                    prop_assert!(of_mark.clone().all(|id| model.ended.contains(&id)), "{mark:?}");
                    prop_assert!(mark.above.is_sorted() && mark.above.iter().all(|id| *id > mark.low_id));
                    // Each outcome is in one checkpoint.
                    let before = (1..model.next).filter(|id| model.is_stored(*id)).count();
                    prop_assert_eq!(of_mark.count(), before + mark.ended);
                }
                let stored = (1..model.next).filter(|id| model.is_stored(*id)).count();
                prop_assert!(stored >= recorded, "a recorded member stays recorded");
                recorded = stored;
            }
        }

        #[test]
        fn a_crash_repeats_no_more_sends_than_the_limit(steps in steps()) {
            let now = Instant::now();
            let mut model = Model::new(now);
            for step in steps {
                model.take(step, now);
                let begun_and_not_stored = model.running.len()
                    + model.ended.iter().filter(|id| !model.is_stored(**id)).count();
                prop_assert!(begun_and_not_stored <= LIMIT, "{begun_and_not_stored}");
            }
        }

        #[test]
        fn the_next_run_sends_to_each_member_that_is_left(steps in steps()) {
            let now = Instant::now();
            let mut model = Model::new(now);
            steps.into_iter().for_each(|step| model.take(step, now));
            let last = model.next;
            // The process ends here. Another run begins where the store says, and ends everything.
            let Mark { low_id, above, .. } = model.stored.clone();
            let mut next = BatchProgress::new(usize::MAX, Duration::from_secs(1), low_id, &above, now);
            for id in (1..last).filter(|id| !model.is_stored(*id)) {
                next.begin(id);
                next.end(id);
            }
            let mark = next.mark(now);
            let newest = (1..last).filter(|id| !model.is_stored(*id)).max();
            prop_assert_eq!(mark.low_id, newest.unwrap_or(low_id));
            let done = |id: i64| id <= mark.low_id || mark.above.contains(&id);
            prop_assert!((1..last).all(done), "{mark:?}");
        }
    }

    #[test]
    fn a_checkpoint_is_due_by_number_by_time_and_when_nothing_goes_on() {
        let now = Instant::now();
        let every = Duration::from_secs(1);
        let mut progress = BatchProgress::new(4, every, 0, &[], now);
        assert!(!progress.should_record(true, now + every), "there is nothing to record");
        assert_eq!(progress.due(), None);
        for id in 1..=4 {
            assert!(progress.may_begin());
            progress.begin(id);
        }
        assert!(!progress.may_begin());
        progress.end(2);
        assert!(!progress.should_record(false, now));
        assert!(progress.should_record(true, now) && progress.should_record(false, now + every));
        progress.end(1);
        progress.end(4);
        assert!(progress.should_record(false, now), "three of four");
        assert_eq!(progress.mark(now), Mark { low_id: 2, above: vec![4], ended: 3 });
        assert!(!progress.may_begin(), "it is not committed yet");
        progress.recorded(3);
        assert!(progress.may_begin());
    }
}
