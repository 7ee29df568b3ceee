//! Every snippet of README.md and of docs/ works as described: shell in a fresh directory, JavaScript in a real
//! browser, SQL with the libraries of other programs, TOML as settings.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::task::JoinSet;

use support::double::Double;
use support::firefox::{self, Firefox};
use support::process::{Perennial, Setup, binary};
use support::redis::Prefix;
use support::{eventually, soon};

const FIRST_NOTIFICATION: &str = include_str!("../../docs/first-notification.md");
const YOUR_OWN_SITE: &str = include_str!("../../docs/your-own-site.md");
const JOBS: &str = include_str!("../../docs/jobs.md");
const MOVING_IN: &str = include_str!("../../docs/moving-in.md");

/// Name and text of README.md and of every page under docs/.
fn pages() -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("README.md")];
    let mut directories = vec![root.join("docs")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    let page = |path: PathBuf| {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        (name, std::fs::read_to_string(path).unwrap())
    };
    files.into_iter().map(page).collect()
}

/// Languages and texts of the snippets of a page.
fn snippets(page: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open: Option<(String, String)> = None;
    for line in page.lines() {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => found.extend(open.take()),
            (Some(language), None) => open = Some((language.to_owned(), String::new())),
            (None, Some((_, text))) => text.push_str(&format!("{}\n", line.trim_start())),
            (None, None) => {}
        }
    }
    found
}

/// The only snippet of a page in this language that contains `part`.
fn snippet(page: &str, language: &str, part: &str) -> String {
    let mut fitting = snippets(page).into_iter().filter(|(of, text)| of == language && text.contains(part));
    let (_, text) = fitting.next().unwrap_or_else(|| panic!("no {language} has {part}"));
    assert!(fitting.next().is_none(), "one {language} has {part}");
    text
}

/// Runs a snippet as a reader types it: in this directory, with the program on the path.
async fn shell(directory: &Path, text: &str) -> Output {
    let bin = directory.join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    if !bin.join("perennial").exists() {
        std::os::unix::fs::symlink(binary(), bin.join("perennial")).unwrap();
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", text])
        .current_dir(directory)
        .env("PATH", path)
        .kill_on_drop(true);
    command.env("PERENNIAL_PUSH__RESOLVE", crate::moving::SERVICES);
    soon("the snippet ends", command.output()).await.unwrap()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn every_snippet_is_one_that_is_tried() {
    let known = [
        // This test is itself part of such a run.
        "cargo run --release",
        "cargo install --path app",
        // Tried by the tests of projects.
        "perennial new guestbook",
        // They need a network and a cluster. The tests of Kubernetes read the manifests.
        "docker build -t guestbook",
        "kubectl apply -f k8s/guestbook.yaml",
        // Tried by the tests in this file.
        "curl -i http://127.0.0.1:8080/notify",
        "const server = \"https://push.example.com\"",
        "self.addEventListener(\"push\"",
        "hash_hmac('sha256'",
        "user: null",
        "curl -i https://push.example.com/notify",
        "perennial serve --dev",
        "INSERT INTO jobs",
        "redis-cli XADD",
        "perennial keys import private_key.pem",
        "perennial subscriptions import --from",
        "grep VAPID_ .env",
        "npx web-push generate-vapid-keys --json",
        "gunzip users.csv.gz",
        "{\"endpoint\": \"https://..\"",
        // Tried by the tests of the stores and of adoption.
        "perennial keys generate --set store.url",
        // A drawing, which cannot be tried.
        "the usual parts",
    ];
    let mut unused = known.to_vec();
    for (page, text) in pages() {
        for (language, text) in snippets(&text) {
            unused.retain(|part| !text.contains(part));
            // All TOML is checked below. rustdoc compiles the Rust. The tests of projects apply the diffs.
            let is_rust = language.starts_with("rust") && !language.contains("ignore");
            let is_tried = is_rust || ["toml", "diff"].contains(&language.as_str());
            let is_known = is_tried || known.iter().any(|part| text.contains(part));
            assert!(is_known, "{page}: nothing tries this {language}:\n{text}");
        }
    }
    assert!(unused.is_empty(), "no page has a snippet with {unused:?}");
}

#[test]
fn every_page_is_a_chapter_of_the_book() {
    let pages = pages();
    let (_, summary) = pages.iter().find(|(name, _)| name == "docs/SUMMARY.md").unwrap();
    for (name, _) in pages.iter().filter(|(name, _)| name != "docs/SUMMARY.md") {
        let path = name.strip_prefix("docs/").map_or_else(|| format!("../{name}"), str::to_owned);
        assert!(summary.contains(&format!("]({path})")), "{name} is not in docs/SUMMARY.md");
    }
}

#[test]
fn every_link_leads_to_a_file() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    for (page, text) in pages() {
        let directory = root.join(&page).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            let path = link.split('#').next().unwrap();
            let is_here = !path.is_empty() && !path.contains(':');
            assert!(!is_here || directory.join(path).exists(), "{page}: {link}");
        }
    }
}

