//! Tools of others that judge what we make, as `tests/run` installs them below `target/tools`.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use tokio::process::Command;

/// How long one of them may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where they are.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")
}

/// A tool of the Python environment, or of Node's; none where they are not installed, which in CI is a failure.
pub fn tool(name: &str) -> Option<PathBuf> {
    let places =
        [directory().join("python/bin"), directory().join("node/node_modules/.bin"), "/usr/bin".into()];
    let found = places.into_iter().map(|place| place.join(name)).find(|tool| tool.exists());
    let must = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(found.is_some() || !must, "{name} is not installed: tests/run installs it");
    if found.is_none() {
        eprintln!("not run: {name} is not installed");
    }
    found
}

/// Runs a tool in a directory.
pub async fn run(tool: &Path, arguments: &[&str], directory: &Path) -> Output {
    let path = format!(
        "{}:{}",
        self::directory().join("python/bin").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let running = Command::new(tool)
        .args(arguments)
        .current_dir(directory)
        .env("PATH", path)
        // It neither reports its use nor looks for newer versions of itself: the network is not part of a test.
        .env("REDOCLY_TELEMETRY", "off")
        .env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap_or_else(|_| panic!("{} hangs", tool.display()))
        .unwrap()
}

/// Runs a tool that has to be content.
pub async fn must_pass(tool: &Path, arguments: &[&str], directory: &Path) -> String {
    let output = run(tool, arguments, directory).await;
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{} {arguments:?}: {said}", tool.display());
    said
}
