//! Access control: API keys, the token of the page, the admin token, and the rights of each.

mod files;
pub(crate) mod first;
pub mod keys;
mod limits;
pub mod secrets;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::rand;
use axum::extract::{FromRef, FromRequestParts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::request::Parts;
use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;
use parking_lot::Mutex;
use perennial_runtime::drain::Drain;
use perennial_server::http::problem::Problem;
use perennial_server::http::scope::RequestScope;
use perennial_store::cache::{self, Cache, Caches, Kept};
use perennial_store::pool::redis::Redis;
use perennial_store::pool::sql::Store;
use secrecy::{ExposeSecret, SecretString};

use crate::api::store_failed;
use crate::sites::{SiteId, Sites};
pub(crate) use files::Config as KeyFile;
use files::KeyFiles;
use keys::{Grant, Hash, Hashes, hash};
use limits::KeyLimits;

/// Cache of the keys in the store. It also remembers unknown keys.
pub(crate) const CACHE: cache::Config = cache::Config {
    name: "api_keys",
    bytes: 4 << 20,
    // A key that another process has ended stays valid here for this long if no Redis reports its end.
    ttl: Duration::from_secs(15),
    negative_ttl: Duration::from_secs(5),
    // While the store is away, requests that do not need it go on for known callers for this long.
    stale: Duration::from_secs(300),
};
/// Cache of the first bytes of the hashes of all API keys. They are read only while an address guesses keys.
const LISTED: cache::Config = cache::Config {
    name: "api_key_hashes",
    bytes: 4 << 20,
    ttl: Duration::from_secs(5),
    negative_ttl: Duration::from_secs(5),
    stale: Duration::from_secs(300),
};
/// Maximum length of a key, in bytes.
const MAX_KEY: usize = 512;
/// Interval at which addresses without recent wrong keys are dropped.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// A right of a key, as a word. The host has two scopes, and modules add their own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope(Cow<'static, str>);

impl Scope {
    /// Right to read stored data.
    pub const READ: Self = Self::new("read");
    /// Right to enqueue jobs.
    pub const JOBS: Self = Self::new("jobs");

    /// Makes the scope with this word, which has only a-z and dashes.
    pub const fn new(word: &'static str) -> Self {
        Self(Cow::Borrowed(word))
    }

    /// Makes a scope from a word in the store. A scope of a newer version is kept, but grants nothing in this version,
    /// since no route asks for it.
    fn stored(word: &str) -> Self {
        Self(Cow::Owned(word.to_owned()))
    }

    /// The word of the scope.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// All scopes of the program, which a new key can have.
#[derive(Clone, Debug)]
pub(crate) struct Scopes(Vec<Scope>);

impl Scopes {
    /// Collects the scopes of the modules and of the host.
    pub(crate) fn new(of_modules: impl Iterator<Item = Scope>) -> Self {
        Self(of_modules.chain([Scope::READ, Scope::JOBS]).collect())
    }

    /// Every scope.
    pub(crate) fn all(&self) -> BTreeSet<Scope> {
        self.0.iter().cloned().collect()
    }

    /// The scope with this word, if there is one.
    pub(crate) fn named(&self, word: &str) -> Option<Scope> {
        self.0.iter().find(|scope| scope.as_str() == word).cloned()
    }

    /// The words of all scopes, separated by commas.
    pub(crate) fn words(&self) -> String {
        self.0.iter().map(Scope::as_str).collect::<Vec<_>>().join(", ")
    }
}

/// A caller, as its key identifies it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The site that the key is for.
    pub site: SiteId,
    /// Owner of idempotency keys and limits. It is the same for a key and for the key that replaces it.
    pub key: String,
    scopes: BTreeSet<Scope>,
    per_minute: Option<u32>,
    /// End of the key, in milliseconds since 1970.
    ends_at: Option<i64>,
}

impl Caller {
    fn new(key: String, grant: Grant) -> Self {
        let Grant { site, scopes, per_minute, ends_at, .. } = grant;
        Self { site, key, scopes, per_minute, ends_at }
    }

    /// Checks that the key has this scope.
    ///
    /// # Errors
    /// 403 if it does not.
    pub fn may(&self, scope: &Scope) -> Result<(), Problem> {
        if self.scopes.contains(scope) {
            return Ok(());
        }
        let detail = format!("this key does not have the scope {}", scope.as_str());
        Err(Problem::new(StatusCode::FORBIDDEN, detail))
    }

    fn has_ended(&self) -> bool {
        self.ends_at.is_some_and(|at| at <= Timestamp::now().as_millisecond())
    }
}

impl Kept for Caller {
    fn bytes(&self) -> usize {
        size_of::<Self>() + self.key.len() + self.scopes.len() * size_of::<Scope>()
    }
}

/// The keys that this process accepts. A cheap handle.
#[derive(Clone, Debug)]
pub struct Access(Arc<AccessInner>);

#[derive(Debug)]
struct AccessInner {
    store: Store,
    sites: Sites,
    stored: Cache<Caller>,
    listed: Cache<Arc<Hashes>>,
    files: KeyFiles,
    tokens: Mutex<HashMap<Hash, IssuedToken>>,
    limits: KeyLimits,
    admin: SecretString,
}

#[derive(Debug)]
struct IssuedToken {
    caller: Caller,
    ends: Instant,
}

impl Access {
    /// Makes the handle for keys in the store, which `caches` keep for a while, and for keys in files. Replicas share
    /// the limits in `redis`, which comes with the prefix of its keys.
    pub(crate) fn new(
        store: Store,
        sites: Sites,
        caches: &Caches,
        files: Vec<KeyFile>,
        redis: Option<(Redis, String)>,
        admin: SecretString,
    ) -> Self {
        let files = KeyFiles::open(files, &sites);
        let (stored, tokens, limits) = (caches.make(CACHE), Mutex::default(), KeyLimits::new(redis));
        let listed = caches.make(LISTED);
        Self(Arc::new(AccessInner { store, sites, stored, listed, files, tokens, limits, admin }))
    }

    /// Follows changes of the files, and drops addresses without recent wrong keys, until the drain is soft.
    ///
    /// # Errors
    /// Never: a task has to return a result.
    pub(crate) async fn tend(self, drain: Drain) -> anyhow::Result<()> {
        let forget = async {
            loop {
                tokio::time::sleep(FORGET_EVERY).await;
                self.0.limits.forget();
            }
        };
        tokio::select! {
            () = self.0.files.follow(drain) => Ok(()),
            never = forget => never,
        }
    }

    /// Makes a token that only this process accepts. It is called `name`, has `scopes` on the default site, and ends
    /// after `life`.
    pub fn issue(&self, name: &str, scopes: &[Scope], life: Duration) -> SecretString {
        let token = random_key();
        let caller = Caller {
            site: SiteId::DEFAULT,
            key: name.to_owned(),
            scopes: scopes.iter().cloned().collect(),
            per_minute: None,
            ends_at: None,
        };
        let mut tokens = self.0.tokens.lock();
        tokens.insert(hash(token.expose_secret()), IssuedToken { caller, ends: Instant::now() + life });
        token
    }

    /// Returns the caller with this key, if the key is known and has not ended. `address` is the address of the client:
    /// after too many wrong keys, it is refused for a while.
    ///
    /// # Errors
    /// 429 for an address that is refused, and 503 when the store does not answer.
    pub async fn caller(&self, key: &str, address: Option<IpAddr>) -> Result<Option<Caller>, Problem> {
        if key.len() > MAX_KEY {
            return Ok(None);
        }
        // A lookup by hash reveals nothing about a key that is nearly right.
        let hash = hash(key);
        if let Some(caller) = self.token(&hash).or_else(|| self.0.files.find(&hash)) {
            return Ok(Some(caller));
        }
        let name = hex(&hash);
        // One address may send wrong keys and right ones. So while it sends wrong ones, the store is asked about a key
        // only if the list of stored keys does not rule it out.
        let guessing = self.0.limits.is_guessing(address);
        if let Some(problem) = &guessing
            && !self.0.stored.has(&name)
            && !self.may_be_there(&hash).await?
        {
            self.0.limits.guessed(address);
            return Err(problem.clone());
        }
        let load = keys::find(&self.0.store, hash);
        let found = self.0.stored.get(&name, load).await;
        let found = found.map_err(|error| store_failed(&*error, error.is_passing()))?;
        if found.is_none() {
            self.0.limits.guessed(address);
            if let Some(problem) = guessing {
                return Err(problem);
            }
        }
        let is_good = |caller: &Caller| !caller.has_ended() && self.0.sites.get(caller.site).is_some();
        Ok(found.filter(is_good))
    }

    /// Returns true when a key may be in the store. While an address guesses keys, the hashes of all keys are read
    /// every few seconds; when there are too many to list, a few keys a second are looked up one by one.
    async fn may_be_there(&self, hash: &Hash) -> Result<bool, Problem> {
        let load = async { keys::hashes(&self.0.store).await.map(|hashes| hashes.map(Arc::new)) };
        let listed = self.0.listed.get("", load).await;
        match listed.map_err(|error| store_failed(&*error, error.is_passing()))? {
            Some(hashes) => Ok(hashes.may_have(hash)),
            None => Ok(self.0.limits.may_look()),
        }
    }

    fn token(&self, hash: &Hash) -> Option<Caller> {
        let mut tokens = self.0.tokens.lock();
        tokens.retain(|_, token| Instant::now() < token.ends);
        tokens.get(hash).map(|token| token.caller.clone())
    }

    /// The sites that are served.
    pub fn sites(&self) -> &Sites {
        &self.0.sites
    }

    /// Returns true when this is the admin token.
    pub fn is_admin(&self, token: &str) -> bool {
        verify_slices_are_equal(token.as_bytes(), self.0.admin.expose_secret().as_bytes()).is_ok()
    }

    /// Returns the caller of a request, which counts against the limit of its key; `None` without `Authorization`.
    ///
    /// # Errors
    /// 401 for a key that is not known or has ended, 403 from a page of another site, 429 for a key that is used too
    /// often, and the errors of [`caller`](Self::caller).
    pub async fn optional(&self, parts: &Parts) -> Result<Option<Caller>, Problem> {
        let Some(key) = bearer(&parts.headers) else { return Ok(None) };
        let scope = parts.extensions.get::<RequestScope>();
        let caller = self.caller(key, scope.and_then(RequestScope::client)).await?;
        let unknown = || Problem::new(StatusCode::UNAUTHORIZED, "this key is not known, or has ended");
        let caller = caller.ok_or_else(unknown)?;
        if self.0.sites.is_elsewhere(&parts.headers, caller.site) {
            let detail = "this key is not of the site that the page belongs to";
            return Err(Problem::new(StatusCode::FORBIDDEN, detail));
        }
        if let Some(scope) = scope {
            scope.identify();
        }
        if let Some(standing) = self.0.limits.count(&caller).await {
            if let Some(scope) = scope {
                scope.add_headers(standing.headers());
            }
            standing.verdict()?;
        }
        Ok(Some(caller))
    }
}

/// Formats bytes as hexadecimal text, two digits each.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
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

/// The scope [`Scope::READ`] as a type.
#[derive(Clone, Copy, Debug)]
pub struct ReadScope;

impl Required for ReadScope {
    const SCOPE: Scope = Scope::READ;
}

/// The scope [`Scope::JOBS`] as a type.
#[derive(Clone, Copy, Debug)]
pub struct JobsScope;

impl Required for JobsScope {
    const SCOPE: Scope = Scope::JOBS;
}

/// A caller whose key has the scope `S`. A handler that takes this value needs no other check.
#[derive(Clone, Debug)]
pub struct Authorized<S> {
    /// The caller.
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
        let caller = access.optional(parts).await?.ok_or_else(missing)?;
        caller.may(&S::SCOPE)?;
        Ok(Self { caller, scope: PhantomData })
    }
}

/// Makes a new key of 256 random bits.
pub fn random_key() -> SecretString {
    let mut bytes = [0; 32];
    #[expect(clippy::expect_used, reason = "without randomness nothing here can go on")]
    rand::fill(&mut bytes).expect("the system's random generator");
    format!("pk_{}", URL_SAFE_NO_PAD.encode(bytes)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_of_another_version_is_kept_and_is_no_scope_of_this_one() {
        let scopes = Scopes::new([Scope::new("notify")].into_iter());
        assert_eq!(scopes.words(), "notify, read, jobs");
        assert_eq!(scopes.named("notify"), Some(Scope::new("notify")));
        assert_eq!(scopes.named("telepathy"), None, "no key is made with it");
        let stored = BTreeSet::from(["read", "telepathy"].map(Scope::stored));
        let words: Vec<&str> = stored.iter().map(Scope::as_str).collect();
        assert_eq!(words, ["read", "telepathy"], "a key that is replaced keeps it");
        assert!(stored.contains(&Scope::READ) && !stored.contains(&Scope::JOBS));
    }
}
