//! External tools read the description of the interface and the metrics: validators, generators of clients, and a
//! tester that sends requests which no client would send.

use serde_json::Value;
use tempfile::TempDir;

use support::process::{Perennial, Setup};
use support::tools::{must_pass, run, tool};

/// Starts a server whose rate limits are out of reach, and writes its description to a file.
async fn described() -> (Perennial, TempDir) {
    let limits = ["address_burst", "site_burst"].map(|limit| format!("push.{limit}=1000000"));
    let setup = limits.iter().fold(Setup::new(), |setup, limit| setup.set(limit));
    let perennial =
        setup.set("push.address_per_minute=100000000").set("push.site_per_minute=100000000").start().await;
    let directory = TempDir::new().unwrap();
    let description = perennial.client().get("/openapi.json").await;
    assert_eq!(description.status, 200);
    std::fs::write(directory.path().join("openapi.json"), description.text()).unwrap();
    (perennial, directory)
}

#[tokio::test]
async fn the_description_is_valid_and_every_operation_has_a_name_of_its_own() {
    let Some(validator) = tool("openapi-spec-validator") else { return };
    let (_perennial, directory) = described().await;
    must_pass(&validator, &["openapi.json"], directory.path()).await;
    let Some(redocly) = tool("redocly") else { return };
    // The description lists no servers: its server is the one that serves it.
    let rules = ["--extends=recommended", "--skip-rule=no-empty-servers"];
    must_pass(&redocly, &[&["lint", "openapi.json"], &rules[..]].concat(), directory.path()).await;
    let text = std::fs::read_to_string(directory.path().join("openapi.json")).unwrap();
    let description: Value = serde_json::from_str(&text).unwrap();
    let mut names = Vec::new();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let place = format!("{method} {path}");
            names.push(operation["operationId"].as_str().unwrap_or_else(|| panic!("{place}")).to_owned());
            for (status, response) in operation["responses"].as_object().unwrap() {
                assert!(
                    response["description"].as_str().is_some_and(|text| !text.is_empty()),
                    "{place} {status}"
                );
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let is_in_path = path.contains(&format!("{{{}}}", parameter["name"].as_str().unwrap()));
                assert_eq!(parameter["in"] == "path", is_in_path, "{place}: {parameter}");
            }
            let is_public = operation["security"].as_array().unwrap().contains(&serde_json::json!({}));
            let of_pages = [("get", "/push/key"), ("post", "/subscriptions"), ("delete", "/subscriptions")];
            assert_eq!(is_public, of_pages.contains(&(method.as_str(), path.as_str())), "{place}");
            for status in ["401", "429", "503"] {
                assert!(operation["responses"][status].is_object(), "{place} {status}");
            }
        }
    }
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count, "{names:?}");
}

#[tokio::test]
async fn clients_are_generated_from_the_description_and_compile() {
    let (Some(python), Some(generator)) = (tool("python"), tool("openapi-python-client")) else { return };
    let (Some(to_typescript), Some(compiler)) = (tool("openapi-typescript"), tool("tsc")) else { return };
    let (_perennial, directory) = described().await;
    let here = directory.path();
    std::fs::write(here.join("config.yml"), "post_hooks: []\n").unwrap();
    let arguments =
        ["generate", "--path", "openapi.json", "--config", "config.yml", "--output-path", "client"];
    must_pass(&generator, &arguments, here).await;
    must_pass(&python, &["-m", "compileall", "-q", "client"], here).await;
    let import = "import sys; sys.path.insert(0, 'client'); from perennial_client.api.default import notify, list_subscriptions";
    must_pass(&python, &["-c", import], here).await;

    must_pass(&to_typescript, &["openapi.json", "--output", "client.ts"], here).await;
    let use_it = "import type { paths } from './client';\n\
        const to: paths['/notify']['post']['requestBody']['content']['application/json']['to'] = { tags: 'news' };\n\
        export default to;\n";
    std::fs::write(here.join("use.ts"), use_it).unwrap();
    must_pass(&compiler, &["--noEmit", "--strict", "--skipLibCheck", "use.ts"], here).await;
}

