//! Settings for the stores that processes share.

use crate::process::Setup;
use crate::redis::Prefix;

/// On Postgres, after its keys have been made.
pub async fn on_postgres(setup: Setup, url: &str) -> Setup {
    let setup = setup.set(&format!("store.url={url}"));
    let made = setup.run(&["keys", "generate"]).await;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    setup
}

/// With jobs in Redis, under a prefix of its own.
pub fn with_redis(setup: Setup, prefix: &Prefix) -> Setup {
    setup.set(&format!("queue.url={}", prefix.url())).set(&format!("queue.prefix={}", prefix.name()))
}
