//! The program on shared stores: Postgres, and Redis for jobs. The promises are the same.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use perennial_store::pool::redis::Redis;
use perennial_store::pool::redis::client::cmd;
use perennial_workers::Queue;
use perennial_workers::queue::{Claim, Due, NewJob, Settlement};
use perennial_workers::state::Transition;
use perennial_workers::store::redis::RedisQueue;
use serde_json::{Value, json};
use tokio::process::Command;
use uuid::Uuid;

use support::double::Double;
use support::eventually;
use support::pgbouncer::PgBouncer;
use support::postgres::Database;
use support::process::{Perennial, Setup, example};
use support::redis::Prefix;
use support::stores::{on_postgres, with_redis};

/// Subscribes, sends to all in every way, and checks the outcomes.
async fn sends_to_everybody(perennial: &Perennial, double: &Double) {
    let user = json!({ "subscription": double.mint(), "user": "ada", "tags": ["news", "de"] });
    let answer = perennial.client().post("/subscriptions", &user).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    let again = perennial.client().post("/subscriptions", &user).await;
    assert_eq!((again.status.as_u16(), again.json()), (200, answer.json()));
    perennial.subscribe(double, 4).await;
    let listed = perennial.client().get("/subscriptions?tag=news").await.json();
    assert_eq!(listed["subscriptions"][0]["tags"].as_array().unwrap().len(), 2);

    let notify = async |to: Value| {
        let request = json!({ "to": to, "notification": { "title": "Hello" } });
        perennial.notify_and_wait(&request).await["outcomes"].clone()
    };
    assert_eq!(notify(json!({ "all": true })).await, json!({ "delivered": 5 }));
    assert_eq!(notify(json!({ "user": "ada" })).await, json!({ "delivered": 1 }));
    assert_eq!(notify(json!({ "users": ["ada", "bob"] })).await, json!({ "delivered": 1 }));
    assert_eq!(notify(json!({ "tags": "news and not muted" })).await, json!({ "delivered": 1 }));
    let id = answer.json()["id"].clone();
    assert_eq!(notify(json!({ "subscriptions": [id] })).await, json!({ "delivered": 1 }));
    assert_eq!(notify(json!({ "push": [double.mint()] })).await, json!({ "delivered": 1 }));

    let once = perennial.client().with_header("idempotency-key", "one");
    let request = json!({ "to": { "all": true }, "payload": "x" });
    let (first, second) = (once.post("/notify", &request).await, once.post("/notify", &request).await);
    assert_eq!(first.json()["id"], second.json()["id"]);
    perennial.done(first.json()["id"].as_str().unwrap()).await;
    assert_eq!(once.post("/notify", &json!({ "to": { "user": "x" }, "payload": "x" })).await.status, 422);
    let all = perennial.client().get("/notifications").await.json();
    assert_eq!(all["notifications"].as_array().unwrap().len(), 7);
    let unsubscribed = perennial.client().delete(&format!("/subscriptions/{id}"), None).await;
    assert_eq!(unsubscribed.status, 204);
}

