//! The keys that a first boot makes.

use perennial_store::pool::sql;
use secrecy::{ExposeSecret, SecretString};
use tracing::info;

use super::keys::Grant;
use super::{Scopes, keys, random_key};
use crate::data_dir::{self, DataDir};
use crate::sites::SiteId;

/// Makes the keys that a first boot needs, logs their files once, and returns the admin token. No API key is made if
/// there are others in files (`has_others`).
pub(crate) async fn make(
    data_dir: &DataDir,
    store: &sql::Store,
    scopes: &Scopes,
    has_others: bool,
) -> anyhow::Result<SecretString> {
    let random = || random_key().expose_secret().to_owned();
    let (token, made) = data_dir.secret(data_dir::ADMIN_TOKEN, random)?;
    if made {
        info!(file = %data_dir.join(data_dir::ADMIN_TOKEN).display(), "made the admin token");
    }
    if !has_others && !keys::exist(store).await? {
        if store.dialect() == sql::Dialect::Postgres {
            anyhow::bail!(
                "there is no API key in the store: make the keys once, with `{} keys generate`",
                crate::program_name()
            );
        }
        make_api_key(data_dir, store, scopes).await?;
    }
    Ok(token.into())
}

/// Makes an API key with every scope, or takes the key of an existing file, and stores its hash.
pub(crate) async fn make_api_key(
    data_dir: &DataDir,
    store: &sql::Store,
    scopes: &Scopes,
) -> anyhow::Result<()> {
    let (key, made) = data_dir.secret(data_dir::API_KEY, || random_key().expose_secret().to_owned())?;
    let grant = Grant {
        site: SiteId::DEFAULT,
        name: data_dir::API_KEY.to_owned(),
        scopes: scopes.all(),
        per_minute: None,
        ends_at: None,
    };
    keys::insert(store, &grant, &key).await?;
    if made {
        info!(file = %data_dir.join(data_dir::API_KEY).display(), "made an API key");
    }
    Ok(())
}
