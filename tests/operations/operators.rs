//! Jobs as operators and other programs handle them: enqueue, list, show, retry, discard, pause, cancel.

use serde_json::{Value, json};

use support::eventually;
use support::http::Client;
use support::process::{Perennial, Setup, example};

/// Starts our example, whose kind `hello.count` is public.
async fn hello() -> Perennial {
    Setup::new().program(example("hello")).start().await
}

fn admin_with_token(hello: &Perennial) -> Client {
    let token = std::fs::read_to_string(hello.setup.data_dir().join("admin.token")).unwrap();
    hello.admin().with_key(token.trim())
}

fn store(hello: &Perennial) -> rusqlite::Connection {
    let store = rusqlite::Connection::open(hello.setup.data_dir().join("perennial.db")).unwrap();
    store.busy_timeout(support::SOON).unwrap();
    store
}

async fn greeted(hello: &Perennial, name: &str, times: i64) {
    let store = store(hello);
    let sql = "SELECT times FROM greeted WHERE name = ?";
    eventually(&format!("{name} was greeted {times} times"), || async {
        (store.query_row(sql, [name], |row| row.get(0)).ok() == Some(times)).then_some(())
    })
    .await;
}

/// Runs `perennial jobs ..`. Returns the exit code, the lines of its output as JSON, and its error output.
async fn jobs(setup: &Setup, arguments: &[&str]) -> (Option<i32>, Vec<Value>, String) {
    let ended = setup.run(&[&["jobs"], arguments].concat()).await;
    let out = String::from_utf8(ended.stdout).unwrap();
    let lines = serde_json::Deserializer::from_str(&out).into_iter().map(Result::unwrap).collect();
    (ended.status.code(), lines, String::from_utf8(ended.stderr).unwrap())
}

#[tokio::test]
async fn a_public_kind_can_be_enqueued_with_a_key() {
    let hello = hello().await;
    let enqueue = async |body: Value| hello.client().post("/jobs/hello.count", &body).await;
    let answer = enqueue(json!({ "payload": { "name": "Ada" }, "priority": -1 })).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    greeted(&hello, "Ada", 1).await;

    let once = json!({ "payload": { "name": "Bob" }, "unique": "bob", "delay": "300ms" });
    let (first, second) = (enqueue(once.clone()).await.json(), enqueue(once.clone()).await.json());
    assert!(first["id"].is_string() && first == second);
    greeted(&hello, "Bob", 1).await;
    eventually("the key is given back", || async {
        (enqueue(once.clone()).await.json() != first).then_some(())
    })
    .await;

    for (body, fields) in [
        (json!({ "payload": { "nme": "x" } }), ["payload.nme"]),
        (json!({ "payload": { "name": 7 } }), ["payload.name"]),
        (json!({ "payload": { "name": "x" }, "delay": "soon" }), ["delay"]),
        (json!({ "payload": { "name": "x" }, "unique": "" }), ["unique"]),
        (json!({ "payload": { "name": "x" }, "queue": "mine" }), ["queue"]),
        (json!({}), ["body"]),
    ] {
        let answer = enqueue(body.clone()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.fields()),
            (422, fields.map(str::to_owned).to_vec()),
            "{body}"
        );
    }
    let body = json!({ "payload": {} });
    assert_eq!(hello.client().post("/jobs/hello.private", &body).await.status, 404);
    assert_eq!(hello.client().without_key().post("/jobs/hello.count", &body).await.status, 401);
}

