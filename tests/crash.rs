//! kill -9: everybody is reached, repeats stay within the checkpoint's bound, and the sums are right.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::support::double::Double;
use crate::support::eventually;
use crate::support::process::Setup;

/// Whether the long versions are wanted.
fn full() -> bool {
    std::env::var_os("PERENNIAL_FULL").is_some()
}

#[tokio::test]
async fn a_kill_in_the_middle_of_a_broadcast_loses_nobody() {
    let (audience, kills) = if full() { (50_000, 10) } else { (5_000, 2) };
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).set("push.checkpoint.every=200ms").start().await;
    fill(&perennial.setup.data_dir().join("perennial.db"), &double, audience);

    let mut perennial = perennial;
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    for kill in 1..=kills {
        let until = audience * kill / (kills + 1);
        eventually("some were sent", || async { (double.taken().len() >= until).then_some(()) }).await;
        perennial = perennial.kill_and_start_again().await;
    }
    let progress = perennial.done_within(&id, Duration::from_secs(600)).await;
    let (reached, repeats) = double.reached_and_repeats();
    println!("{audience} subscribers, {kills} kills: {reached} reached, {repeats} repeats");
    assert_eq!(reached, audience, "everybody got it");
    // push.batches batches were in flight at each kill, each with at most push.checkpoint.sends not recorded.
    assert!(repeats <= kills * 4 * 500, "{repeats} repeats");
    assert_eq!(progress["outcomes"], json!({ "delivered": audience }));
    assert_eq!(progress["audience"].as_u64(), Some(audience as u64));
    assert!(double.refused().is_empty(), "{:?}", double.refused());
}

#[tokio::test]
async fn an_accepted_notification_survives_a_kill_at_once() {
    let double = Double::start().await;
    let perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 3).await;
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    let perennial = perennial.kill_and_start_again().await;
    let progress = perennial.done(&id).await;
    assert_eq!(progress["outcomes"], json!({ "delivered": 3 }));
    assert_eq!(double.reached_and_repeats().0, 3);
}

#[tokio::test]
async fn a_killed_process_leaves_no_lock_behind() {
    let mut perennial = Setup::new().start().await;
    for _ in 0..3 {
        perennial.signal(Signal::SIGKILL);
        perennial.ended().await;
        perennial = perennial.start_again().await;
    }
    assert_eq!(perennial.stop().await, Some(0));
}

/// Stores many subscriptions at once, as an import would.
fn fill(store: &std::path::Path, double: &Double, count: usize) {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let mut store = rusqlite::Connection::open(store).unwrap();
    store.busy_timeout(Duration::from_secs(10)).unwrap();
    let tx = store.transaction().unwrap();
    let sql = "INSERT INTO subscriptions (site, vapid_key, endpoint, endpoint_hash, p256dh, auth, created_at, updated_at)
               VALUES (1, (SELECT min(id) FROM vapid_keys), ?, ?, ?, ?, 0, 0)";
    {
        let mut insert = tx.prepare(sql).unwrap();
        for _ in 0..count {
            let subscription = double.mint();
            let endpoint = subscription["endpoint"].as_str().unwrap();
            let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, endpoint.as_bytes());
            let key =
                |name: &str| URL_SAFE_NO_PAD.decode(subscription["keys"][name].as_str().unwrap()).unwrap();
            insert.execute((endpoint, &hash.as_ref()[..16], key("p256dh"), key("auth"))).unwrap();
        }
    }
    tx.commit().unwrap();
}
