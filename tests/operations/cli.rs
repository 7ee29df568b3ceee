//! The commands of the program.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::{Value, json};

use nix::sys::signal::Signal;
use support::double::Double;
use support::process::{Perennial, Setup};
use support::{eventually, soon};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn notify_sends_and_follows_to_the_end() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    for tags in [json!(["news"]), json!(["news"]), json!([])] {
        let request = json!({ "subscription": double.mint(), "tags": tags });
        perennial.client().post("/subscriptions", &request).await;
    }
    let run = async |arguments: &[&str]| {
        let ended = perennial.setup.run(&[&["notify"], arguments].concat()).await;
        (ended.status.code(), text(&ended.stdout), text(&ended.stderr))
    };
    let (code, out, error) = run(&["--all", "--title", "Hello", "--body", "World"]).await;
    assert_eq!((code, out.contains("delivered 3")), (Some(0), true), "{out}{error}");
    let (code, out, _) =
        run(&["--tags", "news", "--payload", r#"{"a": 1}"#, "--urgency", "low", "--ttl", "60"]).await;
    assert_eq!((code, out.contains("delivered 2")), (Some(0), true), "{out}");
    let (code, out, _) = run(&["--user", "nobody", "--title", "Hello"]).await;
    assert_eq!((code, out.contains("nobody to send to")), (Some(0), true), "{out}");

    let (code, _, error) = run(&["--tags", "news and", "--title", "Hello"]).await;
    assert_eq!((code, error.contains("to.tags: a tag, not, or (")), (Some(1), true), "{error}");
    let (code, _, _) = run(&["--title", "to nobody"]).await;
    assert_eq!(code, Some(2), "whom is it for?");
    let (code, _, error) = run(&["--all", "--title", "x", "--url", "http://127.0.0.1:1"]).await;
    assert_eq!((code, error.contains("cannot reach http://127.0.0.1:1")), (Some(1), true), "{error}");

    let taken = double.taken();
    assert_eq!(taken.len(), 5);
    let shown: Value = serde_json::from_str(&taken[0].text).unwrap();
    assert_eq!((shown["title"].as_str(), shown["body"].as_str()), (Some("Hello"), Some("World")));
    assert_eq!((taken[4].text.as_str(), taken[4].push.ttl), (r#"{"a":1}"#, 60));
}

#[tokio::test]
async fn keys_are_made_before_the_first_boot_and_shown_without_their_secrets() {
    let setup = Setup::new();
    let show = setup.run(&["keys", "show"]).await;
    assert!(text(&show.stdout).contains("none yet"), "{}", text(&show.stdout));
    assert!(!setup.data_dir().exists(), "looking makes nothing");
    let generate = setup.run(&["keys", "generate"]).await;
    assert_eq!(generate.status.code(), Some(0), "{}", text(&generate.stderr));
    let again = setup.run(&["keys", "generate"]).await;
    assert_eq!(generate.stdout, again.stdout, "what is there is kept");
    let said = text(&generate.stdout) + &text(&generate.stderr);
    for secret in ["api.key", "admin.token"] {
        let secret = std::fs::read_to_string(setup.data_dir().join(secret)).unwrap();
        assert!(!said.contains(secret.trim()));
    }
    assert!(said.contains("losing it loses them all"), "{said}");

    let perennial = setup.start().await;
    let key = perennial.client().get("/push/key").await.json()["key"].as_str().unwrap().to_owned();
    assert!(said.contains(&key), "the public one is shown");
    assert_eq!(perennial.client().get("/notifications").await.status, 200, "the API key opens");
    let mut perennial = perennial;
    let while_running = perennial.setup.run(&["keys", "generate"]).await;
    assert_eq!(while_running.status.code(), Some(0), "there is nothing to make");
    std::fs::remove_file(perennial.setup.data_dir().join("api.key")).unwrap();
    let while_running = perennial.setup.run(&["keys", "generate"]).await;
    assert_eq!(while_running.status.code(), Some(1), "{}", text(&while_running.stderr));
    perennial.stop().await;

    // A lost API key is replaced by a new one, but a new VAPID key would orphan every subscription.
    assert_eq!(perennial.setup.run(&["keys", "generate"]).await.status.code(), Some(0));
    let mut perennial = perennial.start_again().await;
    assert_eq!(perennial.client().get("/notifications").await.status, 200, "the new API key opens");
    let double = Double::start().await;
    perennial.stop().await;
    perennial.setup = perennial.setup.sending_to(&double);
    let mut perennial = perennial.start_again().await;
    perennial.subscribe(&double, 1).await;
    perennial.stop().await;
    std::fs::remove_file(perennial.setup.data_dir().join("vapid.pem")).unwrap();
    let lost = perennial.setup.run(&["keys", "generate"]).await;
    assert_eq!(lost.status.code(), Some(1));
    assert!(text(&lost.stderr).contains("restore the file"), "{}", text(&lost.stderr));
}

#[tokio::test]
async fn health_asks_the_running_server() {
    let mut perennial = Setup::new().start().await;
    let health = perennial.setup.run(&["health"]).await;
    assert_eq!((health.status.code(), text(&health.stdout).trim()), (Some(0), "ok"));
    assert_eq!(perennial.setup.run(&["health", "--live"]).await.status.code(), Some(0));
    perennial.stop().await;
    let refused = async |perennial: &Perennial| {
        let health = perennial.setup.run(&["health"]).await;
        assert_eq!(health.status.code(), Some(1));
        assert!(text(&health.stderr).contains("no server runs on"), "{}", text(&health.stderr));
    };
    refused(&perennial).await;
    let mut perennial = perennial.start_again().await;
    perennial.signal(Signal::SIGKILL);
    perennial.ended().await;
    assert!(perennial.setup.data_dir().join("addresses.json").exists(), "left behind, and not believed");
    refused(&perennial).await;
}

#[tokio::test]
async fn the_sink_subscribes_imaginary_browsers_and_prints_what_they_get() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let setup = Setup::new();
    let directory = setup.file("sink");
    let arguments = ["sink", "--listen", "127.0.0.1:0", "--browsers", "127.0.0.1:0", "--subscribers", "2"];
    let arguments = [&arguments[..], &["--directory", directory.to_str().unwrap()]].concat();
    let mut sink = setup.command(&arguments).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(sink.stdout.take().unwrap()).lines();
    let mut line = async || support::soon("a line", lines.next_line()).await.unwrap().unwrap();
    assert!(line().await.starts_with("A push service at https://127.0.0.1:"));
    let setup = setup
        .set("push.allow_insecure=true")
        .set("push.allow_hosts=127.0.0.1")
        .set("push.allow_networks=127.0.0.1")
        .set(&format!("push.extra_ca_file={}", directory.join("ca.pem").display()));
    let perennial = setup.start().await;
    while !line().await.contains("\"subscribed\":\"#2\"") {}
    perennial.notify_and_wait(&json!({ "to": {"tags": "sink"}, "notification": {"title": "Hi"} })).await;
    let mut printed: Vec<Value> = vec![serde_json::from_str(&line().await).unwrap()];
    printed.push(serde_json::from_str(&line().await).unwrap());
    printed.sort_by_key(|line| line["to"].as_str().unwrap().to_owned());
    assert_eq!(printed[0]["to"], "#1");
    assert!(printed[1]["text"].as_str().unwrap().contains("\"title\":\"Hi\""));
}

#[tokio::test]
async fn a_backup_that_is_started_sends_nothing_until_an_operator_says_so() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let later = jiff::Timestamp::now() + Duration::from_secs(1);
    let request = json!({ "to": { "all": true }, "payload": "of both", "at": later.to_string() });
    let id = perennial.notify(&request).await;
    let directory = perennial.setup.file("copy");
    let copied = perennial.setup.run(&["backup", directory.to_str().unwrap()]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert_eq!(perennial.done(&id).await["outcomes"], json!({ "delivered": 3 }));
    assert_eq!(double.taken().len(), 3);

    let drill = Setup::new().sending_to(&double);
    std::fs::rename(&directory, drill.data_dir()).unwrap();
    let drill = drill.start().await;
    eventually("it says so", || async { drill.log().contains("the store is a copy").then_some(()) }).await;
    let ready = drill.admin().get("/readyz").await;
    assert!(ready.status == 200 && ready.text().contains("the store is a copy"), "{}", ready.text());
    // The copy answers requests and accepts jobs.
    let own = drill.notify(&json!({ "to": { "all": true }, "payload": "of the copy" })).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(double.taken().len(), 3, "it sends nothing, although its job has long been due");
    // The copy is still paused after a restart.
    let mut drill = drill;
    assert_eq!(drill.stop().await, Some(0));
    let drill = drill.start_again().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(double.taken().len(), 3);
    let resumed = drill.setup.run(&["resume"]).await;
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(drill.done(&own).await["outcomes"], json!({ "delivered": 3 }));
    assert_eq!(drill.done(&id).await["outcomes"], json!({ "delivered": 3 }), "what it had taken along");
    eventually("it is an original", || async {
        (!drill.admin().get("/readyz").await.text().contains("copy")).then_some(())
    })
    .await;
    let mut drill = drill;
    assert_eq!(drill.stop().await, Some(0));
    let drill = drill.start_again().await;
    drill.notify_and_wait(&json!({ "to": { "all": true }, "payload": "again" })).await;
}

/// Any store can be served paused, if the operator asks for it.
#[tokio::test]
async fn a_process_may_be_started_paused() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 1).await;
    assert_eq!(perennial.stop().await, Some(0));
    let setup = perennial.setup.argument("--paused");
    let perennial = setup.start().await;
    let id = perennial.notify(&json!({ "to": { "all": true }, "payload": "x" })).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(double.taken().is_empty());
    assert!(perennial.admin().get("/readyz").await.text().contains("--paused"));
    assert!(perennial.setup.run(&["resume"]).await.status.success());
    assert_eq!(perennial.done(&id).await["outcomes"], json!({ "delivered": 1 }));
}

