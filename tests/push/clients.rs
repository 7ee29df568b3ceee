//! The clients in clients/ against the program: each runs its own test and its example, and a page of another origin
//! subscribes a real browser with the script of the server.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::task::JoinSet;

use support::double::Double;
use support::firefox::{self, Firefox};
use support::process::{Perennial, Setup};
use support::{eventually, soon};

const README: &str = include_str!("../../clients/README.md");
const SECRET: &str = "a secret of the backend";

/// A language with a client: its program, the directory of the client, the test there, the name that snippets have, and
/// the arguments that make the program read a script from its standard input.
struct Language {
    program: &'static str,
    directory: &'static str,
    test: &'static str,
    snippet: &'static str,
    from_input: &'static [&'static str],
}

const LANGUAGES: [Language; 3] = [
    Language { program: "php", directory: "php", test: "test.php", snippet: "php", from_input: &[] },
    Language {
        program: "python3",
        directory: "python",
        test: "test_client.py",
        snippet: "python",
        from_input: &["-"],
    },
    Language {
        program: "node",
        directory: "js",
        test: "test.mjs",
        snippet: "js",
        from_input: &["--input-type=module", "-"],
    },
];

impl Language {
    /// Returns true when the program is installed. Where it must be (`CI=true`), its absence is a failure.
    async fn is_installed(&self) -> bool {
        let version = Command::new(self.program).arg("--version").output().await;
        let installed = version.is_ok_and(|output| output.status.success());
        let must = std::env::var_os("CI").is_some_and(|ci| ci == "true");
        assert!(installed || !must, "{} is not installed: tests/run installs it", self.program);
        if !installed {
            eprintln!("not run: {} is not installed", self.program);
        }
        installed
    }

    fn directory(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients").join(self.directory)
    }

    /// The program, in the directory of the client and with the environment that its test describes.
    fn command(&self, perennial: &Perennial, double: &Double) -> Command {
        let key = std::fs::read_to_string(perennial.setup.data_dir().join("api.key")).unwrap();
        let mut command = Command::new(self.program);
        command
            .current_dir(self.directory())
            .env("PERENNIAL_URL", perennial.client().base())
            .env("PERENNIAL_KEY", key.trim())
            .env("PERENNIAL_ENDPOINT", format!("{}/wpush/v2/", double.origin()))
            .env("PERENNIAL_SUBSCRIPTION", double.mint().to_string())
            .env("PERENNIAL_USER_SECRET", SECRET)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .kill_on_drop(true);
        command
    }

    /// The example of the README, for the server at `base`.
    fn example(&self, base: &str) -> String {
        let fence = format!("```{}\n", self.snippet);
        let (_, text) = README.split_once(&fence).unwrap_or_else(|| panic!("no {} example", self.snippet));
        let (text, _) = text.split_once("```").unwrap();
        text.replace("https://push.example.com", base)
    }
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// A setup that accepts user tokens under [`SECRET`].
fn with_user_tokens(setup: Setup) -> Setup {
    let file = setup.file("user.secret");
    std::fs::write(&file, SECRET).unwrap();
    setup.set(&format!("sites.default.user_secret_file={}", file.display()))
}

#[tokio::test]
async fn each_client_passes_its_own_test_beside_the_others() {
    let double = Double::start().await;
    let perennial = with_user_tokens(Setup::new().sending_to(&double)).start().await;
    let tests = LANGUAGES.iter().map(async |language| {
        if !language.is_installed().await {
            return;
        }
        let mut command = language.command(&perennial, &double);
        command.arg(language.test).stdin(Stdio::null());
        let output = soon(language.test, command.output()).await.unwrap();
        assert!(output.status.success(), "{}: {}", language.test, said(&output));
    });
    futures_util::future::join_all(tests).await;
    // The only messages that the push service refuses are those to subscriptions that it does not know.
    assert!(double.refused().iter().all(|refusal| refusal.status == 404), "{:?}", double.refused());
}

#[tokio::test]
async fn the_examples_run_as_they_are_written() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    let request = json!({ "subscription": double.mint(), "tags": ["news"], "metadata": { "name": "Ada" } });
    assert_eq!(perennial.client().post("/subscriptions", &request).await.status, 201);
    for language in &LANGUAGES {
        if !language.is_installed().await {
            continue;
        }
        let mut command = language.command(&perennial, &double);
        command.args(language.from_input).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(language.example(perennial.client().base()).as_bytes()).await.unwrap();
        drop(input);
        let output = soon(language.program, child.wait_with_output()).await.unwrap();
        let said = said(&output);
        assert!(output.status.success() && said.contains("delivered"), "{}: {said}", language.program);
    }
    // All examples have the same idempotency key and send the same.
    let texts: Vec<String> = double.taken().into_iter().map(|taken| taken.text).collect();
    assert_eq!(texts.len(), 1, "{texts:?}");
    assert!(texts[0].contains("Hello Ada"), "{texts:?}");
}

