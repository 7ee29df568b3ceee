//! Plans that Postgres chooses for each query about subscriptions when there are very many: those of the statements
//! that the program really sends, from the log of the server.
//!
//! `tests/bench/run plans` fills a server of its own with 10,000,000 subscriptions (`PLAN_ROWS` sets another
//! number) and sends requests to the interface. For each statement it prints the nodes that read tables, the number
//! of blocks of 8 KiB that the whole plan looked at, and the time. One statement costs more with more
//! subscriptions: the count of all of them.

#![allow(clippy::unwrap_used, reason = "a bench that fails should stop")]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::double::Double;
use support::postgres::{Server, client};
use support::process::Setup;

/// One subscription in this many has the tag `rare` and is sent to.
const RARE: u64 = 10_000;

fn main() {
    // The figures are printed only by `cargo bench`.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let rows = std::env::var("PLAN_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(10_000_000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(plans(rows));
}

async fn plans(rows: u64) {
    let server = Server::start(&[
        "fsync=off",
        "shared_buffers=1GB",
        "maintenance_work_mem=1GB",
        "max_wal_size=1GB",
        "wal_level=minimal",
        "max_wal_senders=0",
        "logging_collector=on",
        "log_directory=log",
        "log_filename=log",
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "auto_explain.log_analyze=on",
        "auto_explain.log_buffers=on",
        "auto_explain.log_timing=off",
    ])
    .await;
    let (double, url) = (Double::start().await, server.create().await);
    let setup =
        Setup::new().sending_to(&double).set(&format!("store.url={url}")).set("store.statement_timeout=10m");
    assert!(setup.run(&["keys", "generate"]).await.status.success());
    let perennial = setup.start().await;
    let began = Instant::now();
    fill(&url, &double, rows).await;
    println!("{rows} subscriptions, filled in {:.0} s", began.elapsed().as_secs_f64());
    let last = rows - rows / 10;
    let asked = [
        ("a page of all, near the end", format!("/subscriptions?cursor={last}&limit=100")),
        ("a page of a tag, near the end", format!("/subscriptions?tag=rare&cursor={last}&limit=100")),
        (
            "a page of a tag that half have, near the end",
            format!("/subscriptions?tag=news&cursor={last}&limit=100"),
        ),
        ("those of a user", "/subscriptions?user=u5000".to_owned()),
    ];
    for (what, path) in asked {
        let mark = server.log().len();
        let answer = perennial.client().get(&path).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        show(what, &server, mark, "FROM subscription").await;
    }
    for (what, to) in [
        ("how many there are", json!({ "all": true })),
        ("how many have a rare tag", json!({ "tags": "rare" })),
        ("how many have a rare tag and not another", json!({ "tags": "rare and not news" })),
        ("how many a user has", json!({ "user": "u5000" })),
    ] {
        let mark = server.log().len();
        let request = json!({ "to": to, "payload": "x", "dry_run": true });
        let answer = perennial.client().post("/notify", &request).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        show(what, &server, mark, "SELECT count(*) FROM subscription").await;
    }
    let mark = server.log().len();
    let id = perennial.notify(&json!({ "to": { "tags": "rare" }, "payload": "x" })).await;
    let done: Value = perennial.done_within(&id, Duration::from_secs(600)).await;
    println!("sent to a rare tag: {}", done["outcomes"]);
    show("the members of a batch", &server, mark, "p256dh").await;
    let mark = server.log().len();
    let slowly = json!({ "to": { "tags": "news" }, "payload": "x", "rate": 100 });
    let id = perennial.notify(&slowly).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    perennial.client().post(&format!("/notifications/{id}/cancel"), &json!({})).await;
    show("where a batch of half of them ends", &server, mark, "SELECT max(id)").await;
    show("its members", &server, mark, "p256dh").await;
}

/// Stores `rows` subscriptions: half with the tag `news`, and one in [`RARE`] with `rare`.
async fn fill(url: &str, double: &Double, rows: u64) {
    let subscription = double.mint();
    let endpoint = subscription["endpoint"].as_str().unwrap();
    let key = |name: &str| {
        let text = subscription["keys"][name].as_str().unwrap().replace('-', "+").replace('_', "/");
        format!("decode('{text}{}', 'base64')", "=".repeat((4 - text.len() % 4) % 4))
    };
    let (p256dh, auth) = (key("p256dh"), key("auth"));
    for sql in [
        format!(
            "INSERT INTO subscriptions (site, vapid_key, endpoint, endpoint_hash, p256dh, auth, \"user\", created_at, updated_at)
             SELECT 1, (SELECT min(id) FROM vapid_keys), '{endpoint}', decode(md5(n::text), 'hex'), {p256dh}, {auth},
                    'u' || n / 2, 0, 0 FROM generate_series(1, {rows}) AS n"
        ),
        "INSERT INTO subscription_tags SELECT 1, 'news', id FROM subscriptions WHERE id % 2 = 0".to_owned(),
        format!("INSERT INTO subscription_tags SELECT 1, 'rare', id FROM subscriptions WHERE id % {RARE} = 0"),
        "VACUUM ANALYZE subscriptions".to_owned(),
        "VACUUM ANALYZE subscription_tags".to_owned(),
    ] {
        let mut psql = client("psql");
        let output = psql.arg(url).args(["-q", "-v", "ON_ERROR_STOP=1", "-c", &sql]).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Prints the plan of a statement with these words that the server has logged since `mark`.
async fn show(what: &str, server: &Server, mark: usize, words: &str) {
    // Another process writes the log.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let log = server.log();
    let plans =
        log[mark..].split("duration: ").filter(|entry| entry.contains("plan:") && entry.contains(words));
    // Several plans may differ only in their numbers; one of them is shown.
    let Some(plan) = plans.max_by_key(|plan| plan.len()) else {
        return println!("{what}: no plan is in the log");
    };
    let took = plan.split_whitespace().next().unwrap_or_default();
    let blocks: u64 = plan
        .lines()
        .find(|line| line.trim_start().starts_with("Buffers:"))
        .map(|line| line.split(['=', ' ']).filter_map(|word| word.parse::<u64>().ok()).sum())
        .unwrap_or_default();
    println!("{what:<46} {took:>10} ms {blocks:>9} blocks");
    for line in plan.lines().map(str::trim) {
        let node = line.trim_start_matches("->").trim();
        if node.contains("Scan") && node.contains("rows=") {
            let actual = node.split("(actual").nth(1).unwrap_or_default().trim_end_matches(')');
            println!("    {}  {}", node.split("  (").next().unwrap_or_default(), actual.trim());
        }
    }
}
