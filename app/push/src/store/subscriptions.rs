//! Subscriptions of browsers.

use std::sync::Arc;

use futures_util::future::try_join_all;
use jiff::Timestamp;
use perennial_store::pool::sql::{self, Dialect, Result, Row, Tx, Value};
use perennial_store::{transact, values};
use perennial_webpush::Keys;
use serde_json::value::RawValue;

use super::deliveries::DeliveryView;
use super::{Page, Pager, PushStore, now_ms, timestamp};
use crate::model::audience::{Audience, Selection};
use crate::model::endpoint::endpoint_hash;

/// Number of subscriptions of a user that are deleted in one transaction.
const DELETED: usize = 500;

/// A subscription that is about to be stored.
#[derive(Clone, Debug)]
pub(crate) struct NewSubscription {
    pub(crate) site: i64,
    pub(crate) vapid_key: i64,
    pub(crate) endpoint: String,
    pub(crate) keys: Keys,
    /// The user: `None` keeps the stored one, and `Some(None)` removes it.
    pub(crate) user: Option<Option<String>>,
    /// The tags: `None` keeps the stored ones; when the user changes, only public tags stay.
    pub(crate) tags: Option<Vec<String>>,
    /// Whether only public tags may be removed, since the request comes from a page.
    pub(crate) only_public: bool,
    /// Tags that belong to the browser, whichever user it has.
    pub(crate) public_tags: Arc<[String]>,
    /// The metadata as JSON: `None` keeps the stored one, unless the user changes.
    pub(crate) metadata: Option<String>,
    /// Time at which the subscription ends, in milliseconds since 1970.
    pub(crate) expires_at: Option<i64>,
    pub(crate) replaces: Option<Replaced>,
    pub(crate) proof: Proof,
    /// Set for a guest: a subscription without an API key or a user token, until its first delivery.
    pub(crate) guest: Option<Guest>,
    /// Largest number of subscriptions of its user, if that is limited.
    pub(crate) most_of_user: Option<usize>,
}

/// The address of a guest, and how many other guests make room for it.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Keyed hash of the address; empty when the address is not known.
    pub(crate) address: Vec<u8>,
    /// Largest number of guests of one address; the oldest of them make room.
    pub(crate) per_address: Option<usize>,
    /// Number of the site's oldest guests that make room, because the site has too many.
    pub(crate) evicted: usize,
}

/// The subscription that a browser had before.
#[derive(Clone, Debug)]
pub(crate) struct Replaced {
    pub(crate) endpoint: String,
    pub(crate) auth: Vec<u8>,
}

/// The proof that the caller may change a subscription that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// An API key.
    Key,
    /// The authentication secret of the subscription, which the browser knows.
    Auth,
}

/// The result of storing a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upserted {
    Created(i64),
    Updated(i64),
    /// The endpoint is stored with another secret.
    WrongAuth,
}

/// A stored subscription.
#[derive(Clone, Debug)]
pub(crate) struct Subscription {
    pub(crate) id: i64,
    pub(crate) endpoint: String,
    pub(crate) user: Option<String>,
    pub(crate) tags: Vec<String>,
    pub(crate) metadata: Option<Box<RawValue>>,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
}

/// A subscription with everything that is needed to send to it.
#[derive(Clone, Debug)]
pub(crate) struct Exported {
    pub(crate) endpoint: String,
    pub(crate) p256dh: Vec<u8>,
    pub(crate) auth: Vec<u8>,
    /// Public half of the VAPID key that the subscription was made with.
    pub(crate) public_key: Vec<u8>,
    pub(crate) user: Option<String>,
    pub(crate) tags: Option<Vec<String>>,
    pub(crate) metadata: Option<serde_json::Value>,
    /// Time at which the subscription ends, in milliseconds since 1970.
    pub(crate) expires_at: Option<i64>,
}

/// The columns of [`Subscription`].
fn columns(dialect: Dialect) -> String {
    let tags = dialect.list_of("tag");
    format!(
        r#"id, endpoint, "user", metadata, created_at, updated_at,
           (SELECT {tags} FROM subscription_tags WHERE subscription = subscriptions.id) AS tags"#
    )
}

