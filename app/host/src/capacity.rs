//! How many connections the process can bear, by the descriptors and the memory that it may have.
//!
//! Every connection is an open file. When they run out, whoever comes last gets nothing, be it a probe, a store or a push
//! service: so each of these has its share, and visitors have the rest.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use perennial_runtime::cgroup::{self, Cgroup};
use rustix::process::{Resource, getrlimit};

use crate::settings::Reader;

/// What one connection takes beside the head of its request: buffers of both directions, the task, the kernel's part.
const OF_ONE: u64 = 16 << 10;

/// What the process may have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means {
    /// How many files may be open.
    pub(crate) descriptors: u64,
    /// How much memory, in bytes, if that is limited.
    pub(crate) memory: Option<u64>,
}

impl Means {
    /// As the system has it: the hard limit of descriptors, to which the soft one is raised at the start.
    pub(crate) fn of_process(memory: Option<u64>) -> Self {
        Self { descriptors: getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX), memory }
    }

    /// How many connections visitors may have: what is left of the descriptors by the other shares and by files, and no more
    /// than fit into a third of the memory, each with a request head of `head` bytes.
    pub(crate) fn visitors(self, head: usize) -> u64 {
        let others = self.outgoing() + self.operators() + 64 + self.descriptors / 8;
        let by_descriptors = self.descriptors.saturating_sub(others);
        let by_memory = self.memory.map_or(u64::MAX, |memory| memory / 3 / (head as u64 + OF_ONE));
        by_descriptors.min(by_memory).max(16)
    }

    /// How many connections there may be to others, such as push services: a quarter.
    pub(crate) fn outgoing(self) -> u64 {
        (self.descriptors / 4).max(8)
    }

    /// How many connections operators and probes may have: a sixteenth.
    pub(crate) fn operators(self) -> u64 {
        (self.descriptors / 16).clamp(8, 256)
    }
}

/// How many processors this process may keep busy.
pub fn processors(settings: &mut Reader<'_>) -> NonZeroUsize {
    cgroup::processors(&cgroup_of(settings))
}

pub(crate) fn cgroup_of(settings: &mut Reader<'_>) -> Cgroup {
    Cgroup::at(&settings.get::<PathBuf>("process.cgroup"))
}

/// What the process may have of descriptors and memory.
pub(crate) fn means(settings: &mut Reader<'_>) -> Means {
    Means::of_process(cgroup_of(settings).memory_limit())
}

/// A number of connections to others, as a setting wants it, and no more than their share of what the process can bear.
pub fn outgoing_connections(settings: &mut Reader<'_>, key: &'static str, wanted: usize) -> usize {
    fit(settings, key, wanted, Means::outgoing)
}

/// A number of connections, and no more than the process can bear.
pub(crate) fn fit(
    settings: &mut Reader<'_>,
    key: &'static str,
    wanted: usize,
    most: impl Fn(Means) -> u64,
) -> usize {
    let means = means(settings);
    let most = usize::try_from(most(means)).unwrap_or(usize::MAX);
    if most < wanted {
        let Means { descriptors, memory } = means;
        let memory = memory.map_or_else(|| "no limit".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        settings.note(format!(
            "{key}: {most} instead of {wanted}, since the process may have {descriptors} open files and {memory} of memory"
        ));
    }
    wanted.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn each_part_has_its_share_of_the_descriptors() {
        let means = Means { descriptors: 1024, memory: None };
        assert_eq!((means.visitors(16 << 10), means.outgoing(), means.operators()), (512, 256, 64));
        let means = Means { descriptors: u64::MAX, memory: None };
        assert!(means.visitors(16 << 10) > 1_000_000);
    }

    #[test]
    fn heads_of_all_connections_fit_into_a_third_of_the_memory() {
        let of = |memory| Means { descriptors: 1 << 20, memory: Some(memory * MIB) }.visitors(16 << 10);
        assert_eq!((of(256), of(512), of(4096)), (2730, 5461, 43690));
    }
}