#[tokio::test]
async fn a_full_queue_answers_503_and_takes_more_when_it_has_room() {
    let hello = Setup::new().program(example("hello")).set("queue.max_jobs=3").start().await;
    let admin = admin_with_token(&hello);
    admin.post("/queues/pause", &json!({ "queue": "default" })).await;
    let body = json!({ "payload": { "name": "crowd" } });
    for _ in 0..3 {
        assert_eq!(hello.client().post("/jobs/hello.count", &body).await.status, 202);
    }
    let refused = hello.client().post("/jobs/hello.count", &body).await;
    assert_eq!(
        (refused.status.as_u16(), refused.header("retry-after")),
        (503, Some("5")),
        "{}",
        refused.text()
    );
    admin.post("/queues/resume", &json!({ "queue": "default" })).await;
    greeted(&hello, "crowd", 3).await;
    eventually("there is room", || async {
        (hello.client().post("/jobs/hello.count", &body).await.status == 202).then_some(())
    })
    .await;
}

#[tokio::test]
async fn dead_jobs_are_listed_shown_retried_and_discarded() {
    let mut hello = hello().await;
    // Another program enqueues jobs with one statement.
    let insert = r#"INSERT INTO jobs (kind, payload) VALUES ('hello.count', '{"name": "psql"}'),
                                                            ('hello.count', '{"nme": "misspelt"}')"#;
    store(&hello).execute(insert, []).unwrap();
    greeted(&hello, "psql", 1).await;
    let refused =
        store(&hello).execute("INSERT INTO jobs (kind, payload) VALUES ('hello.count', 'no JSON')", []);
    assert!(refused.unwrap_err().to_string().contains("CHECK constraint failed"));

    let dead = async |hello: &Perennial| jobs(&hello.setup, &["list", "--state", "dead"]).await.1;
    let listed = eventually("it is dead", || async {
        let dead = dead(&hello).await;
        (dead.len() == 1).then_some(dead)
    })
    .await;
    let id = listed[0]["id"].as_str().unwrap().to_owned();
    let reason = listed[0]["reason"].as_str().unwrap();
    assert!(reason.contains("missing field `name`") || reason.contains("unknown field"), "{reason}");
    let (code, shown, _) = jobs(&hello.setup, &["show", &id]).await;
    assert_eq!((code, &shown[0]["payload"]), (Some(0), &json!({ "nme": "misspelt" })));
    let queues = jobs(&hello.setup, &["queues"]).await.1;
    assert_eq!(
        (&queues[0]["queue"], &queues[0]["ended"], &queues[0]["slots"]),
        (&json!("default"), &json!(1), &json!(8))
    );

    assert_eq!(jobs(&hello.setup, &["retry", &id]).await.1, [json!({ "retried": 1 })]);
    eventually("it is dead again", || async { (dead(&hello).await.len() == 1).then_some(()) }).await;
    let (code, _, error) = jobs(&hello.setup, &["retry"]).await;
    assert_eq!(code, Some(2), "which? {error}");
    let (code, _, error) = jobs(&hello.setup, &["list", "--state", "tired"]).await;
    assert_eq!(
        (code, error.contains("state: one of scheduled, ready, running, dead, cancelled")),
        (Some(1), true),
        "{error}"
    );

    // Without a server the command opens the store itself.
    assert_eq!(hello.stop().await, Some(0));
    assert_eq!(dead(&hello).await.len(), 1);
    let discarded = jobs(&hello.setup, &["discard", "--reason", "field", "--kind", "hello.count"]).await.1;
    assert_eq!(discarded, [json!({ "discarded": 1 })]);
    assert!(dead(&hello).await.is_empty());
    let (code, _, error) = jobs(&hello.setup, &["enqueue", "hello.count", "{}"]).await;
    assert_eq!((code, error.contains("takes a running server")), (Some(1), true), "{error}");
}

