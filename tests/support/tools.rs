//! External tools that check our output. `tests/run` installs them below `target/tools`.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use tokio::process::Command;

/// Maximum time for one run of a tool.
const PATIENCE: Duration = Duration::from_secs(600);

/// Directory of the tools.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools")
}

/// Path of a tool of the Python environment, of Node's, or of the system. Returns `None` where the tool is not
/// installed, which in CI is a failure.
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
        // The network is not part of a test: the tool neither reports its use nor looks for newer versions of itself.
        .env("REDOCLY_TELEMETRY", "off")
        .env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap_or_else(|_| panic!("{} hangs", tool.display()))
        .unwrap()
}

/// Runs a tool that must succeed, and returns its output.
pub async fn must_pass(tool: &Path, arguments: &[&str], directory: &Path) -> String {
    let output = run(tool, arguments, directory).await;
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{} {arguments:?}: {said}", tool.display());
    said
}