impl PushStore {
    /// Stores a subscription, or updates the one with its endpoint. Returns also the number of subscriptions that were
    /// deleted to make room for it.
    pub(crate) async fn upsert(&self, new: NewSubscription) -> Result<(Upserted, u64)> {
        transact!(&self.sql, tx => upsert(tx, &new))
    }

    /// Returns the number of guests of a site.
    pub(crate) async fn guests(&self, site: i64) -> Result<u64> {
        self.sql.value("SELECT count(*) FROM guests WHERE site = ?", values![site]).await
    }

    pub(crate) async fn subscription(&self, site: i64, id: i64) -> Result<Option<Subscription>> {
        let columns = columns(self.sql.dialect());
        let sql = format!("SELECT {columns} FROM subscriptions WHERE site = ? AND id = ?");
        self.sql.first(sql, values![site, id]).await?.as_ref().map(read).transpose()
    }

    /// Returns the subscriptions after `cursor` in the order of their ids: up to `limit`, and as many bytes as one
    /// answer may have.
    pub(crate) async fn subscriptions(
        &self,
        site: i64,
        user: Option<String>,
        tag: Option<String>,
        cursor: i64,
        limit: usize,
    ) -> Result<Page<Subscription>> {
        let _share = self.shares.take(site).await?;
        let dialect = self.sql.dialect();
        let columns = columns(dialect);
        let audience = tag.map_or(Audience::All, Audience::Tags);
        let mut pager = Pager::new(("subscriptions", "id"), cursor, limit);
        loop {
            let (after, limit) = pager.part();
            let Selection { from, mut condition, id, mut parameters } =
                audience.select(dialect, site, after, i64::MAX);
            if let Some(user) = &user {
                condition.push_str(r#" AND "user" = ?"#);
                parameters.push(user.into());
            }
            parameters.push(limit.into());
            let sql = format!("SELECT {columns} FROM {from} WHERE {condition} ORDER BY {id} LIMIT ?");
            if let Some(page) = pager.take(&self.sql.query(sql, parameters).await?, read) {
                return Ok(page);
            }
        }
    }

    /// Stores many subscriptions, new or known, `size` of them in each transaction.
    pub(crate) async fn import_all(&self, new: Vec<NewSubscription>, size: usize) -> Result<Vec<Upserted>> {
        let mut new = new.into_iter();
        let parts = std::iter::from_fn(|| {
            Some(new.by_ref().take(size).collect::<Vec<_>>()).filter(|part| !part.is_empty())
        });
        let parts: Vec<_> = parts.collect();
        if self.sql.dialect() == Dialect::Sqlite {
            // The writer commits the transactions that wait at the same time together.
            return Ok(try_join_all(parts.into_iter().map(|part| self.import(part))).await?.concat());
        }
        let mut upserted = Vec::new();
        for part in parts {
            upserted.extend(self.import(part).await?);
        }
        Ok(upserted)
    }

    async fn import(&self, new: Vec<NewSubscription>) -> Result<Vec<Upserted>> {
        transact!(&self.sql, tx => import(tx, &new))
    }

    /// Returns the subscriptions after `cursor` in the order of their ids, with everything that is needed to send to
    /// them.
    pub(crate) async fn export(&self, site: i64, cursor: i64, limit: usize) -> Result<Page<Exported>> {
        let tags = self.sql.dialect().list_of("tag");
        let sql = format!(
            r#"SELECT id, endpoint, p256dh, auth, vapid_key, "user", metadata, expires_at,
                      (SELECT {tags} FROM subscription_tags WHERE subscription = subscriptions.id) AS tags,
                      (SELECT public_key FROM vapid_keys WHERE vapid_keys.id = vapid_key) AS public_key
               FROM subscriptions WHERE site = ? AND id > ? ORDER BY id LIMIT ?"#
        );
        let read = |row: &Row| {
            let tags: Vec<String> = serde_json::from_str(&row.get::<String>("tags")?).unwrap_or_default();
            let metadata: Option<String> = row.get("metadata")?;
            Ok(Exported {
                endpoint: row.get("endpoint")?,
                p256dh: row.get("p256dh")?,
                auth: row.get("auth")?,
                public_key: row.get("public_key")?,
                user: row.get("user")?,
                tags: Some(tags).filter(|tags| !tags.is_empty()),
                metadata: metadata.and_then(|text| serde_json::from_str(&text).ok()),
                expires_at: row.get("expires_at")?,
            })
        };
        let mut pager = Pager::new(("subscriptions", "id"), cursor, limit);
        loop {
            let (after, limit) = pager.part();
            let rows = self.sql.query(sql.clone(), values![site, after, limit]).await?;
            if let Some(page) = pager.take(&rows, read) {
                return Ok(page);
            }
        }
    }

    /// Returns the deliveries to one subscription after a notification, in the order in which the notifications were
    /// accepted, and the notification after which the next page begins, if there may be one.
    pub(crate) async fn deliveries_of(
        &self,
        subscription: i64,
        after: Vec<u8>,
        limit: usize,
    ) -> Result<(Vec<DeliveryView>, Option<Vec<u8>>)> {
        let sql = "SELECT notification, subscription, outcome, status, detail, at FROM deliveries
                   WHERE subscription = ? AND notification > ? ORDER BY subscription, notification LIMIT ?";
        let rows = self.sql.query(sql, values![subscription, after, limit]).await?;
        let next = rows.last().filter(|_| rows.len() == limit).and_then(|row| row.get("notification").ok());
        Ok((sql::each(&rows, "deliveries", "subscription", DeliveryView::read), next))
    }

    /// Deletes everything about one user; returns the numbers of subscriptions and of logged deliveries.
    pub(crate) async fn delete_user(&self, site: i64, user: &str) -> Result<(u64, u64)> {
        let (mut subscriptions, mut deliveries) = (0, 0);
        loop {
            // Each transaction deletes some of them, so that other transactions write in between.
            let name = user.to_owned();
            let (some, lines) = transact!(&self.sql, tx => delete_user(tx, site, &name))?;
            subscriptions += some;
            deliveries += lines;
            if some == 0 {
                return Ok((subscriptions, deliveries));
            }
        }
    }

    /// Deletes a subscription; returns false when there is none.
    pub(crate) async fn delete(&self, site: i64, id: i64) -> Result<bool> {
        let sql = "DELETE FROM subscriptions WHERE site = ? AND id = ?";
        Ok(self.sql.execute(sql, values![site, id]).await? == 1)
    }

    /// Deletes up to 1000 subscriptions that end before `before`, in milliseconds since 1970; returns their number.
    pub(crate) async fn forget_expired(&self, before: i64) -> Result<u64> {
        // The condition is checked twice, so that a subscription that is renewed at this moment stays.
        let sql = "DELETE FROM subscriptions WHERE expires_at < ?1 AND id IN (
                       SELECT id FROM subscriptions WHERE expires_at < ?1 ORDER BY expires_at LIMIT 1000)";
        self.sql.execute(sql, values![before]).await
    }

