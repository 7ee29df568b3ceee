//! Secrets that all replicas need, on a store that they share. A file in `data_dir` wins over what is here.

use perennial_store::pool::sql::{self, Dialect, Store, Tx};
use perennial_store::{transact, values};
use secrecy::SecretString;

/// A secret that all replicas need, on a store that they share.
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

/// Keeps a secret that all replicas need, unless there is one, and returns the one that is kept.
///
/// # Errors
/// When the store refuses.
pub async fn share(store: &Store, name: &str, value: &str) -> sql::Result<SecretString> {
    let (name, value) = (name.to_owned(), value.to_owned());
    transact!(store, tx => share_in(tx, &name, &value))
}

/// The same in a transaction of the caller's.
pub(crate) async fn share_in<T: Tx>(tx: &T, name: &str, value: &str) -> sql::Result<SecretString> {
    let sql = "INSERT INTO secrets (name, value) VALUES (?, ?) ON CONFLICT (name) DO NOTHING";
    tx.execute(sql, &values![name, value]).await?;
    let kept = sql::first(tx, "SELECT value FROM secrets WHERE name = ?", &values![name]).await?;
    let kept: Option<String> = kept.map(|row| row.get("value")).transpose()?;
    Ok(kept.unwrap_or_else(|| value.to_owned()).into())
}

/// Puts another value in the place of a shared secret, if nobody else has.
///
/// # Errors
/// When the store refuses.
pub async fn replace(store: &Store, name: &str, before: &str, value: &str) -> anyhow::Result<()> {
    let sql = "UPDATE secrets SET value = ? WHERE name = ? AND value = ?";
    let changed = store.execute(sql, values![value, name, before]).await?;
    anyhow::ensure!(changed == 1, "somebody else has just changed {name}");
    Ok(())
}
