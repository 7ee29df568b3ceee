//! The directory that the process owns: the embedded store, the keys, the lock.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use tracing::warn;

/// File with the first API key.
pub const API_KEY: &str = "api.key";
/// File with the token of the admin listener.
pub const ADMIN_TOKEN: &str = "admin.token";
/// File with the addresses that the running server listens on.
pub const ADDRESSES: &str = "addresses.json";
const LOCK: &str = "perennial.lock";

/// A secret file of a module, without which the rows of the module in the store are worth nothing.
#[derive(Clone, Debug)]
pub struct SecretFile {
    /// Name of the secret, for people.
    pub label: String,
    /// Path of the file; a relative path is inside the data directory.
    pub file: String,
    /// Name of the file in a copy, and of the secret in a store that replicas share.
    pub name: String,
    /// Returns the public part of its text, such as a public key.
    pub public: fn(&str) -> Option<String>,
    /// Consequences of its loss, in a sentence for operators.
    pub loss: &'static str,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the directory.
    #[error("{} is in use by another process{}; stop it, or set data_dir to another directory", .path.display(), holder(.pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Number of the process; empty if it left none.
        pid: String,
    },
    /// Another process has the store, which need not be in the directory.
    #[error("the store {} is in use by another process{}; stop it, or set store.url to another file", .path.display(), holder(.pid))]
    StoreInUse {
        /// The file.
        path: PathBuf,
        /// Number of the process; empty if it left none.
        pid: String,
    },
    /// A file that should have a secret is empty.
    #[error("{} is empty; remove it to have a new one made", .0.display())]
    Empty(PathBuf),
    /// A file in the directory cannot be read or written.
    #[error("cannot use {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

fn holder(pid: &str) -> String {
    if pid.is_empty() { String::new() } else { format!(" (process {pid})") }
}

/// The directory, locked: no other process uses it while this value lives.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// The locks on stores. They are released first, so that a process that waits for the directory finds them free.
    stores: Mutex<Vec<(PathBuf, File)>>,
    _lock: File,
}

impl DataDir {
    /// Makes the directory if it is missing, readable for its owner only, and locks it.
    ///
    /// # Errors
    /// When another process has the directory, or the directory cannot be made.
    pub fn lock(path: &Path) -> Result<Self, Error> {
        Self::make(path)?;
        let in_use = |pid| Error::InUse { path: path.to_owned(), pid };
        let lock = take(&path.join(LOCK), in_use)?;
        let data_dir = Self { path: path.to_owned(), stores: Mutex::default(), _lock: lock };
        // A process that was killed has left this file behind.
        data_dir.remove(ADDRESSES);
        Ok(data_dir)
    }

    /// Makes the directory if it is missing, readable for its owner only.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn make(path: &Path) -> Result<(), Error> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))
    }

    /// Locks the file of a store, wherever it is, for as long as this value lives: two directories may name the same
    /// store. The lock is a file beside it, since closing the file of the store anywhere in the process would end
    /// SQLite's locks on it.
    ///
    /// # Errors
    /// When another process has the store, or the lock cannot be made.
    pub fn lock_store(&self, file: &Path) -> Result<(), Error> {
        // Links are resolved. For a file that does not exist yet, only the links of its directory are.
        let file = fs::canonicalize(file).unwrap_or_else(|_| {
            let directory = file.parent().and_then(|parent| fs::canonicalize(parent).ok());
            match (directory, file.file_name()) {
                (Some(directory), Some(name)) => directory.join(name),
                _ => file.to_owned(),
            }
        });
        let mut stores = self.stores.lock();
        if stores.iter().any(|(locked, _)| *locked == file) {
            return Ok(());
        }
        let mut name = file.clone().into_os_string();
        name.push(".lock");
        let lock = take(Path::new(&name), |pid| Error::StoreInUse { path: file.clone(), pid })?;
        stores.push((file, lock));
        Ok(())
    }

    /// The path of a file in the directory.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the text of a secret file, and true if the file was missing and has been made with `make`.
    ///
    /// # Errors
    /// When the file is empty, or cannot be read or written.
    pub fn secret(&self, name: &str, make: impl FnOnce() -> String) -> Result<(String, bool), Error> {
        let path = self.join(name);
        match fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Err(Error::Empty(path)),
            Ok(text) => {
                warn_if_others_can_read(&path);
                Ok((text.trim_end().to_owned(), false))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let text = make();
                self.write(name, &format!("{}\n", text.trim_end()))?;
                Ok((text.trim_end().to_owned(), true))
            }
            Err(source) => Err(at(&path)(source)),
        }
    }

    /// Returns the text of a file, if it exists and can be read.
    pub fn read(&self, name: &str) -> Option<String> {
        Some(fs::read_to_string(self.join(name)).ok()?.trim_end().to_owned())
    }

    /// Writes a file, readable for its owner only, so that it exists completely or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), Error> {
        let path = self.join(name);
        let draft = self.join(format!("{name}.new"));
        let write = || {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            // The entry in the directory must be as durable as the content.
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|error| {
            // The draft has a secret that is not in use.
            let _ = fs::remove_file(&draft);
            at(&path)(error)
        })
    }

    /// Removes a file if it exists.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.join(name));
    }
}

/// Takes a lock, and writes the number of this process into the file. The number is only for the error message: the
/// lock itself belongs to the kernel, and ends with the process.
fn take(path: &Path, in_use: impl FnOnce(String) -> Error) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut lock = options.open(path).map_err(at(path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = lock.read_to_string(&mut pid);
            return Err(in_use(pid.trim().to_owned()));
        }
        Err(TryLockError::Error(source)) => return Err(at(path)(source)),
    }
    let number = format!("{}\n", std::process::id());
    lock.set_len(0).and_then(|()| lock.write_all(number.as_bytes())).map_err(at(path))?;
    Ok(lock)
}

/// Returns true when a process holds the lock on a data directory.
pub fn is_locked(path: &Path) -> bool {
    let lock = File::open(path.join(LOCK));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn warn_if_others_can_read(path: &Path) {
    if let Some(mode) = exposed(path) {
        warn!(file = %path.display(), mode = format!("{mode:o}"), "others can read this secret");
    }
}

/// Returns the mode of a file or a directory that other users can read; `None` when they cannot, or when it does not
/// exist.
pub(crate) fn exposed(path: &Path) -> Option<u32> {
    let file = fs::metadata(path).ok()?;
    let mode = file.permissions().mode() & 0o777;
    // A Secret of Kubernetes belongs to root, and its group is the pod's.
    let is_ours = file.uid() == rustix::process::geteuid().as_raw();
    let others = if is_ours { 0o077 } else { 0o007 };
    (mode & others != 0).then_some(mode)
}

/// Checks that this user may read the directory, if it exists.
///
/// # Errors
/// When the directory belongs to another user: every other answer about it would be misleading.
pub(crate) fn check_access(path: &Path) -> anyhow::Result<()> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            anyhow::bail!("{} belongs to another user: run this as that user, or as root", path.display())
        }
        _ => Ok(()),
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}
