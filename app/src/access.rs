//! Who may call: API keys, the page's token, the admin token, and what each of them may do.

use std::collections::{BTreeSet, HashMap};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::{digest, rand};
use axum::extract::{FromRef, FromRequestParts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::request::Parts;
use http::{HeaderMap, StatusCode, header};
use perennial_server::http::problem::Problem;
use perennial_server::pool::Migrations;
use perennial_server::pool::sqlite::{self, Sqlite};
use rusqlite::Connection;
use secrecy::{ExposeSecret, SecretString};

/// The tables of sites and keys.
pub const MIGRATIONS: Migrations = Migrations {
    module: "access",
    steps: &["CREATE TABLE sites (
        id   INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE
    );
    INSERT INTO sites (id, name) VALUES (1, 'default');
    CREATE TABLE api_keys (
        id         INTEGER PRIMARY KEY,
        site       INTEGER NOT NULL REFERENCES sites (id),
        name       TEXT NOT NULL,
        hash       BLOB NOT NULL UNIQUE,   -- SHA-256: the keys are random, so that no slower hash is needed
        scopes     TEXT NOT NULL,          -- words, separated by spaces
        created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
    );"],
};

/// A site: one of several that a process may serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SiteId(pub i64);

impl SiteId {
    /// The site that needs no settings.
    pub const DEFAULT: Self = Self(1);
}

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Write subscriptions.
    Subscribe,
    /// Send notifications.
    Notify,
    /// Read what is stored.
    Read,
    /// Enqueue jobs.
    Jobs,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Subscribe, Self::Notify, Self::Read, Self::Jobs];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Subscribe => "subscribe",
            Self::Notify => "notify",
            Self::Read => "read",
            Self::Jobs => "jobs",
        }
    }
}

/// Who calls, as far as a key says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The site that the key is for.
    pub site: SiteId,
    /// The key's name in the store, or that of the page's token: what idempotency keys belong to.
    pub key: String,
    scopes: BTreeSet<Scope>,
}

impl Caller {
    /// Whether the key may be used for this.
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }
}

type Hash = [u8; 32];

/// The keys of this process. A cheap handle.
#[derive(Clone, Debug)]
pub struct Access(Arc<Keys>);

#[derive(Debug)]
struct Keys {
    api: RwLock<HashMap<Hash, Caller>>,
    tokens: Mutex<HashMap<Hash, Token>>,
    admin: SecretString,
}

#[derive(Debug)]
struct Token {
    caller: Caller,
    ends: Instant,
}

impl Access {
    /// Reads the API keys from the store.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn open(store: &Sqlite, admin: SecretString) -> sqlite::Result<Self> {
        let api = RwLock::new(store.read(read_keys).await?);
        Ok(Self(Arc::new(Keys { api, tokens: Mutex::default(), admin })))
    }

    /// A token of this process called `name`, for `scopes` of the default site, that ends after `life`.
    pub fn issue(&self, name: &str, scopes: &[Scope], life: Duration) -> SecretString {
        let token = random_key();
        let caller =
            Caller { site: SiteId::DEFAULT, key: name.to_owned(), scopes: scopes.iter().copied().collect() };
        let mut tokens = self.0.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.insert(hash(token.expose_secret()), Token { caller, ends: Instant::now() + life });
        token
    }

    /// Who presents a key, if it is one that is known and has not ended.
    pub fn caller(&self, key: &str) -> Option<Caller> {
        // Looking up a hash tells nothing about a key that is nearly right.
        let hash = hash(key);
        if let Some(caller) = self.0.api.read().unwrap_or_else(PoisonError::into_inner).get(&hash) {
            return Some(caller.clone());
        }
        let mut tokens = self.0.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, token| Instant::now() < token.ends);
        tokens.get(&hash).map(|token| token.caller.clone())
    }

    /// Whether this is the admin token.
    pub fn is_admin(&self, token: &str) -> bool {
        verify_slices_are_equal(token.as_bytes(), self.0.admin.expose_secret().as_bytes()).is_ok()
    }

    /// Who sends these headers: nobody in particular without `Authorization`.
    ///
    /// # Errors
    /// 401 for a key that is not known.
    pub fn optional(&self, headers: &HeaderMap) -> Result<Option<Caller>, Problem> {
        let Some(key) = bearer(headers) else { return Ok(None) };
        let unknown = || Problem::new(StatusCode::UNAUTHORIZED, "this key is not known, or has ended");
        self.caller(key).map(Some).ok_or_else(unknown)
    }
}

