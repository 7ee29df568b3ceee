//! Settings for the stores that several processes share.

use crate::process::Setup;
use crate::redis::Prefix;

/// Stores everything in the Postgres database at `url`. Makes the keys first.
pub async fn on_postgres(setup: Setup, url: &str) -> Setup {
    let setup = setup.set(&format!("store.url={url}"));
    let made = setup.run(&["keys", "generate"]).await;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    setup
}

/// Stores the jobs in Redis, under a prefix of its own.
pub fn with_redis(setup: Setup, prefix: &Prefix) -> Setup {
    setup.set(&format!("queue.url={}", prefix.url())).set(&format!("queue.prefix={}", prefix.name()))
}