#[tokio::test]
async fn every_toml_is_accepted_as_settings() {
    let mut tried = 0;
    for (page, text) in pages() {
        for (_, toml) in snippets(&text).into_iter().filter(|(language, _)| language == "toml") {
            let setup = Setup::new();
            let file = setup.file("perennial.toml");
            std::fs::write(&file, &toml).unwrap();
            let output = setup.config(file.to_str().unwrap()).run(&["check"]).await;
            assert!(output.status.success(), "{page}: {}\n{toml}", said(&output));
            tried += 1;
        }
    }
    assert!(tried >= 3, "{tried}");
}

#[tokio::test]
async fn the_first_five_minutes_from_a_terminal() {
    let perennial = Setup::new().start().await;
    let directory = TempDir::new().unwrap();
    std::os::unix::fs::symlink(perennial.setup.data_dir(), directory.path().join("perennial-data")).unwrap();
    let text = snippet(FIRST_NOTIFICATION, "sh", "curl -i http://127.0.0.1:8080/notify");
    let text = text.replace("http://127.0.0.1:8080", perennial.client().base());
    let output = shell(directory.path(), &text).await;
    let said = said(&output);
    assert!(said.contains("202 Accepted") && said.contains("location: /notifications/"), "{said}");
}

#[tokio::test]
async fn the_backends_example_is_accepted() {
    let perennial = Setup::new().start().await;
    let key = std::fs::read_to_string(perennial.setup.data_dir().join("api.key")).unwrap();
    let text = snippet(YOUR_OWN_SITE, "sh", "curl -i https://push.example.com/notify");
    let text = format!(
        "KEY={}\n{}",
        key.trim(),
        text.replace("https://push.example.com", perennial.client().base())
    );
    let output = shell(TempDir::new().unwrap().path(), &text).await;
    assert!(said(&output).contains("202 Accepted"), "{}", said(&output));
}

/// Serves a site with the page and the service worker of docs/your-own-site.md. Returns its origin.
async fn site(server: &str) -> (String, JoinSet<std::io::Result<()>>) {
    let page = snippet(YOUR_OWN_SITE, "js", "const server = ").replace("https://push.example.com", server);
    let logout = snippet(YOUR_OWN_SITE, "js", "user: null");
    // The snippet leaves this out: the script runs in a module, and reports in the title when it is done.
    let script = format!(
        "try {{\n{page}\nwindow.logout = async () => {{\n{}\n}};\ndocument.title = 'subscribed';\n}} catch (error) {{ document.title = `failed: ${{error}}`; }}",
        logout.replace("const subscription", "const mine").replace("subscription,", "subscription: mine,")
    );
    let page = format!(
        "<!doctype html><title>subscribing</title><p id=state>site</p><script type=module>{script}</script>"
    );
    let worker = snippet(YOUR_OWN_SITE, "js", "self.addEventListener(\"push\"");
    support::site::serve(page, worker).await
}

async fn shown(firefox: &Firefox) -> Vec<Value> {
    let list = "navigator.serviceWorker.ready.then((worker) => worker.getNotifications())
        .then((shown) => JSON.stringify(shown.map(({ title, body, data }) => ({ title, body, data }))))";
    serde_json::from_str(&firefox.evaluate(list).await).unwrap()
}

