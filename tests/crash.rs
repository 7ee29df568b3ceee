//! kill -9: everybody is reached, repeats stay within the checkpoint's bound, and the sums are right.

use std::time::Duration;

use nix::sys::signal::Signal;
use perennial::sink::Answer;
use serde_json::json;

use support::double::Double;
use support::eventually;
use support::process::Setup;

#[tokio::test]
async fn a_kill_in_the_middle_of_a_broadcast_loses_nobody() {
    let (audience, kills) = if support::full() { (50_000, 10) } else { (5_000, 2) };
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).set("push.checkpoint.sends=50").start().await;
    perennial.fill((0..audience).map(|_| double.mint()));
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
    assert!(repeats <= kills * 4 * 50, "{repeats} repeats");
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

#[tokio::test]
async fn a_notification_that_kills_its_process_every_time_ends_some_time() {
    let double = Double::start().await;
    let mut perennial = Setup::new().sending_to(&double).start().await;
    perennial.subscribe(&double, 2).await;
    double.script(|_| Answer::Stall);
    let id = perennial.notify(&json!({ "to": {"all": true}, "notification": {"title": "Hello"} })).await;
    let (mut kills, mut asked) = (0, 0);
    let progress = loop {
        let ended = eventually("it is sent again, or given up", || async {
            let progress = perennial.client().get(&format!("/notifications/{id}")).await.json();
            let done = progress["state"] == "done";
            (done || double.asked() > asked).then_some(done.then_some(progress))
        })
        .await;
        if let Some(progress) = ended {
            break progress;
        }
        kills += 1;
        assert!(kills < 100, "it goes on for ever");
        asked = double.asked();
        perennial = perennial.kill_and_start_again().await;
    };
    assert_eq!(progress["outcomes"], json!({ "failed": 2 }));
    assert!(kills > 10, "a crash may be somebody else's: {kills}");
}
