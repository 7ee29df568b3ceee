//! Number of connections that the process can bear, by the descriptors and the memory that it may have.
//!
//! Every connection is an open file. When descriptors run out, the next connection fails, even if a probe, a store or a
//! push service needs it. So each of these has its share, and visitors have the rest.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use perennial_runtime::cgroup::{self, Cgroup};
use rustix::process::{Resource, getrlimit};

use crate::settings::Reader;

/// Memory of one connection beside the head of its request, in bytes: the buffers of both directions, the task, and the
/// part of the kernel.
const OF_ONE: u64 = 16 << 10;

/// Limits of the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Means {
    /// Maximum number of open files.
    pub(crate) descriptors: u64,
    /// Maximum memory, in bytes; `None` is no limit.
    pub(crate) memory: Option<u64>,
}

impl Means {
    /// Reads the hard limit of descriptors, to which the soft limit is raised at the start.
    pub(crate) fn of_process(memory: Option<u64>) -> Self {
        Self { descriptors: getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX), memory }
    }

    /// Maximum number of connections of visitors: the descriptors that the other shares and files leave, and no more
    /// than fit into a third of the memory, each with a request head of `head` bytes.
    pub(crate) fn visitors(self, head: usize) -> u64 {
        let others = self.outgoing() + self.operators() + 64 + self.descriptors / 8;
        let by_descriptors = self.descriptors.saturating_sub(others);
        let by_memory = self.memory.map_or(u64::MAX, |memory| memory / 3 / (head as u64 + OF_ONE));
        by_descriptors.min(by_memory).max(16)
    }

    /// Maximum number of connections to other servers, such as push services: a quarter of the descriptors, at least 8.
    pub(crate) fn outgoing(self) -> u64 {
        (self.descriptors / 4).max(8)
    }

    /// Maximum number of connections of operators and probes: a sixteenth of the descriptors, from 8 to 256.
    pub(crate) fn operators(self) -> u64 {
        (self.descriptors / 16).clamp(8, 256)
    }
}

/// Number of processors that this process may keep busy.
pub fn processors(settings: &mut Reader<'_>) -> NonZeroUsize {
    cgroup::processors(&cgroup_of(settings))
}

pub(crate) fn cgroup_of(settings: &mut Reader<'_>) -> Cgroup {
    Cgroup::at(&settings.get::<PathBuf>("process.cgroup"))
}

/// Limits of the process for descriptors and memory.
pub(crate) fn means(settings: &mut Reader<'_>) -> Means {
    Means::of_process(cgroup_of(settings).memory_limit())
}

/// Returns the number of connections to other servers that a setting wants, but no more than their share. A smaller
/// number is noted for operators.
pub fn outgoing_connections(settings: &mut Reader<'_>, key: &'static str, wanted: usize) -> usize {
    fit(settings, key, wanted, Means::outgoing)
}

/// Returns the wanted number of connections, but no more than `most` of the limits of the process. A smaller number is
/// noted for operators.
pub(crate) fn fit(settings: &mut Reader<'_>, key: &str, wanted: usize, most: impl Fn(Means) -> u64) -> usize {
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
