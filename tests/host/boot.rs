//! Boot: the files that it creates, the secrets that it keeps, and the conditions under which it refuses to start.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::pty::openpty;
use nix::sys::signal::Signal;
use perennial::sink::Answer;
use serde_json::Value;

use support::double::Double;
use support::process::Setup;
use support::{eventually, soon};

const SECRETS: [&str; 3] = ["api.key", "admin.token", "vapid.pem"];

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn the_first_boot_makes_private_files_and_the_next_uses_them_again() {
    let mut perennial = Setup::new().start().await;
    let data_dir = perennial.setup.data_dir();
    let read = |name: &str| std::fs::read_to_string(data_dir.join(name)).unwrap();
    let first = SECRETS.map(read);
    assert_eq!(mode(&data_dir), 0o700);
    for file in SECRETS.iter().chain(&["perennial.db", "perennial.db-wal", "perennial.lock"]) {
        assert_eq!(mode(&data_dir.join(file)), 0o600, "{file}");
    }
    for message in ["made the admin token", "made an API key"] {
        perennial.logged(message).await;
    }
    let key = perennial.client().get("/push/key").await.json();
    assert_eq!(perennial.stop().await, Some(0));
    assert!(!data_dir.join("addresses.json").exists(), "nobody listens there any more");

    let perennial = perennial.start_again().await;
    assert_eq!(SECRETS.map(read), first);
    assert_eq!(perennial.client().get("/push/key").await.json(), key);
    assert_eq!(perennial.log().matches("made an API key").count(), 1, "said once");
    let log = perennial.log();
    for secret in &first {
        for line in secret.lines().filter(|line| !line.contains("-----")) {
            assert!(!log.contains(line), "a secret in the log");
        }
    }
}

#[tokio::test]
async fn a_second_process_on_the_same_data_is_refused() {
    let perennial = Setup::new().start().await;
    let second = perennial.setup.run(&["serve"]).await;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1));
    assert!(said.contains("is in use by another process"), "{said}");
    assert!(said.contains(&perennial.pid().to_string()), "it names the process: {said}");
    assert!(perennial.client().get("/push/key").await.status.is_success(), "the first goes on");
}

#[tokio::test]
async fn sigterm_while_booting_ends_it_in_order() {
    let setup = Setup::new();
    let first = setup.start().await;
    let mut first = first;
    assert_eq!(first.stop().await, Some(0));
    // A lock on the store keeps the next boot waiting.
    let store = rusqlite::Connection::open(first.setup.data_dir().join("perennial.db")).unwrap();
    store.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE").unwrap();
    let mut second = first.setup.spawn();
    eventually("the handler is installed", || async {
        let status = std::fs::read_to_string(format!("/proc/{}/status", second.pid())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        (caught >> (Signal::SIGTERM as u32 - 1) & 1 == 1).then_some(())
    })
    .await;
    second.signal(Signal::SIGTERM);
    assert_eq!(second.ended().await.code(), Some(0));
    second.logged("stopped while booting").await;
}

#[tokio::test]
async fn a_lost_vapid_key_is_not_replaced_in_silence() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 1).await;
    perennial.stop().await;
    std::fs::remove_file(perennial.setup.data_dir().join("vapid.pem")).unwrap();
    let again = perennial.setup.run(&["serve"]).await;
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert_eq!(again.status.code(), Some(1));
    assert!(said.contains("vapid.pem is missing") && said.contains("restore"), "{said}");
    assert!(!perennial.setup.data_dir().join("vapid.pem").exists());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let perennial = Setup::new().start().await;
    let taken = perennial.client().base().trim_start_matches("http://").to_owned();
    let second = Setup::new().set(&format!("server.listen={taken}")).run(&["serve"]).await;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1));
    assert!(said.contains(&format!("cannot listen on {taken}")), "{said}");
}

