//! The tables of web push, and every statement on them.
//!
//! | table | a row is |
//! |---|---|
//! | `vapid_keys` | a key that subscriptions were made with |
//! | `subscriptions`, `subscription_tags` | a browser that may be sent to |
//! | `notifications`, `notification_outcomes` | something that was accepted by `POST /notify`, and how it went |
//! | `recipients` | a subscription that came with a notification |
//! | `batches` | a part of an audience that a job sends to |
//! | `idempotency_keys` | a promise to answer the same again |

mod batches;
mod notifications;
mod subscriptions;

use jiff::Timestamp;
use perennial_server::pool::sqlite::{Result, Sqlite};
use perennial_workers::{Jobs, NewJob, queue};
use rusqlite::Connection;
use uuid::Uuid;

pub(crate) use batches::{Added, Batch, Checkpoint, Deferred, Member, Part, Recorded};
pub(crate) use notifications::{Accepted, Idempotency, NewNotification, Notification, Recipient};
pub(crate) use subscriptions::{NewSubscription, Proof, Replaced, Subscription, Upserted};

/// The steps in which the tables came to be.
pub(crate) const MIGRATIONS: &[&str] = &["
    CREATE TABLE vapid_keys (
        id         INTEGER PRIMARY KEY,
        site       INTEGER NOT NULL REFERENCES sites (id),
        public_key BLOB NOT NULL,              -- 65 bytes
        created_at INTEGER NOT NULL,
        UNIQUE (site, public_key)
    );

    CREATE TABLE subscriptions (
        id            INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used again: an audience is a range of ids
        site          INTEGER NOT NULL REFERENCES sites (id),
        vapid_key     INTEGER NOT NULL REFERENCES vapid_keys (id),
        endpoint      TEXT NOT NULL,
        endpoint_hash BLOB NOT NULL,           -- the first 16 bytes of SHA-256
        p256dh        BLOB NOT NULL,           -- 65 bytes
        auth          BLOB NOT NULL,           -- 16 bytes
        user          TEXT,
        metadata      TEXT,                    -- JSON
        created_at    INTEGER NOT NULL,        -- milliseconds since 1970, here as everywhere
        updated_at    INTEGER NOT NULL,
        UNIQUE (site, endpoint_hash)
    );
    CREATE INDEX subscriptions_site ON subscriptions (site, id);
    CREATE INDEX subscriptions_user ON subscriptions (site, user) WHERE user IS NOT NULL;

    CREATE TABLE subscription_tags (
        site         INTEGER NOT NULL,
        tag          TEXT NOT NULL,
        subscription INTEGER NOT NULL REFERENCES subscriptions (id) ON DELETE CASCADE,
        PRIMARY KEY (site, tag, subscription)
    ) WITHOUT ROWID;
    CREATE INDEX subscription_tags_of ON subscription_tags (subscription);

    CREATE TABLE notifications (
        id           BLOB PRIMARY KEY,         -- UUID version 7
        site         INTEGER NOT NULL REFERENCES sites (id),
        state        TEXT NOT NULL,            -- queued, sending, done
        audience     TEXT NOT NULL,            -- JSON
        payload      BLOB NOT NULL,
        ttl          INTEGER NOT NULL,         -- seconds
        urgency      TEXT NOT NULL,
        topic        TEXT,
        watermark    INTEGER NOT NULL,         -- the highest id of a member
        estimate     INTEGER NOT NULL,         -- members, counted when it was accepted
        fanned_out   INTEGER NOT NULL,         -- whether every page of the audience has its batch
        fanned_to    INTEGER NOT NULL DEFAULT 0,
        fanout_epoch INTEGER NOT NULL DEFAULT 0,
        outstanding  INTEGER NOT NULL,         -- batches that are not finished
        error        TEXT,
        created_at   INTEGER NOT NULL,
        started_at   INTEGER,
        ended_at     INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX notifications_site ON notifications (site, id);

    CREATE TABLE notification_outcomes (
        notification BLOB NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        outcome      TEXT NOT NULL,
        count        INTEGER NOT NULL,
        PRIMARY KEY (notification, outcome)
    ) WITHOUT ROWID;

    CREATE TABLE recipients (
        notification BLOB NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        id           INTEGER NOT NULL,
        endpoint     TEXT NOT NULL,
        p256dh       BLOB NOT NULL,
        auth         BLOB NOT NULL,
        PRIMARY KEY (notification, id)
    ) WITHOUT ROWID;

    CREATE TABLE batches (
        id           BLOB PRIMARY KEY,         -- the id of the job that sends it
        notification BLOB NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        after_id     INTEGER NOT NULL,         -- members with after_id < id <= upto_id,
        upto_id      INTEGER NOT NULL,
        ids          TEXT,                     -- or, when some are tried again, those in this JSON list,
        again        INTEGER NOT NULL DEFAULT 0,   -- and how many they are
        attempt      INTEGER NOT NULL DEFAULT 0,
        epoch        INTEGER NOT NULL DEFAULT 0,
        low_id       INTEGER NOT NULL,         -- the outcomes of members up to it are recorded,
        above        TEXT NOT NULL DEFAULT '[]'    -- and of those in this JSON list
    ) WITHOUT ROWID;
    CREATE INDEX batches_notification ON batches (notification, ids IS NULL);

    CREATE TABLE idempotency_keys (
        api_key      TEXT NOT NULL,
        key          TEXT NOT NULL,
        fingerprint  BLOB NOT NULL,            -- SHA-256 of the request
        notification BLOB NOT NULL,
        created_at   INTEGER NOT NULL,
        PRIMARY KEY (api_key, key)
    ) WITHOUT ROWID;
    CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);
"];

/// The tables. A cheap handle.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    sqlite: Sqlite,
    jobs: Jobs,
}

