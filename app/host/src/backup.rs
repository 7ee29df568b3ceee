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
    /// The file of the store.
    file: PathBuf,
    /// The files of embedded databases of modules.
    databases: Vec<PathBuf>,
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
    /// When the store is a server, which has its own tool for copies.
    pub(crate) fn of(
        config: &Config,
        secrets: Vec<SecretFile>,
        directories: Vec<&'static str>,
    ) -> anyhow::Result<Self> {
        let data_dir = config.data_dir.clone();
        let StoreConfig::Sqlite { file, .. } = &config.store else {
            bail!("the store is a Postgres server: pg_dump copies it, and the keys that are in it");
        };
        let databases = config.pools.iter().filter_map(PoolConfig::file);
        let databases = databases.map(|file| data_dir.join(file)).collect();
        Ok(Self { file: data_dir.join(file), data_dir, databases, secrets, directories })
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
        let databases = self.databases.iter().filter(|file| file.exists());
        for file in [&self.file].into_iter().chain(databases) {
            let name = file.file_name().context("the store has no file")?.to_string_lossy().into_owned();
            sqlite::copy(file, &draft.join(&name))
                .with_context(|| format!("{} cannot be copied", file.display()))?;
            files.push(name);
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