#[tokio::test]
async fn a_site_of_its_own_subscribes_shows_and_forgets() {
    if !firefox::is_installed().await {
        return;
    }
    let double = Double::start().await;
    // The site names the server, so the port must be known before the server starts.
    let port = support::free_port();
    let server = format!("http://127.0.0.1:{port}");
    let (origin, _serving) = site(&server).await;
    let perennial = Setup::listening_as_configured()
        .sending_to(&double)
        .set(&format!("server.listen=127.0.0.1:{port}"))
        .set("admin.listen=127.0.0.1:0")
        .set(&format!("sites.default.origins={origin}"))
        .start()
        .await;
    let firefox = Firefox::start(double.browsers()).await;
    // The push service of the browser may not have woken up yet.
    for attempt in 0..4 {
        firefox.open(&format!("{origin}/?{attempt}")).await;
        let title = eventually("the page has done its part", || async {
            let title = firefox.evaluate("document.title").await;
            (title != "subscribing").then_some(title)
        })
        .await;
        if title == "subscribed" {
            break;
        }
        assert!(attempt < 3, "{title}");
    }
    let stored = perennial.client().get("/subscriptions").await.json();
    assert_eq!(stored["subscriptions"][0]["metadata"]["name"], "Ada", "{stored}");

    // The notification of the backend's example is shown, with the URL that a click opens.
    let example = snippet(YOUR_OWN_SITE, "sh", "curl -i https://push.example.com/notify");
    let body = example.split_once("-d '").unwrap().1.rsplit_once('\'').unwrap().0;
    let mut request: Value = serde_json::from_str(body).unwrap();
    request["to"] = json!({ "all": true });
    let progress = perennial.notify_and_wait(&request).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 1 }));
    let first = eventually("it is shown", || async { shown(&firefox).await.into_iter().next() }).await;
    assert_eq!((&first["title"], &first["body"]), (&json!("Hello Ada"), &json!("Fresh today")), "{first}");
    assert_eq!(first["data"]["url"], "https://www.example.com/news", "{first}");
    let declared = json!({ "to": {"all": true}, "declarative": true, "notification": { "title": "Declared", "url": "https://www.example.com/d" } });
    perennial.notify_and_wait(&declared).await;
    let declared = eventually("it is shown", || async {
        shown(&firefox).await.into_iter().find(|shown| shown["title"] == "Declared")
    })
    .await;
    assert_eq!(declared["data"]["url"], "https://www.example.com/d");

    // The snippet for the logout detaches the user.
    let subscription = "navigator.serviceWorker.ready.then((worker) => worker.pushManager.getSubscription()).then((mine) => JSON.stringify(mine))";
    let subscription: Value = serde_json::from_str(&firefox.evaluate(subscription).await).unwrap();
    let owned = json!({ "subscription": subscription, "user": "ada" });
    assert_eq!(perennial.client().post("/subscriptions", &owned).await.status, 200);
    firefox.evaluate("window.logout().then(() => 'done')").await;
    let after = perennial.client().get("/subscriptions").await.json();
    assert_eq!(after["subscriptions"][0]["user"], Value::Null, "{after}");
}

/// The only job that another program has enqueued.
async fn enqueued(perennial: &Perennial) -> Value {
    let jobs = perennial.admin().get("/jobs?kind=mail.send").await.json();
    assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(1), "{jobs}");
    jobs["jobs"][0].clone()
}

#[tokio::test]
async fn other_programs_enqueue_with_their_own_sqlite() {
    let statement = snippet(JOBS, "sql", "INSERT INTO jobs");
    for program in ["sqlite3", "python3"] {
        let perennial = Setup::new().start().await;
        let file = perennial.setup.data_dir().join("perennial.db");
        let mut command = Command::new(program);
        if program == "sqlite3" {
            command.arg(&file).arg(&statement);
        } else {
            let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(sys.argv[2]); db.commit()";
            command
                .args(["-c", script])
                .arg(&file)
                .arg(statement.split("--").next().unwrap().trim().trim_end_matches(';'));
        }
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{program}: {}", said(&output));
        let job = enqueued(&perennial).await;
        let made: jiff::Timestamp = job["created_at"].as_str().unwrap().parse().unwrap();
        let age = jiff::Timestamp::now().duration_since(made);
        assert!(age.as_secs().abs() < 60, "{program}: by its own clock, to the millisecond: {job}");
        // An old library cannot read a schema that uses these words.
        let schema = rusqlite::Connection::open(&file).unwrap();
        let strict: i64 = schema
            .query_row(
                "SELECT count(*) FROM sqlite_schema WHERE sql LIKE '%STRICT%' OR sql LIKE '%subsec%'",
                [],
                |row| row.get(0),
            )
            .unwrap();
        assert_eq!(strict, 0, "SQLite 3.31 knows neither");
    }
}