    /// Deletes the subscription with this endpoint, and with this secret if one is given; returns false when there is
    /// none.
    pub(crate) async fn delete_by_endpoint(
        &self,
        site: i64,
        endpoint: &str,
        auth: Option<Vec<u8>>,
    ) -> Result<bool> {
        let hash = endpoint_hash(endpoint);
        let deleted = match auth {
            Some(auth) => {
                let sql = "DELETE FROM subscriptions WHERE site = ? AND endpoint_hash = ? AND auth = ?";
                self.sql.execute(sql, values![site, hash, auth]).await?
            }
            None => {
                let sql = "DELETE FROM subscriptions WHERE site = ? AND endpoint_hash = ?";
                self.sql.execute(sql, values![site, hash]).await?
            }
        };
        Ok(deleted == 1)
    }

    /// Returns the subscription with this endpoint.
    pub(crate) async fn subscription_at(&self, site: i64, endpoint: &str) -> Result<Option<Subscription>> {
        let columns = columns(self.sql.dialect());
        let sql = format!("SELECT {columns} FROM subscriptions WHERE site = ? AND endpoint_hash = ?");
        self.sql.first(sql, values![site, endpoint_hash(endpoint)]).await?.as_ref().map(read).transpose()
    }
}

async fn delete_user<T: Tx>(tx: &T, site: i64, user: &str) -> Result<(u64, u64)> {
    let sql =
        format!(r#"SELECT id FROM subscriptions WHERE site = ? AND "user" = ? ORDER BY id LIMIT {DELETED}"#);
    let rows = tx.query(&sql, &values![site, user]).await?;
    let ids = rows.iter().map(Row::first).collect::<Result<Vec<i64>>>()?;
    let list = serde_json::to_string(&ids).unwrap_or_default();
    let among = tx.dialect().numbers_in("?");
    let sql = format!("DELETE FROM deliveries WHERE subscription IN ({among})");
    let deliveries = tx.execute(&sql, &values![&list]).await?;
    let sql = format!("DELETE FROM subscriptions WHERE id IN ({among})");
    Ok((tx.execute(&sql, &values![&list]).await?, deliveries))
}

async fn import<T: Tx>(tx: &T, all: &[NewSubscription]) -> Result<Vec<Upserted>> {
    // One statement for each row inserts it, or updates a known one. Only a new row has equal times.
    let sql = r#"
        INSERT INTO subscriptions AS known (site, vapid_key, endpoint, endpoint_hash, p256dh, auth, "user", metadata,
                                            created_at, updated_at, expires_at)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9, ?10)
        ON CONFLICT (site, endpoint_hash) DO UPDATE
        SET vapid_key = excluded.vapid_key, p256dh = excluded.p256dh, auth = excluded.auth,
            strikes = 0, struck_at = NULL, refused_since = NULL, refused_with = NULL, expires_at = excluded.expires_at,
            delivered_at = CASE WHEN known.vapid_key = excluded.vapid_key THEN known.delivered_at END,
            "user" = CASE WHEN ?11 THEN excluded."user" ELSE known."user" END,
            metadata = CASE WHEN ?11 AND known."user" <> coalesce(excluded."user", '') THEN excluded.metadata
                       ELSE coalesce(excluded.metadata, known.metadata) END,
            updated_at = CASE WHEN known.created_at >= ?9 THEN ?9 + 1 ELSE ?9 END
        RETURNING id, created_at = updated_at AS created"#;
    let now = now_ms();
    let mut upserted = Vec::with_capacity(all.len());
    for new in all {
        if let Some(user) = &new.user {
            let found = find(tx, new.site, &new.endpoint).await?;
            if let Some(found) = found.filter(|found| found.is_of_another(user)) {
                forget_private_tags(tx, found.id, new).await?;
            }
        }
        let mut row = new_row(new, now).to_vec();
        row.push(new.user.is_some().into());
        let Some(row) = sql::first(tx, sql, &row).await? else { continue };
        let id = row.get("id")?;
        let created: bool = row.get("created")?;
        if !created {
            tx.execute("DELETE FROM guests WHERE subscription = ?", &values![id]).await?;
        }
        if new.tags.is_some() {
            if !created {
                tx.execute("DELETE FROM subscription_tags WHERE subscription = ?", &values![id]).await?;
            }
            set_tags(tx, new, id).await?;
        }
        upserted.push(if created { Upserted::Created(id) } else { Upserted::Updated(id) });
    }
    Ok(upserted)
}

