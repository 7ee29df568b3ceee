//! Files that have changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Interval at which the files are looked at.
const LOOK: Duration = Duration::from_millis(150);
/// Maximum number of files that are looked at.
const FILES: usize = 20_000;
/// Directories that are not a part of the sources.
const IGNORED: [&str; 2] = ["target", "node_modules"];
/// Files by which a data directory of a program is known.
const DATA: &str = "perennial.lock";

/// The files of a project: when each was changed, and its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshot(BTreeMap<PathBuf, (SystemTime, u64)>);

impl Snapshot {
    pub(super) fn of(directory: &Path) -> Self {
        let mut snapshot = Self::default();
        snapshot.add(directory);
        snapshot
    }

    fn add(&mut self, directory: &Path) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let Ok(metadata) = entry.metadata() else { continue };
            let is_ignored = name.starts_with('.') || name.ends_with('~') || IGNORED.contains(&&*name);
            if is_ignored || self.0.len() >= FILES {
                continue;
            }
            if metadata.is_dir() && !path.join(DATA).exists() {
                self.add(&path);
            } else if metadata.is_file() {
                let changed = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                self.0.insert(path, (changed, metadata.len()));
            }
        }
    }

    /// Waits until a file has changed, and until no further one does: editors write several.
    pub(super) async fn changed(&self, directory: &Path) {
        let mut before = self.clone();
        loop {
            tokio::time::sleep(LOOK).await;
            let now = Self::of(directory);
            if now == before && now != *self {
                return;
            }
            before = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_count_and_what_is_made_of_them_does_not() {
        let directory = std::env::temp_dir().join(format!("perennial-watch-{}", std::process::id()));
        for path in ["src", "target/debug", ".git", "perennial-data"] {
            fs::create_dir_all(directory.join(path)).unwrap();
        }
        fs::write(directory.join("perennial-data/perennial.lock"), "").unwrap();
        fs::write(directory.join("src/main.rs"), "").unwrap();
        let before = Snapshot::of(&directory);
        for path in ["target/debug/x", ".git/x", "perennial-data/store.db", "src/.main.rs.swp"] {
            fs::write(directory.join(path), "x").unwrap();
        }
        assert_eq!(Snapshot::of(&directory), before);
        fs::write(directory.join("src/main.rs"), "x").unwrap();
        assert_ne!(Snapshot::of(&directory), before);
        fs::remove_dir_all(directory).unwrap();
    }
}
