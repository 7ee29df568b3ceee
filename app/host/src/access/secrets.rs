//! Secrets that all replicas need, in a store that they share. A file in `data_dir` takes precedence over them.

use perennial_store::pool::sql::{self, Dialect, Store, Tx};
use perennial_store::{transact, values};
use secrecy::SecretString;

/// Reads a secret that all replicas need from a store that they share; always `None` for the embedded store.
///
/// # Errors
/// When the store cannot be read.
pub async fn shared(store: &Store, name: &str) -> sql::Result<Option<SecretString>> {
    if store.dialect() == Dialect::Sqlite {
        return Ok(None);
    }
    let secret: Option<String> =
        store.value("SELECT value FROM secrets WHERE name = ?", values![name]).await?;
    Ok(secret.map(SecretString::from))
}

/// Stores a secret that all replicas need, unless the store has it already, and returns the stored value.
///
/// # Errors
/// When the store refuses.
pub async fn share(store: &Store, name: &str, value: &str) -> sql::Result<SecretString> {
    let (name, value) = (name.to_owned(), value.to_owned());
    transact!(store, tx => share_in(tx, &name, &value))
}

/// Does the same as [`share`] in a transaction of the caller.
pub(crate) async fn share_in<T: Tx>(tx: &T, name: &str, value: &str) -> sql::Result<SecretString> {
    let sql = "INSERT INTO secrets (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING";
    tx.execute(sql, &values![name, value]).await?;
    let kept = sql::first(tx, "SELECT value FROM secrets WHERE name = ?", &values![name]).await?;
    let kept: Option<String> = kept.map(|row| row.get("value")).transpose()?;
    Ok(kept.unwrap_or_else(|| value.to_owned()).into())
}

/// Replaces the value of a shared secret, if it is still `before`.
///
/// # Errors
/// When the store refuses, or another process has changed the secret.
pub async fn replace(store: &Store, name: &str, before: &str, value: &str) -> anyhow::Result<()> {
    let sql = "UPDATE secrets SET value = ? WHERE name = ? AND value = ?";
    let changed = store.execute(sql, values![value, name, before]).await?;
    anyhow::ensure!(changed == 1, "another process has just changed {name}");
    Ok(())
}
