//! Migrations: the steps that create and change the tables of a module.

/// A write that changes nothing but needs room on the disk.
pub(super) const WRITE_PROBE: &str = "UPDATE migrations_served SET oldest = oldest";

/// The steps that create and change the tables of one module.
#[derive(Clone, Copy, Debug)]
pub struct Migrations {
    /// Name of the module.
    pub module: &'static str,
    /// SQL of the steps, the oldest first. A released step is never changed.
    ///
    /// During a rollout, and after a rollback, programs that know fewer steps work on the same tables: so a step only
    /// adds parts that such programs do not need. A later step may remove parts that no program uses any more. It
    /// begins with a line such as `-- serves 3`, the number of steps that a program must know from then on.
    pub steps: &'static [&'static str],
}

/// The store does not serve programs as old as this one any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the store is too new for this program: {module} is at version {found} and serves programs that know {serves}; \
     this one knows {known}"
)]
pub struct Newer {
    /// Name of the module.
    pub module: &'static str,
    /// The version in the store.
    pub found: usize,
    /// The oldest version of a program that the store serves.
    pub serves: usize,
    /// The newest version that this program knows.
    pub known: usize,
}

/// The recorded status of the tables of a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MigrationStatus {
    /// Number of steps done.
    pub(super) version: usize,
    /// Number of steps that a program must know. `None` in a store from before this was recorded, which serves no older
    /// program.
    pub(super) serves: Option<usize>,
}

impl Migrations {
    /// Returns the steps that a store lacks, each with the version that it makes, and the number of steps that a
    /// program must know when they are done.
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
        // Every program knows the first step.
        let serves =
            missing.clone().filter_map(|(_, step)| serves_from(step)).fold(serves.max(1), usize::max);
        Ok((missing, serves))
    }
}

/// The number in the `-- serves` line of a step, if it has one.
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
        // A store without a recorded number serves no older program.
        assert!(missing(&["CREATE"], 2, None).is_err());
        assert_eq!(missing(&["CREATE", "ADD", "MORE"], 2, None), Ok((1, 2)));
    }
}
