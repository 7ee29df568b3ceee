//! The tables of web push, for SQLite and for Postgres.

/// The migrations for SQLite, in order.
pub(crate) const SQLITE: &[&str] = &[
    r#"
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
        "user"        TEXT,
        metadata      TEXT,                    -- JSON
        created_at    INTEGER NOT NULL,        -- milliseconds since 1970, here as everywhere
        updated_at    INTEGER NOT NULL,
        UNIQUE (site, endpoint_hash)
    );
    CREATE INDEX subscriptions_site ON subscriptions (site, id);
    CREATE INDEX subscriptions_user ON subscriptions (site, "user") WHERE "user" IS NOT NULL;

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
        above        TEXT NOT NULL DEFAULT '[]',   -- and of those in this JSON list
        trying       INTEGER                   -- the member that is sent to alone, after crashes
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
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0;   -- refused or not found, in a row
    ALTER TABLE subscriptions ADD COLUMN struck_at INTEGER;
    ALTER TABLE notifications ADD COLUMN rate_milli INTEGER;     -- sends per 1000 seconds, if it is paced
    ALTER TABLE notifications ADD COLUMN ramp_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE notifications ADD COLUMN pace_from INTEGER;      -- when its schedule began, in microseconds by the
    ALTER TABLE notifications ADD COLUMN pace_next INTEGER;      -- store's clock, and the first send nobody has reserved
    ALTER TABLE notifications ADD COLUMN due_at INTEGER;         -- not before then
    ALTER TABLE notifications ADD COLUMN expires_at INTEGER;     -- not after then
    ALTER TABLE notifications ADD COLUMN webhook TEXT;           -- the name of whom to tell
    ALTER TABLE notifications ADD COLUMN log TEXT NOT NULL DEFAULT 'failures';   -- or all
    ALTER TABLE notifications ADD COLUMN http TEXT NOT NULL DEFAULT 'auto';
    ALTER TABLE notifications ADD COLUMN is_declarative INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE notifications ADD COLUMN is_template INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX notifications_ended ON notifications (ended_at) WHERE ended_at IS NOT NULL;

    CREATE TABLE deliveries (
        notification BLOB NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        subscription INTEGER NOT NULL,
        outcome      TEXT NOT NULL,
        status       INTEGER,                  -- of the push service's answer
        detail       TEXT NOT NULL,
        at           INTEGER NOT NULL,
        PRIMARY KEY (notification, subscription)
    ) WITHOUT ROWID;
    CREATE INDEX deliveries_subscription ON deliveries (subscription);

    CREATE TABLE push_services (
        origin     TEXT PRIMARY KEY,           -- https://fcm.googleapis.com
        held_until INTEGER,                    -- by the store's clock
        cause      TEXT,
        changed_at INTEGER NOT NULL,
        pace_next  INTEGER                     -- microseconds, as with notifications
    ) WITHOUT ROWID;
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN expires_at INTEGER;     -- as its browser said
    CREATE INDEX subscriptions_expired ON subscriptions (expires_at) WHERE expires_at IS NOT NULL;
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN delivered_at INTEGER;   -- when something was first delivered to it
    ALTER TABLE subscriptions ADD COLUMN refused_since INTEGER;  -- when it was first refused since the last delivery,
    ALTER TABLE subscriptions ADD COLUMN refused_with INTEGER;   -- and what the message was signed with
    CREATE INDEX subscriptions_refused ON subscriptions (refused_since) WHERE refused_since IS NOT NULL;
    -- Refusals were counted by another rule before.
    UPDATE subscriptions SET strikes = 0, struck_at = NULL WHERE strikes > 0;
    ALTER TABLE batches ADD COLUMN waits_for text;

    CREATE TABLE push_acceptances (
        origin      TEXT NOT NULL,
        signer      INTEGER NOT NULL,          -- of a key and a contact
        accepted_at INTEGER NOT NULL,
        PRIMARY KEY (origin, signer)
    ) WITHOUT ROWID;

    CREATE TABLE guests (                      -- subscriptions that strangers made, and nothing was delivered to yet
        subscription INTEGER PRIMARY KEY REFERENCES subscriptions (id) ON DELETE CASCADE,
        site         INTEGER NOT NULL,
        address      BLOB NOT NULL             -- 8 bytes of a keyed hash; none if it is not known
    );
    CREATE INDEX guests_site ON guests (site, subscription);
    CREATE INDEX guests_address ON guests (site, address, subscription);
"#,
];