#[tokio::test]
async fn a_paused_queue_holds_its_jobs_and_those_can_be_cancelled() {
    let hello = hello().await;
    let run = async |arguments: &[&str]| {
        let (code, answer, error) = jobs(&hello.setup, arguments).await;
        assert_eq!(code, Some(0), "{arguments:?}: {error}");
        answer
    };
    run(&["pause", "default"]).await;
    let enqueued = run(&["enqueue", "hello.count", r#"{"name": "Eve"}"#]).await;
    run(&["enqueue", "hello.count", r#"{"name": "Ada"}"#, "--priority", "-5", "--unique", "a"]).await;
    let waiting = run(&["list", "--state", "ready"]).await;
    assert_eq!(waiting.len(), 2);
    assert_eq!(run(&["queues"]).await[0]["paused"], true);
    let id = enqueued[0]["id"].as_str().unwrap();
    assert_eq!(run(&["cancel", id]).await, [json!({ "cancelled": "now" })]);
    assert_eq!(run(&["cancel", id]).await, [json!({ "cancelled": "never" })]);
    run(&["resume", "default"]).await;
    greeted(&hello, "Ada", 1).await;
    let cancelled = run(&["show", id]).await;
    assert_eq!(
        (&cancelled[0]["state"], &cancelled[0]["reason"]),
        (&json!("cancelled"), &json!("cancelled by an operator"))
    );
    assert_eq!(run(&["retry", id]).await, [json!({ "retried": 1 })]);
    greeted(&hello, "Eve", 1).await;
}

#[tokio::test]
async fn what_changes_something_takes_the_token_and_no_page_elsewhere() {
    let hello = hello().await;
    let pause = json!({ "queue": "default" });
    assert_eq!(
        hello.admin().without_key().post("/queues/pause", &pause).await.status,
        401,
        "also on loopback"
    );
    let admin = admin_with_token(&hello);
    let elsewhere = admin.with_header("origin", "https://evil.example").post("/queues/pause", &pause).await;
    assert_eq!(elsewhere.status, 421);
    assert_eq!(admin.post("/queues/pause", &pause).await.status, 200);
    let api_key = hello.client().with_header("x", "y");
    assert_eq!(api_key.post("/queues/pause", &pause).await.status, 404, "not on the public listener");
    assert_eq!(hello.admin().without_key().get("/jobs").await.status, 200, "looking is free here");
    assert_eq!(hello.admin().without_key().get("/jobs/nonsense").await.status, 404);
}

#[tokio::test]
async fn a_process_that_has_done_enough_ends_well() {
    let mut hello = Setup::new().program(example("hello")).set("process.max_jobs=2").start().await;
    for name in ["a", "b"] {
        hello.client().post("/jobs/hello.count", &json!({ "payload": { "name": name } })).await;
    }
    assert_eq!(hello.ended().await.code(), Some(0));
    assert!(hello.log().contains("process.max_* reached: 2 jobs have run"), "{}", hello.log());
}

#[tokio::test]
async fn a_job_leaves_one_line_at_its_start_and_one_at_its_end_with_ids_that_join_up() {
    let hello = hello().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let client = hello.client().with_header("traceparent", trace);
    let body = json!({ "payload": { "name": "Ada" } });
    let id = client.post("/jobs/hello.count", &body).await.json()["id"].clone();
    hello.logged("job ended").await;
    let lines = hello.log_lines();
    let of_job: Vec<&Value> =
        lines.iter().filter(|line| line["job"]["id"] == id || line["span"]["id"] == id).collect();
    let messages: Vec<&str> = of_job.iter().filter_map(|line| line["message"].as_str()).collect();
    assert_eq!(messages, ["job started", "job ended"], "{}", hello.log());
    assert!(of_job.iter().all(|line| line.to_string().contains(trace)));
    let of_trace = |message: &str| {
        let is_joined = |line: &&Value| {
            line["message"] == message && line["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
        };
        lines.iter().filter(is_joined).count()
    };
    for message in ["request", "enqueued", "job started", "job ended"] {
        assert_eq!(of_trace(message), 1, "{message}: {}", hello.log());
    }
    assert!(lines.iter().any(|line| line["message"] == "enqueued" && line["job"] == id));
    let metrics = hello.admin().get("/metrics").await.text();
    assert!(metrics.contains(r#"perennial_jobs_total{kind="hello.count",outcome="done"} 1"#), "{metrics}");
    assert!(metrics.contains(r#"perennial_queue_depth{queue="default",state="ready"}"#), "{metrics}");
}
