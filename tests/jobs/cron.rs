//! Schedules in the whole program: from settings, across replicas, restarts and stops, and under operators' control.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use support::double::Double;
use support::postgres::{self, Database};
use support::process::{Perennial, Setup};
use support::redis::{self, Prefix};
use support::schedules::{ended, runs, second};
use support::stores::{on_postgres, with_redis};
use support::{eventually, eventually_within, full};

/// The tests run with the tick and without it, since no promise may depend on it.
const TICKS: [bool; 2] = [true, false];

/// A schedule for every second, none of which may be skipped.
const EVERY_SECOND: &str = "{ name = 'second', expression = '* * * * * *', job = 'jobs.retention',
                              misfire = 'catch_up', catch_up = 500, catch_up_within = '1h' }";

fn with(setup: Setup, schedules: &str, ticks: bool) -> Setup {
    let schedules = schedules.split_whitespace().collect::<Vec<_>>().join(" ");
    setup.set(&format!("cron.schedules=[{schedules}]")).set(&format!("cron.tick={ticks}"))
}

async fn of_schedule(perennial: &Perennial, name: &str) -> Value {
    let all = perennial.admin().get("/schedules").await.json();
    all.as_array().unwrap().iter().find(|one| one["name"] == name).unwrap().clone()
}

/// Runs three replicas and kills and restarts a random one again and again.
async fn each_second_is_claimed_once(redis: bool, ticks: bool) {
    let (database, prefix) = (Database::new().await, Prefix::new().await);
    let make = async || {
        let setup = Setup::new().set("queue.lease=1500ms").set("queue.renew_every=500ms");
        let setup = on_postgres(with(setup, EVERY_SECOND, ticks), database.url()).await;
        if redis { with_redis(setup, &prefix).start().await } else { setup.start().await }
    };
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(make().await);
    }
    let long = Duration::from_secs(if full() { 300 } else { 20 });
    let (began, mut kills) = (Instant::now(), 0);
    let mut seen = BTreeSet::new();
    while began.elapsed() < long {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(500..3000))).await;
        let index = fastrand::usize(0..replicas.len());
        let killed = replicas.remove(index);
        replicas.push(killed.kill_and_start_again().await);
        kills += 1;
        seen.extend(runs(&replicas[0], "second").await.iter().map(second));
    }
    // The other replicas run the jobs of a killed one.
    let newest = eventually("all have ended", || async {
        let runs = runs(&replicas[0], "second").await;
        runs.iter().skip(2).all(|run| run["outcome"] == "done").then_some(runs)
    })
    .await;
    seen.extend(newest.iter().map(second));
    let (first, last) = (*seen.first().unwrap(), *seen.last().unwrap());
    let lost: Vec<i64> = (first..=last).filter(|second| !seen.contains(second)).collect();
    assert_eq!(lost, [] as [i64; 0], "of {} seconds, with {kills} kills", last - first + 1);
    let logs: Vec<String> = replicas.iter().map(Perennial::log).collect();
    let mut done = ended(&logs, "second");
    done.sort();
    let all = done.len();
    done.dedup();
    // A job that ended just before its worker was killed may run again, but each occurrence is claimed once.
    assert!(all - done.len() <= kills, "{all} runs of {} times, with {kills} kills", done.len());
    println!(
        "{} seconds, each claimed once; {kills} kills, {} jobs done again",
        seen.len(),
        all - done.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_on_postgres_claim_each_second_once() {
    each_second_is_claimed_once(false, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_on_redis_claim_each_second_once_without_the_tick() {
    each_second_is_claimed_once(true, false).await;
}

#[tokio::test]
async fn a_process_that_was_stopped_for_a_while_goes_on_by_the_policy() {
    let schedules =
        "{ name = 'all', expression = '* * * * * *', job = 'jobs.retention', misfire = 'catch_up',
                       catch_up = 500 },
                     { name = 'one', expression = '* * * * * *', job = 'jobs.retention' }";
    for ticks in TICKS {
        let perennial = with(Setup::new(), schedules, ticks).start().await;
        eventually("both run", || async {
            (!runs(&perennial, "all").await.is_empty() && !runs(&perennial, "one").await.is_empty())
                .then_some(())
        })
        .await;
        let stop = Duration::from_secs(if full() { 60 } else { 4 });
        perennial.signal(Signal::SIGSTOP);
        let stopped_at = Timestamp::now().as_second();
        tokio::time::sleep(stop).await;
        perennial.signal(Signal::SIGCONT);
        let went_on_at = Timestamp::now().as_second();
        eventually("it has caught up", || async {
            runs(&perennial, "all").await.first().is_some_and(|run| second(run) > went_on_at).then_some(())
        })
        .await;
        let all: Vec<i64> = runs(&perennial, "all").await.iter().rev().map(second).collect();
        assert!(all.windows(2).all(|two| two[1] == two[0] + 1), "none lost, none doubled: {all:?}");
        let meanwhile = |run: &Value| (stopped_at + 1..went_on_at).contains(&second(run));
        let one = runs(&perennial, "one").await;
        assert!(one.iter().filter(|run| meanwhile(run)).count() <= 1, "{one:?}");
        let passed: u64 = one.iter().map(|run| run["passed"].as_u64().unwrap()).sum();
        assert!(passed + 2 >= stop.as_secs() - 1, "what one stands for is counted: {passed}");
        let mut times: Vec<i64> = one.iter().map(second).collect();
        let counted = times.len();
        times.dedup();
        assert_eq!(times.len(), counted);
        let metrics = perennial.admin().get("/metrics").await.text();
        let line = |start: &str| metrics.lines().find(|line| line.starts_with(start)).map(str::to_owned);
        let lag = line("perennial_cron_lag_seconds_sum{schedule=\"one\"}").unwrap();
        let lag: f64 = lag.split_whitespace().last().unwrap().parse().unwrap();
        assert!(lag > 0.0, "{metrics}");
        assert!(
            line("perennial_cron_occurrences_total{schedule=\"one\",outcome=\"passed\"}").is_some(),
            "{metrics}"
        );
        assert!(line("perennial_cron_overdue_seconds{schedule=\"one\"}").is_some());
    }
}

#[tokio::test]
async fn a_store_that_was_away_loses_nothing_beyond_the_policy() {
    for ticks in TICKS {
        let (mut postgres, mut redis) = (postgres::Server::start(&[]).await, redis::Server::durable().await);
        let url = postgres.create().await;
        let on_both = on_postgres(with(Setup::new(), EVERY_SECOND, ticks), &url).await;
        let on_one = on_postgres(with(Setup::new(), EVERY_SECOND, ticks), &postgres.create().await).await;
        let on_redis = on_both.set(&format!("queue.url={}", redis.url())).start().await;
        let on_postgres = on_one.start().await;
        for perennial in [&on_redis, &on_postgres] {
            eventually("it runs", || async { (runs(perennial, "second").await.len() > 1).then_some(()) })
                .await;
        }
        let away = Duration::from_secs(if full() { 60 } else { 3 });
        postgres.signal_all(Signal::SIGSTOP);
        redis.signal(Signal::SIGSTOP);
        tokio::time::sleep(away).await;
        redis.signal(Signal::SIGCONT);
        postgres.signal_all(Signal::SIGCONT);
        postgres.restart().await;
        redis.restart().await;
        let back = Timestamp::now().as_second();
        for perennial in [&on_redis, &on_postgres] {
            eventually_within(3 * support::SOON, "it has caught up", || async {
                let newest = perennial.admin().get("/schedules/second/runs?limit=100").await;
                let newest = (newest.status == 200).then(|| newest.json())?;
                (second(newest.as_array()?.first()?) > back).then_some(())
            })
            .await;
            let all: Vec<i64> = runs(perennial, "second").await.iter().rev().map(second).collect();
            assert!(all.windows(2).all(|two| two[1] == two[0] + 1), "none lost, none doubled: {all:?}");
        }
    }
}

#[tokio::test]
async fn operators_see_schedules_and_act_on_them() {
    let schedules =
        "{ name = 'nightly', expression = '30 2 * * *', zone = 'Asia/Kolkata', job = 'jobs.retention',
                       overlap = 'skip', jitter = '10s' },
                     { name = 'push.expired', expression = '@daily', zone = 'Europe/Berlin', paused = true }";
    let perennial = with(Setup::new(), schedules, true).start().await;
    let run = async |arguments: &[&str]| {
        let output = perennial.setup.run(arguments).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (_, list, _) = run(&["cron", "list"]).await;
    let line = |name: &str| {
        list.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{list}")).to_owned()
    };
    assert!(line("nightly").contains("30 2 * * *") && line("nightly").contains("Asia/Kolkata"), "{list}");
    assert!(line("nightly").contains("02:30:0") && line("nightly").contains("+05:30  20"), "{list}");
    assert!(line("push.expired").contains("@daily") && line("push.expired").contains("paused"), "{list}");
    for hosted in ["jobs.retention", "push.retention", "store.optimize"] {
        assert!(line(hosted).contains("UTC"), "{list}");
    }

    let (code, id, _) = run(&["cron", "run", "nightly"]).await;
    assert_eq!(code, Some(0));
    eventually("it has run", || async {
        (runs(&perennial, "nightly").await[0]["outcome"] == "done").then_some(())
    })
    .await;
    let (_, history, _) = run(&["cron", "history", "nightly"]).await;
    assert!(
        history.contains("manual") && history.contains("done") && history.contains(id.trim()),
        "{history}"
    );
    let (_, history, _) = run(&["cron", "history", "nightly", "--json"]).await;
    let first: Value = serde_json::from_str(history.lines().next().unwrap()).unwrap();
    assert_eq!((&first["cause"], &first["job"]), (&json!("manual"), &json!(id.trim())));

    assert_eq!(run(&["cron", "pause", "nightly"]).await.0, Some(0));
    assert_eq!(of_schedule(&perennial, "nightly").await["paused"], true);
    assert_eq!(run(&["cron", "resume", "nightly"]).await.0, Some(0));
    assert_eq!(of_schedule(&perennial, "nightly").await["paused"], false);
    for arguments in
        [["cron", "run", "nothing"], ["cron", "pause", "nothing"], ["cron", "history", "nothing"]]
    {
        let (code, _, error) = run(&arguments).await;
        assert!(code == Some(1) && error.contains("there is no such schedule"), "{error}");
    }

    // Without the token, no request may change anything.
    assert_eq!(perennial.admin().post("/schedules/nightly/run", &json!({})).await.status, 401);
    assert_eq!(perennial.admin().get("/schedules").await.status, 200, "on loopback, anybody may look");

    // The same commands work without a server.
    let mut perennial = perennial;
    assert_eq!(perennial.stop().await, Some(0));
    let output = perennial.setup.run(&["cron", "run", "nightly"]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let refused = perennial.setup.run(&["cron", "run", "nightly"]).await;
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains(&id), "{error}");
    let perennial = perennial.start_again().await;
    eventually("the next process runs it", || async {
        let runs = runs(&perennial, "nightly").await;
        (runs[0]["job"] == id.as_str() && runs[0]["outcome"] == "done").then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_a_schedule_is_refused_at_boot_by_name() {
    for (schedules, status, parts) in [
        (
            "{ name = 'a', expression = '61 * * * *', job = 'jobs.retention' },
             { name = 'b', expression = '* * * * *', zone = 'Nowhere', job = 'jobs.retention' }",
            2,
            vec![
                "cron.schedules[0].expression = \"61 * * * *\"",
                "the minute 61 cannot be read",
                "cron.schedules[1].zone = \"Nowhere\"",
            ],
        ),
        (
            "{ name = 'a', expression = '* * * * *', job = 'no.such' },
             { name = 'b', expression = '* * * * *', job = 'jobs.retention', payload = { a = 1 } },
             { name = 'push.expire', paused = true }",
            1,
            vec![
                "cron.schedules[0].job, of \"a\": wanted one of jobs.retention, ",
                "there is no no.such",
                "cron.schedules[1].payload, of \"b\": wanted",
                "no fields; there is no a",
                "cron.schedules[2].name, of \"push.expire\": wanted one of jobs.retention, store.optimize, ",
                "or an expression and a job beside it",
            ],
        ),
    ] {
        let mut refused = with(Setup::new(), schedules, true).spawn();
        assert_eq!(refused.ended().await.code(), Some(status), "{}", refused.log());
        for part in parts {
            let log = refused.log().replace("\\\"", "\"");
            assert!(log.contains(part), "{part}: {log}");
        }
    }
    let never = "{ name = 'never', expression = '0 0 30 2 *', job = 'jobs.retention' }";
    let perennial = with(Setup::new(), never, true).start().await;
    assert_eq!(perennial.logged("this schedule is never due").await["schedule"], "never");
    let never = of_schedule(&perennial, "never").await;
    assert_eq!((&never["next"], &never["state"]), (&Value::Null, &json!("never")));
}

#[tokio::test]
async fn what_is_over_is_forgotten_by_the_hosted_schedules() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).set("push.retention=24h").start().await;
    let mut bound = double.mint();
    bound["expirationTime"] = json!(Timestamp::now().as_millisecond() as f64 - 1000.5);
    let mut later = double.mint();
    later["expirationTime"] = json!(Timestamp::now().as_millisecond() + 3_600_000);
    for subscription in [bound, later, double.mint()] {
        let answer =
            perennial.client().post("/subscriptions", &json!({ "subscription": subscription })).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
    }
    let id = perennial.notify(&json!({ "to": { "all": true }, "payload": "hello" })).await;
    perennial.done(&id).await;
    let store = rusqlite::Connection::open(perennial.setup.data_dir().join("perennial.db")).unwrap();
    store.busy_timeout(Duration::from_secs(5)).unwrap();
    store.execute("UPDATE notifications SET ended_at = ended_at - 90000000", []).unwrap();
    for name in ["push.expired", "push.retention", "jobs.retention", "store.optimize"] {
        let ran = perennial.setup.run(&["cron", "run", name]).await;
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        eventually(name, || async { (runs(&perennial, name).await[0]["outcome"] == "done").then_some(()) })
            .await;
    }
    let left = perennial.client().get("/subscriptions").await.json();
    assert_eq!(left["subscriptions"].as_array().unwrap().len(), 2, "{left}");
    assert_eq!(perennial.client().get(&format!("/notifications/{id}")).await.status, 404);
}

#[tokio::test]
async fn no_time_is_claimed_from_the_moment_of_the_signal() {
    for ticks in TICKS {
        let mut perennial = with(Setup::new().set("drain.notice=2s"), EVERY_SECOND, ticks).start().await;
        eventually("it runs", || async { (!runs(&perennial, "second").await.is_empty()).then_some(()) })
            .await;
        perennial.signal(Signal::SIGTERM);
        let signal = Timestamp::now();
        assert_eq!(perennial.ended().await.code(), Some(0));
        let output = perennial.setup.run(&["cron", "history", "second", "--json", "--limit", "1"]).await;
        let newest: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(second(&newest) <= signal.as_second(), "{newest}");
        assert_eq!(newest["outcome"], "done", "what ran could finish");
    }
}