/// The same migrations for Postgres.
pub(crate) const POSTGRES: &[&str] = &[
    r#"
    CREATE TABLE vapid_keys (
        id         bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
        site       bigint NOT NULL REFERENCES sites (id),
        public_key bytea NOT NULL,
        created_at bigint NOT NULL,
        UNIQUE (site, public_key)
    );

    CREATE TABLE subscriptions (
        id            bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
        site          bigint NOT NULL REFERENCES sites (id),
        vapid_key     bigint NOT NULL REFERENCES vapid_keys (id),
        endpoint      text NOT NULL,
        endpoint_hash bytea NOT NULL,
        p256dh        bytea NOT NULL,
        auth          bytea NOT NULL,
        "user"        text,
        metadata      text,
        created_at    bigint NOT NULL,
        updated_at    bigint NOT NULL,
        UNIQUE (site, endpoint_hash)
    );
    CREATE INDEX subscriptions_site ON subscriptions (site, id);
    CREATE INDEX subscriptions_user ON subscriptions (site, "user") WHERE "user" IS NOT NULL;

    CREATE TABLE subscription_tags (
        site         bigint NOT NULL,
        tag          text NOT NULL,
        subscription bigint NOT NULL REFERENCES subscriptions (id) ON DELETE CASCADE,
        PRIMARY KEY (site, tag, subscription)
    );
    CREATE INDEX subscription_tags_of ON subscription_tags (subscription);

    CREATE TABLE notifications (
        id           bytea PRIMARY KEY,
        site         bigint NOT NULL REFERENCES sites (id),
        state        text NOT NULL,
        audience     text NOT NULL,
        payload      bytea NOT NULL,
        ttl          bigint NOT NULL,
        urgency      text NOT NULL,
        topic        text,
        watermark    bigint NOT NULL,
        estimate     bigint NOT NULL,
        fanned_out   boolean NOT NULL,
        fanned_to    bigint NOT NULL DEFAULT 0,
        fanout_epoch bigint NOT NULL DEFAULT 0,
        outstanding  bigint NOT NULL,
        error        text,
        created_at   bigint NOT NULL,
        started_at   bigint,
        ended_at     bigint
    );
    CREATE INDEX notifications_site ON notifications (site, id);

    CREATE TABLE notification_outcomes (
        notification bytea NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        outcome      text NOT NULL,
        count        bigint NOT NULL,
        PRIMARY KEY (notification, outcome)
    );

    CREATE TABLE recipients (
        notification bytea NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        id           bigint NOT NULL,
        endpoint     text NOT NULL,
        p256dh       bytea NOT NULL,
        auth         bytea NOT NULL,
        PRIMARY KEY (notification, id)
    );

    CREATE TABLE batches (
        id           bytea PRIMARY KEY,
        notification bytea NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        after_id     bigint NOT NULL,
        upto_id      bigint NOT NULL,
        ids          text,
        again        bigint NOT NULL DEFAULT 0,
        attempt      bigint NOT NULL DEFAULT 0,
        epoch        bigint NOT NULL DEFAULT 0,
        low_id       bigint NOT NULL,
        above        text NOT NULL DEFAULT '[]',
        trying       bigint
    );
    CREATE INDEX batches_notification ON batches (notification, (ids IS NULL));

    CREATE TABLE idempotency_keys (
        api_key      text NOT NULL,
        key          text NOT NULL,
        fingerprint  bytea NOT NULL,
        notification bytea NOT NULL,
        created_at   bigint NOT NULL,
        PRIMARY KEY (api_key, key)
    );
    CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN strikes bigint NOT NULL DEFAULT 0;
    ALTER TABLE subscriptions ADD COLUMN struck_at bigint;
    ALTER TABLE notifications ADD COLUMN rate_milli bigint;
    ALTER TABLE notifications ADD COLUMN ramp_ms bigint NOT NULL DEFAULT 0;
    ALTER TABLE notifications ADD COLUMN pace_from bigint;
    ALTER TABLE notifications ADD COLUMN pace_next bigint;
    ALTER TABLE notifications ADD COLUMN due_at bigint;
    ALTER TABLE notifications ADD COLUMN expires_at bigint;
    ALTER TABLE notifications ADD COLUMN webhook text;
    ALTER TABLE notifications ADD COLUMN log text NOT NULL DEFAULT 'failures';
    ALTER TABLE notifications ADD COLUMN http text NOT NULL DEFAULT 'auto';
    ALTER TABLE notifications ADD COLUMN is_declarative boolean NOT NULL DEFAULT FALSE;
    ALTER TABLE notifications ADD COLUMN is_template boolean NOT NULL DEFAULT FALSE;
    CREATE INDEX notifications_ended ON notifications (ended_at) WHERE ended_at IS NOT NULL;

    CREATE TABLE deliveries (
        notification bytea NOT NULL REFERENCES notifications (id) ON DELETE CASCADE,
        subscription bigint NOT NULL,
        outcome      text NOT NULL,
        status       bigint,
        detail       text NOT NULL,
        at           bigint NOT NULL,
        PRIMARY KEY (notification, subscription)
    );
    CREATE INDEX deliveries_subscription ON deliveries (subscription);

    CREATE TABLE push_services (
        origin     text PRIMARY KEY,
        held_until bigint,
        cause      text,
        changed_at bigint NOT NULL,
        pace_next  bigint
    );
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN expires_at bigint;
    CREATE INDEX subscriptions_expired ON subscriptions (expires_at) WHERE expires_at IS NOT NULL;
"#,
    r#"
    ALTER TABLE subscriptions ADD COLUMN delivered_at bigint;
    ALTER TABLE subscriptions ADD COLUMN refused_since bigint;
    ALTER TABLE subscriptions ADD COLUMN refused_with bigint;
    CREATE INDEX subscriptions_refused ON subscriptions (refused_since) WHERE refused_since IS NOT NULL;
    UPDATE subscriptions SET strikes = 0, struck_at = NULL WHERE strikes > 0;
    ALTER TABLE batches ADD COLUMN waits_for text;

    CREATE TABLE push_acceptances (
        origin      text NOT NULL,
        signer      bigint NOT NULL,
        accepted_at bigint NOT NULL,
        PRIMARY KEY (origin, signer)
    );

    CREATE TABLE guests (
        subscription bigint PRIMARY KEY REFERENCES subscriptions (id) ON DELETE CASCADE,
        site         bigint NOT NULL,
        address      bytea NOT NULL
    );
    CREATE INDEX guests_site ON guests (site, subscription);
    CREATE INDEX guests_address ON guests (site, address, subscription);
"#,
];