/// The lock is on the file of the store, whichever directory and name lead to it.
#[tokio::test]
async fn two_data_directories_do_not_serve_one_store() {
    let first = Setup::new().start().await;
    let file = first.setup.data_dir().join("perennial.db");
    let link = first.setup.file("link.db");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [&file, &link] {
        let mut second = Setup::new().set(&format!("store.url=sqlite:{}", path.display())).spawn();
        assert_eq!(second.ended().await.code(), Some(1), "{}", second.log());
        let log = second.log();
        assert!(log.contains("perennial.db is in use by another process (process"), "{log}");
    }
    assert_eq!(first.client().get("/push/key").await.status, 200);
}

#[tokio::test]
async fn a_backup_is_a_data_directory() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let directory = perennial.setup.file("copy");
    let copied = perennial.setup.run(&["backup", directory.to_str().unwrap()]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    let said = String::from_utf8_lossy(&copied.stdout).into_owned();
    assert!(["perennial.db", "vapid.pem", "api.key"].iter().all(|file| said.contains(file)), "{said}");
    for file in ["perennial.db", "vapid.pem", "api.key"] {
        let mode = std::fs::metadata(directory.join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} is nobody else's");
    }
    let again = perennial.setup.run(&["backup", directory.to_str().unwrap()]).await;
    let error = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && error.contains("wanted a new directory"), "{error}");

    // A failed backup leaves nothing behind that would hinder the next one.
    let token = perennial.setup.data_dir().join("admin.token");
    let (broken, mended) = (perennial.setup.file("broken"), perennial.setup.file("token"));
    std::fs::rename(&token, &mended).unwrap();
    std::fs::create_dir(&token).unwrap();
    let failed = perennial.setup.run(&["backup", broken.to_str().unwrap()]).await;
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(!failed.status.success() && error.contains("admin.token cannot be read"), "{error}");
    let left = std::fs::read_dir(broken.parent().unwrap()).unwrap();
    let left: Vec<_> = left.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|file| file.starts_with("broken")), "{left:?}");
    std::fs::remove_dir(&token).unwrap();
    std::fs::rename(&mended, &token).unwrap();

    // The running server does the same for clients that have the admin token.
    let token = std::fs::read_to_string(perennial.setup.data_dir().join("admin.token")).unwrap();
    let admin = perennial.admin().with_key(token.trim());
    let other = perennial.setup.file("other");
    let answer = admin.post("/backup", &json!({ "directory": other })).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["files"].as_array().unwrap().len(), 4, "{}", answer.text());
    assert_eq!(admin.post("/backup", &json!({ "directory": "here" })).await.fields(), ["directory"]);
    assert_eq!(perennial.admin().post("/backup", &json!({ "directory": other })).await.status, 401);

    let key = perennial.client().get("/push/key").await.text();
    perennial.stop().await;
    let restored = Setup::new().sending_to(&double);
    std::fs::rename(&directory, restored.data_dir()).unwrap();
    let restored = restored.start().await;
    assert_eq!(restored.client().get("/push/key").await.text(), key);
    let resumed = restored.setup.run(&["resume"]).await;
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    let progress = restored.notify_and_wait(&json!({ "to": { "all": true }, "payload": "hello" })).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 3 }));
}