/// Sends to a big audience, some of which fail at first: fan-out, retries, prunes.
async fn reaches_a_crowd(perennial: &Perennial, double: &Double) {
    for _ in 0..60 {
        perennial.subscribe(double, 1).await;
    }
    let fails = std::sync::Mutex::new(std::collections::HashSet::new());
    double.script(move |push| {
        if push.token.ends_with('A') {
            support::double::status_answer(410, &[])
        } else if fails.lock().unwrap().insert(push.token.clone()) && push.token.ends_with(['B', 'C', 'D']) {
            support::double::status_answer(503, &[("retry-after", "1")])
        } else {
            perennial::sink::Answer::Take
        }
    });
    let progress = perennial.notify_and_wait(&json!({ "to": { "all": true }, "payload": "to all" })).await;
    let outcomes: u64 = progress["outcomes"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(outcomes, progress["audience"].as_u64().unwrap(), "{progress}");
}

fn crowd(double: &Double) -> Setup {
    Setup::new().sending_to(double).set("push.small_audience=10").set("push.batch=16")
}

#[tokio::test]
async fn everything_works_on_postgres() {
    let (double, database) = (Double::start().await, Database::new().await);
    let setup = on_postgres(crowd(&double), database.url()).await;
    let mut perennial = setup.start().await;
    sends_to_everybody(&perennial, &double).await;
    reaches_a_crowd(&perennial, &double).await;
    assert_eq!(perennial.stop().await, Some(0));
}

#[tokio::test]
async fn everything_works_behind_a_pgbouncer_that_pools_transactions() {
    let (double, bouncer) = (Double::start().await, PgBouncer::start().await);
    let setup = crowd(&double).set("store.pgbouncer=true");
    let setup = on_postgres(setup, bouncer.url()).await;
    let mut perennial = setup.start().await;
    sends_to_everybody(&perennial, &double).await;
    reaches_a_crowd(&perennial, &double).await;
    assert_eq!(perennial.stop().await, Some(0));
}

#[tokio::test]
async fn everything_works_with_jobs_in_redis_beside_the_embedded_store() {
    let (double, prefix) = (Double::start().await, Prefix::new().await);
    let mut perennial = with_redis(crowd(&double), &prefix).start().await;
    sends_to_everybody(&perennial, &double).await;
    reaches_a_crowd(&perennial, &double).await;
    let store = rusqlite::Connection::open(perennial.setup.data_dir().join("perennial.db")).unwrap();
    eventually("entries go when their jobs have settled", || async {
        let count = store.query_row("SELECT count(*) FROM outbox", [], |row| row.get::<_, i64>(0));
        (count.unwrap() == 0).then_some(())
    })
    .await;
    let asked = Instant::now();
    assert_eq!(perennial.stop().await, Some(0));
    assert!(asked.elapsed() < Duration::from_secs(10), "nothing runs any more that would be waited for");
}

#[tokio::test]
async fn of_two_replicas_one_goes_on_where_the_other_died() {
    for redis in [false, true] {
        let (double, database, prefix) = (Double::start().await, Database::new().await, Prefix::new().await);
        let make = async || {
            let setup = crowd(&double)
                .set("queue.lease=1500ms")
                .set("queue.renew_every=500ms")
                .set("push.timeout=2s");
            let setup = on_postgres(setup, database.url()).await;
            if redis { with_redis(setup, &prefix).start().await } else { setup.start().await }
        };
        let (mut first, second) = (make().await, make().await);
        let key = async |perennial: &Perennial| perennial.client().get("/push/key").await.json();
        assert_eq!(key(&first).await, key(&second).await, "they have one VAPID key");
        first.subscribe(&double, 30).await;
        // Each replica stalls in the middle of its batches; then one replica dies.
        double.script(|_| perennial::sink::Answer::Stall);
        let id = first.notify(&json!({ "to": { "all": true }, "payload": "to all" })).await;
        eventually("both batches are begun", || async { (double.asked() >= 30).then_some(()) }).await;
        first.signal(Signal::SIGKILL);
        first.ended().await;
        double.script(|_| perennial::sink::Answer::Take);
        // The sends that the second replica had begun end by their timeout and are retried.
        let progress = second.done_within(&id, 3 * support::SOON).await;
        assert_eq!(progress["outcomes"], json!({ "delivered": 30 }), "redis: {redis}");
    }
}

#[tokio::test]
async fn a_shared_store_wants_its_keys_made_once() {
    let database = Database::new().await;
    let setup = Setup::new().set(&format!("store.url={}", database.url()));
    let mut refused = setup.spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(refused.log().contains("perennial keys generate"), "{}", refused.log());
}

/// Other programs enqueue with one statement, as the documents say.
#[tokio::test]
async fn psql_and_redis_cli_can_enqueue() {
    let run = async |program: &str, arguments: &[&str]| {
        let ended = Command::new(program).args(arguments).stdin(Stdio::null()).output().await.unwrap();
        let (out, error) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success() && !out.contains("ERR"), "{out}{error}");
    };
    let database = Database::new().await;
    let greeted = async |name: &'static str| {
        let postgres = database.connect().await;
        eventually(&format!("{name} was greeted"), || async {
            let sql = "SELECT times FROM greeted WHERE name = $1";
            let rows = postgres.query(sql, &[(&name, tokio_postgres::types::Type::TEXT)]).await.unwrap();
            (!rows.is_empty()).then_some(())
        })
        .await;
    };

    let setup = on_postgres(Setup::new().program(example("hello")), database.url()).await;
    let hello = setup.start().await;
    let sql =
        r#"INSERT INTO jobs (kind, queue, payload) VALUES ('hello.count', 'default', '{"name": "psql"}')"#;
    run("psql", &[database.url(), "-c", sql]).await;
    greeted("psql").await;
    let bad =
        Command::new("psql").arg(database.url()).args(["-c", &sql.replace("{", "")]).output().await.unwrap();
    assert!(!bad.status.success(), "what is no JSON is refused at once");
    drop(hello);

    let prefix = Prefix::new().await;
    let setup = on_postgres(Setup::new().program(example("hello")), database.url()).await;
    let _hello = with_redis(setup, &prefix).start().await;
    let inbox = format!("{}:{{default}}:inbox", prefix.name());
    let payload = r#"{"name": "redis-cli"}"#;
    let xadd = ["XADD", &inbox, "*", "kind", "hello.count", "payload", payload];
    match prefix.url().strip_prefix("redis+unix://") {
        Some(socket) => run("redis-cli", &[&["-s", socket], &xadd[..]].concat()).await,
        None => run("redis-cli", &[&["-u", prefix.url()], &xadd[..]].concat()).await,
    }
    greeted("redis-cli").await;
}

