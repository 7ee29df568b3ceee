//! The tables of a module, in the steps in which they came to be.

/// A write that changes nothing, and needs room all the same.
pub(super) const WRITE_PROBE: &str = "UPDATE migrations_served SET oldest = oldest";

/// The tables of one part of the program, in the steps in which they came to be.
#[derive(Clone, Copy, Debug)]
pub struct Migrations {
    /// Whose tables these are.
    pub module: &'static str,
    /// SQL, the oldest first. A step that was ever released is never changed.
    ///
    /// While a new version is rolled out, and after it was rolled back, programs that know fewer steps work on the same
    /// tables: so a step only adds what they can do without. A later one may take away what no program uses any more; it
    /// begins with a line `-- serves 3`, which says how many steps a program must know from then on.
    pub steps: &'static [&'static str],
}

/// The store does not serve programs as old as this one any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the store is too new for this program: {module} is at version {found} and serves programs that know {serves}; \
     this one knows {known}"
)]
pub struct Newer {
    /// Whose migrations.
    pub module: &'static str,
    /// The version in the store.
    pub found: usize,
    /// The oldest version that it serves.
    pub serves: usize,
    /// The newest version that this program knows.
    pub known: usize,
}

/// Where the tables of a module stand, as a store has written it down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MigrationStatus {
    /// How many steps were done.
    pub(super) version: usize,
    /// How many of them a program must know. Stores from before this was written down serve none that is older.
    pub(super) serves: Option<usize>,
}

impl Migrations {
    /// The steps that a store has not seen, each with the version that it makes; and how many of them a program must know
    /// when they are done.
    pub(super) fn missing(
        self,
        status: MigrationStatus,
    ) -> Result<(impl Iterator<Item = (i64, &'static str)>, usize), Newer> {
        let Self { module, steps } = self;
        let MigrationStatus { version: found, serves } = status;
        let serves = serves.unwrap_or(found);
        if serves > steps.len() {
            return Err(Newer { module, found, serves, known: steps.len() });
        }
        let missing = (1..).zip(steps.iter().copied()).skip(found);
        // The first step is what there is nothing older than.
        let serves =
            missing.clone().filter_map(|(_, step)| serves_from(step)).fold(serves.max(1), usize::max);
        Ok((missing, serves))
    }
}

/// What a step says of programs that are older.
fn serves_from(step: &str) -> Option<usize> {
    step.trim_start().lines().next()?.strip_prefix("-- serves ")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(
        steps: &'static [&'static str],
        version: usize,
        serves: Option<usize>,
    ) -> Result<(usize, usize), Newer> {
        let migrations = Migrations { module: "zoo", steps };
        migrations.missing(MigrationStatus { version, serves }).map(|(steps, serves)| (steps.count(), serves))
    }

    #[test]
    fn older_programs_are_served_until_a_step_takes_something_away() {
        assert_eq!(missing(&["CREATE", "ADD"], 0, None), Ok((2, 1)));
        assert_eq!(
            missing(&["CREATE"], 2, Some(1)),
            Ok((0, 1)),
            "an older program on a store that only grew"
        );
        assert_eq!(missing(&["CREATE", "ADD", "-- serves 2\nDROP"], 2, Some(1)), Ok((1, 2)));
        let newer = Newer { module: "zoo", found: 3, serves: 2, known: 1 };
        assert_eq!(missing(&["CREATE"], 3, Some(2)), Err(newer));
        assert_eq!(missing(&["CREATE", "ADD"], 3, Some(2)), Ok((0, 2)));
        // Nobody has said what a store from before serves.
        assert!(missing(&["CREATE"], 2, None).is_err());
        assert_eq!(missing(&["CREATE", "ADD", "MORE"], 2, None), Ok((1, 2)));
    }
}