/// An existing row, its secret and its user.
struct FoundSubscription {
    id: i64,
    auth: Vec<u8>,
    user: Option<String>,
}

impl FoundSubscription {
    /// Returns true when the row has a user, but not this one.
    fn is_of_another(&self, user: &Option<String>) -> bool {
        self.user.is_some() && self.user != *user
    }
}

async fn find<T: Tx>(tx: &T, site: i64, endpoint: &str) -> Result<Option<FoundSubscription>> {
    let sql = r#"SELECT id, auth, "user" FROM subscriptions WHERE site = ? AND endpoint_hash = ?"#;
    let row = sql::first(tx, sql, &values![site, endpoint_hash(endpoint)]).await?;
    row.map(|row| {
        Ok(FoundSubscription { id: row.get("id")?, auth: row.get("auth")?, user: row.get("user")? })
    })
    .transpose()
}

/// Removes the tags that belonged to the user, not to the browser.
async fn forget_private_tags<T: Tx>(tx: &T, id: i64, new: &NewSubscription) -> Result<()> {
    let public = serde_json::to_string(&*new.public_tags).unwrap_or_default();
    let sql = format!(
        "DELETE FROM subscription_tags WHERE subscription = ? AND tag NOT IN ({})",
        tx.dialect().texts_in("?")
    );
    tx.execute(&sql, &values![id, public]).await.map(drop)
}

