//! `perennial new`: the project of an application is made, and in CI and with `--full` it is built and tested by its own
//! tests.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use support::process::Setup;
use tempfile::TempDir;
use tokio::process::Command;

/// Time limit for a build. Dependencies are built already, unless a feature of theirs differs.
const BUILD: Duration = Duration::from_secs(1500);

const TUTORIAL: &str = include_str!("../../docs/tutorial.md");

/// Root of this repository.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn words(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs cargo in a project, with the target directory and the locked versions of this repository.
async fn cargo(project: &Path, arguments: &[&str]) -> Output {
    let tests = std::env::current_exe().unwrap();
    let target = tests.ancestors().nth(3).unwrap();
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(arguments)
        .current_dir(project)
        .env("CARGO_TARGET_DIR", target)
        .env_remove("PERENNIAL_TEST_POSTGRES")
        .kill_on_drop(true);
    tokio::time::timeout(BUILD, cargo.output()).await.unwrap().unwrap()
}

/// Makes a project with web push, which has the locked versions of this repository.
async fn project(directory: &Path, name: &str) -> PathBuf {
    let project = directory.join(name);
    let source = repository().join("app");
    let made = Setup::new()
        .run(&["new", project.to_str().unwrap(), "--with", "push", "--perennial", source.to_str().unwrap()])
        .await;
    assert!(made.status.success(), "{}", words(&made));
    std::fs::copy(repository().join("Cargo.lock"), project.join("Cargo.lock")).unwrap();
    project
}

/// Checks that a project is formatted and, in CI and with `--full`, that it passes its own tests.
async fn passes(project: &Path, tests: &str) {
    let formatted = cargo(project, &["fmt", "--check"]).await;
    assert!(formatted.status.success(), "{}", words(&formatted));
    // The build takes minutes: dependencies have other features than in this repository.
    let is_built = support::full() || std::env::var("CI").is_ok_and(|ci| ci == "true");
    if !is_built {
        return;
    }
    let tested = cargo(project, &["test", "--quiet"]).await;
    assert!(tested.status.success(), "{}", words(&tested));
    assert!(words(&tested).contains(tests), "{}", words(&tested));
}

#[tokio::test]
async fn a_new_project_builds_and_passes_its_own_tests() {
    let directory = TempDir::new().unwrap();
    let project = project(directory.path(), "guest-book").await;
    passes(&project, "3 passed").await;
}

#[tokio::test]
async fn the_steps_of_the_tutorial_can_be_followed() {
    let directory = TempDir::new().unwrap();
    let project = project(directory.path(), "guestbook").await;
    let diffs: Vec<&str> =
        TUTORIAL.split("```diff\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0)).collect();
    assert_eq!(diffs.len(), 4);
    for diff in diffs {
        let file = directory.path().join("step.diff");
        std::fs::write(&file, diff).unwrap();
        let applied =
            Command::new("git").arg("apply").arg(&file).current_dir(&project).output().await.unwrap();
        assert!(applied.status.success(), "{}\n{diff}", words(&applied));
    }
    passes(&project, "4 passed").await;
}

#[tokio::test]
async fn a_new_project_replaces_nothing_and_has_a_name_that_cargo_takes() {
    let directory = TempDir::new().unwrap();
    let make = async |name: &str, more: &[&str]| {
        let path = directory.path().join(name);
        let source = repository().join("app");
        let arguments = ["new", path.to_str().unwrap(), "--perennial", source.to_str().unwrap()];
        Setup::new().run(&[&arguments, more].concat()).await
    };
    assert!(make("shop", &[]).await.status.success());
    let text = |file: &str| std::fs::read_to_string(directory.path().join("shop").join(file)).unwrap();
    let all = ["Cargo.toml", "src/lib.rs", "src/notes.rs", "tests/program.rs", "Dockerfile", "k8s/shop.yaml"];
    for file in all {
        let text = text(file);
        assert!(!text.contains("{{name") && !text.contains("#[push]"), "{file}: {text}");
    }
    assert!(!text("src/notes.rs").contains("Push"));
    let again = make("shop", &[]).await;
    assert!(!again.status.success() && words(&again).contains("exists already"), "{}", words(&again));
    for wrong in ["Shop", "1shop", "a b", "perennial"] {
        let refused = make(wrong, &[]).await;
        assert!(!refused.status.success(), "{wrong}");
        assert!(!directory.path().join(wrong).exists());
    }
}