#[tokio::test]
async fn only_a_terminal_is_told_the_token_of_the_page() {
    let perennial = Setup::new().start().await;
    assert!(!perennial.log().contains("#key="), "neither the log nor a pipe");

    let setup = Setup::new();
    let terminal = openpty(None, None).unwrap();
    let mut child =
        setup.command(&["serve"]).stdout(Stdio::from(terminal.slave)).stderr(Stdio::null()).spawn().unwrap();
    let url = soon(
        "the line on the terminal",
        tokio::task::spawn_blocking(move || {
            let mut said = String::new();
            let mut buffer = [0; 1024];
            while !said.contains("#key=") || !said.ends_with('\n') {
                let count = nix::unistd::read(&terminal.master, &mut buffer).unwrap();
                said.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
            said.split_whitespace().find(|word| word.contains("#key=")).unwrap().to_owned()
        }),
    )
    .await
    .unwrap();
    let (base, key) = url.split_once("/#key=").unwrap();
    let page = support::http::Client::new(base).with_key(key);
    assert!(page.get("/").await.text().contains("Subscribe"));
    assert!(page.get("/notifications").await.status.is_success(), "it may read");
    let nothing = page.post("/notify", &serde_json::json!({"to": {"all": true}, "payload": ""})).await;
    assert_eq!(nothing.status, 202, "it may notify");
    assert_eq!(page.delete("/subscriptions/1", None).await.status, 404, "it may subscribe and unsubscribe");
    let answer = page.with_key("pk_other").get("/notifications").await;
    assert_eq!(answer.status, 401);
    child.kill().await.unwrap();
}

#[tokio::test]
async fn probes_metrics_and_pages_for_operators() {
    let perennial = Setup::new().start().await;
    let admin = perennial.admin();
    for probe in ["/livez", "/readyz", "/startupz"] {
        assert_eq!(admin.get(probe).await.status, 200, "{probe}");
    }
    perennial.client().get("/push/key").await;
    perennial.client().get("/no/such/path").await;
    let metrics = admin.get("/metrics").await;
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let metrics = metrics.text();
    for line in [
        r#"perennial_http_requests_total{listener="public",route="/push/key",method="GET",status="200"} 1"#,
        r#"perennial_http_requests_total{listener="public",route="unmatched",method="GET",status="404"} 1"#,
        "# HELP perennial_sqlite_commits_total",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let settings = admin.get("/settings").await.json();
    let listen = settings.as_array().unwrap().iter().find(|shown| shown["key"] == "server.listen").unwrap();
    assert_eq!(
        (&listen["value"], listen["source"].as_str()),
        (&serde_json::json!(["127.0.0.1:0"]), Some("--set"))
    );
    assert_eq!(admin.get("/workers").await.json(), serde_json::json!([]));
    assert!(admin.get("/modules").await.json()["push"]["vapid_keys"]["default"].is_string());

    // A page elsewhere whose own host name points here is refused (DNS rebinding).
    let rebound = admin.with_header("host", "attacker.example");
    assert_eq!(rebound.get("/settings").await.status, 421);
    assert_eq!(rebound.get("/readyz").await.status, 200, "probes say nothing to anybody");
}

#[tokio::test]
async fn an_admin_listener_that_others_can_reach_wants_its_token() {
    let perennial = Setup::new().set("admin.listen=0.0.0.0:0").spawn();
    let mut perennial = perennial;
    let file = perennial.setup.data_dir().join("addresses.json");
    let addresses: Value = eventually("the addresses", || {
        std::future::ready(serde_json::from_str(&std::fs::read_to_string(&file).unwrap_or_default()).ok())
    })
    .await;
    let port = addresses["admin"][0].as_str().unwrap().rsplit(':').next().unwrap().to_owned();
    let admin = support::http::Client::new(&format!("http://127.0.0.1:{port}"));
    let token = std::fs::read_to_string(perennial.setup.data_dir().join("admin.token")).unwrap();
    eventually("boot", || async { admin.get("/startupz").await.status.is_success().then_some(()) }).await;
    assert_eq!(admin.get("/settings").await.status, 401);
    assert_eq!(admin.with_key("pk_wrong").get("/settings").await.status, 401);
    let let_in = eventually("the token is known", || async {
        let answer = admin.with_key(token.trim()).get("/settings").await;
        answer.status.is_success().then_some(answer)
    })
    .await;
    assert!(let_in.json().is_array());
    assert_eq!(admin.get("/metrics").await.status, 200, "metrics are open");
    assert_eq!(perennial.stop().await, Some(0));
}

#[tokio::test]
async fn a_boot_that_fails_has_begun_no_job() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    double.script(|_| Answer::Stall);
    let id = perennial
        .notify(&serde_json::json!({ "to": {"all": true}, "notification": {"title": "Hello"} }))
        .await;
    eventually("it is being sent", || async { (double.asked() == 3).then_some(()) }).await;
    perennial.signal(Signal::SIGKILL);
    perennial.ended().await;
    double.script(|_| Answer::Take);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("server.listen={}", taken.local_addr().unwrap());
    perennial.setup = perennial.setup.set(&listen);
    let failed = perennial.setup.run(&["serve"]).await;
    assert_eq!(failed.status.code(), Some(1), "{}", String::from_utf8_lossy(&failed.stderr));
    assert_eq!(double.asked(), 3);

    perennial.setup = perennial.setup.set("server.listen=127.0.0.1:0");
    let perennial = perennial.start_again().await;
    assert_eq!(perennial.done(&id).await["outcomes"], serde_json::json!({ "delivered": 3 }));
    // The first "job started" line may have been lost with its process.
    eventually("one crash is one recovery", || async {
        let lines = perennial.log_lines();
        let last = lines.iter().rfind(|line| line["message"] == "job started")?;
        (last["recoveries"] == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_pod_near_its_limit_of_memory_sheds_before_it_is_killed() {
    let cgroup = tempfile::TempDir::new().unwrap();
    let write = |file: &str, text: &str| std::fs::write(cgroup.path().join(file), text).unwrap();
    write("cpu.max", "50000 100000\n");
    write("memory.max", "100000000\n");
    // Most of the memory is page cache.
    write("memory.stat", "anon 10000000\nfile 60000000\nshmem 0\n");
    write("memory.current", "95000000\n");
    let perennial = Setup::new().set(&format!("process.cgroup={}", cgroup.path().display())).start().await;
    let status = async || perennial.client().get("/push/key").await.status.as_u16();
    assert_eq!(status().await, 200);
    write("memory.stat", "anon 92000000\nfile 1000000\nshmem 0\n");
    eventually("it sheds", || async { (status().await == 503).then_some(()) }).await;
    assert!(perennial.client().get("/push/key").await.header("retry-after").is_some());
    assert_eq!(perennial.admin().get("/readyz").await.status, 200, "probes are never shed");
    assert!(
        perennial.admin().get("/metrics").await.text().contains("perennial_memory_limit_bytes 100000000")
    );
    write("memory.stat", "anon 92000000\nfile 40000000\nshmem 0\n");
    eventually("it serves again", || async { (status().await == 200).then_some(()) }).await;
}

/// An idle process does hardly any work: 19 wake-ups a second where this was measured.
#[tokio::test]
async fn an_idle_process_is_idle() {
    let perennial = Setup::new().start().await;
    let switches = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", perennial.pid())).unwrap();
        let of = |status: String| {
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_default()
        };
        let status = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.ok()?.path().join("status")).ok()
        };
        tasks.filter_map(status).map(of).sum::<u64>()
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = switches();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let rate = switches().saturating_sub(before) / 5;
    println!("{rate} wake-ups a second");
    assert!(rate < 60, "{rate} wake-ups a second");
}

/// With a hard limit of 1,024 descriptors and more idle clients than that, probes and requests are still answered.
#[tokio::test]
async fn descriptors_that_are_few_are_shared_out() {
    let setup = Setup::new();
    let script = setup.file("few");
    let program = support::process::binary();
    let text = format!("#!/bin/sh\nulimit -n 1024\nexec {} \"$@\"\n", program.display());
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let perennial = setup.program(script).start().await;
    eventually("it says so", || async {
        perennial.log().contains("a setting needs attention").then_some(())
    })
    .await;
    let address = perennial.client().base().trim_start_matches("http://").to_owned();
    let mut idle = Vec::new();
    for _ in 0..1100 {
        if let Ok(Ok(stream)) =
            tokio::time::timeout(Duration::from_secs(1), tokio::net::TcpStream::connect(&address)).await
        {
            idle.push(stream);
        }
    }
    for _ in 0..5 {
        assert_eq!(soon("a probe", perennial.admin().get("/livez")).await.status, 200);
        assert_eq!(soon("a new client", perennial.client().get("/push/key")).await.status, 200);
    }
    drop(idle);
}