impl Store {
    pub(crate) fn new(sqlite: Sqlite, jobs: Jobs) -> Self {
        Self { sqlite, jobs }
    }

    /// Counts a job that is about to be stored with what it is about.
    pub(crate) fn admit(&self, job: &NewJob) -> queue::Result<()> {
        self.jobs.admission().admit(std::slice::from_ref(job))
    }

    /// Notes a VAPID key, and returns its id.
    pub(crate) async fn vapid_key(&self, site: i64, public_key: [u8; 65]) -> Result<i64> {
        self.sqlite
            .write(move |tx| {
                let insert = "INSERT INTO vapid_keys (site, public_key, created_at) VALUES (?, ?, ?)
                              ON CONFLICT DO NOTHING";
                tx.execute(insert, (site, public_key, now_ms()))?;
                let select = "SELECT id FROM vapid_keys WHERE site = ? AND public_key = ?";
                tx.query_row(select, (site, public_key), |row| row.get(0))
            })
            .await
    }

    /// How many subscriptions were made with other keys than this one.
    pub(crate) async fn made_with_other_keys(&self, vapid_key: i64) -> Result<u64> {
        let sql = "SELECT count(*) FROM subscriptions WHERE vapid_key <> ?";
        self.sqlite.read(move |tx| tx.query_row(sql, [vapid_key], |row| row.get(0))).await
    }
}

/// Whether there is any subscription at all.
pub(crate) async fn has_subscriptions(store: &Sqlite) -> Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM subscriptions)";
    store.read(move |tx| tx.query_row(sql, [], |row| row.get(0))).await
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or_default()
}

/// Adds up a notification's outcomes.
fn add_outcome(tx: &Connection, notification: Uuid, outcome: &str, count: usize) -> rusqlite::Result<()> {
    let sql = "INSERT INTO notification_outcomes (notification, outcome, count) VALUES (?, ?, ?)
               ON CONFLICT (notification, outcome) DO UPDATE SET count = count + excluded.count";
    tx.prepare_cached(sql)?.execute((notification.as_bytes(), outcome, count)).map(drop)
}