async fn upsert<T: Tx>(tx: &T, new: &NewSubscription) -> Result<(Upserted, u64)> {
    // The page and the service worker may both report the subscription at the same time.
    tx.lock(&endpoint_hash(&new.endpoint)).await?;
    let existing = find(tx, new.site, &new.endpoint).await?;
    if let Some(existing) = &existing
        && new.proof == Proof::Auth
        && existing.auth != new.keys.auth()
        && !new.replaces.as_ref().is_some_and(|before| {
            // A browser that has new keys for the endpoint knows the old secret.
            before.endpoint == new.endpoint && before.auth == existing.auth
        })
    {
        return Ok((Upserted::WrongAuth, 0));
    }
    let replaced = match &new.replaces {
        Some(replaced) => {
            let found = find(tx, new.site, &replaced.endpoint).await?;
            // A wrong secret for the old subscription is no reason to lose the new one.
            found.filter(|found| found.auth == replaced.auth)
        }
        None => None,
    };
    let known = match (replaced, existing) {
        (Some(replaced), Some(existing)) if replaced.id != existing.id => {
            // The page and the service worker both reported the new one: the older row has user and tags.
            tx.execute("DELETE FROM subscriptions WHERE id = ?", &values![existing.id]).await?;
            Some(replaced)
        }
        (Some(found), _) | (None, Some(found)) => Some(found),
        (None, None) => None,
    };
    let Some(known) = known else {
        let id = insert(tx, new).await?;
        set_tags(tx, new, id).await?;
        let mut evicted = evict_of_user(tx, new, id).await?;
        if let Some(guest) = &new.guest {
            evicted += take_in(tx, new.site, id, guest).await?;
        }
        return Ok((Upserted::Created(id), evicted));
    };
    update(tx, new, &known).await?;
    if new.guest.is_none() {
        tx.execute("DELETE FROM guests WHERE subscription = ?", &values![known.id]).await?;
    }
    let evicted = evict_of_user(tx, new, known.id).await?;
    Ok((Upserted::Updated(known.id), evicted))
}

/// Records a new guest. Other guests make room if there are too many; their number is returned.
async fn take_in<T: Tx>(tx: &T, site: i64, id: i64, guest: &Guest) -> Result<u64> {
    let sql = "INSERT INTO guests (subscription, site, address) VALUES (?, ?, ?)";
    tx.execute(sql, &values![id, site, &guest.address]).await?;
    let mut evicted = 0;
    if let Some(most) = guest.per_address {
        let sql = evict(
            tx,
            "SELECT subscription FROM guests WHERE site = ? AND address = ? ORDER BY subscription DESC LIMIT 16 OFFSET ?",
        );
        evicted += tx.execute(&sql, &values![site, &guest.address, most]).await?;
    }
    if guest.evicted > 0 {
        let sql = evict(tx, "SELECT subscription FROM guests WHERE site = ? ORDER BY subscription LIMIT ?");
        evicted += tx.execute(&sql, &values![site, guest.evicted]).await?;
    }
    Ok(evicted)
}

/// Deletes subscriptions of a user who has too many. Subscriptions that nothing was delivered to go first, the oldest
/// of the others next.
async fn evict_of_user<T: Tx>(tx: &T, new: &NewSubscription, id: i64) -> Result<u64> {
    let (Some(Some(user)), Some(most)) = (&new.user, new.most_of_user) else { return Ok(0) };
    let sql = evict(
        tx,
        r#"SELECT id FROM subscriptions WHERE site = ? AND "user" = ? AND id <> ?
           ORDER BY delivered_at IS NULL, updated_at DESC LIMIT 16 OFFSET ?"#,
    );
    tx.execute(&sql, &values![new.site, user, id, most.saturating_sub(1)]).await
}

