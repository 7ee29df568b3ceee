//! Backups of the embedded store and the keys, which cannot be made again.
//!
//! | route | what |
//! |---|---|
//! | `POST /backup` | `{"directory"}`: an absolute path on this machine that does not exist yet |

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use axum::routing::post;
use axum::{Extension, Router};
use perennial_server::http::problem::FieldError;
use perennial_store::pool::sqlite;
use serde::{Deserialize, Serialize};
use tracing::info;
use uuid::Uuid;

use crate::api::{Json, Result};
use crate::config::{Config, StoreConfig};
use crate::data_dir::{ADMIN_TOKEN, API_KEY, SecretFile};
use crate::pools::PoolConfig;
use crate::sessions;

/// The files to copy.
#[derive(Clone, Debug)]
pub(crate) struct BackupSource {
    data_dir: PathBuf,
    /// The file of the store; `None` for a server.
    store: Option<PathBuf>,
    /// The embedded databases of modules: their files, and their places in the copy.
    databases: Vec<(PathBuf, PathBuf)>,
    /// Secret files of the modules.
    secrets: Vec<SecretFile>,
    /// Directories of the modules, within the data directory.
    directories: Vec<&'static str>,
}

/// Result of a backup.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Copied {
    pub(crate) directory: PathBuf,
    /// Names of the files within the directory.
    pub(crate) files: Vec<String>,
    pub(crate) bytes: u64,
}

impl BackupSource {
    /// Names the files to copy of a data directory.
    ///
    /// # Errors
    /// When the store is a server, which has its own tool for copies, and no module has an embedded database.
    pub(crate) fn of(
        config: &Config,
        secrets: Vec<SecretFile>,
        directories: Vec<&'static str>,
    ) -> anyhow::Result<Self> {
        let data_dir = config.data_dir.clone();
        let store = match &config.store {
            StoreConfig::Sqlite { file, .. } => Some(data_dir.join(file)),
            StoreConfig::Postgres(_) => None,
        };
        let database = |pool: &PoolConfig| {
            let file = pool.file()?;
            // A file elsewhere gets the name of its pool.
            let place =
                if file.is_absolute() { format!("{}.db", pool.name()).into() } else { file.to_owned() };
            Some((data_dir.join(file), place))
        };
        let databases: Vec<_> = config.pools.iter().filter_map(database).collect();
        if store.is_none() && databases.is_empty() {
            bail!("the store is a Postgres server: pg_dump copies it, and the keys that are in it");
        }
        Ok(Self { store, data_dir, databases, secrets, directories })
    }

    /// The files with keys, each with its name in the copy.
    fn keys(&self) -> impl Iterator<Item = (PathBuf, &str)> {
        let own = [API_KEY, ADMIN_TOKEN, sessions::KEY].map(|name| (self.data_dir.join(name), name));
        let secrets =
            self.secrets.iter().map(|secret| (self.data_dir.join(&secret.file), secret.name.as_str()));
        secrets.chain(own)
    }

    /// Copies the store as of one moment, even while it is in use, each other embedded database as of its own, and the
    /// keys. The directory appears with everything
    /// in it, or not at all.
    pub(crate) fn copy_to(&self, directory: &Path) -> anyhow::Result<Copied> {
        if directory.exists() {
            bail!("{} is there already: wanted a new directory", directory.display());
        }
        let name = directory.file_name().context("wanted a directory with a name")?;
        let draft = format!("{}.{}.new", name.to_string_lossy(), Uuid::now_v7().simple());
        let Draft(draft) = &Draft(directory.with_file_name(draft));
        let at = |path: &Path| format!("{} cannot be written", path.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(draft).with_context(|| at(draft))?;
        let mut files = Vec::new();
        if let Some(store) = &self.store {
            let place = store.file_name().context("the store has no file")?;
            copy_database(store, draft, Path::new(place), true, &mut files)?;
        }
        for (database, place) in self.databases.iter().filter(|(database, _)| database.exists()) {
            copy_database(database, draft, place, false, &mut files)?;
        }
        for (file, key) in self.keys() {
            match fs::read(file) {
                Ok(secret) => {
                    let mut options = fs::OpenOptions::new();
                    let file =
                        options.write(true).create(true).truncate(true).mode(0o600).open(draft.join(key));
                    let written = file.and_then(|mut file| {
                        io::Write::write_all(&mut file, &secret)?;
                        file.sync_all()
                    });
                    written.with_context(|| at(&draft.join(key)))?;
                    files.push(key.to_owned());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("{key} cannot be read")),
            }
        }
        for directory in &self.directories {
            let from = self.data_dir.join(directory);
            copy_directory(&from, draft, Path::new(directory), &mut files)
                .with_context(|| format!("{} cannot be copied", from.display()))?;
        }
        let sizes = files.iter().map(|file| Ok(fs::metadata(draft.join(file))?.len()));
        let bytes = sizes.sum::<io::Result<u64>>()?;
        fs::rename(draft, directory).with_context(|| at(directory))?;
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::File::open(parent)?.sync_all()?;
        }
        Ok(Copied { directory: directory.to_owned(), files, bytes })
    }
}

/// Copies an embedded database to its place in `draft`.
fn copy_database(
    database: &Path,
    draft: &Path,
    place: &Path,
    is_store: bool,
    files: &mut Vec<String>,
) -> anyhow::Result<()> {
    let to = draft.join(place);
    let parent = to.parent().context("a database has no directory")?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    sqlite::copy(database, &to, is_store)
        .with_context(|| format!("{} cannot be copied to {}", database.display(), place.display()))?;
    files.push(place.to_string_lossy().into_owned());
    Ok(())
}

/// Copies the regular files of a directory, and of those below it, to the same place in `draft`. A link is not followed:
/// it may lead anywhere. A file that is gone meanwhile is left out.
fn copy_directory(from: &Path, draft: &Path, place: &Path, files: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(from) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(draft.join(place))?;
    for entry in entries {
        let entry = entry?;
        let (kind, place) = (entry.file_type()?, place.join(entry.file_name()));
        if kind.is_dir() {
            copy_directory(&entry.path(), draft, &place, files)?;
        } else if kind.is_file() {
            match fs::copy(entry.path(), draft.join(&place)) {
                Ok(_) => fs::File::open(draft.join(&place))?.sync_all()?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            }
            files.push(place.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// An unfinished directory, which is removed on drop unless it was renamed.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Route with which operators make a backup; without a source it is refused.
pub(crate) fn admin_write(source: Option<BackupSource>) -> Router {
    Router::new().route("/backup", post(backup)).layer(Extension(source))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    directory: PathBuf,
}

async fn backup(
    Extension(source): Extension<Option<BackupSource>>,
    Json(Wanted { directory }): Json<Wanted>,
) -> Result<Json<Copied>> {
    let refuse = |wanted: String| FieldError::new("directory", wanted);
    let Some(source) = source else {
        return Err(refuse("an embedded store: pg_dump copies Postgres".to_owned()).into());
    };
    if !directory.is_absolute() || directory.exists() {
        return Err(refuse("an absolute path where nothing is yet".to_owned()).into());
    }
    let copy = tokio::task::spawn_blocking(move || source.copy_to(&directory));
    let copied = copy.await.context("copying broke off")??;
    info!(directory = %copied.directory.display(), bytes = copied.bytes, "copied by an operator");
    Ok(Json(copied))
}