/// Serves a page that has nothing but the script of the server, and the service worker of the README. Returns its
/// origin.
async fn site(server: &str) -> (String, JoinSet<std::io::Result<()>>) {
    let page = format!("<!doctype html><title>site</title><script src=\"{server}/perennial.js\"></script>");
    let (_, worker) = README.split_once("```js\nimportScripts").unwrap();
    let (worker, _) = worker.split_once("```").unwrap();
    let worker = format!("importScripts{worker}").replace("https://push.example.com", server);
    support::site::serve(page, worker).await
}

fn user_token(user: &str) -> String {
    let expires = jiff::Timestamp::now().as_second() + 3600;
    let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET.as_bytes());
    let signature = hmac::sign(&key, format!("v1.default.{expires}.{user}").as_bytes());
    format!("v1.{expires}.{}", URL_SAFE_NO_PAD.encode(signature))
}

async fn stored(perennial: &Perennial) -> Vec<Value> {
    perennial.client().get("/subscriptions").await.json()["subscriptions"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_page_of_another_origin_needs_one_script() {
    if !firefox::is_installed().await {
        return;
    }
    let double = Double::start().await;
    // The page names the server, so the port must be known before the server starts.
    let port = support::free_port();
    let server = format!("http://127.0.0.1:{port}");
    let (origin, _serving) = site(&server).await;
    let perennial = with_user_tokens(Setup::listening_as_configured().sending_to(&double))
        .set(&format!("server.listen=127.0.0.1:{port}"))
        .set(&format!("sites.default.origins={origin}"))
        .start()
        .await;
    let firefox = Firefox::start(double.browsers()).await;
    firefox.open(&origin).await;
    let run = async |call: &str| firefox.evaluate(&format!("perennial.{call}.then(String, String)")).await;

    assert_eq!(run("renew()").await, "null", "a browser that was never subscribed is not asked");
    // The push service of the browser may not have woken up yet.
    let id = eventually("it subscribes", || async {
        run("subscribe({ metadata: { name: 'Ada' } })").await.parse::<i64>().ok()
    })
    .await;
    let before = stored(&perennial).await;
    assert_eq!(
        (before.len(), &before[0]["id"], &before[0]["metadata"]["name"]),
        (1, &json!(id), &json!("Ada"))
    );

    let token = user_token("ann");
    assert_eq!(run(&format!("login('ann', '{token}')")).await, id.to_string());
    assert_eq!(stored(&perennial).await[0]["user"], "ann");
    let refused = run(&format!("login('bob', '{token}')")).await;
    assert!(refused.contains("does not fit this user"), "{refused}");
    assert_eq!(run("renew()").await, id.to_string());
    assert_eq!(stored(&perennial).await[0]["user"], "ann");
    assert_eq!(run("logout()").await, id.to_string());
    assert_eq!(stored(&perennial).await[0]["user"], Value::Null);

    // The push service forgets the browser: the service worker finds the server again, and the id stays.
    double.disconnect_browsers();
    let after = eventually("the service worker has told of its new subscription", || async {
        let now = stored(&perennial).await;
        (now.len() == 1 && now[0]["endpoint"] != before[0]["endpoint"]).then(|| now[0].clone())
    })
    .await;
    assert_eq!(after["id"], json!(id));

    run("unsubscribe()").await;
    assert_eq!(stored(&perennial).await.len(), 0);
    assert_eq!(run("renew()").await, "null");
}