/// The statement that deletes the subscriptions that `which` finds. On Postgres, rows that another transaction is
/// changing stay.
fn evict<T: Tx>(tx: &T, which: &str) -> String {
    match tx.dialect() {
        Dialect::Sqlite => format!("DELETE FROM subscriptions WHERE id IN ({which})"),
        Dialect::Postgres => format!(
            "DELETE FROM subscriptions WHERE id IN (
                 SELECT id FROM subscriptions WHERE id IN ({which}) ORDER BY id FOR UPDATE SKIP LOCKED)"
        ),
    }
}

/// The values of a new row, in the order of its columns.
fn new_row(new: &NewSubscription, now: i64) -> [Value; 10] {
    values![
        new.site,
        new.vapid_key,
        &new.endpoint,
        endpoint_hash(&new.endpoint),
        new.keys.p256dh(),
        new.keys.auth(),
        new.user.clone().flatten(),
        &new.metadata,
        now,
        new.expires_at,
    ]
}

async fn insert<T: Tx>(tx: &T, new: &NewSubscription) -> Result<i64> {
    let sql = r#"
        INSERT INTO subscriptions (site, vapid_key, endpoint, endpoint_hash, p256dh, auth, "user", metadata,
                                   created_at, updated_at, expires_at)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9, ?10) RETURNING id"#;
    let row = sql::first(tx, sql, &new_row(new, now_ms())).await?;
    row.map_or_else(|| Ok(0), |row| row.first())
}

async fn update<T: Tx>(tx: &T, new: &NewSubscription, known: &FoundSubscription) -> Result<()> {
    let id = known.id;
    let is_anothers = new.user.as_ref().is_some_and(|user| known.is_of_another(user));
    if is_anothers {
        forget_private_tags(tx, id, new).await?;
    }
    let sql = r#"
        UPDATE subscriptions
        SET vapid_key = ?1, endpoint = ?2, p256dh = ?4, auth = ?5,
            "user" = CASE WHEN ?6 THEN ?7 ELSE "user" END,
            metadata = CASE WHEN ?8 THEN ?9 ELSE coalesce(?9, metadata) END, updated_at = ?10, expires_at = ?11,
            delivered_at = CASE WHEN vapid_key = ?1 AND endpoint_hash = ?3 THEN delivered_at END, endpoint_hash = ?3,
            strikes = 0, struck_at = NULL, refused_since = NULL, refused_with = NULL
        WHERE id = ?12"#;
    let parameters = values![
        new.vapid_key,
        &new.endpoint,
        endpoint_hash(&new.endpoint),
        new.keys.p256dh(),
        new.keys.auth(),
        new.user.is_some(),
        new.user.clone().flatten(),
        is_anothers,
        &new.metadata,
        now_ms(),
        new.expires_at,
        id,
    ];
    tx.execute(sql, &parameters).await?;
    if new.tags.is_some() {
        let own = new.only_public.then(|| serde_json::to_string(&*new.public_tags).unwrap_or_default());
        let sql = format!(
            "DELETE FROM subscription_tags WHERE subscription = ?1 AND (?2 IS NULL OR tag IN ({}))",
            tx.dialect().texts_in("?2")
        );
        tx.execute(&sql, &values![id, own]).await?;
    }
    set_tags(tx, new, id).await
}

async fn set_tags<T: Tx>(tx: &T, new: &NewSubscription, id: i64) -> Result<()> {
    let sql =
        "INSERT INTO subscription_tags (site, tag, subscription) VALUES (?, ?, ?) ON CONFLICT DO NOTHING";
    for tag in new.tags.iter().flatten() {
        tx.execute(sql, &values![new.site, tag, id]).await?;
    }
    Ok(())
}

fn read(row: &Row) -> Result<Subscription> {
    let tags: String = row.get("tags")?;
    let metadata: Option<String> = row.get("metadata")?;
    Ok(Subscription {
        id: row.get("id")?,
        endpoint: row.get("endpoint")?,
        user: row.get("user")?,
        tags: serde_json::from_str(&tags).unwrap_or_default(),
        metadata: metadata.and_then(|text| RawValue::from_string(text).ok()),
        created_at: timestamp(row.get("created_at")?),
        updated_at: timestamp(row.get("updated_at")?),
    })
}
