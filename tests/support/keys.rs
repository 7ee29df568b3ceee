//! API keys.

use crate::process::Setup;

/// Creates an API key with the command, and returns it.
pub async fn add_key(setup: &Setup, name: &str, arguments: &[&str]) -> String {
    let output = setup.run(&[&["keys", "add", name], arguments].concat()).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
