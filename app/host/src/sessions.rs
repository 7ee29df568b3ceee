//! Sessions of browsers: a signed cookie with a random id, and data in the store, which all replicas share.
//!
//! ```no_run
//! # use perennial_host::api::Result;
//! # use perennial_host::sessions::{Session, Sessions};
//! # async fn login(sessions: Sessions, session: Option<Session>) -> Result<http::HeaderValue> {
//! // The login changes the id: an id that an attacker has planted before opens nothing.
//! let (mut session, _cookie) = sessions.login(session, "ada").await?;
//! session.set("cart", vec![17]);
//! sessions.save(&session).await?;
//! Ok(sessions.cookie(&session))
//! # }
//! ```
//!
//! In a handler, `Session` is the session of the request (401 without one), and `Option<Session>` accepts both. Their
//! state must have [`Sessions`] (`FromRef`). A cookie that was not signed here costs no query. The store has a hash of
//! the id only: a copy of it opens no session.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::{constant_time, digest, hmac, rand};
use axum::extract::{FromRef, FromRequestParts, OptionalFromRequestParts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cookie::{Cookie, SameSite};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use perennial_server::http::problem::{FieldError, Problem};
use perennial_store::pool::sql::{FromRow, Row, Store, Tables};
use perennial_store::values;
use secrecy::ExposeSecret;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::access::secrets;
use crate::api::{self, Result};
use crate::data_dir::DataDir;

/// Name of the key's file, and of the secret in a shared store.
pub(crate) const KEY: &str = "session.key";
/// Longest data of a session, in bytes.
const MAX_DATA: usize = 16 << 10;
/// Longest name of a user, in bytes.
const MAX_USER: usize = 200;
/// The end of a session is put off at most this often: one write, not one for each request.
const TOUCH: i64 = 60;
/// Number of expired sessions that are deleted at once.
const FORGET: i64 = 1000;

const MIGRATION: &str = "CREATE TABLE sessions (
    -- SHA-256 of the id, in hexadecimal digits
    id         TEXT PRIMARY KEY,
    user_name  TEXT,
    data       TEXT NOT NULL,
    -- seconds since 1970
    begun_at   BIGINT NOT NULL,
    ends_at    BIGINT NOT NULL
);
CREATE INDEX sessions_by_end ON sessions (ends_at);
CREATE INDEX sessions_by_user ON sessions (user_name);";

/// Lets time pass for a test: sessions are as if they had begun that much earlier.
#[cfg(feature = "testing")]
pub(crate) async fn shift(store: &Store, by: std::time::Duration) -> perennial_store::pool::sql::Result<()> {
    let seconds = i64::try_from(by.as_secs()).unwrap_or(i64::MAX);
    let sql = "UPDATE sessions SET begun_at = begun_at - $1, ends_at = ends_at - $1";
    store.execute(sql, values![seconds]).await.map(drop)
}

pub(crate) const TABLES: Tables = Tables { module: "sessions", sqlite: &[MIGRATION], postgres: &[MIGRATION] };

/// How sessions are kept.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the cookie. With `secure` it gets the prefix `__Host-`.
    pub cookie: String,
    /// A session that is not used for this long ends.
    pub idle: Duration,
    /// A session ends after this time at the latest.
    pub longest: Duration,
    /// Whether browsers send the cookie over https only (and on this machine).
    pub secure: bool,
    /// Whether browsers send the cookie with requests that other sites cause: `Lax` sends it with links to this site,
    /// and `Strict` not even with those.
    pub same_site: SameSite,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cookie: "session".to_owned(),
            idle: Duration::from_secs(14 * 86_400),
            longest: Duration::from_secs(90 * 86_400),
            secure: true,
            same_site: SameSite::Lax,
        }
    }
}

/// The sessions of a program. A cheap handle.
#[derive(Clone)]
pub struct Sessions(Arc<SessionsInner>);

struct SessionsInner {
    store: Store,
    key: hmac::Key,
    config: Config,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// A session of one browser. Changes are kept by [`Sessions::save`].
#[derive(Clone)]
pub struct Session {
    id: [u8; 32],
    user: Option<String>,
    data: Map<String, Value>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("user", &self.user).finish_non_exhaustive()
    }
}

/// The row of a session.
struct SessionRow {
    user: Option<String>,
    data: String,
    begun_at: i64,
    ends_at: i64,
}

impl FromRow for SessionRow {
    fn from_row(row: &Row) -> perennial_store::pool::sql::Result<Self> {
        Ok(Self {
            user: row.get("user_name")?,
            data: row.get("data")?,
            begun_at: row.get("begun_at")?,
            ends_at: row.get("ends_at")?,
        })
    }
}