/// Whatever jobs another program enqueues, they delay no other job, and they can be listed.
#[tokio::test]
async fn odd_jobs_of_others_keep_nobody_waiting() {
    let prefix = Prefix::new().await;
    let hello = with_redis(Setup::new().program(example("hello")), &prefix).start().await;
    let redis = prefix.connect().await;
    let inbox = format!("{}:{{default}}:inbox", prefix.name());
    let long = format!(r#"{{"name": "{}"}}"#, "x".repeat(300_000));
    let odd: [&[&str]; 6] = [
        &["id", "not a uuid", "kind", "hello.count", "payload", "no JSON"],
        &["kind", "hello.count", "payload", "{}", "priority", "nan", "delay", "-inf"],
        &["kind", "hello.count", "payload", &long],
        &["payload", "null"],
        &["kind", "hello.count", "priority", "1e300"],
        &[
            "id",
            "01A1FE2B-5854-7538-8125-17204CA24586",
            "kind",
            "hello.count",
            "payload",
            r#"{"name": "good"}"#,
        ],
    ];
    for fields in odd {
        redis.query::<()>(cmd("XADD").arg(&inbox).arg("*").arg(fields)).await.unwrap();
    }
    let bytes: &[u8] = b"{\"name\": \"\xff\"}";
    let mut xadd = cmd("XADD");
    xadd.arg(&inbox).arg("*").arg("kind").arg("hello.count").arg("payload").arg(bytes);
    redis.query::<()>(&xadd).await.unwrap();
    // This job was damaged by hand.
    let hash = |part: &str| format!("{}:{{default}}:{part}", prefix.name());
    let id = "01a1fe2b-5854-7538-8125-17204ca24500";
    redis.query::<()>(cmd("HSET").arg(hash("jobs")).arg(id).arg("rubbish")).await.unwrap();
    redis.query::<()>(cmd("ZADD").arg(hash("ready")).arg("-1e15").arg(id)).await.unwrap();
    let store = rusqlite::Connection::open(hello.setup.data_dir().join("perennial.db")).unwrap();
    eventually("the good one has run", || async {
        let times = store.query_row("SELECT times FROM greeted WHERE name = 'good'", [], |row| row.get(0));
        (times.ok() == Some(1)).then_some(())
    })
    .await;
    eventually("the others are dead", || async {
        let dead = hello.admin().get("/jobs?state=dead").await.json();
        let dead = dead["jobs"].as_array().unwrap().len();
        (dead == 6).then_some(())
    })
    .await;
}

/// A row that cannot be read again would block its queue for ever.
#[tokio::test]
async fn rows_that_could_not_be_read_again_are_refused() {
    let database = Database::new().await;
    let postgres = database.connect().await;
    postgres.migrate(&[perennial_workers::store::postgres::MIGRATIONS]).await.unwrap();
    let insert = async |columns: &str, values: &str| {
        let sql = format!("INSERT INTO jobs (kind, payload, {columns}) VALUES ('x', '{{}}', {values})");
        postgres.execute(&sql, &[]).await
    };
    for (columns, values) in [
        ("run_at", "'20000-01-01'"),
        ("run_at", "'infinity'"),
        ("created_at", "'-infinity'"),
        ("scheduled_at", "'infinity'"),
        ("epoch", "9223372036854775807"),
        ("failures", "-1"),
        ("state", "'running'"),
        ("state", "'odd'"),
    ] {
        assert!(insert(columns, values).await.is_err(), "{columns} = {values}");
    }
    insert("priority", "-5").await.unwrap();

    let store = rusqlite::Connection::open_in_memory().unwrap();
    store.execute_batch(perennial_workers::store::sqlite::MIGRATIONS.steps[0]).unwrap();
    for (column, value) in [
        ("run_at", "datetime('now')"),
        ("run_at", "1.5"),
        ("id", "'sixteen letters!'"),
        ("priority", "1.5"),
        ("epoch", "-1"),
        ("state", "'running'"),
    ] {
        let sql = format!("INSERT INTO jobs (kind, payload, {column}) VALUES ('x', '{{}}', {value})");
        assert!(store.execute(&sql, []).is_err(), "{column} = {value}");
    }
}

/// Another program has written Latin-1 into columns of text: a payload, a kind, a trace.
#[tokio::test]
async fn a_job_that_cannot_be_read_is_set_apart_and_the_others_run() {
    let hello = Setup::new().program(example("hello")).start().await;
    let file = hello.setup.data_dir().join("perennial.db");
    let store = rusqlite::Connection::open(file).unwrap();
    store.busy_timeout(Duration::from_secs(5)).unwrap();
    let insert = |column: &str, value: &str| {
        let mut fields = std::collections::BTreeMap::from([
            ("kind", "'hello.count'"),
            ("payload", "'{\"name\": \"good\"}'"),
            ("priority", "-9"),
        ]);
        fields.insert(column, value);
        let columns: Vec<_> = fields.keys().copied().collect();
        let values: Vec<_> = fields.values().copied().collect();
        let sql = format!("INSERT INTO jobs ({}) VALUES ({})", columns.join(", "), values.join(", "));
        store.execute(&sql, []).unwrap();
    };
    let latin1 = "CAST(x'7b226e616d65223a2022476fe9227d' AS TEXT)";
    insert("payload", latin1);
    insert("kind", latin1);
    insert("trace", latin1);
    insert("priority", "0");
    eventually("the good one has run", || async {
        let times =
            store.query_row("SELECT times FROM greeted WHERE name = 'good'", [], |row| row.get::<_, i64>(0));
        times.is_ok_and(|times| times >= 1).then_some(())
    })
    .await;
    eventually("those that cannot be read are dead", || async {
        let dead = hello.admin().get("/jobs?state=dead").await;
        assert_eq!(dead.status, 200, "{}", dead.text());
        (dead.json()["jobs"].as_array().unwrap().len() >= 2).then_some(())
    })
    .await;
    let kept =
        "SELECT count(*) FROM ended_jobs WHERE hex(CAST(payload AS BLOB)) = '7B226E616D65223A2022476FE9227D'";
    assert_eq!(store.query_row(kept, [], |row| row.get::<_, i64>(0)).unwrap(), 1, "its bytes are kept");
    let listed = hello.setup.run(&["jobs", "list", "--state", "dead"]).await;
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
}

/// A role or a database may have any defaults.
#[tokio::test]
async fn defaults_of_the_database_decide_nothing() {
    let (double, database) = (Double::start().await, Database::new().await);
    let server = database.connect().await;
    for default in [
        "default_transaction_isolation = serializable",
        "synchronous_commit = off",
        "lock_timeout = '1ms'",
        "standard_conforming_strings = off",
        "bytea_output = escape",
    ] {
        let sql = format!(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {}', current_database()); END $$",
            default.replace('\'', "''")
        );
        server.execute(&sql, &[]).await.unwrap();
    }
    let perennial = on_postgres(Setup::new().sending_to(&double), database.url()).await.start().await;
    let mut posting = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (client, request) = (perennial.client().clone(), json!({ "subscription": double.mint() }));
        posting.spawn(async move { client.post("/subscriptions", &request).await.status });
    }
    while let Some(status) = posting.join_next().await {
        assert_eq!(status.unwrap(), 201);
    }
    let progress = perennial.notify_and_wait(&json!({ "to": { "all": true }, "payload": "x" })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 100 }));
}