#[tokio::test]
async fn migrating_is_what_a_boot_does_first() {
    let setup = Setup::new();
    for _ in 0..2 {
        let migrated = setup.run(&["migrate"]).await;
        let said = String::from_utf8_lossy(&migrated.stdout).into_owned();
        assert!(migrated.status.success() && said.contains("up to date"), "{said}");
    }
    let store = rusqlite::Connection::open(setup.data_dir().join("perennial.db")).unwrap();
    let sql = "SELECT count(*) FROM migrations WHERE module IN ('push', 'jobs')";
    let steps: i64 = store.query_row(sql, [], |row| row.get(0)).unwrap();
    assert!(steps >= 2, "{steps}");
    drop(store);
    let perennial = setup.start().await;
    let refused = perennial.setup.run(&["migrate"]).await;
    assert!(!refused.status.success(), "one process at a time has the embedded store");
}

#[tokio::test]
async fn top_shows_what_goes_on() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let slow = json!({ "to": { "all": true }, "payload": "x", "rate": 0.1 });
    let id = perennial.notify(&slow).await;
    let shown = eventually("the notification is shown", || async {
        let output = perennial.setup.run(&["top", "--once"]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let shown = String::from_utf8(output.stdout).unwrap();
        shown.contains("sending").then_some(shown)
    })
    .await;
    for part in [&id, ": ok\n", "REQUESTS  0 running", "sqlite", "api_keys", "push-paced", "push.deliver"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let nobody = Setup::new().run(&["top", "--once"]).await;
    assert_eq!(nobody.status.code(), Some(1));
}

/// With `--json` every command prints lines of JSON, also when it fails; without it, messages use the
/// words of the interface.
#[tokio::test]
async fn commands_answer_in_one_family() {
    let perennial = Setup::new().start().await;
    let run = async |arguments: &[&str]| {
        let output = perennial.setup.run(arguments).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let backup = perennial.setup.file("copy");
    for arguments in [
        &["keys", "show"][..],
        &["keys", "generate"],
        &["keys", "rotate"],
        &["keys", "add", "one"],
        &["keys", "revoke", "one"],
        &["keys", "list"],
        &["jobs", "queues"],
        &["jobs", "list"],
        &["jobs", "pause", "push"],
        &["jobs", "resume", "push"],
        &["cron", "pause", "jobs.retention"],
        &["cron", "resume", "jobs.retention"],
        &["resume"],
        &["backup", backup.to_str().unwrap()],
    ] {
        let (code, out, error) = run(&[arguments, &["--json"]].concat()).await;
        assert_eq!(code, Some(0), "{arguments:?}: {error}");
        assert!(arguments == ["jobs", "list"] || !out.is_empty(), "{arguments:?}");
        for line in out.lines() {
            assert!(
                serde_json::from_str::<Value>(line).is_ok_and(|line| line.is_object()),
                "{arguments:?}: {out}"
            );
        }
    }
    let id = "01890a5d-ac96-774b-bcce-b302099a8057";
    for (arguments, said) in [
        (&["jobs", "resume", "nope"][..], "one of "),
        (&["jobs", "retry", id], "none of these jobs has ended"),
        (&["jobs", "show", "nope"], "wanted the id of a job"),
        (&["jobs", "list", "--limit", "x"], "wanted a whole number"),
        (&["jobs", "retry"], "perennial jobs retry"),
        (&["notify", "--all", "--title", "x", "--ttl", "soon"], "wanted seconds"),
        (&["notify", "--all", "--title", "x", "--at", "2020-01-01"], "is past"),
        (&["sink", "--listen", "localhost:8443"], "wanted an IP address and a port"),
    ] {
        let (code, _, error) = run(arguments).await;
        assert!(code != Some(0) && error.contains(said), "{arguments:?}: {error}");
    }
    let (code, _, error) = run(&["jobs", "show", id, "--json"]).await;
    let error: Value = serde_json::from_str(&error).unwrap_or_else(|_| panic!("{error}"));
    assert!(code == Some(1) && error["error"].is_string(), "{error}");
}

/// A key is shown once, so no key is created where the output is discarded.
#[tokio::test]
async fn no_key_is_made_that_nobody_could_see() {
    let perennial = Setup::new().start().await;
    let mut add = perennial.setup.command(&["keys", "add", "lost"]);
    let refused =
        add.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let refused = soon("it ends", refused.wait_with_output()).await.unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("leads nowhere"));
    let list = perennial.setup.run(&["keys", "list", "--json"]).await;
    assert!(!String::from_utf8_lossy(&list.stdout).contains("lost"));
}

/// A password in a mistyped setting is not repeated, wherever the mistake is.
#[tokio::test]
async fn mistyped_settings_do_not_repeat_what_may_be_secret() {
    let setup = Setup::new();
    let file = setup.file("settings.toml");
    for text in [
        "[store]\nurl = \"postgres://u:s3cret@h/db\n",
        "[store]\nurl = postgres://u:s3cret@h/db\n",
        "[queue]\nurl = \"redis://:s3cret@h\" x\n",
        "\"postgres://u:s3cret@h/db\" = 1\n",
        "[access]\nkeys = [{ name = 'b', key = 's3cret' }]\n",
    ] {
        std::fs::write(&file, text).unwrap();
        let output = setup.run(&["check", "--config", file.to_str().unwrap()]).await;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(2), "{text}: {said}");
        assert!(!said.contains("s3cret"), "{text}: {said}");
    }
    for arguments in [
        &["check", "--set", "postgres://u:s3cret@h/db"][..],
        &["check", "--set", "store.url:postgres://u:s3cret@h/db"],
        &["check", "store.url=postgres://u:s3cret@h/db"],
        &["serve", "--set", "store.url=postgres://127.0.0.1:s3cret/x"],
        &["serve", "--set", "queue.url=redis://127.0.0.1:s3cret/0"],
    ] {
        let output = setup.run(arguments).await;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(!output.status.success() && !said.contains("s3cret"), "{arguments:?}: {said}");
    }
}