impl Session {
    /// The user that has logged in.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// A value of the session; `None` when there is none, or it is of another type.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_value(self.data.get(name)?.clone()).ok()
    }

    /// Sets a value of the session. A value that is no JSON is left out.
    pub fn set(&mut self, name: &str, value: impl Serialize) {
        self.data.insert(name.to_owned(), serde_json::to_value(value).unwrap_or_default());
    }

    /// Removes a value of the session.
    pub fn remove(&mut self, name: &str) {
        self.data.remove(name);
    }
}

impl Sessions {
    pub(crate) async fn open(store: Store, data_dir: &DataDir, config: Config) -> anyhow::Result<Self> {
        let random = || URL_SAFE_NO_PAD.encode(random());
        let secret = match secrets::shared(&store, KEY).await? {
            Some(secret) => secret,
            None if store.dialect() == perennial_store::pool::sql::Dialect::Postgres => {
                // The key of an embedded store that was left for Postgres opens its sessions there, too.
                let made = data_dir.read(KEY).unwrap_or_else(random);
                secrets::share(&store, KEY, made.trim()).await?
            }
            None => data_dir.secret(KEY, random)?.0.into(),
        };
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
        Ok(Self(Arc::new(SessionsInner { store, key, config })))
    }

    /// Begins a session without a user.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn begin(&self) -> Result<(Session, HeaderValue)> {
        self.insert(None, Map::new()).await
    }

    /// Begins the session of a user who has just proved to be one, with the data of the session before, which ends.
    /// Returns the session and its `Set-Cookie`.
    ///
    /// # Errors
    /// A problem when the name of the user is too long; or the store fails.
    pub async fn login(&self, before: Option<Session>, user: &str) -> Result<(Session, HeaderValue)> {
        if user.is_empty() || user.len() > MAX_USER {
            return Err(FieldError::new("user", format!("a name of 1 to {MAX_USER} bytes")).into());
        }
        if let Some(before) = &before {
            self.delete(before).await?;
        }
        self.insert(Some(user.to_owned()), before.map(|before| before.data).unwrap_or_default()).await
    }

    /// Ends a session, and returns the `Set-Cookie` that removes its cookie.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn logout(&self, session: Session) -> Result<HeaderValue> {
        self.delete(&session).await?;
        Ok(self.set_cookie(String::new(), Duration::ZERO))
    }

    /// Ends all sessions of a user, on all devices. Returns their number.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn logout_everywhere(&self, user: &str) -> Result<u64> {
        Ok(self.0.store.execute("DELETE FROM sessions WHERE user_name = ?", values![user]).await?)
    }

    /// Keeps the changes of a session.
    ///
    /// # Errors
    /// A problem when its data is longer than 16 KiB; or the store fails.
    pub async fn save(&self, session: &Session) -> Result<()> {
        let data = written(&session.data)?;
        let sql = "UPDATE sessions SET data = ? WHERE id = ?";
        self.0.store.execute(sql, values![data, hashed(&session.id)]).await?;
        Ok(())
    }

    /// The session of a request; `None` without a valid cookie.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn of(&self, headers: &HeaderMap) -> Result<Option<Session>> {
        let Some(id) = self.id_of(headers) else { return Ok(None) };
        let (now, id_hash) = (now(), hashed(&id));
        let sql = "SELECT user_name, data, begun_at, ends_at FROM sessions WHERE id = ? AND ends_at > ?";
        let Some(row) = self.0.store.first_as::<SessionRow>(sql, values![&id_hash, now]).await? else {
            return Ok(None);
        };
        let ends_at = self.ends_at(now, row.begun_at);
        if ends_at - row.ends_at > TOUCH {
            let sql = "UPDATE sessions SET ends_at = ? WHERE id = ?";
            self.0.store.execute(sql, values![ends_at, id_hash]).await?;
        }
        Ok(Some(Session { id, user: row.user, data: serde_json::from_str(&row.data).unwrap_or_default() }))
    }

    /// The `Set-Cookie` of a session.
    pub fn cookie(&self, session: &Session) -> HeaderValue {
        let signature = hmac::sign(&self.0.key, &session.id);
        let [id, signature] =
            [session.id.as_slice(), signature.as_ref()].map(|part| URL_SAFE_NO_PAD.encode(part));
        self.set_cookie(format!("{id}.{signature}"), self.0.config.longest)
    }

    /// A token that a form or a script of a page sends back with each request that changes something. Pages of other
    /// sites cannot read it (OWASP: signed double submit cookie).
    pub fn csrf_token(&self, session: &Session) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.0.key, &[b"csrf", session.id.as_slice()].concat()))
    }

    /// Checks the token that came with a request.
    ///
    /// # Errors
    /// 403 when it is not the token of the session.
    pub fn check_csrf(&self, session: &Session, token: &str) -> std::result::Result<(), Problem> {
        let right = self.csrf_token(session);
        constant_time::verify_slices_are_equal(right.as_bytes(), token.as_bytes())
            .map_err(|_| Problem::new(StatusCode::FORBIDDEN, "the CSRF token is not that of this session"))
    }

    /// Deletes some sessions that have ended, and returns their number.
    pub(crate) async fn forget(store: &Store) -> anyhow::Result<u64> {
        let sql = "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE ends_at < ? LIMIT ?)";
        Ok(store.execute(sql, values![now(), FORGET]).await?)
    }

    async fn insert(&self, user: Option<String>, data: Map<String, Value>) -> Result<(Session, HeaderValue)> {
        let session = Session { id: random(), user, data };
        let (now, data) = (now(), written(&session.data)?);
        let sql = "INSERT INTO sessions (id, user_name, data, begun_at, ends_at) VALUES (?, ?, ?, ?, ?)";
        let values = values![hashed(&session.id), &session.user, data, now, self.ends_at(now, now)];
        self.0.store.execute(sql, values).await?;
        let cookie = self.cookie(&session);
        Ok((session, cookie))
    }

    async fn delete(&self, session: &Session) -> Result<()> {
        self.0.store.execute("DELETE FROM sessions WHERE id = ?", values![hashed(&session.id)]).await?;
        Ok(())
    }

    /// The end of a session that is used now.
    fn ends_at(&self, now: i64, begun_at: i64) -> i64 {
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX / 4);
        (now + seconds(self.0.config.idle)).min(begun_at + seconds(self.0.config.longest))
    }

    /// The id in the cookie of a request, if it was signed here.
    fn id_of(&self, headers: &HeaderMap) -> Option<[u8; 32]> {
        let name = self.cookie_name();
        let texts = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        texts.flat_map(Cookie::split_parse).flatten().filter(|cookie| cookie.name() == name).find_map(
            |cookie| {
                let (id, signature) = cookie.value().split_once('.')?;
                let id: [u8; 32] = URL_SAFE_NO_PAD.decode(id).ok()?.try_into().ok()?;
                hmac::verify(&self.0.key, &id, &URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
                Some(id)
            },
        )
    }

    fn cookie_name(&self) -> String {
        let Config { cookie, secure, .. } = &self.0.config;
        if *secure { format!("__Host-{cookie}") } else { cookie.clone() }
    }

    fn set_cookie(&self, value: String, max_age: Duration) -> HeaderValue {
        let Config { secure, same_site, .. } = &self.0.config;
        let max_age = i64::try_from(max_age.as_secs()).unwrap_or(i64::MAX);
        let cookie = Cookie::build((self.cookie_name(), value))
            .path("/")
            .http_only(true)
            .secure(*secure)
            .same_site(*same_site)
            .max_age(cookie::time::Duration::seconds(max_age));
        // The parts are printable, so this does not fail.
        HeaderValue::from_str(&cookie.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }
}

impl<S> FromRequestParts<S> for Session
where
    Sessions: FromRef<S>,
    S: Send + Sync,
{
    type Rejection = api::Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let found = Sessions::from_ref(state).of(&parts.headers).await?;
        found.ok_or_else(|| Problem::new(StatusCode::UNAUTHORIZED, "there is no session: log in").into())
    }
}

impl<S> OptionalFromRequestParts<S> for Session
where
    Sessions: FromRef<S>,
    S: Send + Sync,
{
    type Rejection = api::Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Option<Self>> {
        Sessions::from_ref(state).of(&parts.headers).await
    }
}

fn written(data: &Map<String, Value>) -> Result<String> {
    let text = serde_json::to_string(data).unwrap_or_default();
    if text.len() > MAX_DATA {
        return Err(FieldError::new("session", format!("data of at most {MAX_DATA} bytes")).into());
    }
    Ok(text)
}

fn random() -> [u8; 32] {
    let mut id = [0; 32];
    #[expect(clippy::expect_used, reason = "without random numbers there is no session that could be safe")]
    rand::fill(&mut id).expect("the random generator of the system");
    id
}

fn hashed(id: &[u8; 32]) -> String {
    let hash = digest::digest(&digest::SHA256, id);
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