#[tokio::test]
async fn whatever_is_tried_is_answered_as_described() {
    let Some(tester) = tool("schemathesis") else { return };
    let (perennial, directory) = described().await;
    let key = std::fs::read_to_string(perennial.setup.data_dir().join("api.key")).unwrap();
    let url = format!("{}/openapi.json", perennial.client().base());
    let header = format!("Authorization: Bearer {}", key.trim());
    // The quick version sends the same requests each time.
    let (examples, seed) =
        if support::full() { ("200", fastrand::u32(..).to_string()) } else { ("10", "1".to_owned()) };
    let arguments = [
        "run",
        &url,
        "--header",
        &header,
        "--checks",
        "all",
        "--max-examples",
        examples,
        "--workers",
        "1",
        "--seed",
        &seed,
        // A schema cannot express every rule: a point on the curve, a name that resolves, a time in the future.
        "--exclude-checks",
        "positive_data_acceptance",
    ];
    must_pass(&tester, &arguments, directory.path()).await;
    assert_eq!(perennial.admin().get("/readyz").await.status, 200);
    let metrics = perennial.admin().get("/metrics").await.text();
    assert!(metrics.contains("perennial_http_panics_total 0"), "nothing panicked");
}

#[tokio::test]
async fn metrics_are_as_prometheus_wants_them_and_begin_at_zero() {
    let perennial = Setup::new().start().await;
    let metrics = perennial.admin().get("/metrics").await.text();
    for name in [
        "perennial_http_panics_total 0",
        "perennial_http_requests_shed_total{listener=\"public\"} 0",
        "perennial_http_refused_total{listener=\"public\",reason=\"bad_head\"} 0",
        "perennial_http_connections_cut_total{reason=\"head timeout\"} 0",
        "perennial_http_connections_at_limit{listener=\"public\"} 0",
        "perennial_jobs_total{kind=\"push.deliver\",outcome=\"dead\"} 0",
        "perennial_push_outcomes_total{outcome=\"failed\"} 0",
        "perennial_push_notifications_total 0",
        "perennial_cron_occurrences_total{schedule=\"push.retention\",outcome=\"missed\"} 0",
        "perennial_log_lines_dropped_total 0",
        "perennial_sqlite_lost_total 0",
        "perennial_unreadable_rows_total{what=\"jobs\"} 0",
        "perennial_pool_nested_total{pool=\"sqlite\"} 0",
        "perennial_memory_shedding 0",
        "perennial_push_subscriptions{site=\"default\"} 0",
        "perennial_task_failures_total{task=\"push services\"} 0",
        "perennial_build_info{version=",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_threads",
        "process_start_time_seconds",
    ] {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name} is not in\n{metrics}");
    }
    // Every metric that an alert names exists before its event happens.
    let alerts = include_str!("../../docs/operations.md");
    let named = alerts.split('`').filter(|word| word.starts_with("perennial_"));
    for name in named.map(|word| word.split(['{', ' ']).next().unwrap()) {
        let is_there = metrics.lines().any(|line| line.starts_with(name));
        let of_limits = [
            "perennial_memory_used_bytes",
            "perennial_memory_limit_bytes",
            "perennial_push_guests",
            "perennial_cron_overdue_seconds",
            "perennial_queue_oldest_seconds",
            "perennial_pool_wait_seconds",
        ];
        assert!(is_there || of_limits.contains(&name), "{name} is not there");
    }
    let Some(promtool) = tool("promtool") else { return };
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("metrics"), &metrics).unwrap();
    let check = format!("{} check metrics < metrics", promtool.display());
    let output = run("/bin/sh".as_ref(), &["-c", &check], directory.path()).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
}
