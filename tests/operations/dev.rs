//! `perennial dev`: a project is built and run anew whenever its files change. The package that the test builds has no
//! dependencies: its program answers as the environment says that `perennial dev` gives it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use support::process::binary;
use support::{eventually, free_port, soon};

/// A program that serves on the inherited socket: it answers with a word, and the number of its build.
const PROGRAM: &str = r#"
use std::io::{Read, Write};
use std::os::fd::FromRawFd;

fn main() {
    assert_eq!(std::env::var("LISTEN_FDS").unwrap(), "1");
    let number = std::env::var("PERENNIAL_DEV_BUILD").unwrap();
    let listener = unsafe { std::net::TcpListener::from_raw_fd(3) };
    // All who have the socket share this.
    listener.set_nonblocking(false).unwrap();
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let body = format!("WORD {number}");
        let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
    }
}
"#;

const MANIFEST: &str = "[package]\nname = \"word\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n[workspace]\n";

/// A running `perennial dev`.
struct DevProcess {
    child: Child,
    base: String,
}

impl DevProcess {
    fn start(project: &Path) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let child = Command::new(binary())
            .args(["dev", "--listen", &listen])
            .current_dir(project)
            .env("CARGO", env!("CARGO"))
            .env("CARGO_TARGET_DIR", project.join("target"))
            .env_remove("RUSTFLAGS")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { child, base: format!("http://{listen}") }
    }

    /// The status and the body of an answer; `None` when the connection is refused.
    async fn get(&self, path: &str) -> Option<(u16, String)> {
        let url = format!("{}{path}", self.base);
        let output = Command::new("curl").args(["-sm20", "-w", "%{http_code}", &url]).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.split_at(text.len().checked_sub(3)?);
        Some((status.parse().ok()?, body.to_owned())).filter(|(status, _)| *status > 0)
    }

    async fn says(&self, wanted: &str) {
        eventually(wanted, || async {
            let (_, body) = self.get("/").await?;
            body.contains(wanted).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_is_built_and_runs_without_a_refused_connection() {
    let directory = TempDir::new().unwrap();
    let project = directory.path();
    std::fs::create_dir(project.join("src")).unwrap();
    std::fs::write(project.join("Cargo.toml"), MANIFEST).unwrap();
    let write =
        |word: &str| std::fs::write(project.join("src/main.rs"), PROGRAM.replace("WORD", word)).unwrap();
    std::fs::write(project.join("src/main.rs"), "fn main() { no_such_thing }").unwrap();

    let mut dev = DevProcess::start(project);
    eventually("the address answers", || dev.get("/")).await;
    dev.says("no_such_thing").await;
    let (status, page) = dev.get("/").await.unwrap();
    assert_eq!(status, 503, "{page}");
    assert!(page.contains("/_dev/reload.js") && !page.contains('\u{1b}'), "{page}");
    assert!(dev.get("/_dev/reload.js").await.unwrap().1.contains("EventSource"));

    write("first");
    dev.says("first 1").await;
    write("second");
    // From the edit to the new program, every request is answered.
    let (mut refused, mut answers) = (0, 0);
    soon("the second program", async {
        loop {
            match dev.get("/").await {
                Some((200, body)) if body == "second 2" => break,
                Some((200, _)) => answers += 1,
                _ => refused += 1,
            }
        }
    })
    .await;
    assert_eq!(refused, 0, "{answers} were answered");

    std::fs::write(project.join("src/main.rs"), "fn main() { another_mistake }").unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(dev.get("/").await.unwrap().1, "second 2", "the last build goes on");
    write("third");
    dev.says("third 3").await;

    kill(Pid::from_raw(dev.child.id().unwrap().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert!(soon("the end", dev.child.wait()).await.unwrap().success());
    assert_eq!(dev.get("/").await, None, "nothing serves any more");
}

#[tokio::test]
async fn a_directory_without_a_project_is_refused() {
    let directory = TempDir::new().unwrap();
    let output = Command::new(binary()).arg("dev").current_dir(directory.path()).output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("has no Cargo.toml"), "{text}");
}