/// The token of `Authorization: Bearer`.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

/// A scope as a type, for [`Authorized`].
pub trait Required: Send + Sync + 'static {
    /// The scope.
    const SCOPE: Scope;
}

macro_rules! required {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        impl Required for $name {
            const SCOPE: Scope = Scope::$name;
        }
    )*};
}

required!(
    /// See [`Scope::Subscribe`].
    Subscribe,
    /// See [`Scope::Notify`].
    Notify,
    /// See [`Scope::Read`].
    Read,
    /// See [`Scope::Jobs`].
    Jobs
);

/// A caller whose key may be used for `S`. A handler that takes one needs no other check.
#[derive(Clone, Debug)]
pub struct Authorized<S> {
    /// Who it is.
    pub caller: Caller,
    scope: PhantomData<S>,
}

impl<S: Required, T> FromRequestParts<T> for Authorized<S>
where
    Access: FromRef<T>,
    T: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &T) -> Result<Self, Problem> {
        let access = Access::from_ref(state);
        let missing = || Problem::new(StatusCode::UNAUTHORIZED, "wanted Authorization: Bearer <API key>");
        let caller = access.optional(&parts.headers)?.ok_or_else(missing)?;
        if !caller.may(S::SCOPE) {
            let detail = format!("this key does not have the scope {}", S::SCOPE.as_str());
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
        Ok(Self { caller, scope: PhantomData })
    }
}

fn read_keys(tx: &Connection) -> rusqlite::Result<HashMap<Hash, Caller>> {
    let mut select = tx.prepare("SELECT id, site, hash, scopes FROM api_keys")?;
    let keys = select.query_map([], |row| {
        let scopes: String = row.get("scopes")?;
        let known = |word: &str| Scope::ALL.into_iter().find(|scope| scope.as_str() == word);
        let caller = Caller {
            site: SiteId(row.get("site")?),
            key: row.get::<_, i64>("id")?.to_string(),
            scopes: scopes.split(' ').filter_map(known).collect(),
        };
        Ok((row.get("hash")?, caller))
    })?;
    keys.collect()
}

/// Whether there is an API key at all.
///
/// # Errors
/// When SQLite refuses.
pub fn has_keys(tx: &Connection) -> rusqlite::Result<bool> {
    tx.query_row("SELECT EXISTS (SELECT 1 FROM api_keys)", [], |row| row.get(0))
}

/// Stores the hash of a key with every scope of the default site.
///
/// # Errors
/// When SQLite refuses.
pub fn insert_key(tx: &Connection, name: &str, key: &str) -> rusqlite::Result<()> {
    let scopes = Scope::ALL.map(Scope::as_str).join(" ");
    let sql =
        "INSERT INTO api_keys (site, name, hash, scopes) VALUES (?, ?, ?, ?) ON CONFLICT (hash) DO NOTHING";
    tx.execute(sql, (SiteId::DEFAULT.0, name, hash(key), scopes)).map(drop)
}

/// A new key: 256 random bits.
pub fn random_key() -> SecretString {
    let mut bytes = [0; 32];
    #[expect(clippy::expect_used, reason = "without randomness nothing here can go on")]
    rand::fill(&mut bytes).expect("the system's random generator");
    format!("pk_{}", URL_SAFE_NO_PAD.encode(bytes)).into()
}

fn hash(key: &str) -> Hash {
    let digest = digest::digest(&digest::SHA256, key.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}