/// Such a database could return text that is not UTF-8 at any time.
#[tokio::test]
async fn a_database_with_another_encoding_is_refused() {
    let database = Database::new().await;
    let name = format!("latin_{}", uuid::Uuid::now_v7().simple());
    let server = database.connect().await;
    let sql =
        format!("CREATE DATABASE {name} ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0");
    server.execute(&sql, &[]).await.unwrap();
    let own: String = server.query("SELECT current_database()::text", &[]).await.unwrap()[0].get(0);
    let url = database.url().replace(&own, &name);
    let refused = Setup::new().set(&format!("store.url={url}")).run(&["migrate"]).await;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    server.execute(&format!("DROP DATABASE {name}"), &[]).await.unwrap();
    assert!(!refused.status.success() && said.contains("the encoding SQL_ASCII"), "{said}");
}

/// Placeholders are replaced only where SQL allows them.
#[tokio::test]
async fn question_marks_that_are_no_places_stay() {
    use perennial_store::pool::sql::{Store, Value};
    let database = Database::new().await;
    let store = Store::Postgres(database.connect().await);
    let text =
        async |sql: &'static str, values: Vec<Value>| store.value::<String>(sql, values).await.unwrap();
    assert_eq!(text("SELECT 'Why?'", vec![]).await, "Why?");
    assert_eq!(text("SELECT 'it''s ?' || ?", vec!["!".into()]).await, "it's ?!");
    assert_eq!(text("SELECT $$a ? b$$ || ? -- and ?\n /* ? */", vec!["c".into()]).await, "a ? bc");
    assert_eq!(text(r#"SELECT ? AS "who?""#, vec!["x".into()]).await, "x");
    assert_eq!(
        text("SELECT CASE WHEN '{\"a\": 1}'::jsonb ? 'a' THEN ? ELSE 'no' END", vec!["yes".into()]).await,
        "yes"
    );
    let wrong = store.value::<i64>("SELECT 'x' AS times", vec![]).await.unwrap_err().to_string();
    assert!(wrong.contains("wanted") && wrong.contains("the column"), "{wrong}");
}

/// The outbox publishes jobs again that Redis has lost, and under epochs that were not used before.
#[tokio::test]
async fn a_redis_that_lost_everything_gets_its_jobs_again() {
    let (double, server) = (Double::start().await, support::redis::Server::start(&[]).await);
    let setup = crowd(&double).set(&format!("queue.url={}", server.url()));
    let perennial = setup.start().await;
    perennial.subscribe(&double, 2).await;
    let paused = perennial.setup.run(&["jobs", "pause", "push-small"]).await;
    assert!(paused.status.success(), "{}", String::from_utf8_lossy(&paused.stderr));
    let id = perennial.notify(&json!({ "to": { "all": true }, "payload": "x" })).await;
    let redis = Redis::open(support::redis::config(&server.url())).await.unwrap();
    eventually("it is published", || async {
        let ready: usize = redis.query(cmd("ZCARD").arg("perennial:{push-small}:ready")).await.unwrap();
        (ready == 1).then_some(())
    })
    .await;
    // The job is gone, and so is the pause. The audit runs every five seconds, and checks what was published
    // fifteen seconds ago.
    redis.query::<()>(&cmd("FLUSHALL")).await.unwrap();
    let progress = perennial.done_within(&id, Duration::from_secs(60)).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 2 }));
    assert!(perennial.log().contains("published, and not in Redis: publishing again"));

    let queue = RedisQueue::new(redis.clone(), "other");
    let job = any_job();
    let claim = || Claim {
        queue: "tests".into(),
        limit: 1,
        worker: "test".to_owned(),
        lease: Duration::from_secs(60),
    };
    queue.enqueue(vec![job.clone()]).await.unwrap();
    let before = queue.claim(claim()).await.unwrap().jobs.remove(0);
    redis.query::<()>(&cmd("FLUSHALL")).await.unwrap();
    queue.enqueue(vec![job]).await.unwrap();
    let after = queue.claim(claim()).await.unwrap().jobs.remove(0);
    assert!(after.epoch > before.epoch);
    let stale = Settlement::of(Arc::new(before), Transition::Finished);
    assert_eq!(queue.settle(vec![stale]).await.unwrap(), [false]);
}

