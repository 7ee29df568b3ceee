//! Who may call: API keys, the page's token, the admin token, and what each of them may do.

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

/// What is known of keys in the store, the unknown ones too.
pub(crate) const CACHE: cache::Config = cache::Config {
    name: "api_keys",
    bytes: 4 << 20,
    // How long a key that was ended elsewhere is good, where there is no Redis that says so.
    ttl: Duration::from_secs(15),
    negative_ttl: Duration::from_secs(5),
    // What does not need the store goes on for those who were known.
    stale: Duration::from_secs(300),
};
/// The beginnings of the hashes of all API keys. They are read only while an address guesses keys.
const LISTED: cache::Config = cache::Config {
    name: "api_key_hashes",
    bytes: 4 << 20,
    ttl: Duration::from_secs(5),
    negative_ttl: Duration::from_secs(5),
    stale: Duration::from_secs(300),
};
/// The longest key, in bytes.
const MAX_KEY: usize = 512;
/// How often addresses are forgotten that have not shown wrong keys lately.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// What a key may be used for, as a word. The host has two of its own, and modules bring theirs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Scope(Cow<'static, str>);

impl Scope {
    /// Read what is stored.
    pub const READ: Self = Self::new("read");
    /// Enqueue jobs.
    pub const JOBS: Self = Self::new("jobs");

    /// The scope with this word: a-z and dashes.
    pub const fn new(word: &'static str) -> Self {
        Self(Cow::Borrowed(word))
    }

    /// A word in the store. One of a newer version is kept, and is no right in this one, since nothing asks for it.
    fn stored(word: &str) -> Self {
        Self(Cow::Owned(word.to_owned()))
    }

    /// The word for it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// All scopes of a program: those that a key can be made with.
#[derive(Clone, Debug)]
pub(crate) struct Scopes(Vec<Scope>);

impl Scopes {
    /// Those of the modules, and those of the host.
    pub(crate) fn new(of_modules: impl Iterator<Item = Scope>) -> Self {
        Self(of_modules.chain([Scope::READ, Scope::JOBS]).collect())
    }

    /// Every scope.
    pub(crate) fn all(&self) -> BTreeSet<Scope> {
        self.0.iter().cloned().collect()
    }

    /// The scope of a word, if there is one.
    pub(crate) fn named(&self, word: &str) -> Option<Scope> {
        self.0.iter().find(|scope| scope.as_str() == word).cloned()
    }

    /// Their words.
    pub(crate) fn words(&self) -> String {
        self.0.iter().map(Scope::as_str).collect::<Vec<_>>().join(", ")
    }
}

/// Who calls, as far as a key says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The site that the key is for.
    pub site: SiteId,
    /// What idempotency keys and limits belong to: the same for a key and for the one that takes its place.
    pub key: String,
    scopes: BTreeSet<Scope>,
    per_minute: Option<u32>,
    /// In milliseconds since 1970.
    ends_at: Option<i64>,
}

impl Caller {
    fn new(key: String, grant: Grant) -> Self {
        let Grant { site, scopes, per_minute, ends_at, .. } = grant;
        Self { site, key, scopes, per_minute, ends_at }
    }

    /// Whether the key may be used for this.
    ///
    /// # Errors
    /// 403 if not.
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

/// The keys of this process. A cheap handle.
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
    /// The keys in the store, which `caches` keep for a while, and those in files. `redis`, with what its keys begin with,
    /// is where replicas share the limits.
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

    /// Follows what changes in files, until nothing new is taken.
    ///
    /// # Errors
    /// Never: the type is that of a task.
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

    /// A token of this process called `name`, for `scopes` of the default site, that ends after `life`.
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

    /// Who presents a key, if it is one that is known and has not ended. `address` is where it comes from: one that
    /// shows too many wrong keys is not listened to for a while.
    ///
    /// # Errors
    /// 429 then, and 503 when the store does not answer.
    pub async fn caller(&self, key: &str, address: Option<IpAddr>) -> Result<Option<Caller>, Problem> {
        if key.len() > MAX_KEY {
            return Ok(None);
        }
        // Looking up a hash tells nothing about a key that is nearly right.
        let hash = hash(key);
        if let Some(caller) = self.token(&hash).or_else(|| self.0.files.find(&hash)) {
            return Ok(Some(caller));
        }
        let name = hex(&hash);
        // One address may send wrong keys and right ones. So while it sends wrong ones, the store is asked about a key only if
        // the list of stored keys does not rule it out.
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

    /// Whether a key may be in the store. While an address guesses keys, the hashes of all keys are read every few seconds; where
    /// they are too many to be listed, a few keys a minute are looked up one by one.
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

    /// Whether this is the admin token.
    pub fn is_admin(&self, token: &str) -> bool {
        verify_slices_are_equal(token.as_bytes(), self.0.admin.expose_secret().as_bytes()).is_ok()
    }

    /// Who sends a request, counted against the limit of its key: nobody in particular without `Authorization`.
    ///
    /// # Errors
    /// 401 for a key that is not known, 403 from a page of another site, 429 for a key that is used too often.
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

/// Bytes as text, two digits each.
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

/// See [`Scope::READ`].
#[derive(Clone, Copy, Debug)]
pub struct ReadScope;

impl Required for ReadScope {
    const SCOPE: Scope = Scope::READ;
}

/// See [`Scope::JOBS`].
#[derive(Clone, Copy, Debug)]
pub struct JobsScope;

impl Required for JobsScope {
    const SCOPE: Scope = Scope::JOBS;
}

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
        let caller = access.optional(parts).await?.ok_or_else(missing)?;
        caller.may(&S::SCOPE)?;
        Ok(Self { caller, scope: PhantomData })
    }
}

/// A new key: 256 random bits.
pub fn random_key() -> SecretString {
    let mut bytes = [0; 32];
    #[expect(clippy::expect_used, reason = "without randomness nothing here can go on")]
    rand::fill(&mut bytes).expect("the system's random generator");
    format!("pk_{}", URL_SAFE_NO_PAD.encode(bytes)).into()
}