#[tokio::test]
async fn other_programs_enqueue_into_redis() {
    let prefix = Prefix::new().await;
    let perennial = support::stores::with_redis(Setup::new(), &prefix).start().await;
    let socket = prefix.url().trim_start_matches("redis+unix://").split('?').next().unwrap();
    let text = snippet(JOBS, "sh", "redis-cli XADD");
    let text = text
        .replace("redis-cli", &format!("redis-cli -s {socket}"))
        .replace("perennial:", &format!("{}:", prefix.name()));
    let output = shell(TempDir::new().unwrap().path(), &text).await;
    assert!(output.status.success(), "{}", said(&output));
    eventually("it is taken in", || async {
        let jobs = perennial.admin().get("/jobs?kind=mail.send").await.json();
        (jobs["jobs"].as_array()?.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_user_token_of_php_names_a_user() {
    if Command::new("php").arg("--version").output().await.is_err() {
        eprintln!("not run: php is not installed");
        return;
    }
    let double = Double::start().await;
    let setup = Setup::new().sending_to(&double);
    let file = setup.file("user.secret");
    std::fs::write(&file, "a secret of the backend").unwrap();
    let perennial = setup.set(&format!("sites.default.user_secret_file={}", file.display())).start().await;
    let snippet = snippet(YOUR_OWN_SITE, "php", "hash_hmac");
    let script = format!("$secret = 'a secret of the backend'; $user = 'ann';\n{snippet}\necho $token;");
    let output = Command::new("php").args(["-r", &script]).output().await.unwrap();
    let token = String::from_utf8(output.stdout).unwrap();
    let request = json!({ "subscription": double.mint(), "user": "ann", "user_token": token.trim() });
    assert_eq!(
        perennial.client().without_key().post("/subscriptions", &request).await.status,
        201,
        "{token}"
    );
}

/// Copies fixtures to the file names of the page's commands, in the formats that the senders write.
fn as_moved_in(directory: &Path) {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for (from, to) in [
        ("keys/openssl-ecparam-genkey.pem", "private_key.pem"),
        ("keys/laravel.env", ".env"),
        ("keys/web-push-cli.json", "keys.json"),
        ("dumps/web-push-php.jsonl", "subscriptions.jsonl"),
        ("dumps/laravel.batch.tsv", "push_subscriptions.tsv"),
        ("dumps/django-webpush.dumpdata.json", "webpush.json"),
        ("dumps/django-push-notifications.dumpdata.json", "devices.json"),
        ("dumps/onesignal.csv", "users.csv"),
        ("dumps/django-webpush.joined.csv", "subscriptions.csv"),
    ] {
        std::fs::copy(fixtures.join(from), directory.join(to)).unwrap();
    }
}

#[tokio::test]
async fn every_recipe_for_moving_in_is_followed() {
    let mut tried = 0;
    for (language, text) in snippets(MOVING_IN) {
        // Commands of other senders' programs are not tried here, nor is one with a placeholder.
        let is_ours =
            |line: &&str| line.contains("perennial ") && !line.contains("SENDER") && !line.contains("npx");
        let commands: Vec<&str> = text.lines().filter(is_ours).collect();
        if language != "sh" || commands.is_empty() {
            continue;
        }
        let directory = TempDir::new().unwrap();
        as_moved_in(directory.path());
        for command in commands {
            let output = shell(directory.path(), &format!("{command}\n")).await;
            let said = said(&output);
            // The dumps have bad lines, which the exit code reports.
            let is_import = command.contains("subscriptions import");
            assert!(output.status.success() || (is_import && said.contains(" refused")), "{command}: {said}");
            assert!(!is_import || said.contains("\"created\":"), "{command}: {said}");
            tried += 1;
        }
    }
    assert!(tried >= 10, "{tried}");
}