fn any_job() -> NewJob {
    NewJob {
        id: Uuid::now_v7(),
        kind: "x".into(),
        queue: "tests".into(),
        priority: 0,
        payload: "{}".to_owned(),
        due: Due::Now,
        unique: None,
        trace: None,
        recoveries: 0,
    }
}

/// A server whose memory is full accepts no more jobs, but lets its jobs be claimed and settled.
#[tokio::test]
async fn a_full_redis_can_be_drained() {
    let server = support::redis::Server::start(&[]).await;
    let redis = Redis::open(support::redis::config(&server.url())).await.unwrap();
    let queue = RedisQueue::new(redis.clone(), "perennial");
    queue.enqueue(vec![any_job(), any_job()]).await.unwrap();
    redis.query::<()>(cmd("CONFIG").arg("SET").arg("maxmemory").arg(1)).await.unwrap();
    let refused = queue.enqueue(vec![any_job()]).await.unwrap_err();
    assert!(refused.is_passing(), "{refused}");
    let lease = Duration::from_secs(60);
    let claim = Claim { queue: "tests".into(), limit: 9, worker: "test".to_owned(), lease };
    let jobs = queue.claim(claim).await.unwrap().jobs;
    assert_eq!(jobs.len(), 2);
    let again = Transition::Again { wait: lease, spent: jobs[0].spent };
    let ends = [Transition::Finished, again];
    let settlements = jobs.into_iter().map(Arc::new).zip(ends).map(|(job, end)| Settlement::of(job, end));
    assert_eq!(queue.settle(settlements.collect()).await.unwrap(), [true, true]);
}

#[tokio::test]
async fn a_redis_that_would_throw_jobs_away_is_refused() {
    let server = support::redis::Server::start(&[]).await;
    let redis = Redis::open(support::redis::config(&server.url())).await.unwrap();
    let mut evict = cmd("CONFIG");
    redis.query::<()>(evict.arg("SET").arg("maxmemory-policy").arg("allkeys-lru")).await.unwrap();
    let refused = Setup::new().set(&format!("queue.url={}", server.url()));
    let mut refused = refused.spawn();
    assert_eq!(refused.ended().await.code(), Some(1));
    assert!(
        refused.log().contains("maxmemory-policy is allkeys-lru, wanted noeviction"),
        "{}",
        refused.log()
    );
}
